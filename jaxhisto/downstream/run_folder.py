"""The folder of a training run on a task: made, recognised, and refused where it is another's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxhisto import settings
from jaxhisto.errors import RunError
from jaxhisto.pretrain.folder import begun
from jaxhisto.runlog import environment, write_atomically

PLACES = ("out", "encoder", "task.data", "task.labels", "task.masks", "task.split")
"""Settings that say where something lies: it may move, what it is stands in the facts."""


def open_run(out: str | Path, config: Any, facts: Mapping[str, Any]) -> Path:
    """Makes the run folder, or checks that it is this same run.

    Args:
      out: the folder.
      config: a frozen dataclass; written to config.json.
      facts: what was trained on and from, as hashes; JSON, written to data.json.

    Raises:
      RunError: the folder holds something else, or a run with other settings or facts.
    """
    path = Path(out)
    found = path / "config.json"
    if found.exists():
        _check_same(path, config, facts)
    elif path.exists() and (not path.is_dir() or not all(begun(p.name) for p in path.iterdir())):
        raise RunError(f"{path}: exists and is no run folder; give --out an empty or new folder.")
    path.mkdir(parents=True, exist_ok=True)
    devices = [f"{d.platform} {d.device_kind}" for d in jax.devices()]
    write_atomically(path / "env.json", json.dumps(environment(devices), indent=1) + "\n")
    write_atomically(path / "data.json", json.dumps(dict(facts), indent=1) + "\n")
    write_atomically(found, settings.to_json(config))
    return path


def _check_same(path: Path, config: Any, facts: Mapping[str, Any]) -> None:
    text = (path / "config.json").read_text(encoding="utf-8")
    try:
        before = settings.from_json(type(config), text)
    except (ValueError, TypeError, KeyError, RunError) as error:
        raise RunError(
            f"{path}: holds a run of another verb or version ({error}); give another --out."
        ) from error
    ours, theirs = settings.identity(config), settings.identity(before)
    differing = settings.differences(
        {k: v for k, v in theirs.items() if k not in PLACES},
        {k: v for k, v in ours.items() if k not in PLACES},
    )
    known = json.loads((path / "data.json").read_text(encoding="utf-8"))
    differing += settings.differences(known, json.loads(json.dumps(dict(facts))))
    if differing:
        raise RunError(
            f"{path}: holds a run with other settings or data ({'; '.join(differing)}); repeat "
            "them, or give another --out."
        )
