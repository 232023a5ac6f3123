"""The small parent process of each process of a pod.

JAX's coordination service ends a process from C++, with no Python exception, when another one
dies. So the work is done in a child, and this parent, which imports no JAX, calls the roll, hands
signals on, and says in one sentence what happened: which process is gone, on which host, and how
to go on.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

from jaxhisto.launch import Launch, hostname
from jaxhisto.rollcall import Called, call_roll

STOPPED = 75
GRACE_S = 5.0
"""Time a child gets to end by itself once another process is lost: it may be about to say the
same refusal, and it may be writing."""
LAST_S = 60.0
"""Time process 0 waits for the others to end after it has."""

REPEAT_S = 1.0
"""A second request to stop within this time is the first one's echo: `timeout` and `scancel` tell
a process and then its whole group."""

NOISE = re.compile(
    r"[EFWI]\d{4} [\d:.]+ +\d+ (client\.h|coordination_service|preemption_notifier|add_port)"
    r"|\[Gloo\] Rank|W\d{4} .* \[\d+\] ConnectAfterBarrierPasses"
)
FATAL = re.compile(
    r"F\d{4} .* client\.h|\*\*\* Check failure stack trace"
    r"|E\d{4} .* coordination_service.*(Use error polling|Polled an error)"
)
SILENT = re.compile(r"stopped sending heartbeats\):\s*((?:\S*?\d+[,\s]+)+)")


class Child:
    """The process that does the work; what it says passes through, but for JAX's own noise."""

    def __init__(self, command: Sequence[str], launch: Launch, debug: bool) -> None:
        environment = dataclasses.replace(launch, parent=os.getpid()).to_environment()
        # A session of its own: Ctrl-C at the terminal reaches the parent alone, which hands it
        # on once.
        self._process = subprocess.Popen(
            command,
            env=os.environ | environment | {"PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._debug = debug
        self._tail: deque[str] = deque(maxlen=200)
        self._pumps = [
            threading.Thread(target=self._pass_through, args=pair, daemon=True)
            for pair in ((self._process.stdout, sys.stdout), (self._process.stderr, sys.stderr))
        ]
        for pump in self._pumps:
            pump.start()

    def poll(self) -> int | None:
        """The exit code, negative for a signal's number; none while it runs."""
        return self._process.poll()

    def send(self, number: int) -> None:
        """Sends a signal, if it is still there."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def wait(self, seconds: float) -> int | None:
        """The exit code, none if it has not ended within that time."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """Ends it now."""
        self._process.kill()
        self._process.wait()

    def said(self, verb: str) -> str:
        """The sentence it ended with, empty if it ended without."""
        self._drain()
        mark = f"jaxhisto {verb}: "
        found = [text for text in self._tail if text.startswith(mark)]
        return found[-1].removeprefix(mark).strip() if found else ""

    def silent(self) -> list[int]:
        """The processes that JAX's coordination service stopped hearing from."""
        self._drain()
        found = SILENT.search("".join(self._tail))
        return sorted({int(n) for n in re.findall(r"\d+(?=[,\s])", found[1])}) if found else []

    def _drain(self) -> None:
        for pump in self._pumps:
            pump.join(timeout=2)

    def _pass_through(self, source: IO[bytes], to: IO[str]) -> None:
        fatal = False
        with source:
            for raw in source:
                text = raw.decode(errors="replace")
                self._tail.append(text)
                # After this line the process only writes more of the same, and its stack trace.
                fatal = fatal or bool(FATAL.match(text))
                ours = self._debug or text.startswith("jaxhisto ")
                if ours or not (fatal or NOISE.match(text)):
                    to.write(text)
                    to.flush()


class Supervisor:
    """One parent: its child, the line to the other parents, and what to say at the end."""

    def __init__(
        self, launch: Launch, called: Called, verb: str, run: str, signals: Signals
    ) -> None:
        self._launch, self._verb, self._run, self._signals = launch, verb, run, signals
        self._line, self._hosts = called.line, called.hosts
        self._leads = launch.process == 0
        self._done: set[int] = set()

    def watch(self, child: Child) -> int:
        """Returns the exit code, once the child has ended or another process is lost."""
        while True:
            lost = self._lost(self._line.receive(0.2))
            if lost:
                return self._give_up(child, lost)
            code = child.poll()
            if code is not None:
                return self._ended(child, code)

    def _lost(self, arrived: list[tuple[int, Any]]) -> str:
        """The sentence on a process that is gone, by what came over the line; else empty."""
        for peer, message in arrived:
            if message is not None and message.get("left") in (0, STOPPED):
                self._done.add(peer)
            elif message is None and peer not in self._done:
                return self._broadcast(self._gone(peer, "is gone"), peer)
            elif message is not None and "lost" in message:
                return self._broadcast(str(message["lost"]), peer)
        return ""

    def _broadcast(self, sentence: str, but: int) -> str:
        if self._leads:
            self._line.send({"lost": sentence}, but=but)
        return sentence

    def _give_up(self, child: Child, lost: str) -> int:
        """Another process is gone: no step can be done without it."""
        if child.wait(GRACE_S) is None:
            child.kill()
        # A refusal that all processes come to is said by each of them; once is enough.
        own = child.said(self._verb)
        if not own or own not in lost:
            self._say(lost)
        self._wait_for_others(GRACE_S)
        return 1

    def _ended(self, child: Child, code: int) -> int:
        if code in (0, STOPPED):
            self._line.send({"left": code})
            self._wait_for_others(LAST_S)
            return code
        if code > 0:
            self._line.send({"lost": self._stopped(child.said(self._verb), code)})
            self._wait_for_others(GRACE_S * 2)
            return code
        return self._aborted(child, -code)

    def _aborted(self, child: Child, number: int) -> int:
        """The child ended by a signal: because of another process, or by itself."""
        sentence = ""
        if number == signal.SIGABRT:
            silent = child.silent()
            if silent:
                quiet = f"was silent for {self._launch.heartbeat} s and counts as lost"
                sentence = self._gone(silent[0], quiet)
            else:  # the line says who, a moment later
                sentence = self._lost(self._line.receive(GRACE_S))
        if not sentence:
            sentence = self._gone(self._launch.process, f"was ended by {self._signal(number)}")
        self._line.send({"lost": sentence})
        self._say(sentence)
        self._wait_for_others(GRACE_S * 2)
        return 1

    def _signal(self, number: int) -> str:
        name = signal.Signals(number).name
        if self._signals.count > 1:
            return "a second signal"
        if self._signals.count:
            return f"{name} before its first step"
        return f"{name} (out of memory?)" if number == signal.SIGKILL else name

    def _wait_for_others(self, seconds: float) -> None:
        """Process 0 goes last, so that nobody takes its end for a loss."""
        deadline = time.monotonic() + seconds
        while self._leads and self._line.peers and time.monotonic() < deadline:
            self._line.receive(0.2)
        self._line.close()

    def _who(self, process: int) -> str:
        host = self._hosts[process] if 0 <= process < len(self._hosts) else "?"
        return f"process {process} of {self._launch.processes} ({host})"

    def _stopped(self, said: str, code: int) -> str:
        return f"{self._who(self._launch.process)} stopped: {said or f'exit code {code}'}"

    def _gone(self, process: int, how: str) -> str:
        step = newest_checkpoint(self._run)
        onward = "" if not self._run else ", the run begins again"
        if step is not None:
            onward = f", the run goes on from step {step}"
        return f"{self._who(process)} {how}; start the same line again on every host{onward}."

    def _say(self, sentence: str) -> None:
        # In one piece: several processes may write to the same terminal, and print writes the
        # end of the line apart.
        sys.stderr.write(f"jaxhisto {self._verb}: {sentence}\n")
        sys.stderr.flush()


def supervise(
    launch: Launch,
    verb: str,
    argv: Sequence[str],
    record: Mapping[str, Any],
    run: str = "",
    debug: bool = False,
) -> int:
    """Calls the roll, does the work in a child, and returns the exit code.

    Args:
      launch: this process's place.
      verb, argv: the command line.
      record: what must be equal on all hosts, by kind ("settings", "versions").
      run: the run folder, to say from which step the run goes on; empty where there is none.

    Raises:
      RunError: a roll call that fails.
    """
    signals = Signals()
    called = call_roll(launch, {"host": hostname(), "time": time.time(), **record})
    if launch.process == 0:
        print(f"{launch.processes} processes on {', '.join(dict.fromkeys(called.hosts))}")
        for warning in called.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        sys.stdout.flush()
    command = [sys.executable, "-m", "jaxhisto.member", *(["--debug"] * debug), verb, *argv]
    child = Child(command, launch, debug)
    signals.hand_to(child)
    try:
        return Supervisor(launch, called, verb, run, signals).watch(child)
    finally:
        if child.poll() is None:
            child.kill()


class Signals:
    """SIGTERM and SIGINT: the first asks all processes to stop, the second ends this one.

    Before there is a child the first ends this process, as it would without us.
    """

    def __init__(self) -> None:
        self._child: Child | None = None
        self._first = 0.0
        self.count = 0

    def hand_to(self, child: Child) -> None:
        """From now on signals reach this child."""
        self._child = child
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.count and time.monotonic() - self._first < REPEAT_S:
            return
        self._first = self._first or time.monotonic()
        self.count += 1
        assert self._child is not None
        # JAX listens for SIGTERM and makes all processes stop at the same step.
        self._child.send(signal.SIGTERM if self.count == 1 else signal.SIGKILL)


def end_with_the_parent(parent: int) -> None:
    """Ends this process when its supervisor is killed: nobody would watch it any more."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def newest_checkpoint(run: str) -> int | None:
    """The step of a run's newest checkpoint, by the names in its folder; none without one."""
    folder = Path(run) / "checkpoints"
    if not run or not folder.is_dir():
        return None
    return max((int(p.name) for p in folder.iterdir() if p.name.isdigit()), default=None)
