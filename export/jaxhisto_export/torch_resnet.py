"""A torch module of an exported file, with its own preprocessing.

The network is torchvision's where torchvision is installed; else the one below, which has
the same names and the same arithmetic.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jaxhisto_export.architecture import Architecture
from jaxhisto_export.errors import ExportFileError
from jaxhisto_export.provenance import ENCODER_FIELDS, Provenance, problems
from jaxhisto_export.weights_file import UNETS, one_sentence, read_weights, tensor_problems


class Block(nn.Module):
    """A residual block: two 3x3 convolutions, or 1x1, 3x3 (which strides), 1x1."""

    def __init__(self, incoming: int, inner: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        outgoing = inner * 4 if bottleneck else inner
        sides = (1, 3, 1) if bottleneck else (3, 3)
        self.convolutions = len(sides)
        strided = 2 if bottleneck else 1  # torchvision strides in the 3x3, "ResNet v1.5"
        width = incoming
        for number, side in enumerate(sides, start=1):
            last = number == len(sides)
            convolution = nn.Conv2d(
                width,
                outgoing if last else inner,
                side,
                stride=stride if number == strided else 1,
                padding=side // 2,
                bias=False,
            )
            width = convolution.out_channels
            self.add_module(f"conv{number}", convolution)
            self.add_module(f"bn{number}", nn.BatchNorm2d(width))
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or incoming != outgoing:
            shortcut = nn.Conv2d(incoming, outgoing, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outgoing))

    def forward(self, x: Tensor) -> Tensor:
        """(n, incoming, h, w) -> (n, outgoing, h / stride, w / stride)."""
        y = x
        for number in range(1, self.convolutions + 1):
            y = self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(y))
            if number < self.convolutions:
                y = F.relu(y)
        return F.relu(y + self.downsample(x))


class PlainResNet(nn.Module):
    """ResNet with torchvision's names, without `fc`, for machines without torchvision."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        incoming = 64
        for stage, count in enumerate(architecture.blocks):
            inner = 64 << stage
            blocks = []
            for number in range(count):
                stride = 2 if stage > 0 and number == 0 else 1
                blocks.append(Block(incoming, inner, stride, architecture.bottleneck))
                incoming = inner * architecture.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, H, W) normalised -> (n, d) features."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
        return torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)


def empty_resnet(architecture: Architecture) -> tuple[nn.Module, str]:
    """A ResNet with `fc` an Identity, and which one it is: `torchvision 0.29.2` or ours.

    Its weights are whatever was in memory: nobody waits for an initialisation that a strict
    load overwrites.
    """
    with torch.device("meta"):
        network, which = _stock_or_plain(architecture)
    return network.to_empty(device="cpu"), which


def _stock_or_plain(architecture: Architecture) -> tuple[nn.Module, str]:
    try:
        import torchvision
        from torchvision.models import resnet
    except (ImportError, RuntimeError, OSError):  # absent, or built for another torch
        return PlainResNet(architecture), "this package's plain ResNet (no torchvision here)"
    block = resnet.Bottleneck if architecture.bottleneck else resnet.BasicBlock
    network: nn.Module = resnet.ResNet(block, list(architecture.blocks))
    network.fc = nn.Identity()
    return network, f"torchvision {torchvision.__version__}"


class Preprocessing(nn.Module):
    """How the network of a file wants to be fed.

    Attributes:
      provenance: everything that the file says about itself.
      mean, std: (3,) each, of the value range `provenance["value_range"]`.
    """

    NEEDS = ("mean", "std", "value_range", "channel_order")  # of the provenance

    mean: Tensor
    std: Tensor

    def __init__(self, provenance: Provenance) -> None:
        super().__init__()
        self.provenance = provenance
        self.register_buffer("mean", torch.tensor(provenance["mean"]), persistent=False)
        self.register_buffer("std", torch.tensor(provenance["std"]), persistent=False)

    def preprocess(self, tiles: Tensor) -> Tensor:
        """(n, H, W, 3) uint8 RGB -> (n, 3, H, W) float32 as the network wants it."""
        if tiles.dtype != torch.uint8 or tiles.ndim != 4 or tiles.shape[-1] != 3:
            raise ValueError(
                f"tiles are (n, height, width, 3) uint8 RGB, not {tiles.dtype} of shape "
                f"{tuple(tiles.shape)}."
            )
        if self.provenance["channel_order"] == "BGR":
            tiles = tiles.flip(-1)
        low, high = self.provenance["value_range"]
        scaled = tiles.to(self.mean.device).float() / 255 * (high - low) + low
        normalised: Tensor = (scaled - self.mean) / self.std
        return normalised.permute(0, 3, 1, 2).contiguous()


class Encoder(Preprocessing):
    """A ResNet without a head, and how it wants to be fed.

    Attributes:
      resnet: the network; (n, 3, H, W) normalised -> (n, d).
    """

    def __init__(self, resnet: nn.Module, provenance: Provenance) -> None:
        super().__init__(provenance)
        self.resnet = resnet

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, H, W) float32, already normalised -> (n, d) features."""
        features: Tensor = self.resnet(x)
        return features

    def features(self, tiles: Tensor) -> Tensor:
        """(n, H, W, 3) uint8 RGB -> (n, d) features: `preprocess`, then the network."""
        features: Tensor = self.resnet(self.preprocess(tiles))
        return features


def load_encoder(path: str | Path) -> Encoder:
    """Loads an exported file or an encoder.safetensors, strictly, in eval mode on the CPU.

    Args:
      path: a file or folder in any layout, or an encoder.safetensors.

    Raises:
      ExportFileError: not such a file, tensors missing, extra or of another shape, or no
        word in it on how it wants to be fed.
    """
    file = read_weights(Path(path))
    if file.layout in UNETS:
        raise ExportFileError(
            f"{path}: is a UNet, load it into segmentation_models_pytorch's Unet."
        )
    found = tensor_problems(file) + problems(file.provenance, ENCODER_FIELDS)
    if found:
        raise ExportFileError(
            f"{path}: not a file of this project ({one_sentence(found)}), see what "
            "`python -m jaxhisto_export verify` says of it."
        )
    resnet, _ = empty_resnet(file.architecture)
    resnet.load_state_dict(file.backbone(), strict=True)
    return Encoder(resnet, file.provenance).eval()
