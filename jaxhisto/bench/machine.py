"""The machine that is measured: what it is, and what it can do at most."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxhisto.runlog import environment

SIDES = {"cpu": 512, "other": 8192}
"""Of the matrices: on a CPU so small that a product ends before another program gets the core."""
COPIED = {"cpu": 256 << 20, "other": 2 << 30}
"""Bytes of the array that is copied: larger than caches."""
GOES, CALLS = 60, {"cpu": 1, "other": 10}


def describe(cores: int, peaks: bool = True) -> dict[str, Any]:
    """Device, cores, versions, date and measured peaks, without what names the machine or a path.

    Args:
      cores: how many this process may use.
      peaks: whether to measure them.
    """
    device = jax.devices()[0]
    kind = processor() if device.platform == "cpu" else device.device_kind
    found = environment([kind] * len(jax.devices()))
    del found["command"]
    stats = device.memory_stats() or {}
    return {
        **found,
        "device": kind,
        "platform": device.platform,
        "cores": cores,
        "memory_bytes": stats.get("bytes_limit"),
        "peaks": measured_peaks(device.platform) if peaks else {},
    }


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or "cpu"


def measured_peaks(kind: str) -> dict[str, Any]:
    """{"tflops": {"f32", "bf16"}, "gb_per_s"} of one device: products of large square matrices,
    and reading and writing a large array in place; the quickest of GOES.

    float32 means float32: products at the highest precision, as the step's f32 convolutions.
    """
    key = "cpu" if kind == "cpu" else "other"
    tflops = {
        name: matmul_flops(SIDES[key], dtype, CALLS[key]) / 1e12
        for name, dtype in (("f32", jnp.float32), ("bf16", jnp.bfloat16))
    }
    return {"tflops": tflops, "gb_per_s": moved_bytes(COPIED[key], CALLS[key]) / 1e9}


def matmul_flops(side: int, dtype: Any, calls: int) -> float:
    """Operations a second of a product of two (side, side) matrices, on one device."""
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    # Random, not zeros: a GPU multiplies zeros a tenth quicker, at less power. Scaled, so that a
    # chain of products neither grows nor vanishes.
    a, b = (jax.random.normal(jax.random.key(i), (side, side), dtype) for i in (0, 1))
    b = b * jnp.asarray(side**-0.5, dtype)
    # Both are arguments: one that is captured would be a constant in the program, 256 MB of it.
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))
    return 2 * side**3 / best_of(lambda a: product(a, b), a, calls)


def moved_bytes(size: int, calls: int) -> float:
    """Bytes a second, read and written, of adding one to an array of `size` bytes in place."""
    array = jnp.zeros(size // 4, jnp.float32)
    add = jax.jit(lambda x: x + jnp.float32(1), donate_argnums=0)
    moved = 2 * array.nbytes
    return moved / best_of(add, array, calls)


def best_of(act: Callable[[jax.Array], jax.Array], x: jax.Array, calls: int) -> float:
    """Seconds of x = act(x), in the quickest of GOES of `calls` calls, after two to warm up."""
    best = float("inf")
    for go in range(GOES + 2):
        start = time.perf_counter()
        for _ in range(calls):
            x = act(x)
        x.block_until_ready()
        if go >= 2:
            best = min(best, (time.perf_counter() - start) / calls)
    return best
