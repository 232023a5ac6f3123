"""The folder of a training run on a task: made, recognised, and refused where it is another's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxhisto import settings
from jaxhisto.distributed import is_main
from jaxhisto.errors import ConfigError, RunError
from jaxhisto.runlog import environment, write_atomically

CONFIG, ENVIRONMENT, LOCK = "config.json", "env.json", ".lock"
FACTS = "facts.json"  # not data.json, by which a run of `pretrain` is known
HALVES = tuple(f".{name}." for name in (CONFIG, ENVIRONMENT, FACTS))
"""So begin the names under which these are written, before they are renamed."""
PLACES = ("out", "encoder", "task.data", "task.labels", "task.masks", "task.split")
"""Settings that say where something lies: it may move, what it is stands in the facts."""
HASH = 64  # letters of a sha256, of which a message shows some


def open_run(out: str | Path, config: Any, facts: Mapping[str, Any]) -> Path:
    """Makes the run folder, or checks that it is this same run.

    Args:
      out: the folder.
      config: a frozen dataclass; written to config.json.
      facts: what was trained on and from, as hashes and names, one level deep; JSON, written to
        facts.json.

    Raises:
      RunError: the folder holds something else, or a run with other settings or facts, or cannot
        be written.
    """
    path = Path(out)
    try:
        if (path / CONFIG).exists():
            _check_same(path, config, facts)
        elif path.exists() and not (path.is_dir() and all(_begun(p.name) for p in path.iterdir())):
            raise RunError(
                f"{path}: exists and is no run folder; give --out an empty or new folder."
            )
        if is_main():
            path.mkdir(parents=True, exist_ok=True)
            devices = [f"{d.platform} {d.device_kind}" for d in jax.devices()]
            found = json.dumps(environment(devices), indent=1)
            write_atomically(path / ENVIRONMENT, found + "\n")
            write_atomically(path / FACTS, json.dumps(dict(facts), indent=1) + "\n")
            write_atomically(path / CONFIG, settings.to_json(config))
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written ({error.strerror}); give another --out."
        ) from error
    return path


def _check_same(path: Path, config: Any, facts: Mapping[str, Any]) -> None:
    try:
        text = (path / CONFIG).read_text(encoding="utf-8")
        before = settings.from_json(type(config), text)
        known = json.loads((path / FACTS).read_text(encoding="utf-8"))
    except (ConfigError, ValueError, TypeError, KeyError, FileNotFoundError) as error:
        raise RunError(
            f"{path}: holds a run of another verb or version ({str(error).rstrip('.')}); give "
            "another --out."
        ) from error
    ours, theirs = (
        {k: v for k, v in settings.identity(c).items() if k not in PLACES} for c in (config, before)
    )
    differing = settings.differences(theirs, ours)
    differing += settings.differences(_shown(known), _shown(json.loads(json.dumps(dict(facts)))))
    if differing:
        raise RunError(
            f"{path}: holds a run with other settings or data ({'; '.join(differing)}); repeat "
            "them, or give another --out."
        )


def _begun(name: str) -> bool:
    """True for what a start that was killed before its config.json may leave: nothing."""
    return name in (ENVIRONMENT, FACTS, LOCK) or name.startswith(HALVES)


def _shown(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts with hashes as short as a message shows them, 48 bits."""
    return {
        k.removesuffix("_sha256"): v[:12] if isinstance(v, str) and len(v) == HASH else v
        for k, v in facts.items()
    }
