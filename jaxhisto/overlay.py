"""`jaxhisto plot`: runs read from their folders, named by what sets them apart, and drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from jaxhisto import plots, runlog
from jaxhisto.config import PlotConfig, PretrainConfig
from jaxhisto.errors import ConfigError, RunError
from jaxhisto.settings import differences, from_json, identity

MOST_NAMED = 3
PLACES = ("out", "data.stores", "init")


def plot_runs(config: PlotConfig) -> Path:
    """Draws the runs over each other (needs the extra `plots`).

    Returns:
      The picture.

    Raises:
      RunError: a folder that is no run or has no steps yet, or matplotlib is not there.
      ConfigError: no run, a run named twice, or a picture that cannot be written.
    """
    folders = [Path(run) for run in config.runs]
    if not folders:
        raise ConfigError("no run: name the folders that `jaxhisto pretrain --out` wrote.")
    resolved = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, resolved, strict=True):
        if resolved.count(place) > 1:
            raise ConfigError(f"{folder}: is named twice; leave one out.")
    out = Path(config.out)
    if out.is_dir() or not out.parent.is_dir():
        raise ConfigError(f"--out {out}: is no file that could be written; give FOLDER/NAME.png.")
    configs = [_config(folder) for folder in folders]
    names = run_names(folders, configs)
    curves = [_curves(*each) for each in zip(folders, configs, names, strict=True)]
    try:
        return plots.overlay(curves, out)
    except ImportError as error:
        raise RunError(
            "plot: matplotlib is not installed; pip install 'jaxhisto[plots]'."
        ) from error
    except ValueError as error:
        raise ConfigError(f"--out {out}: {error}; end the name in .png.") from error


def run_names(folders: Sequence[Path], configs: Sequence[PretrainConfig]) -> list[str]:
    """A legend's entry a run: its folder's name, and the settings that differ where they are few.

    Folders of one name get those above them in front, as far as it takes to tell them apart.
    """
    settings = [identity(c) for c in configs]
    first = settings[0]
    differing = {
        line.partition(":")[0] for other in settings[1:] for line in differences(first, other)
    } - set(PLACES)
    named = sorted(differing, key=list(first).index) if len(differing) <= MOST_NAMED else []
    return [
        name + (f" ({', '.join(f'{n} {_text(s[n])}' for n in named)})" if named else "")
        for name, s in zip(_shortest(folders), settings, strict=True)
    ]


def _shortest(folders: Sequence[Path]) -> list[str]:
    parts = [folder.resolve().parts for folder in folders]
    depth = 1
    while len({p[-depth:] for p in parts}) < len(parts):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _config(folder: Path) -> PretrainConfig:
    file = folder / "config.json"
    if not file.is_file():
        raise RunError(
            f"{folder}: no run folder (config.json is missing); name one that "
            "`jaxhisto pretrain --out` wrote."
        )
    return from_json(PretrainConfig, file.read_text(encoding="utf-8"))


def _curves(folder: Path, config: PretrainConfig, name: str) -> plots.Curves:
    metrics = runlog.read_metrics(folder)
    if not metrics:
        raise RunError(f"{folder}: no step is recorded yet; let it train or leave it out.")
    return plots.Curves(
        name, metrics, runlog.read_monitor(folder), math.log(2 * config.batch_size - 1)
    )
