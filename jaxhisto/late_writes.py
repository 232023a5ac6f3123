"""Keeps the storage library's late reports about a failed save from the terminal.

The first error of a save is ours to tell. Orbax writes many arrays at once and closes the event
loop at the first failure: of the other writes Python prints a traceback each, dozens on a full
disk, either since the loop is closed or since nobody asked for their error.
"""

from __future__ import annotations

import logging
import sys
import traceback
from pathlib import PurePath
from typing import Any

_FROM = {"orbax", "tensorstore"}


def ignore_late_writes() -> None:
    """Installs both filters, once in a process."""
    before = sys.unraisablehook
    if getattr(before, "ignores_late_writes", False):
        return

    def hook(report: Any) -> None:
        if str(report.exc_value) != "Event loop is closed":
            before(report)

    hook.ignores_late_writes = True  # type: ignore[attr-defined]
    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(_is_to_be_told)


def _is_to_be_told(record: logging.LogRecord) -> bool:
    if "exception was never retrieved" not in record.getMessage() or not record.exc_info:
        return True
    frames = traceback.walk_tb(record.exc_info[2])
    return not any(_FROM & set(PurePath(f.f_code.co_filename).parts) for f, _ in frames)
