"""UNet: the ResNet encoder's five maps and qubvel's decoder, equal to smp.Unet.

smp is segmentation_models_pytorch (https://github.com/qubvel-org/segmentation_models.pytorch),
whose decoder the paper takes: five times nearest upsampling by 2, the encoder's map of that
size behind it, two 3x3 convolutions with BatchNorm and ReLU; then a 3x3 convolution to the
classes. Attributes carry smp's names, so that a parameter's path is its key there:
`decoder.blocks.0.conv1.0.kernel` is `decoder.blocks.0.conv1.0.weight`.

Used functionally, as `simclr.py`: `structure`, `init`, `apply` on plain nested dicts of arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxhisto.errors import ConfigError
from jaxhisto.models.batchnorm import BatchNorm
from jaxhisto.models.initial import as_torchvision, initial, kaiming_uniform, xavier_uniform
from jaxhisto.models.resnet import BOTTLENECK, Conv, Numbered, build_resnet

Tree = dict[str, Any]
Skips = Literal["all", "none"]

DECODER_WIDTHS = (256, 128, 64, 32, 16)
"""Channels of the decoder's maps at 1/16, 1/8, 1/4, 1/2 and 1 of the image's side."""

DRAWS = {
    "encoder": as_torchvision,
    "decoder": kaiming_uniform,
    "segmentation_head": xavier_uniform,
}

STRIDE = 32
"""The image's side over the deepest map's; sides must be multiples of it."""


def map_widths(name: str) -> tuple[int, ...]:
    """Channels of an encoder's maps at 1/2, 1/4, 1/8, 1/16 and 1/32."""
    grown = 4 if name in BOTTLENECK else 1
    return (64, *(grown * inner for inner in (64, 128, 256, 512)))


class ConvReLU(Numbered):
    """3x3 convolution without bias, BatchNorm, ReLU."""

    def __init__(self, width_in: int, width: int, dtype: DTypeLike):
        super().__init__({0: Conv(width_in, width, 3, 1, dtype), 1: BatchNorm(width)})

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        conv, norm = self.in_order()
        return nnx.relu(norm(conv(x, train=train), train=train))


class DecoderBlock(nnx.Module):
    """Doubles the side, takes the encoder's map of that size along, convolves twice."""

    def __init__(self, width_in: int, width_skip: int, width: int, dtype: DTypeLike):
        self.conv1 = ConvReLU(width_in + width_skip, width, dtype)
        self.conv2 = ConvReLU(width, width, dtype)

    def __call__(self, x: jax.Array, skip: jax.Array | None, *, train: bool = False) -> jax.Array:
        """(N, h, w, width in), (N, 2h, 2w, skip width) or none, to (N, 2h, 2w, width)."""
        x = upsample(x)
        if skip is not None:
            x = jnp.concatenate([x, skip], axis=-1)
        return self.conv2(self.conv1(x, train=train), train=train)


class Decoder(nnx.Module):
    """Five blocks from the deepest map to the image's size; the last has no map to take along."""

    def __init__(self, widths: Sequence[int], skips: Skips, dtype: DTypeLike):
        *shallower, deepest = widths
        taken = [*reversed(shallower), 0] if skips == "all" else [0] * len(DECODER_WIDTHS)
        coming = (deepest, *DECODER_WIDTHS[:-1])
        blocks = zip(coming, taken, DECODER_WIDTHS, strict=True)
        self.blocks = Numbered({i: DecoderBlock(*w, dtype) for i, w in enumerate(blocks)})
        self.skips = skips

    def __call__(self, maps: Sequence[jax.Array], *, train: bool = False) -> jax.Array:
        """The encoder's five maps, largest first, to (N, H, W, 16)."""
        *shallower, x = maps
        skips = reversed(shallower) if self.skips == "all" else ()
        for block, skip in zip_longest(self.blocks.in_order(), skips):
            x = block(x, skip, train=train)
        return x


