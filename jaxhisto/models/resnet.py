"""ResNet 10, 18, 34, 50 and 101 in Flax NNX, equal to torchvision's (He et al. 2015, "v1.5").

Attributes carry torchvision's names, so that a parameter's path is its PyTorch key:
`layer1.0.conv1.kernel` is `layer1.0.conv1.weight`. Images are (N, H, W, C), kernels HWIO.
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

    def __call__(self, x: jax.Array, **options: Any) -> jax.Array:
        for name in self.names:
            x = getattr(self, name)(x, **options)
        return x


class Conv(nnx.Conv):
    """Convolution without bias; torchvision's initialisation, padding as in PyTorch."""

    def __init__(
        self, width_in: int, width: int, side: int, stride: int, rngs: nnx.Rngs, dtype: DTypeLike
    ):
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
            kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
            rngs=rngs,
        )

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """(N, H, W, C_in) to (N, H', W', C_out); the same in training and evaluation."""
        return super().__call__(x)


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


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, width_in: int, width: int, stride: int, rngs: nnx.Rngs, dtype: DTypeLike):
        self.conv1 = Conv(width_in, width, 3, stride, rngs, dtype)
        self.bn1 = BatchNorm(width)
        self.conv2 = Conv(width, width, 3, 1, rngs, dtype)
        self.bn2 = BatchNorm(width)
        self.downsample = _shortcut(width_in, width, stride, rngs, dtype)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        y = nnx.relu(self.bn1(self.conv1(x), train=train))
        y = self.bn2(self.conv2(y), train=train)
        return nnx.relu(y + (self.downsample(x, train=train) if self.downsample else x))


class Bottleneck(nnx.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut; the stride sits on the 3x3 (v1.5)."""

    expansion = 4

    def __init__(self, width_in: int, width: int, stride: int, rngs: nnx.Rngs, dtype: DTypeLike):
        self.conv1 = Conv(width_in, width, 1, 1, rngs, dtype)
        self.bn1 = BatchNorm(width)
        self.conv2 = Conv(width, width, 3, stride, rngs, dtype)
        self.bn2 = BatchNorm(width)
        self.conv3 = Conv(width, width * 4, 1, 1, rngs, dtype)
        self.bn3 = BatchNorm(width * 4)
        self.downsample = _shortcut(width_in, width * 4, stride, rngs, dtype)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        y = nnx.relu(self.bn1(self.conv1(x), train=train))
        y = nnx.relu(self.bn2(self.conv2(y), train=train))
        y = self.bn3(self.conv3(y), train=train)
        return nnx.relu(y + (self.downsample(x, train=train) if self.downsample else x))


class ResNet(nnx.Module):
    """The encoder: normalised RGB to pooled features.

    Args:
      name: a key of BLOCKS.
      rngs: source of the initial weights.
      dtype: of the convolutions; parameters and BatchNorm stay float32.
    """

    def __init__(self, name: str, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        block = Bottleneck if name in BOTTLENECK else BasicBlock
        self.dtype = dtype
        self.conv1 = Conv(3, 64, 7, 2, rngs, dtype)
        self.bn1 = BatchNorm(64)
        width_in = 64
        for stage, count in enumerate(BLOCKS[name]):
            width = 64 * 2**stage
            blocks: dict[int, nnx.Module] = {}
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks[i] = block(width_in, width, stride, rngs, dtype)
                width_in = width * block.expansion
            setattr(self, f"layer{stage + 1}", Numbered(blocks))

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """(N, H, W, 3) normalised RGB to (N, d) float32 features (average over the map)."""
        x = nnx.relu(self.bn1(self.conv1(x.astype(self.dtype)), train=train))
        x = max_pool(x)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x, train=train)
        return x.astype(jnp.float32).mean((1, 2))


def max_pool(x: jax.Array) -> jax.Array:
    """3x3 maximum at stride 2 with one pixel of padding on each side, as torchvision's stem."""
    return nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


def build_resnet(name: str, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> ResNet:
    """A freshly initialised ResNet; `name` is one of `resnet10, 18, 34, 50, 101`."""
    return ResNet(name, rngs, dtype)


def _shortcut(
    width_in: int, width: int, stride: int, rngs: nnx.Rngs, dtype: DTypeLike
) -> Numbered | None:
    """1x1 convolution and BatchNorm where the shape changes; nothing (None) elsewhere."""
    if stride == 1 and width_in == width:
        return None
    return Numbered({0: Conv(width_in, width, 1, stride, rngs, dtype), 1: BatchNorm(width)})
