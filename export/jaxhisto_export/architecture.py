"""Names and shapes of torchvision's ResNets and smp's UNets, in the order of their state dicts.

Written from the architecture, so that neither torchvision, segmentation_models_pytorch (smp) nor
torch is needed; the tests compare with the packages themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Shapes = dict[str, tuple[int, ...]]

UNET_ENCODER = "encoder."  # of the encoder's keys in smp.Unet
UNET_HEAD = "segmentation_head.0.weight"
DECODER_WIDTHS = (256, 128, 64, 32, 16)  # of smp.Unet by default
COUNT_SUFFIX = ".num_batches_tracked"  # int64 scalars; everything else is float32


@dataclass(frozen=True)
class Architecture:
    """One depth of the family of He et al. 2015, with torchvision's strides."""

    name: str
    blocks: tuple[int, int, int, int]  # residual blocks a stage
    bottleneck: bool  # 1x1, 3x3, 1x1 (expansion 4) instead of two 3x3

    @property
    def expansion(self) -> int:
        """Output channels of a block over its inner width."""
        return 4 if self.bottleneck else 1

    @property
    def feature_width(self) -> int:
        """Channels before the head: 512 or 2048."""
        return 512 * self.expansion

    def backbone(self) -> Shapes:
        """Convolutions and BatchNorms, without `fc`: 120, 216, 318 or 624 tensors."""
        shapes: Shapes = {"conv1.weight": (64, 3, 7, 7), **_norm("bn1", 64)}
        incoming = 64
        for stage, count in enumerate(self.blocks):
            inner = 64 << stage
            for block in range(count):
                prefix = f"layer{stage + 1}.{block}"
                shapes |= self._block(prefix, incoming, inner)
                if block == 0 and (stage > 0 or self.bottleneck):
                    shapes |= _downsample(prefix, incoming, inner * self.expansion)
                incoming = inner * self.expansion
        return shapes

    def head(self, projection: int) -> Shapes:
        """The projection head d -> d -> `projection`, under the published names."""
        width = self.feature_width
        return {
            "fc.1.weight": (width, width),
            "fc.1.bias": (width,),
            "fc.3.weight": (projection, width),
            "fc.3.bias": (projection,),
        }

    def unet(self, classes: int) -> Shapes:
        """The whole smp.Unet: `encoder.`, `decoder.` and `segmentation_head.`."""
        shapes: Shapes = {UNET_ENCODER + name: shape for name, shape in self.backbone().items()}
        inner = [64 * self.expansion << stage for stage in range(4)]
        skips = [*inner[2::-1], 64, 0]
        incoming = inner[3]
        for number, (skip, width) in enumerate(zip(skips, DECODER_WIDTHS, strict=True)):
            for conv, width_in in (("conv1", incoming + skip), ("conv2", width)):
                prefix = f"decoder.blocks.{number}.{conv}"
                shapes[f"{prefix}.0.weight"] = (width, width_in, 3, 3)
                shapes |= _norm(f"{prefix}.1", width)
            incoming = width
        head = "segmentation_head.0"
        return shapes | {f"{head}.weight": (classes, incoming, 3, 3), f"{head}.bias": (classes,)}

    def _block(self, prefix: str, incoming: int, inner: int) -> Shapes:
        if self.bottleneck:
            convs = [(inner, incoming, 1), (inner, inner, 3), (4 * inner, inner, 1)]
        else:
            convs = [(inner, incoming, 3), (inner, inner, 3)]
        shapes: Shapes = {}
        for number, (width_out, width_in, side) in enumerate(convs, start=1):
            shapes[f"{prefix}.conv{number}.weight"] = (width_out, width_in, side, side)
            shapes |= _norm(f"{prefix}.bn{number}", width_out)
        return shapes


def _norm(prefix: str, width: int) -> Shapes:
    names = ("weight", "bias", "running_mean", "running_var")
    return {**{f"{prefix}.{name}": (width,) for name in names}, prefix + COUNT_SUFFIX: ()}


def _downsample(prefix: str, width_in: int, width_out: int) -> Shapes:
    convolution: Shapes = {f"{prefix}.downsample.0.weight": (width_out, width_in, 1, 1)}
    return convolution | _norm(f"{prefix}.downsample.1", width_out)


ARCHITECTURES = {
    "resnet10": Architecture("resnet10", (1, 1, 1, 1), False),
    "resnet18": Architecture("resnet18", (2, 2, 2, 2), False),
    "resnet34": Architecture("resnet34", (3, 4, 6, 3), False),
    "resnet50": Architecture("resnet50", (3, 4, 6, 3), True),
    "resnet101": Architecture("resnet101", (3, 4, 23, 3), True),
}


def closest(names: Iterable[str]) -> Architecture:
    """The architecture that shares most names with `names` and lacks fewest."""
    found = set(names)
    return min(ARCHITECTURES.values(), key=lambda a: len(found ^ a.backbone().keys()))
