"""Memory at its peak, of a device or of the process, and what running out of it looks like."""

from __future__ import annotations

import sys
from pathlib import Path

OUT = "out of memory"
NO_ALGORITHM = "no convolution algorithm (often: memory)"
EXIT = 71  # of a process that ran out of it where nothing could be recorded
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
PEAK_RSS = "5"  # what CLEAR takes to set the peak back (Linux, Documentation/filesystems/proc.rst)


def why(error: BaseException) -> str:
    """OUT where an error says that memory is out: Python's, NumPy's, XLA's, CUDA's or PyTorch's;
    NO_ALGORITHM where XLA tried cuDNN's convolutions and none ran; else empty."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return OUT
    text = str(error).lower()
    if any(sign in text for sign in SIGNS):
        return OUT
    return NO_ALGORITHM if "failed to determine best cudnn convolution algorithm" in text else ""


SIGNS = (
    "resource_exhausted", "out of memory", "bad_alloc", "can't allocate memory",
    "failed to allocate", "cannot allocate", "device_allocation_failed",
    "cuda_error_out_of_memory", "cudnn_status_alloc_failed", "cublas_status_alloc_failed",
    # cuBLAS asks for its workspace when it starts, and says no more than that it did not.
    "cublas_status_not_initialized", "failed to create cublas handle",
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says, or often means, that memory is out; `why` tells them apart."""
    return bool(why(error))


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
