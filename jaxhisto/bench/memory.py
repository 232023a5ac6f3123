"""Memory at its peak, of a device or of the process, and what running out of it looks like."""

from __future__ import annotations

import sys
from pathlib import Path

OUT = "out of memory"
EXIT = 71  # of a process that ran out of it where nothing could be recorded
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
PEAK_RSS = "5"  # what CLEAR takes to set the peak back (Linux, Documentation/filesystems/proc.rst)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is out: Python's, NumPy's, XLA's or PyTorch's."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    signs = ("resource_exhausted", "out of memory", "bad_alloc", "can't allocate memory",
             "failed to allocate", "cannot allocate")  # fmt: skip
    return any(sign in text for sign in signs)


def forget_peak() -> None:
    """Sets the process's peak back to what it holds now, where the system allows it."""
    try:
        CLEAR.write_text(PEAK_RSS)
    except OSError:  # another system, or a sandbox: the peak is then that of the process's life
        return


def peak_bytes() -> int | None:
    """The most that was held: on the fullest accelerator, else in this process; None: not known.

    An accelerator's peak is that since the process began, which is why stages that take more
    come after those that take less. A process's is that since `forget_peak`.
    """
    peaks = _of_devices()
    return max(peaks) if peaks else _of_process()


def _of_devices() -> list[int]:
    if "jax" not in sys.modules:  # a peer in a process of its own: nothing of ours to ask
        return []
    import jax

    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return [int(s["peak_bytes_in_use"]) for s in stats if "peak_bytes_in_use" in s]


def _of_process() -> int | None:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
