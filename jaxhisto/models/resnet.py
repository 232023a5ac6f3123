"""ResNet 10, 18, 34, 50 and 101 in Flax NNX, equal to torchvision's (He et al. 2015, "v1.5").

Attributes carry torchvision's names, so that a parameter's path is its PyTorch key:
`layer1.0.conv1.kernel` is `layer1.0.conv1.weight`. Images are (N, H, W, C), kernels HWIO.
A module built here gives structure; its weights come from `initial.py` or from a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxhisto.models import stem
from jaxhisto.models.batchnorm import STATISTICS, BatchNorm
from jaxhisto.models.convolution import convolutions, convolve
from jaxhisto.models.pooling import max_pool

BLOCKS: dict[str, tuple[int, int, int, int]] = {
    "resnet10": (1, 1, 1, 1),
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
}
BOTTLENECK = ("resnet50", "resnet101")

StemForm = Literal["plain", "space_to_depth"]


def feature_width(name: str) -> int:
    """Width d of the pooled features: 512, or 2048 where the blocks are bottlenecks."""
    return 2048 if name in BOTTLENECK else 512


class Numbered(nnx.Module):
    """Children named by number, as in `torch.nn.Sequential`, called in that order.

    Numbers may have gaps: PyTorch counts layers without parameters too. String names, where
    `nnx.List` has integers, keep the trees plain on disk.
    """

    def __init__(self, children: Mapping[int, nnx.Module]):
        self.names = tuple(str(number) for number in children)
        for number, child in children.items():
            setattr(self, str(number), child)

    def in_order(self) -> list[Any]:
        """The children."""
        return [getattr(self, name) for name in self.names]

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        for child in self.in_order():
            x = child(x, train=train)
        return x


class Conv(nnx.Conv):
    """Convolution without bias, padded as in PyTorch."""

    def __init__(self, width_in: int, width: int, side: int, stride: int, dtype: DTypeLike):
        self.stride = stride
        super().__init__(
            width_in,
            width,
            (side, side),
            strides=stride,
            # Never "SAME": XLA pads a strided convolution on the far side first, PyTorch evenly.
            padding=((side // 2, side // 2),) * 2,
            use_bias=False,
            dtype=dtype,
            # float32 means float32: without this a GPU takes TF32 and a TPU bfloat16.
            precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
            kernel_init=nnx.initializers.zeros_init(),
            rngs=nnx.Rngs(0),
        )

    def __call__(
        self, inputs: jax.Array, out_sharding: Any = None, *, train: bool = False
    ) -> jax.Array:
        """(N, H, W, C) to (N, H/stride, W/stride, width).

        Out of training it is XLA's own: what is exported is compared with it to the last digits.
        """
        x, kernel = inputs.astype(self.dtype), self.kernel[...].astype(self.dtype)
        return convolve(x, kernel, self.stride, self.precision, fast=train)


class Stem(Conv):
    """The first convolution, 3 to 64 channels; in training in the form asked for."""

    def __init__(self, dtype: DTypeLike, form: StemForm):
        self.form = form
        super().__init__(3, 64, stem.SIDE, stem.STRIDE, dtype)

    def __call__(
        self, inputs: jax.Array, out_sharding: Any = None, *, train: bool = False
    ) -> jax.Array:
        """(N, H, W, 3) to (N, ceil(H/2), ceil(W/2), 64)."""
        if not train or self.form == "plain":
            return super().__call__(inputs, train=train)
        x, kernel = inputs.astype(self.dtype), self.kernel[...].astype(self.dtype)
        return stem.space_to_depth(x, kernel, self.precision)


class Shortcut(Numbered):
    """1x1 convolution and BatchNorm, where a block changes the shape."""

    def __init__(self, width_in: int, width: int, stride: int, dtype: DTypeLike, group: int):
        norm = BatchNorm(width, group)
        super().__init__({0: Conv(width_in, width, 1, stride, dtype), 1: norm})

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        conv, norm = self.in_order()
        return norm(conv(x, train=train), train=train)


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, width_in: int, width: int, stride: int, dtype: DTypeLike, group: int):
        self.conv1 = Conv(width_in, width, 3, stride, dtype)
        self.bn1 = BatchNorm(width, group)
        self.conv2 = Conv(width, width, 3, 1, dtype)
        self.bn2 = BatchNorm(width, group)
        changes = stride != 1 or width_in != width
        self.downsample = Shortcut(width_in, width, stride, dtype, group) if changes else None

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        y = nnx.relu(self.bn1(self.conv1(x, train=train), train=train))
        y = self.bn2(self.conv2(y, train=train), train=train)
        return nnx.relu(y + (self.downsample(x, train=train) if self.downsample else x))


class Bottleneck(nnx.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut; the stride sits on the 3x3 (v1.5)."""

    expansion = 4

    def __init__(self, width_in: int, width: int, stride: int, dtype: DTypeLike, group: int):
        self.conv1 = Conv(width_in, width, 1, 1, dtype)
        self.bn1 = BatchNorm(width, group)
        self.conv2 = Conv(width, width, 3, stride, dtype)
        self.bn2 = BatchNorm(width, group)
        self.conv3 = Conv(width, width * 4, 1, 1, dtype)
        self.bn3 = BatchNorm(width * 4, group)
        changes = stride != 1 or width_in != width * 4
        self.downsample = Shortcut(width_in, width * 4, stride, dtype, group) if changes else None

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        y = nnx.relu(self.bn1(self.conv1(x, train=train), train=train))
        y = nnx.relu(self.bn2(self.conv2(y, train=train), train=train))
        y = self.bn3(self.conv3(y, train=train), train=train)
        return nnx.relu(y + (self.downsample(x, train=train) if self.downsample else x))


