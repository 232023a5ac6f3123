"""How much memory of the host a process may still take: of the machine, and of its container."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
LIMITS = (
    ("memory.max", "memory.current", "inactive_file"),  # control groups, version 2
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # version 1
)


def available_bytes(root: Path = ROOT) -> int | None:
    """Bytes that this process can still take, or None where the system does not say.

    The least of what the machine has and of what each control group around the process (a
    container, a batch job) has left; pages of files that can be dropped count as free. Where
    there is no /proc, the memory installed.

    Args:
      root: where /proc and /sys are looked for.
    """
    found = [*_of_machine(root), *_of_groups(root)]
    return max(0, min(found)) if found else None


def _of_machine(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024
            return
    if "SC_PHYS_PAGES" in os.sysconf_names:
        yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_groups(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / ("sys/fs/cgroup/memory" if controllers else "sys/fs/cgroup")
        group = mount / path.lstrip("/")
        # A parent's limit binds too. In a container the path may be the host's, and not there.
        for folder in (group, *group.parents):
            yield from _left_in(folder)
            if folder == mount:
                break


def _left_in(group: Path) -> Iterator[int]:
    for limit, usage, droppable in LIMITS:
        most, used = _lines(group / limit), _lines(group / usage)
        if most and used and most[0].isdigit():
            stats = dict(line.split(maxsplit=1) for line in _lines(group / "memory.stat"))
            yield int(most[0]) - int(used[0]) + int(stats.get(droppable, 0))


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
