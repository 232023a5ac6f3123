"""The process of one peer: prepares what a line of JSON names, then runs a turn for each line.

Started by `peers.PeerProcess` with the interpreter of the peer's environment, which needs the
peer's packages and NumPy, and nothing of ours: neither JAX nor an installed jaxhisto.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, TextIO

from jaxhisto.bench.peer_job import PeerJob, Prepared

HALF = ("forward", "backward", "optimizer", "step")


def main() -> None:
    """Answers on the real stdout; what a library prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        prepared = prepare(PeerJob.from_json(sys.argv[1]))
        prepared.run()  # compiles, allocates; where that fails there is no peer
    except Exception as error:
        answer(answers, failure(error))
        return
    answer(answers, {"settings": prepared.settings | {"versions": versions()}})
    for _ in sys.stdin:
        try:
            answer(answers, turn(prepared))
        except Exception as error:
            answer(answers, failure(error))
    prepared.close()


def prepare(job: PeerJob) -> Prepared:
    """The peer of a job; ImportError where it is not installed."""
    if job.stage in HALF:
        from jaxhisto.bench import peers_torch as stage
    elif job.stage == "augment":
        from jaxhisto.bench import peers_augment as stage  # type: ignore[no-redef]
    else:
        from jaxhisto.bench import peers_read as stage  # type: ignore[no-redef]
    return stage.prepare(job)


def turn(prepared: Prepared) -> dict[str, Any]:
    """Seconds by the clock and of the cores, and the peak of memory while it ran."""
    forget_peak()
    began, worked = time.perf_counter(), time.process_time()
    own = prepared.run()
    seconds, cpu = time.perf_counter() - began, time.process_time() - worked
    if own is not None:
        seconds, cpu = own
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak_bytes()}


def forget_peak() -> None:
    """Sets the peak back to what is held now: before it lies what preparing tried."""
    torch: Any = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    from jaxhisto.bench.memory import forget_peak as of_process

    of_process()


def peak_bytes() -> int | None:
    """The GPU's peak as PyTorch's allocator saw it, else this process's."""
    torch: Any = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    from jaxhisto.bench.memory import peak_bytes as of_process

    return of_process()


def failure(error: Exception) -> dict[str, Any]:
    """Why there is no figure, in one line."""
    if isinstance(error, ModuleNotFoundError):
        return {"missing": (error.name or str(error)).split(".")[0]}
    from jaxhisto.bench import memory

    if out := memory.why(error):
        return {"why": out}
    lines = str(error).strip().splitlines() or [""]
    return {"why": f"{type(error).__name__}: {lines[0][:300]}"}


def versions() -> dict[str, str]:
    """Of the packages that made the figure."""
    names = ("torch", "torchvision", "lightly", "kornia", "PIL", "simplejpeg")
    loaded = {name: sys.modules[name] for name in names if name in sys.modules}
    return {name: str(getattr(module, "__version__", "")) for name, module in loaded.items()}


def answer(out: TextIO, what: dict[str, Any]) -> None:
    print(json.dumps(what), file=out, flush=True)
