"""The run folder: made, recognised, locked, and refused where it is another run's."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from jaxhisto import settings
from jaxhisto.config import PretrainConfig
from jaxhisto.data.listed import manifest_of
from jaxhisto.data.sources import Tiles
from jaxhisto.distributed import is_main
from jaxhisto.errors import RunError
from jaxhisto.launch import hostname
from jaxhisto.pretrain.plan import schedule_length
from jaxhisto.runlog import environment, write_atomically

BEGUN = {"env.json", "data.json", ".lock"}
"""What a start that was killed before its config.json may leave; it counts as nothing."""
SHARED_S = 15.0
"""How long a new file may take to be seen by the other hosts of a shared file system."""

HALVES = (".env.json.", ".data.json.", ".config.json.")
"""So begin the names under which these are written, before they are renamed."""


def open_run(config: PretrainConfig, tiles: Tiles) -> Path:
    """Makes the run folder, or checks that it is this same run.

    Raises:
      RunError: the folder holds something else, lies inside the data, or holds a run with
        another identity or other data.
    """
    out = Path(config.out)
    found = out / "config.json"
    for store in config.data.stores:
        if out.resolve().is_relative_to(Path(store).resolve()):
            raise RunError(f"{out}: lies inside the data, {store}; give --out another folder.")
    if found.exists():
        check_same_run(config, tiles, out)
    elif out.exists() and (not out.is_dir() or not all(begun(p.name) for p in out.iterdir())):
        raise RunError(f"{out}: exists and is no run folder; give --out an empty or new folder.")
    if is_main():
        out.mkdir(parents=True, exist_ok=True)
        devices = [f"{d.platform} {d.device_kind}" for d in jax.devices()]
        write_atomically(out / "env.json", json.dumps(environment(devices), indent=1) + "\n")
        write_atomically(out / "data.json", json.dumps(described(tiles), indent=1) + "\n")
        write_atomically(found, settings.to_json(config))
    elif not appears(found):
        raise RunError(
            f"{out}: process 0 made it, and it is not there on {hostname()}; give --out a folder "
            "on a file system that all hosts share."
        )
    return out


def appears(path: Path) -> bool:
    """Whether a file that another host wrote is there, or comes: NFS shows it a little later."""
    deadline = time.monotonic() + SHARED_S
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    return path.exists()


def begun(name: str) -> bool:
    """True for what a start that was killed early may leave in the folder."""
    return name in BEGUN or name.startswith(HALVES)


def check_same_run(config: PretrainConfig, tiles: Tiles, out: Path) -> None:
    """Refuses to resume under another config or on other data, naming what differs."""
    before = settings.from_json(PretrainConfig, (out / "config.json").read_text())
    ours, theirs = settings.identity(config), settings.identity(before)
    for name in ("out", *(("steps", "epochs") if config.extend else ())):
        ours.pop(name)
        theirs.pop(name)
    # Where the data lies may change between two starts; what it is may not (data_hash).
    for name in settings.PLACES:
        ours.pop(name), theirs.pop(name)
    lengths = [schedule_length(c, len(tiles))[0] for c in (before, config)]
    if config.extend and lengths[1] < lengths[0]:
        raise RunError(
            f"{out}: --extend to {lengths[1]} steps is shorter than the run's {lengths[0]}; give "
            "more steps, or another --out."
        )
    differing = settings.differences(theirs, ours)
    if differing:
        raise RunError(
            f"{out}: holds a run with another config ({'; '.join(differing)}); repeat its flags, "
            "pass --extend where only the length differs, or give another --out."
        )
    data_hash = json.loads((out / "data.json").read_text())["hash"]
    if data_hash != tiles.hash:
        raise RunError(
            f"{out}: was trained on other data ({data_hash[:12]}, now {tiles.hash[:12]}); give "
            "the same stores in the same order (or the same manifest), or another --out."
        )


def described(tiles: Tiles) -> dict[str, Any]:
    """What was trained on: goes into data.json, and from there into the export."""
    return {
        "hash": tiles.hash,
        "manifest": manifest_of(tiles),
        "tiles": len(tiles),
        "mpp_range": tiles.mpp_range(),
        "dropped": [{"name": name, "reason": reason} for name, reason in tiles.dropped],
        "summary": tiles.summary(),
    }


def stamped(tiles: Tiles) -> dict[str, str]:
    """What a checkpoint says of its data, and must say for this run to go on from it."""
    manifest = manifest_of(tiles)
    return {"data_hash": tiles.hash} | ({"manifest": manifest["sha256"]} if manifest else {})


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Holds the run folder for this process (on each host, for its own file system's view).

    Raises:
      RunError: another process trains in it.
    """
    if not is_main():
        yield
        return
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"{out}: another process is training in it; wait for it, or give another --out."
            ) from error
        yield
