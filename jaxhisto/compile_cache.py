"""Compiled programs, kept from one start to the next: a step takes half a minute to compile."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

WHERE, MOST = "JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE"
LIMIT = 4 << 30
"""Bytes that are kept, the least recently used of which JAX removes; a step takes some 20 MB."""


def keep_compiled() -> None:
    """Tells JAX where to keep what it compiles, unless the environment says; before it is imported.

    Below the user's cache folder, as downloads are, at most LIMIT bytes. An empty value in the
    environment keeps nothing; a limit in it stays.
    """
    if WHERE in os.environ:
        return
    where = caches() / "jaxhisto" / "compiled" / processor()
    os.environ[WHERE] = str(where)
    if find_spec("filelock"):  # without it JAX keeps to no limit: it refuses to keep anything
        os.environ.setdefault(MOST, str(LIMIT))
        drop_unmarked(where)


def drop_unmarked(folder: Path, older_s: float = 60) -> None:
    """Removes programs without a time of use beside them, where they are older than that.

    A process that was killed while it wrote leaves one, perhaps half-written; so does a start
    without filelock. With a limit JAX stops at the first of them, with a warning at each program,
    and keeps nothing new (jax issue 39880). Younger ones may be another process's at work.
    """
    for program in folder.glob("*-cache"):
        mark = program.with_name(program.name.removesuffix("-cache") + "-atime")
        with suppress(OSError):  # read only, or removed by another process meanwhile
            if not mark.exists() and time.time() - program.stat().st_mtime > older_s:
                program.unlink()


def caches() -> Path:
    """The user's folder for caches, the same as pooch's, which need not be installed here."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return Path(local) if local else Path.home() / "AppData" / "Local"
    given = os.environ.get("XDG_CACHE_HOME", "").strip()
    return Path(given) if given else Path.home() / ".cache"


def processor() -> str:
    """A name for machines whose CPU takes the same instructions.

    Home folders are shared by machines; a program that XLA compiled for one CPU may hold
    instructions that another has not. (For GPUs and TPUs JAX's own key tells the kinds apart.)
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        able = next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        able = platform.processor()
    return hashlib.sha256(f"{platform.machine()} {able}".encode()).hexdigest()[:12]
