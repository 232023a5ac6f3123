"""Bytes and operations of a compiled program, as XLA counts them."""

from __future__ import annotations

import math
import re
from typing import Any

import jax

ITEM = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4,
        "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}  # fmt: skip
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
CALL = re.compile(r"^\s*(?:ROOT )?(%?[\w.-]+) = (.+?) custom-call\((.*?)\)")
LIBRARY = re.compile(r'custom_call_target="__cu(?:dnn|blas)')
WORKSPACE = re.compile(r",\s*u8\[\d*\](?:\{[^}]*\})?\s*\)$")
"""Behind the results of such a call: what the library works in, not what the program moves."""
NAMED = re.compile(r"^\s*(?:ROOT )?(%?[\w.-]+) = (\(.*?\)|\S+) [\w-]+\(")


def cost(compiled: Any, devices: int = 1) -> dict[str, float]:
    """{"flops", "bytes"} of one call on all devices; empty where XLA does not say, without "flops"
    where it does not say those of all: it knows none of a library's.

    Bytes are operands and results of each instruction after fusion: what passes through memory if
    caches help nothing. XLA knows nothing of what happens inside a library's kernel (cuDNN's
    convolutions on a GPU) and counts nothing for it; its operands and results are added here.
    """
    try:
        found = compiled.cost_analysis()
    except (NotImplementedError, jax.errors.JaxRuntimeError):  # not every backend counts
        return {}
    table = found[0] if isinstance(found, list | tuple) and found else found
    if not table or "bytes accessed" not in table:
        return {}
    text = compiled.as_text()
    counted = {"bytes": devices * float(table["bytes accessed"] + custom_call_bytes(text))}
    if " custom-call(" not in text:
        counted["flops"] = devices * float(table.get("flops", 0.0))
    return counted


def custom_call_bytes(text: str) -> int:
    """Bytes of operands and results of a compiled program's custom calls, each called once.

    cuDNN's and cuBLAS's workspaces are none of them.
    """
    lines = text.splitlines()
    shapes = {m[1].lstrip("%"): m[2] for line in lines if (m := NAMED.match(line))}
    total = 0
    for line in lines:
        if not (call := CALL.match(line)):
            continue
        operands = [shapes.get(n, "") for n in re.findall(r"%([\w.-]+)", call[3])]
        results = WORKSPACE.sub(")", call[2]) if LIBRARY.search(line) else call[2]
        total += array_bytes(results) + sum(map(array_bytes, operands))
    return total


def array_bytes(shape: str) -> int:
    """Bytes of an HLO shape, a tuple's parts together: `f32[8,16]{1,0}`, `(f32[2], u8[64])`."""
    return sum(
        ITEM.get(kind, 0) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in ARRAY.findall(shape)
    )
