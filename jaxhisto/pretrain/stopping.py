"""SIGTERM and Ctrl-C: the run ends in good order, saved where there is something to save.

Four times are told apart. While Python imports nothing is written yet, and while XLA compiles
the first step, minutes on some machines, nothing is being written: a thread ends the process at
once, since Python would deliver the signal to the main thread only afterwards. While the run
looks at its data, makes its folder or reads a checkpoint, the request is an exception in the main
thread. Once steps are taken, the loop looks at `is_set` after each, saves and raises `Stopped`.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxhisto.errors import RunError
from jaxhisto.launch import MEMBER
from jaxhisto.supervise import REPEAT_S

EARLY = "stopped before the first step"
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(RunError):
    """Asked to stop and stopped in good order: start the same line again."""

    exit_code = 75


class _EndsStart(BaseException):
    """A request while the run starts; no Exception, which a library's import might swallow."""


class StopRequest:
    """Whether the run was asked to stop, and what to do about it at this time."""

    def __init__(
        self, out: str, at_once: bool = False, verb: str = "pretrain", fact: str = EARLY
    ) -> None:
        self._verb = verb
        self._sentence = f"{out}: {fact}; start the same line again."
        self._asked = threading.Event()
        self._first = 0.0
        self._starting, self._at_once = True, at_once

    def is_set(self) -> bool:
        """True once the run was asked to stop."""
        return self._asked.is_set()

    def check(self) -> None:
        """Ends a start that was asked to end, where the exception was lost in a callback."""
        if self._starting and self._asked.is_set():
            raise _EndsStart

    @contextmanager
    def first_step(self, is_first: bool) -> Iterator[None]:
        """Around the step that compiles: a request in here ends the process at once."""
        if not is_first:
            yield
            return
        try:
            with self.compiling():
                yield
        finally:
            self._starting = False

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Around what compiles: a request in here ends the process at once."""
        self.check()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def ask(self, number: int, frame: Any) -> None:
        """The signal handler; a second request ends the process at once."""
        if self._asked.is_set():
            if time.monotonic() - self._first < REPEAT_S:
                return
            os._exit(128 + number)
        self._first = time.monotonic()
        self._asked.set()
        if self._starting and not self._at_once:
            raise _EndsStart

    def watch(self, received: socket.socket) -> None:
        """Runs in a thread of its own: sees a signal whatever the main thread is doing."""
        while numbers := received.recv(16):
            if self._at_once and set(numbers) & set(SIGNALS):
                # The progress bar hid the cursor.
                shown = "\x1b[?25h" if sys.stderr.isatty() else ""
                os.write(2, f"{shown}jaxhisto {self._verb}: {self._sentence}\n".encode())
                os._exit(Stopped.exit_code)

    def stopped_at_start(self) -> Stopped:
        """The error of a run that was asked to stop before its first step."""
        return Stopped(self._sentence)


@contextmanager
def stop_requests(
    out: str, at_once: bool = False, verb: str = "pretrain", fact: str = EARLY
) -> Iterator[StopRequest]:
    """Listens to SIGTERM and SIGINT until the block ends; in other threads than the main, to none.

    Nor in one of several processes that train together: there JAX listens to SIGTERM, so that all
    stop at the same step.

    Args:
      out: the run folder, for the sentence.
      at_once: a request ends the process where it is, since nothing in the block is half of
        anything: what it may fetch or convert is renamed into its place when whole.
      verb: of the run, for the sentence.
      fact: what the sentence says of a request at once, or before the first step.

    Raises:
      Stopped: asked to stop before the first step.
    """
    stop = StopRequest(out, at_once, verb, fact)
    if threading.current_thread() is not threading.main_thread() or MEMBER in os.environ:
        yield stop
        return
    received, sent = socket.socketpair()
    sent.setblocking(False)
    wakeup = signal.set_wakeup_fd(sent.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=stop.watch, args=(received,), name="stop", daemon=True)
    watcher.start()
    before = {number: signal.signal(number, stop.ask) for number in SIGNALS}
    try:
        yield stop
    except _EndsStart:
        raise stop.stopped_at_start() from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        sent.close()
        watcher.join()
        received.close()
