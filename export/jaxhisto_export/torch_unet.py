"""The UNet of segmentation_models_pytorch with nothing in it yet, to load an exported one into."""

from __future__ import annotations

import torch
from torch import nn

from jaxhisto_export.architecture import Architecture

SMP_ENCODERS = ("resnet18", "resnet34", "resnet50", "resnet101")
"""Of our architectures, those that segmentation_models_pytorch has."""


def empty_unet(architecture: Architecture, classes: int) -> tuple[nn.Module | None, str]:
    """smp.Unet and its version: `segmentation_models_pytorch 0.6.0`; or none, and why.

    Its weights are whatever was in memory, see `torch_resnet.empty_resnet`.
    """
    if architecture.name not in SMP_ENCODERS:
        return None, f"segmentation_models_pytorch has no {architecture.name}"
    try:
        import segmentation_models_pytorch as smp
    except (ImportError, RuntimeError, OSError):  # absent, or built for another torch
        return None, (
            "segmentation_models_pytorch is not installed (pip install segmentation-models-pytorch)"
        )
    with torch.device("meta"):
        network: nn.Module = smp.Unet(architecture.name, encoder_weights=None, classes=classes)
    return network.to_empty(device="cpu"), f"segmentation_models_pytorch {smp.__version__}"
