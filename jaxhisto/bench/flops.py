"""Operations and bytes that the mathematics of a step needs, counted from the network's shapes.

Counted here and not taken from a compiled program, so that every implementation is held against
the same figure: a multiply-add is two operations; a convolution has one for each output, tap and
input channel, taps on the padding included, as torchvision and He et al. (2015) count. XLA leaves
those on the padding out, which at 224 px is 4 % less. BatchNorm, ReLU, pooling and augmentation
are not matrix operations and cost bytes, not operations, as far as a bound goes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jaxhisto.bench.record import VIEWS
from jaxhisto.models.resnet import BLOCKS, BOTTLENECK, feature_width

F32 = 4
ITEM = {"f32": 4, "bf16": 2}
COLOURS, STEM = 3, 64


@dataclass(frozen=True)
class Layer:
    """A convolution, or a linear layer as one of side 1.

    Attributes:
      side_in, side: of the map before and after, pixels.
      taps: k * k.
      width_in, width: channels before and after.
      first: its input is the image, whose gradient nobody wants.
      shares: its input is another layer's too (a block's shortcut), which moves it.
    """

    side_in: int
    side: int
    taps: int
    width_in: int
    width: int
    first: bool = False
    shares: bool = False

    @property
    def flops(self) -> int:
        """Forward, one view."""
        return 2 * self.side**2 * self.taps * self.width_in * self.width

    @property
    def backward_flops(self) -> int:
        """Gradient of the kernel, and of the input where it is wanted; one view."""
        return self.flops * (1 if self.first else 2)

    @property
    def weights(self) -> int:
        """Numbers in the kernel."""
        return self.taps * self.width_in * self.width

    @property
    def inputs(self) -> int:
        """Numbers in the map before; one view."""
        return self.side_in**2 * self.width_in

    @property
    def outputs(self) -> int:
        """Numbers in the map after; one view."""
        return self.side**2 * self.width


def layers(model: str, tile_px: int, projection: int = 128) -> Iterator[Layer]:
    """The convolutions and linear layers of encoder and head, in order."""
    side = half(tile_px)
    yield Layer(tile_px, side, 49, COLOURS, STEM, first=True)
    side, width_in = half(side), STEM  # max-pool
    for stage, count in enumerate(BLOCKS[model]):
        width = STEM * 2**stage
        for block in range(count):
            out = half(side) if stage and not block else side
            yield from _block(model, side, out, width_in, width)
            side, width_in = out, width * (4 if model in BOTTLENECK else 1)
    d = feature_width(model)
    yield Layer(1, 1, 1, d, d)
    yield Layer(1, 1, 1, d, projection)


def half(side: int) -> int:
    """The side after a stride of two, padded as in PyTorch."""
    return (side - 1) // 2 + 1


def _block(model: str, side: int, out: int, width_in: int, width: int) -> Iterator[Layer]:
    grown = width * 4 if model in BOTTLENECK else width
    if model in BOTTLENECK:
        yield Layer(side, side, 1, width_in, width)
        yield Layer(side, out, 9, width, width)
        yield Layer(out, out, 1, width, grown)
    else:
        yield Layer(side, out, 9, width_in, width)
        yield Layer(out, out, 9, width, width)
    if out != side or width_in != grown:
        yield Layer(side, out, 1, width_in, grown, shares=True)


def forward_flops(model: str, tile_px: int, batch: int) -> float:
    """Encoder, head and NT-Xent's similarities, for N images."""
    network = sum(layer.flops for layer in layers(model, tile_px))
    return float(VIEWS * batch * network + loss_flops(batch))


def backward_flops(model: str, tile_px: int, batch: int) -> float:
    """Their gradients, without that of the views."""
    network = sum(layer.backward_flops for layer in layers(model, tile_px))
    return float(VIEWS * batch * network + 2 * loss_flops(batch))


def loss_flops(batch: int, projection: int = 128) -> int:
    """All similarities of 2N views, each with each."""
    return 2 * (VIEWS * batch) ** 2 * projection


def step_flops(model: str, tile_px: int, batch: int) -> float:
    """Forward and backward; the optimizer and the augmentation have next to no products."""
    return forward_flops(model, tile_px, batch) + backward_flops(model, tile_px, batch)


def parameters(model: str, tile_px: int = 224) -> int:
    """Numbers that are trained: kernels, BatchNorm's scale and bias, the head's biases."""
    *convolutions, hidden, out = layers(model, tile_px)
    kernels = sum(layer.weights for layer in (*convolutions, hidden, out))
    return kernels + 2 * sum(layer.width for layer in convolutions) + hidden.width + out.width


def least_bytes(model: str, tile_px: int, batch: int, precision: str) -> float:
    """What a step must move to and from memory if all that can be fused is.

    Each convolution's input is read and its output written once; backward, the gradient of its
    output and the kept input are read and the input's gradient is written. BatchNorm, ReLU,
    pooling and addition cost nothing, as if they were part of the convolutions beside them.
    What a block and its shortcut both read counts once. Tiles are read, views written and read.
    Weights are read twice, gradients written, and the optimizer reads weights, gradients and
    momenta and writes weights and momenta, in float32.
    """
    numbers = sum(
        2 * layer.outputs + (0 if layer.shares else (2 if layer.first else 3) * layer.inputs)
        for layer in layers(model, tile_px)
    )
    pixels = COLOURS * tile_px**2
    image = VIEWS * (numbers * ITEM[precision] + 2 * F32 * pixels) + pixels
    return float(batch * image + (2 + 1 + 5) * F32 * parameters(model))


def kept_bytes(model: str, tile_px: int, batch: int, precision: str) -> float:
    """What a step without rematerialisation holds at least when its forward pass is done: the
    input of each convolution, or what it is made of; nothing else at all."""
    kept = sum(layer.inputs for layer in layers(model, tile_px) if not layer.shares)
    return float(VIEWS * batch * kept * ITEM[precision])
