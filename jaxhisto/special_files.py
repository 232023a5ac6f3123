"""Named pipes, sockets and devices, which bear any name that a file can.

To open a pipe waits until another process writes to it: a slide or image that is one would hang a
run for ever, without a word. So whatever opens what a user named, or what lies in a folder of
theirs, asks here first.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class SpecialFileError(OSError):
    """A path that leads to no file; `strerror` says to what, as of other errors of opening."""


def no_pipe(path: Path) -> Path:
    """The path itself, links and folders too: to be opened, which tells what else is amiss.

    Raises:
      SpecialFileError: a named pipe, a socket or a device.
    """
    if kind := special_kind(path):
        raise SpecialFileError(errno.EINVAL, f"it is {kind}, no file")
    return path


def special_kind(path: Path | str) -> str:
    """`a named pipe`, `a socket` or `a device`, links followed; empty for all else."""
    try:
        return KINDS.get(stat.S_IFMT(os.stat(path).st_mode), "")
    except (OSError, ValueError):  # not there, or a name with a null byte
        return ""
