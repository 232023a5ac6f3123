"""Compiled programs, kept from one start to the next: a step takes half a minute to compile."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

import pooch

WHERE = "JAX_COMPILATION_CACHE_DIR"


def keep_compiled() -> None:
    """Tells JAX where to keep what it compiles, unless the environment says; before it is imported.

    Below the user's cache folder, as downloads are. An empty value in the environment keeps
    nothing.
    """
    os.environ.setdefault(WHERE, str(Path(pooch.os_cache("jaxhisto")) / "compiled" / processor()))


def processor() -> str:
    """A name for machines whose CPU takes the same instructions.

    Home folders are shared by machines; a program that XLA compiled for one CPU may hold
    instructions that another has not. (For GPUs and TPUs JAX's own key tells the kinds apart.)
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        able = next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        able = platform.processor()
    return hashlib.sha256(f"{platform.machine()} {able}".encode()).hexdigest()[:12]
