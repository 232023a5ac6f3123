"""What a verb says to the person at the terminal."""

from __future__ import annotations

import os
import sys

from jaxhisto.launch import inherited


def say(text: str) -> None:
    """One line on stdout, once for all processes."""
    member = inherited(os.environ)
    if member is None or member.process == 0:
        try:
            print(text, flush=True)
        except BrokenPipeError:  # `| head` has seen enough; days of work are not given up for it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def counted(n: int, thing: str) -> str:
    """`1 slide`, `1,200 slides`."""
    return f"{n:,} {thing}" + "s" * (n != 1)


def say_next(command: str) -> None:
    """The last line printed is the next command to type."""
    say(f"next: {command}")


def warn(text: str) -> None:
    """One line on stderr, from whichever process it concerns."""
    print(text, file=sys.stderr, flush=True)