class UNet(nnx.Module):
    """Normalised RGB to a map of logits.

    Args:
      name: of the encoder, a key of `resnet.BLOCKS`.
      classes: channels of the logits.
      skips: `all`, as smp.Unet; `none` leaves the encoder's maps but the deepest out, so that
        each block's first convolution has the width of the block before it alone: an
        autoencoder whose only path is the (N, H/32, W/32, d) map. smp has no such network.
      dtype: of the convolutions but the last, which is float32 as the loss behind it;
        parameters and BatchNorm stay float32.
    """

    def __init__(self, name: str, classes: int, skips: Skips, dtype: DTypeLike = jnp.float32):
        self.encoder = build_resnet(name, dtype)
        self.decoder = Decoder(map_widths(name), skips, dtype)
        self.segmentation_head = Numbered({0: _head(DECODER_WIDTHS[-1], classes)})

    def __call__(self, x: jax.Array, *, train: bool = False, frozen: bool = False) -> jax.Array:
        """(N, H, W, 3) normalised RGB to (N, H, W, classes) float32 logits.

        `frozen`: the encoder is in evaluation mode in training too.

        Raises:
          ConfigError: a side that is no multiple of 32.
        """
        height, width = x.shape[1:3]
        if height % STRIDE or width % STRIDE or not height * width:
            raise ConfigError(
                f"a UNet halves its images five times, and {height} x {width} px cannot be; choose "
                f"sides that are multiples of {STRIDE}."
            )
        maps = self.encoder.maps(x, train=train and not frozen)
        decoded = self.decoder(maps, train=train)
        (head,) = self.segmentation_head.in_order()
        return head(decoded.astype(jnp.float32))


def upsample(x: jax.Array) -> jax.Array:
    """(N, h, w, C) to (N, 2h, 2w, C), each pixel four times: PyTorch's `nearest` at scale 2."""
    N, height, width, C = x.shape
    # Row and column apart: a reshape that merges two pairs of axes loses where axis 0 lies.
    rows = jnp.broadcast_to(x[:, :, None], (N, height, 2, width, C))
    rows = rows.reshape(N, 2 * height, width, C)
    both = jnp.broadcast_to(rows[:, :, :, None], (N, 2 * height, width, 2, C))
    return both.reshape(N, 2 * height, 2 * width, C)


def build_unet(
    name: str, classes: int, skips: Skips = "all", dtype: DTypeLike = jnp.float32
) -> UNet:
    """A UNet without weights; see `UNet` for the arguments."""
    return UNet(name, classes, skips, dtype)


def structure(
    name: str, classes: int, skips: Skips = "all", dtype: DTypeLike = jnp.float32
) -> tuple[nnx.GraphDef, Tree, Tree]:
    """The static part of the model and the shapes of (params, batch_stats), without memory."""
    model = nnx.eval_shape(lambda: build_unet(name, classes, skips, dtype))
    graphdef, *trees = nnx.split(model, nnx.Param, nnx.BatchStat)
    params, stats = trees
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(stats)


def init(name: str, classes: int, seed: int, skips: Skips = "all") -> tuple[Tree, Tree]:
    """Initial (params, batch_stats) on the host, as smp.Unet without pretrained weights.

    The encoder is that of `simclr.init` with the same seed; the decoder gets Kaiming's uniform
    numbers over fan-in, the head Xavier's and a bias of 0 (smp's `initialize_decoder` and
    `initialize_head`).
    """
    _, shapes, stats = structure(name, classes, skips)
    params = {part: initial(tree, seed, f"{part}.", DRAWS[part]) for part, tree in shapes.items()}
    return params, initial(stats, seed)


def apply(
    graphdef: nnx.GraphDef,
    params: Tree,
    batch_stats: Tree,
    x: jax.Array,
    *,
    train: bool,
    frozen: bool = False,
) -> tuple[jax.Array, Tree]:
    """Runs the UNet, and gives the BatchNorm statistics after it.

    Args:
      graphdef: of `structure`.
      params, batch_stats: trees of arrays.
      x: (N, H, W, 3) normalised RGB, H and W multiples of 32.
      train: normalise by the batch and record it, or by the running statistics.
      frozen: by the running statistics in the encoder, whatever `train` says.

    Returns:
      (N, H, W, classes) float32 logits, batch_stats.
    """
    # copy=True: without it BatchNorm's update under `grad` raises TraceContextError.
    model = nnx.merge(graphdef, nnx.State(params), nnx.State(batch_stats), copy=True)
    logits = model(x, train=train, frozen=frozen)
    return logits, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


def _head(width_in: int, classes: int) -> nnx.Conv:
    return nnx.Conv(
        width_in,
        classes,
        (3, 3),
        padding=((1, 1), (1, 1)),
        precision=jax.lax.Precision.HIGHEST,
        kernel_init=nnx.initializers.zeros_init(),
        rngs=nnx.Rngs(0),
    )
