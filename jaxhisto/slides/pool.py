"""A supervised pool of local processes: a job that crashes or hangs costs only itself.

`concurrent.futures` gives up the whole pool when one process dies, and cannot end a job that
hangs; slide libraries do both on damaged files.
"""

from __future__ import annotations

import multiprocessing
import pickle
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

Job = TypeVar("Job")
Value = TypeVar("Value")

_SPAWN = multiprocessing.get_context("spawn")  # a fork of a threaded parent can deadlock


class ProcessDied(Exception):
    """The process of a job ended without an answer, each time."""


class TooSlow(Exception):
    """A job took longer than it may, each time; its process is ended."""


@dataclass(frozen=True)
class Answer(Generic[Value]):
    """What became of one job: a value, or the error that stands in its place."""

    index: int
    value: Value | None
    error: Exception | None


@dataclass
class _Worker:
    process: BaseProcess
    link: Connection
    index: int = -1  # of its job; -1: idle
    deadline: float = field(default=float("inf"))


def run(
    function: Callable[[Job], Value],
    jobs: Sequence[Job],
    processes: int,
    timeout: float,
    attempts: int = 2,
) -> Generator[Answer[Value], None, None]:
    """Runs function(job) for each job and yields the answers as they come.

    Args:
      function: importable by name; its errors travel back pickled.
      processes: how many jobs run at the same time.
      timeout: seconds a job may take.
      attempts: how often a job is begun whose process dies or is too slow. It is begun again after
        all others: what hung on a busy disk or ran out of memory may then find more room.

    A script that calls this needs `if __name__ == "__main__":`, since processes are spawned.
    """
    waiting = deque((index, attempts) for index in range(len(jobs)))
    tries = dict(waiting)
    workers: list[_Worker] = []
    try:
        while waiting or any(w.index >= 0 for w in workers):
            while waiting and (idle := _idle(workers, processes, function)):
                idle.index, tries[idle.index] = waiting.popleft()
                idle.deadline = time.monotonic() + timeout
                with suppress(OSError):  # it has died: `_collect` sees that
                    idle.link.send(jobs[idle.index])
            for answer in _collect(workers, timeout):
                again = isinstance(answer.error, (ProcessDied, TooSlow))
                if again and tries[answer.index] > 1:
                    waiting.append((answer.index, tries[answer.index] - 1))
                else:
                    yield answer
    finally:
        for worker in workers:
            _end(worker)


def _idle(workers: list[_Worker], processes: int, function: Callable[[Any], Any]) -> _Worker | None:
    """A worker without a job, started if there may be one more."""
    for worker in workers:
        if worker.index < 0:
            return worker
    if len(workers) >= processes:
        return None
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_serve, args=(theirs, function), daemon=True)
    process.start()
    theirs.close()
    workers.append(_Worker(process, ours))
    return workers[-1]


def _collect(workers: list[_Worker], timeout: float) -> list[Answer[Any]]:
    """Waits for the next answer, death or deadline; dead workers leave the list."""
    busy = [worker for worker in workers if worker.index >= 0]
    patience = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
    ready = set(wait([worker.link for worker in busy], timeout=min(patience, 1e6)))
    answers: list[Answer[Any]] = []
    for worker in busy:
        if worker.link in ready:
            answer = _received(worker)
        elif time.monotonic() >= worker.deadline:
            answer = Answer(worker.index, None, TooSlow(f"took longer than {timeout:g} s"))
        else:
            continue
        if isinstance(answer.error, (ProcessDied, TooSlow)):
            _end(worker)
            workers.remove(worker)
        worker.index = -1
        answers.append(answer)
    return answers


def _received(worker: _Worker) -> Answer[Any]:
    try:
        value, error = worker.link.recv()
    except (EOFError, OSError):
        worker.process.join(5)
        code = worker.process.exitcode
        return Answer(worker.index, None, ProcessDied(f"its process died (exit code {code})"))
    return Answer(worker.index, value, error)


def _end(worker: _Worker) -> None:
    worker.link.close()
    worker.process.kill()
    worker.process.join()


def _portable(error: Exception) -> Exception:
    """The error, or its words where it does not survive the way to the parent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # a class that cannot be pickled, or not be made again of its arguments
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _serve(link: Connection, function: Callable[[Any], Any]) -> None:
    """The loop of a worker; it ends when its parent is gone."""
    while True:
        try:
            job = link.recv()
        except (EOFError, KeyboardInterrupt):
            return
        value, error = None, None
        try:
            value = function(job)
        except KeyboardInterrupt:
            return
        except Exception as raised:
            error = _portable(raised)
        with suppress(BrokenPipeError):
            link.send((value, error))
