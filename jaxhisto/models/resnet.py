"""ResNet 10, 18, 34, 50 and 101 in Flax NNX, equal to torchvision's (He et al. 2015, "v1.5").

Attributes carry torchvision's names, so that a parameter's path is its PyTorch key:
`layer1.0.conv1.kernel` is `layer1.0.conv1.weight`. Images are (N, H, W, C), kernels HWIO.
A module built here gives structure; its weights come from `initial.py` or from a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

BLOCKS: dict[str, tuple[int, int, int, int]] = {
    "resnet10": (1, 1, 1, 1),
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
}
BOTTLENECK = ("resnet50", "resnet101")


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

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """(N, H, W, C) to (N, H/stride, W/stride, width)."""
        padding = self.kernel.shape[0] // 2
        sides = [(size - 1) // self.stride + 1 for size in inputs.shape[1:3]]
        if padding and max(sides) <= SMALL_MAP:
            x, kernel = inputs.astype(self.dtype), self.kernel[...].astype(self.dtype)
            return _by_patches(x, kernel, self.stride, padding, self.precision)
        return super().__call__(inputs, out_sharding)


SMALL_MAP = 2
"""Side of a map up to which a convolution is a matrix product of patches. XLA's CPU compiler
has a naive loop there, 2 GFLOP/s where the product makes 100; accelerators see no such maps,
the last of a 96-px tile is 3 x 3."""


def _by_patches(
    x: jax.Array,
    kernel: jax.Array,
    stride: int,
    padding: int,
    precision: jax.lax.PrecisionLike,
) -> jax.Array:
    """The convolution (N, H, W, C) * (k, k, C, D) as one product over (k, k, C)."""
    side = kernel.shape[0]
    padded = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    spans = [(size + 2 * padding - side) // stride * stride + 1 for size in x.shape[1:3]]
    patches = [
        padded[:, i : i + spans[0] : stride, j : j + spans[1] : stride]
        for i in range(side)
        for j in range(side)
    ]
    flat = kernel.reshape(-1, kernel.shape[-1])
    return jnp.einsum("nhwc,cd->nhwd", jnp.concatenate(patches, -1), flat, precision=precision)


class BatchNorm(nnx.Module):
    """BatchNorm with PyTorch's running statistics, in float32 over the global batch.

    Flax keeps the biased variance as running variance, PyTorch the unbiased one (n/(n-1)).
    """

    MOMENTUM = 0.9  # PyTorch calls it 0.1
    EPSILON = 1e-5

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros((width,), jnp.float32))
        self.var = nnx.BatchStat(jnp.ones((width,), jnp.float32))

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """(N, H, W, C), normalised by the batch (and recorded) or by the running statistics."""
        mean, var = self._from_batch(x) if train else (self.mean[...], self.var[...])
        gain = self.scale[...] * jax.lax.rsqrt(var + self.EPSILON)
        offset = self.bias[...] - mean * gain
        y = x.astype(jnp.float32) * gain[None, None, None] + offset[None, None, None]
        return y.astype(x.dtype)

    def _from_batch(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x32 = x.astype(jnp.float32)
        axes = (0, 1, 2)
        mean = x32.mean(axes)
        # E[x^2] - E[x]^2 reads x once; rounding may take a constant channel below 0.
        var = jnp.maximum((x32 * x32).mean(axes) - mean * mean, 0.0)
        count = x.size // x.shape[-1]
        unbiased = var * (count / max(count - 1, 1))
        for running, new in ((self.mean, mean), (self.var, unbiased)):
            blended = self.MOMENTUM * running[...] + (1 - self.MOMENTUM) * new
            running[...] = jax.lax.stop_gradient(blended)
        return mean, var


class Shortcut(Numbered):
    """1x1 convolution and BatchNorm, where a block changes the shape."""

    def __init__(self, width_in: int, width: int, stride: int, dtype: DTypeLike):
        super().__init__({0: Conv(width_in, width, 1, stride, dtype), 1: BatchNorm(width)})

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        conv, norm = self.in_order()
        return norm(conv(x), train=train)


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, width_in: int, width: int, stride: int, dtype: DTypeLike):
        self.conv1 = Conv(width_in, width, 3, stride, dtype)
        self.bn1 = BatchNorm(width)
        self.conv2 = Conv(width, width, 3, 1, dtype)
        self.bn2 = BatchNorm(width)
        changes = stride != 1 or width_in != width
        self.downsample = Shortcut(width_in, width, stride, dtype) if changes else None

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        y = nnx.relu(self.bn1(self.conv1(x), train=train))
        y = self.bn2(self.conv2(y), train=train)
        return nnx.relu(y + (self.downsample(x, train=train) if self.downsample else x))


class Bottleneck(nnx.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut; the stride sits on the 3x3 (v1.5)."""

    expansion = 4

    def __init__(self, width_in: int, width: int, stride: int, dtype: DTypeLike):
        self.conv1 = Conv(width_in, width, 1, 1, dtype)
        self.bn1 = BatchNorm(width)
        self.conv2 = Conv(width, width, 3, stride, dtype)
        self.bn2 = BatchNorm(width)
        self.conv3 = Conv(width, width * 4, 1, 1, dtype)
        self.bn3 = BatchNorm(width * 4)
        changes = stride != 1 or width_in != width * 4
        self.downsample = Shortcut(width_in, width * 4, stride, dtype) if changes else None

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        y = nnx.relu(self.bn1(self.conv1(x), train=train))
        y = nnx.relu(self.bn2(self.conv2(y), train=train))
        y = self.bn3(self.conv3(y), train=train)
        return nnx.relu(y + (self.downsample(x, train=train) if self.downsample else x))


