"""Encoders of random weights whose features torchvision computed; no code of the project."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import resnet

from jaxhisto_export.layouts import convert

WIDTHS = {"resnet10": 512, "resnet18": 512, "resnet34": 512, "resnet50": 2048, "resnet101": 2048}


def torchvision_resnet(name: str) -> nn.Module:
    """The oracle: torchvision's own network, headless."""
    if name == "resnet10":
        network = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
    else:
        network = getattr(resnet, name)(weights=None)
    network.fc = nn.Identity()
    return network.eval()


def random_resnet(name: str, seed: int) -> nn.Module:
    """With running statistics and affine parameters away from their defaults."""
    torch.manual_seed(seed)
    network = torchvision_resnet(name)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.fill_(120)
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, 0.0, 0.1)
    return network


def features_of(network: nn.Module, tiles: np.ndarray) -> Tensor:
    """Tiles (n, S, S, 3) uint8, fed as the published weights want it: mean = std = 0.5."""
    x = torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        return network((x - 0.5) / 0.5)


def encoder_metadata(name: str, **changes: Any) -> dict[str, str]:
    """String metadata as a run writes it."""
    return {
        "format": "jaxhisto-encoder-1",
        "arch": name,
        "feature_width": str(WIDTHS[name]),
        "projection_width": "128",
        "mean": "[0.5, 0.5, 0.5]",
        "std": "[0.5, 0.5, 0.5]",
        "value_range": "[0.0, 1.0]",
        "channel_order": "RGB",
        "tile_px": "64",
        "mpp_range": "[0.25, 0.5]",
        "stains": '["H&E"]',
        "data_hash": "0" * 64,
        "step": "120",
        "config": json.dumps({"batch_size": 64, "data": {"stores": ["tiles"]}, "steps": 120}),
        "code_version": "0.1.0",
        "licence": "",
        **changes,
    }


@dataclass(frozen=True)
class Run:
    """What a run leaves for the export, and the truth about it."""

    encoder: Path
    golden: Path
    tensors: dict[str, Tensor]
    tiles: np.ndarray
    features: Tensor

    def export(self, layout: str, out: Path, fc: str = "none") -> Path:
        """The real conversion, golden tiles included."""
        convert(self.encoder, layout, out, golden=self.golden, fc=fc)
        return out


def make_run(folder: Path, name: str = "resnet18", seed: int = 0, **metadata: Any) -> Run:
    """Writes encoder.safetensors and golden.safetensors without any code of the project."""
    folder.mkdir(parents=True, exist_ok=True)
    network, width = random_resnet(name, seed), WIDTHS[name]
    head = nn.Sequential(nn.Flatten(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 128))
    tensors = {**network.state_dict(), **{f"fc.{k}": v for k, v in head.state_dict().items()}}
    encoder, golden = folder / "encoder.safetensors", folder / "golden.safetensors"
    save_file(tensors, encoder, encoder_metadata(name, **metadata))
    tiles = np.random.default_rng(seed).integers(0, 256, (8, 48, 48, 3), dtype=np.uint8)
    features = features_of(network, tiles)
    digest = hashlib.sha256(encoder.read_bytes()).hexdigest()
    stored = {"tiles": torch.from_numpy(tiles), "features": features.clone()}
    save_file(stored, golden, {"encoder_sha256": digest})
    return Run(encoder, golden, tensors, tiles, features)
