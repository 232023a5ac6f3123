"""Initial weights, drawn as torchvision, PyTorch and segmentation_models_pytorch draw them.

Drawn on the host, tensor by tensor from (seed, name): the same on any number of devices and on
any platform, at once, where the compiler needs many seconds for the same random numbers.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

Tree = dict[str, Any]
Draw = Callable[[Tree, np.random.Generator], Tree]


def as_torchvision(shapes: Tree, rng: np.random.Generator) -> Tree:
    """The tensors of one convolution (no bias) or linear layer.

    Convolutions get Kaiming's normal numbers over fan-out, linear layers U(-1, 1) / sqrt(width
    in) for weight and bias.
    """
    shape = shapes["kernel"].shape
    if len(shape) == 4:
        height, width, _, channels = shape
        deviation = (2.0 / (height * width * channels)) ** 0.5
        return {"kernel": deviation * rng.standard_normal(shape, np.float32)}
    bound = shape[0] ** -0.5
    return {
        name: rng.uniform(-bound, bound, leaf.shape).astype(np.float32)
        for name, leaf in sorted(shapes.items(), reverse=True)
    }


def kaiming_uniform(shapes: Tree, rng: np.random.Generator) -> Tree:
    """A convolution: U(-1, 1) sqrt(6 / fan-in), bias 0 (PyTorch's kaiming_uniform_ for ReLU)."""
    height, width, channels, _ = shapes["kernel"].shape
    return _uniform(shapes, rng, (6.0 / (height * width * channels)) ** 0.5)


def xavier_uniform(shapes: Tree, rng: np.random.Generator) -> Tree:
    """A convolution: U(-1, 1) sqrt(6 / (fan-in + fan-out)), bias 0 (PyTorch's xavier_uniform_)."""
    height, width, channels_in, channels = shapes["kernel"].shape
    return _uniform(shapes, rng, (6.0 / (height * width * (channels_in + channels))) ** 0.5)


def initial(shapes: Tree, seed: int, path: str = "", draw: Draw = as_torchvision) -> Tree:
    """Float32 arrays in the place of a tree of shapes (params or batch_stats).

    BatchNorm gets 1 and 0 (zero-gamma off), running statistics 0 and 1.

    Args:
      shapes: nested dict whose leaves have a `shape`.
      seed: the run's; with a layer's path it gives that layer's numbers.
      path: dotted and with a dot at its end, of `shapes` in the whole model.
      draw: what fills a layer with a kernel.
    """
    if "kernel" in shapes:
        return draw(shapes, np.random.default_rng([seed, zlib.crc32(path.encode())]))
    values: Tree = {}
    for name, child in shapes.items():
        if isinstance(child, dict):
            values[name] = initial(child, seed, f"{path}{name}.", draw)
        else:
            fill = np.ones if name in ("scale", "var") else np.zeros
            values[name] = fill(child.shape, np.float32)
    return values


def _uniform(shapes: Tree, rng: np.random.Generator, bound: float) -> Tree:
    kernel = rng.uniform(-bound, bound, shapes["kernel"].shape).astype(np.float32)
    biases = {"bias": np.zeros(shapes["bias"].shape, np.float32)} if "bias" in shapes else {}
    return {"kernel": kernel, **biases}
