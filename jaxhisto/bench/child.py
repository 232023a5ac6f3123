"""The parent's side of a point: starts it, hands its lines on, and says how it ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from jaxhisto import errors
from jaxhisto.bench import memory
from jaxhisto.errors import JaxhistoError, RunError


class OutOfMemory(Exception):
    """The child ended because memory was out, without saying so in a row."""


def ask(job: Mapping[str, Any], env: Mapping[str, str] | None = None) -> Iterator[dict[str, Any]]:
    """The lines that a child answers to a job, as they come.

    Args:
      job: as `point.main` reads it.
      env: variables that the child has beside this process's.

    Raises:
      JaxhistoError: of the class and with the sentence that the child raised.
      OutOfMemory: it was ended by the system, or by an allocator that gave up.
      RunError: it ended otherwise; the last line that it wrote is in the sentence.
    """
    command = [sys.executable, "-m", "jaxhisto.bench.point"]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        # JAX would otherwise take three quarters of a GPU that a peer shares.
        own = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ, **(env or {})}
        process = subprocess.Popen(
            command, env=own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True
        )
        try:
            assert process.stdin
            assert process.stdout
            process.stdin.write(json.dumps(job))
            process.stdin.close()
            for line in process.stdout:
                answer = json.loads(line)
                if "error" in answer:
                    raise raised(answer)
                yield answer
            process.wait()
        finally:
            # Also where the caller is interrupted or stops asking: the child must not go on.
            process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()
        said.seek(0)
        end(process.returncode, said.read())


def raised(answer: Mapping[str, str]) -> JaxhistoError:
    """The error that a child tells of, of its own class."""
    kind = getattr(errors, answer["kind"], RunError)
    error: JaxhistoError = kind(answer["error"])
    return error


def end(code: int, said: str) -> None:
    """Returns where a child ended well.

    Raises:
      OutOfMemory, RunError: as `ask`.
    """
    if code == 0:
        return
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    killed = code == -getattr(signal, "SIGKILL", 9)  # what the system's OOM killer sends
    if killed or code == memory.EXIT or memory.is_out_of_memory(RuntimeError(said)):
        raise OutOfMemory
    last = lines[-1] if lines else "it wrote nothing"
    raise RunError(
        f"the process that measures ended with code {code} ({last[:200]}); "
        "run the same line with --debug and fewer --stages to see which one it was."
    )