class ResNet(nnx.Module):
    """The encoder: normalised RGB to pooled features.

    Args:
      name: a key of BLOCKS.
      dtype: of the convolutions; parameters and BatchNorm stay float32.
    """

    def __init__(self, name: str, dtype: DTypeLike = jnp.float32):
        block = Bottleneck if name in BOTTLENECK else BasicBlock
        self.dtype = dtype
        self.conv1 = Conv(3, 64, 7, 2, dtype)
        self.bn1 = BatchNorm(64)
        counts = BLOCKS[name]
        grown = 64 * block.expansion
        self.layer1 = _stage(block, counts[0], 64, 64, 1, dtype)
        self.layer2 = _stage(block, counts[1], grown, 128, 2, dtype)
        self.layer3 = _stage(block, counts[2], 2 * grown, 256, 2, dtype)
        self.layer4 = _stage(block, counts[3], 4 * grown, 512, 2, dtype)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """(N, H, W, 3) normalised RGB to (N, d) float32 features (average over the map)."""
        return self.maps(x, train=train)[-1].astype(jnp.float32).mean((1, 2))

    def maps(self, x: jax.Array, *, train: bool = False) -> list[jax.Array]:
        """The maps at 1/2 (stem after its ReLU), 1/4, 1/8, 1/16 and 1/32 (the four stages)."""
        x = nnx.relu(self.bn1(self.conv1(x.astype(self.dtype)), train=train))
        maps = [x]
        x = max_pool(x)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x, train=train)
            maps.append(x)
        return maps


def max_pool(x: jax.Array) -> jax.Array:
    """3x3 maximum at stride 2 with one pixel of padding on each side, as torchvision's stem."""
    return nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


def build_resnet(name: str, dtype: DTypeLike = jnp.float32) -> ResNet:
    """An encoder without weights; `name` is one of `resnet10, 18, 34, 50, 101`."""
    return ResNet(name, dtype)


def _stage(
    block: type[BasicBlock] | type[Bottleneck],
    count: int,
    width_in: int,
    width: int,
    stride: int,
    dtype: DTypeLike,
) -> Numbered:
    """`count` blocks, the first of which strides and widens."""
    first = {0: block(width_in, width, stride, dtype)}
    grown = width * block.expansion
    return Numbered(first | {i: block(grown, width, 1, dtype) for i in range(1, count)})
