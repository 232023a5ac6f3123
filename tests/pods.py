"""Real processes on this machine that believe they are hosts of a pod."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Pod:
    """`count` processes with the same line, each with its own flags at the end."""

    def __init__(
        self,
        line: Sequence[object],
        count: int,
        devices: int = 1,
        own: Callable[[int], Sequence[object]] = lambda process: (),
        port: int | None = None,
        program: Sequence[str] = ("-m", "jaxhisto.cli"),
    ) -> None:
        self.port = port or free_port()
        flags = f"--xla_force_host_platform_device_count={devices}"
        self.processes = [
            subprocess.Popen(
                [
                    *(sys.executable, *program, *map(str, line)),
                    *("--distributed.coordinator", f"127.0.0.1:{self.port}"),
                    *("--distributed.processes", str(count), "--distributed.process", str(index)),
                    *map(str, own(index)),
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"XLA_FLAGS": flags},
            )
            for index in range(count)
        ]

    def finish(self, seconds: float = 400) -> list[tuple[int, str, str]]:
        """(exit code, stdout, stderr) of each process."""
        deadline = time.monotonic() + seconds
        ended = []
        for process in self.processes:
            out, err = process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
            ended.append((process.returncode, out, err))
        return ended

    def wait_for(self, condition: Callable[[], object], seconds: float = 300) -> None:
        """Returns once the condition holds; fails where a process ends before."""
        deadline = time.monotonic() + seconds
        while not condition():
            for process in self.processes:
                assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "waited too long"
            time.sleep(0.05)

    def kill(self, index: int) -> None:
        """SIGKILL to a process and to what it started, as a host that is switched off."""
        pid = self.processes[index].pid
        for member in [*children(pid), pid]:
            with suppress(ProcessLookupError):
                os.kill(member, signal.SIGKILL)


@contextmanager
def pod(*args: object, **kwargs: object) -> Iterator[Pod]:
    """A pod of which nothing is left at the end."""
    made = Pod(*args, **kwargs)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        for index, process in enumerate(made.processes):
            if process.poll() is None:
                made.kill(index)
            process.communicate()


def children(pid: int) -> list[int]:
    """The processes that one has started."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def refusals(ended: Sequence[tuple[int, str, str]], verb: str = "pretrain") -> list[str]:
    """The one sentence of each process that refused, exit code 1 and no traceback."""
    sentences = []
    for code, _, err in ended:
        assert code == 1, err
        assert "Traceback" not in err
        said = [text for text in err.splitlines() if text.startswith(f"jaxhisto {verb}: ")]
        assert len(said) == 1, err
        sentences.append(said[0])
    return sentences
