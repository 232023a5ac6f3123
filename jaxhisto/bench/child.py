"""The parent's side of a point: starts it, hands its lines on, and says how it ended."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxhisto import errors
from jaxhisto.bench import memory
from jaxhisto.errors import JaxhistoError, RunError

RAISED = re.compile(r"^\w[\w.]*(?:Error|Exception)\b")
TRACEBACK = "Traceback (most recent call last)"


class OutOfMemory(Exception):
    """The child ended because memory was out, without saying so in a row."""


def ask(job: Mapping[str, Any], env: Mapping[str, str] | None = None) -> Iterator[dict[str, Any]]:
    """The lines that a child answers to a job, as they come.

    Args:
      job: as `point.main` reads it. `log` in it is the file that the child's stderr is added to
        where it failed, or told of an error and went on; without one, stderr is lost.
      env: variables that the child has beside this process's.

    Raises:
      JaxhistoError: of the class and with the sentence that the child raised.
      OutOfMemory: it was ended by the system, or by an allocator that gave up.
      RunError: it ended otherwise; the error that it wrote last, and the log, are in the sentence.
    """
    command = [sys.executable, "-m", "jaxhisto.bench.point"]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        own = {**room(os.environ), **os.environ, **(env or {})}
        process = subprocess.Popen(
            command, env=own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True,
            process_group=0,
        )  # fmt: skip
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
            # Also where the caller is interrupted or stops asking: neither the child nor a peer of
            # its making, which may compile for minutes, must go on.
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdout:
                process.stdout.close()
            said.seek(0)
            text = said.read()
            log = keep(job.get("log", ""), text, process.returncode)
        end(process.returncode, text, log)


def room(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables by which JAX takes of a GPU what it needs, up to nearly all, and not at once.

    It would otherwise hold three quarters, and no more, of a GPU that a peer shares. jaxlib refuses
    the new name of the share beside its old one.
    """
    found = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & set(environ):
        found["XLA_CLIENT_MEM_FRACTION"] = "0.92"
    return found


def raised(answer: Mapping[str, str]) -> JaxhistoError:
    """The error that a child tells of, of its own class."""
    kind = getattr(errors, answer["kind"], RunError)
    error: JaxhistoError = kind(answer["error"])
    return error


def keep(log: str, said: str, code: int) -> str:
    """Adds what a child said to the log if there was an error; the log, or "" if it was not."""
    if not log or not said.strip() or (code == 0 and TRACEBACK not in said):
        return ""
    with Path(log).open("a", encoding="utf-8") as file:
        file.write(f"{said.rstrip()}\n(the process ended with code {code})\n\n")
    return log


def end(code: int, said: str, log: str = "") -> None:
    """Returns where a child ended well.

    Raises:
      OutOfMemory, RunError: as `ask`.
    """
    if code == 0:
        return
    # XLA warns of memory that it would have liked to have; a child that ends by itself and for
    # want of memory says so by its code, so the text is asked only where a signal ended it.
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    mortal = "\n".join(line for line in lines if "not a failure" not in line)
    killed = code == -getattr(signal, "SIGKILL", 9)  # what the system's OOM killer sends
    if killed or code == memory.EXIT:
        raise OutOfMemory
    if code < 0 and memory.is_out_of_memory(RuntimeError(mortal)):
        raise OutOfMemory
    errors_said = [line for line in said.splitlines() if RAISED.match(line)]
    last = (errors_said or lines or ["it wrote nothing"])[-1]
    where = f"all that it said is in {log}" if log else "run fewer --stages to see which it was"
    raise RunError(f"the process that measures ended with code {code} ({last[:200]}); {where}.")
