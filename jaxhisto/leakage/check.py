"""`jaxhisto leakage`: opens both sides, searches, writes the report."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jaxhisto import __version__, settings
from jaxhisto.config import MANY, DataConfig, PretrainConfig
from jaxhisto.data.listed import manifest_of
from jaxhisto.data.manifest import is_manifest, read_manifest
from jaxhisto.data.sources import Tiles, open_tiles
from jaxhisto.errors import ConfigError, RunError, StoreError
from jaxhisto.file_config import LeakageConfig
from jaxhisto.leakage import names, report
from jaxhisto.leakage.search import KINDS, Found, search
from jaxhisto.runlog import write_atomically

FORMAT = "jaxhisto-leakage-1"
PROOF = (*KINDS, "slide", "patient")
"""The kinds that are an overlap; an equal `name` alone is none."""


@dataclass(frozen=True)
class Result:
    """Fields:
    record: leakage.json.
    out: folder of the report.
    lines: what to print; the last but one is the verdict.
    """

    record: dict[str, Any]
    out: Path
    lines: Sequence[str]

    @property
    def overlap(self) -> bool:
        """Whether anything was found that both sides share."""
        return bool(self.record["overlap"])


def check(config: LeakageConfig) -> Result:
    """Searches and writes pairs.csv, leakage.json and leakage.png; of a run also into the run.

    Raises:
      ConfigError: nothing to compare, a report that is there already, or a pattern that is no
        regular expression.
      StoreError: stores or images that cannot be read.
      RunError: a run whose data is not what it was.
    """
    names.read_patterns(config.patient_pattern, config.slide_pattern)
    config = _sides(config)
    if not config.pretraining or not config.against:
        missing = "--against" if config.pretraining else "the pretraining data"
        raise ConfigError(
            f"{missing}: nothing is named; give a run, a list, stores or image folders."
        )
    run, listed = _alone(config.pretraining)
    against_names = "-".join(_short(path) for path in config.against)
    out = _out(config, run, against_names)
    against = open_tiles(
        DataConfig(
            stores=config.against,
            max_side=MANY,  # uncut: a labelled image is one
            failures_allowed=config.failures_allowed,
            threads=config.threads,
        )
    )
    if run:
        pretraining, digest = _run_tiles(run, config)
    else:
        pretraining, digest = _listed_tiles(listed, config) if listed else _tiles(config)
    found = search(pretraining, against, config)
    record = _record(config, found, pretraining, digest, against)
    try:
        out.mkdir(parents=True, exist_ok=True)
        report.write_pairs(out / "pairs.csv", found, pretraining, against)
        report.draw(out / "leakage.png", found, pretraining, against, config.worst)
        # Last: a folder with leakage.json is whole.
        text = json.dumps(record, indent=1) + "\n"
        write_atomically(out / "leakage.json", text)
        if run:
            write_atomically(run / f"leakage-{against_names}.json", text)
    except OSError as error:
        raise ConfigError(
            f"{error.filename or out}: cannot be written ({error.strerror}); make room or give "
            "--out another folder."
        ) from error
    return Result(record, out, report.summary(record, out))


def _sides(config: LeakageConfig) -> LeakageConfig:
    """`jaxhisto leakage LIST LABELLED...`: a run or a list stands alone, so what follows is the
    other side."""
    first, *rest = config.pretraining or ("",)
    if config.against or not rest or not (_is_run(first) or is_manifest(first)):
        return config
    return replace(config, pretraining=(first,), against=tuple(rest))


def _is_run(path: str) -> bool:
    return (Path(path) / "config.json").is_file()


def _alone(paths: Sequence[str]) -> tuple[Path | None, Path | None]:
    """The run, or the list, that is asked about; neither of stores and folders."""
    runs = [Path(p) for p in paths if _is_run(p)]
    lists = [Path(p) for p in paths if is_manifest(p)]
    if runs and len(paths) > 1:
        raise ConfigError(f"{runs[0]}: is a run, which says its data itself; name it alone.")
    if lists and len(paths) > 1:
        raise ConfigError(
            f"{lists[0]}: is a list of tiles; name it alone, and where they lie with --stores."
        )
    return next(iter(runs), None), next(iter(lists), None)


def _out(config: LeakageConfig, run: Path | None, against: str) -> Path:
    if not config.out and run is None:
        raise ConfigError("--out: is needed where the pretraining data is no run folder.")
    out = Path(config.out) if config.out else Path(f"{run}/leakage-{against}")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is a file; give a folder.")
    foreign = out.is_dir() and any(p.name not in report.FILES for p in out.iterdir())
    if foreign or ((out / "leakage.json").exists() and not config.force):
        remedy = "give another" if foreign else "pass --force to replace that report, or another"
        raise ConfigError(f"--out {out}: is not empty; {remedy} folder.")
    for path in (*config.pretraining, *config.stores, *config.against):
        if run is None or path not in config.pretraining:
            _refuse_inside(out, Path(path))
    return out


def _refuse_inside(out: Path, data: Path) -> None:
    """leakage.png would be an image of that folder from then on."""
    if out.resolve().is_relative_to(data.resolve()):
        raise ConfigError(f"--out {out}: lies inside the data, {data}; give another folder.")


def _tiles(config: LeakageConfig) -> tuple[Tiles, str]:
    """Stores and folders as `pretrain` opens them, but uncut, and their hash."""
    if config.stores:
        raise ConfigError(
            f"--stores: is for a list of tiles or a run, and {config.pretraining[0]} is neither; "
            "name stores and folders without the flag."
        )
    data = DataConfig(
        stores=config.pretraining,
        exclude=config.exclude,
        failures_allowed=config.failures_allowed,
        threads=config.threads,
    )
    tiles = open_tiles(replace(data, max_side=MANY))
    return tiles, Tiles(tiles.sources, data).hash


def _listed_tiles(path: Path, config: LeakageConfig) -> tuple[Tiles, str]:
    """Exactly the tiles of a list, uncut, and the hash of a run that is trained on them."""
    if config.exclude:
        raise ConfigError(f"--exclude: {path} says itself what is in it; leave the flag out.")
    if not config.stores:
        names = [str(dataset["name"]) for dataset in read_manifest(path).datasets]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ConfigError(
            f"--stores: is needed, since {path} holds no tiles and no paths; name the stores and "
            f"folders of {', '.join(names[:3])}{more} that it was drawn from."
        )
    data = DataConfig(stores=config.stores, manifest=str(path), threads=config.threads)
    try:
        tiles = open_tiles(replace(data, max_side=MANY))
    except StoreError as error:
        raise StoreError(str(error).replace("--data.stores", "--stores")) from error
    return tiles, Tiles(tiles.sources, data).hash


def _run_tiles(run: Path, config: LeakageConfig) -> tuple[Tiles, str]:
    """What a run was trained on, uncut, and the hash it states.

    Everything that selects tiles is in the run's `data` settings, so a new kind of selection
    needs nothing here.
    """
    if config.exclude:
        raise ConfigError(f"--exclude: {run} says itself what it left out; leave the flag out.")
    file = run / "data.json"
    if not file.is_file():
        raise RunError(f"{run}: data.json is missing, it is no run that has begun; name another.")
    stated = json.loads(file.read_text(encoding="utf-8"))["hash"]
    text = (run / "config.json").read_text(encoding="utf-8")
    data = settings.from_json(PretrainConfig, text).data
    if config.stores:
        data = replace(data, stores=config.stores)
    try:
        tiles = open_tiles(replace(data, max_side=MANY, threads=config.threads))
    except StoreError as error:
        raise RunError(
            f"{run}: its data cannot be opened any more ({str(error).rstrip('.')}); put it back, "
            "or say with --stores where it lies now."
        ) from error
    if Tiles(tiles.sources, data).hash != stated:
        raise RunError(
            f"{run}: was trained on other data ({stated[:12]}) than lies there now; put it back, "
            "say with --stores where it lies, or name the stores instead of the run."
        )
    return tiles, stated


def _record(
    config: LeakageConfig, found: Found, pretraining: Tiles, digest: str, against: Tiles
) -> dict[str, Any]:
    sets = []
    for number, source in enumerate(against.sources):
        counts = {
            kind: {
                "images": found.images[number, kind],
                "pairs": found.counts[number, kind],
            }
            for kind in KINDS
        }
        for kind in ("slide", "patient", "name"):
            groups = [s for s in found.shared[number] if s.kind == kind]
            counts[kind] = {
                "ids": len(groups),
                "images": sum(group.labelled.tiles for group in groups),
            }
        sets.append(
            {
                "name": source.path.resolve().name,
                "hash": source.hash,
                "images": len(source),
                "too_flat": found.flat[1][number],
                "seen_again": sum(found.images[number, kind] for kind in KINDS),
                "counts": counts,
                "overlap": any(counts[kind]["images"] for kind in PROOF),
            }
        )
    return {
        "format": FORMAT,
        "code_version": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "pretraining": {
            "names": [source.path.resolve().name for source in pretraining.sources],
            "hash": digest,
            "tiles": len(pretraining),
            "manifest": manifest_of(pretraining),
            "too_flat": found.flat[0],
            "dropped": len(pretraining.dropped),
        },
        "against": sets,
        "thresholds": {
            "distance_bits_of_63": config.distance,
            "correlation": config.correlation,
            "flat_grey_levels": config.flat,
            "parts": config.parts,
            "patient_pattern": config.patient_pattern,
            "slide_pattern": config.slide_pattern,
        },
        "overlap": any(each["overlap"] for each in sets),
    }


def _short(path: str) -> str:
    """The last part of a path, as far as it can be part of a file name."""
    return re.sub(r"[^\w.+-]+", "_", Path(path).resolve().name) or "set"
