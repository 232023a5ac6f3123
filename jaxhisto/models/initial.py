"""Initial weights, drawn as torchvision and PyTorch draw them.

Drawn on the host, tensor by tensor from (seed, name): the same on any number of devices and on
any platform, at once, where the compiler needs many seconds for the same random numbers.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

Tree = dict[str, Any]


def initial(shapes: Tree, seed: int, path: str = "") -> Tree:
    """Float32 arrays in the place of a tree of shapes (params or batch_stats).

    Convolutions get Kaiming's normal numbers over fan-out, linear layers U(-1, 1) / sqrt(width
    in) for weight and bias, BatchNorm 1 and 0 (zero-gamma off), running statistics 0 and 1.
    """
    if "kernel" in shapes:
        return _layer(shapes, seed, path)
    values: Tree = {}
    for name, child in shapes.items():
        if isinstance(child, dict):
            values[name] = initial(child, seed, f"{path}{name}.")
        else:
            fill = np.ones if name in ("scale", "var") else np.zeros
            values[name] = fill(child.shape, np.float32)
    return values


def _layer(shapes: Tree, seed: int, path: str) -> Tree:
    """The tensors of one convolution (no bias) or linear layer."""
    shape = shapes["kernel"].shape
    rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
    if len(shape) == 4:
        height, width, _, channels = shape
        deviation = (2.0 / (height * width * channels)) ** 0.5
        return {"kernel": deviation * rng.standard_normal(shape, np.float32)}
    bound = shape[0] ** -0.5
    return {
        name: rng.uniform(-bound, bound, leaf.shape).astype(np.float32)
        for name, leaf in sorted(shapes.items(), reverse=True)
    }