class Stage(Numbered):
    """`count` residual blocks, the first of which strides and widens."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        count: int,
        width_in: int,
        width: int,
        stride: int,
        dtype: DTypeLike,
        group: int,
        remat: bool,
    ):
        self.remat = remat
        first = {0: block(width_in, width, stride, dtype, group)}
        grown = width * block.expansion
        rest = {i: block(grown, width, 1, dtype, group) for i in range(1, count)}
        super().__init__(first | rest)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """(N, H, W, C) to (N, H/stride, W/stride, width * expansion)."""
        if not (train and self.remat):
            return super().__call__(x, train=train)
        # BatchNorm's statistics are kept too: they are small, and to compute them anew would send
        # them between devices anew. What it records, it records once, in the forward pass.
        keep = jax.checkpoint_policies.save_only_these_names(STATISTICS)
        run = nnx.remat(lambda block, x: block(x, train=True), policy=keep)
        for block in self.in_order():
            x = run(block, x)
        return x


class ResNet(nnx.Module):
    """The encoder: normalised RGB to pooled features.

    Args:
      name: a key of BLOCKS.
      dtype: of the convolutions; parameters and BatchNorm stay float32.
      group: rows that BatchNorm normalises together; 0: all.
      remat: in training, keep the input of each block alone and compute the rest again, with
        XLA's own convolutions: the temporaries of the CPU's fast forms take what this saves.
      form: of the first convolution in training; its kernel is the same in both.
    """

    def __init__(
        self,
        name: str,
        dtype: DTypeLike = jnp.float32,
        group: int = 0,
        remat: bool = False,
        form: StemForm = "plain",
    ):
        block = Bottleneck if name in BOTTLENECK else BasicBlock
        self.dtype = dtype
        self.remat = remat
        self.conv1 = Stem(dtype, form)
        self.bn1 = BatchNorm(64, group)
        counts = BLOCKS[name]
        grown = 64 * block.expansion
        settings = (dtype, group, remat)
        self.layer1 = Stage(block, counts[0], 64, 64, 1, *settings)
        self.layer2 = Stage(block, counts[1], grown, 128, 2, *settings)
        self.layer3 = Stage(block, counts[2], 2 * grown, 256, 2, *settings)
        self.layer4 = Stage(block, counts[3], 4 * grown, 512, 2, *settings)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """(N, H, W, 3) normalised RGB to (N, d) float32 features (average over the map)."""
        return self.maps(x, train=train)[-1].astype(jnp.float32).mean((1, 2))

    def maps(self, x: jax.Array, *, train: bool = False) -> list[jax.Array]:
        """The maps at 1/2 (stem after its ReLU), 1/4, 1/8, 1/16 and 1/32 (the four stages)."""
        with convolutions("plain") if train and self.remat else nullcontext():
            return self._maps(x, train)

    def _maps(self, x: jax.Array, train: bool) -> list[jax.Array]:
        x = nnx.relu(self.bn1(self.conv1(x.astype(self.dtype), train=train), train=train))
        maps = [x]
        x = max_pool(x)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x, train=train)
            maps.append(x)
        return maps


def build_resnet(
    name: str,
    dtype: DTypeLike = jnp.float32,
    group: int = 0,
    remat: bool = False,
    form: StemForm = "plain",
) -> ResNet:
    """An encoder without weights; `name` is one of `resnet10, 18, 34, 50, 101`."""
    return ResNet(name, dtype, group, remat, form)
