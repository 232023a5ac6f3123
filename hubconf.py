"""Entry points for `torch.hub`: an encoder as a PyTorch module, from a clone alone.

    torch.hub.load("PATH/TO/CLONE", "resnet18_histo", weights="encoder.pth", source="local")

Needs torch, numpy and safetensors; nothing has to be installed from the clone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

dependencies = ["torch", "numpy", "safetensors"]

# Before what is installed, so that the clone that was asked for is the one that runs.
sys.path.insert(0, str(Path(__file__).resolve().parent / "export"))


def resnet18_histo(weights: str, bare: bool = False) -> nn.Module:
    """A ResNet18 encoder, in eval mode on the CPU: see `_load`."""
    return _load("resnet18", weights, bare)


def resnet34_histo(weights: str, bare: bool = False) -> nn.Module:
    """A ResNet34 encoder, in eval mode on the CPU: see `_load`."""
    return _load("resnet34", weights, bare)


def resnet50_histo(weights: str, bare: bool = False) -> nn.Module:
    """A ResNet50 encoder, in eval mode on the CPU: see `_load`."""
    return _load("resnet50", weights, bare)


def resnet101_histo(weights: str, bare: bool = False) -> nn.Module:
    """A ResNet101 encoder, in eval mode on the CPU: see `_load`."""
    return _load("resnet101", weights, bare)


def _load(architecture: str, weights: str, bare: bool) -> nn.Module:
    """Loads a file of this project, strictly.

    Args:
      architecture: that the file must hold.
      weights: an exported file or an encoder.safetensors.
      bare: the ResNet alone under torchvision's names, its `fc` an Identity, instead of the
        encoder that also has `features` ((n, H, W, 3) uint8 RGB tiles -> (n, d)),
        `preprocess`, `mean`, `std` and `provenance`.

    Returns:
      A module (n, 3, H, W) normalised -> (n, d).

    Raises:
      ExportFileError: not such a file, or one of another depth.
    """
    from jaxhisto_export import ExportFileError, load_encoder

    encoder = load_encoder(weights)
    found = encoder.provenance["arch"]
    if found != architecture:
        raise ExportFileError(f"{weights}: is a {found}, not a {architecture}, use {found}_histo.")
    return encoder.resnet if bare else encoder
