"""Memory that was freed, handed back to the system: neither Python nor glibc does it by itself."""

from __future__ import annotations

import ctypes
import gc
import sys

_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE_BYTES = 128 * 1024


def free_large_at_once() -> None:
    """From now on in this process, a block above 128 KiB goes back to the system when freed.

    That is how glibc begins; with the first large block that is freed it raises the bound, to 32
    MiB, and keeps what is smaller. For work that goes through its tensors once, not for training.
    """
    call = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if call is not None:
        call(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def give_back_memory() -> None:
    """Frees what hangs in cycles, as some of what Orbax read does, and what glibc kept."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
