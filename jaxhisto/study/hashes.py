"""What the files of a task hold, as hashes; a file that did not change is not read again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxhisto.errors import StoreError
from jaxhisto.runlog import write_atomically
from jaxhisto.task_config import TaskConfig
from jaxhisto.tasks.task import Task

MASKS = "masks"


def content_hash(files: Mapping[str, Path], memory: Path, threads: int = 0) -> str:
    """Of the names and contents of files, in their order, hexadecimal.

    Args:
      files: by names that stay when their folder is moved.
      memory: a JSON file of what was read earlier; files of the size and date that it has are not
        read again. Written anew.
      threads: that read; 0: as many as Python takes.

    Raises:
      StoreError: one cannot be read, or the memory not be written.
    """
    seen = _seen(memory)

    def one(name: str) -> list[Any]:
        try:
            stat = files[name].stat()
            state = [stat.st_size, stat.st_mtime_ns]
            if name in seen and seen[name][:2] == state:
                return seen[name]
            return [*state, digest(files[name])]
        except OSError as error:
            raise StoreError(
                f"{files[name]}: cannot be read ({error.strerror}); restore it."
            ) from error

    with ThreadPoolExecutor(threads or None) as pool:
        found = dict(zip(files, pool.map(one, files), strict=True))
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(memory, json.dumps(found) + "\n")
    except OSError as error:
        raise StoreError(
            f"{memory}: cannot be written ({error.strerror}); choose another --out."
        ) from error
    content = [[name, facts[2]] for name, facts in found.items()]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def digests_of(memory: Path) -> dict[str, str]:
    """SHA-256 of the files that `content_hash` read, by their names, from its memory."""
    return {name: facts[2] for name, facts in _seen(memory).items()}


def digest(path: Path) -> str:
    """SHA-256 of a file, which may be larger than the memory; OSError where it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def task_hashes(task: Task, config: TaskConfig, memory: Path, threads: int = 0) -> tuple[str, str]:
    """Of a task's images; and of these, classes, targets or masks, and groups.

    Args:
      memory: where `content_hash` keeps what it read, without its suffix.

    Raises:
      StoreError: as `content_hash`.
    """
    images = content_hash(task.images.files(), memory.parent / f"{memory.name}.json", threads)
    found = hashlib.sha256(f"{images} {task.kind} {json.dumps(task.classes)}".encode())
    if task.kind == "segmentation":
        held = memory.parent / MASKS / f"{memory.name}.json"
        masks = content_hash(task.masks.files(), held, threads)
        found.update(json.dumps([masks, config.masks_are, config.window, task.names]).encode())
    else:
        found.update(task.values.tobytes())
    found.update(json.dumps(task.groups).encode())
    return images, found.hexdigest()


def _seen(memory: Path) -> dict[str, list[Any]]:
    """Size, date and hash by name; empty where the file is not there or holds something else."""
    try:
        held = json.loads(memory.read_text(encoding="utf-8"))
        return {name: facts for name, facts in held.items() if len(facts) == 3}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
