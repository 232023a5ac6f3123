"""`jaxhisto probe`: features and a task -> scores of probes, with intervals, and their record."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxhisto import __version__, metrics
from jaxhisto.console import say, warn
from jaxhisto.data.features import read_features
from jaxhisto.data.labelled import few
from jaxhisto.data.named_images import NamedImages, centre_square
from jaxhisto.distributed import make_mesh
from jaxhisto.downstream.embed import features_of
from jaxhisto.downstream.encoders import open_encoder
from jaxhisto.downstream.inputs import in_threads
from jaxhisto.downstream.last_layer import Training
from jaxhisto.downstream.probing import Divided, Probed, Settings, probe
from jaxhisto.downstream_config import ProbeConfig
from jaxhisto.errors import ConfigError, StoreError
from jaxhisto.runlog import environment, write_atomically
from jaxhisto.task_config import TaskConfig
from jaxhisto.tasks.copies import copies_across
from jaxhisto.tasks.splits import fraction, task_split, write_split
from jaxhisto.tasks.task import Split, Task, open_task

FORMAT = "jaxhisto-probe-1"
Digests = Callable[[], list[bytes]]


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Features of a task's images, in its order: `x` (n, d) float32, and what `of` them is known:
    encoder_sha256, arch, side, and so on."""

    x: NDArray[np.float32]
    of: dict[str, Any]


def run_probe(config: ProbeConfig) -> dict[str, Any]:
    """Probes, prints a table, and writes the record and the split.

    Returns:
      The record.

    Raises:
      ConfigError: settings that do not go together.
      StoreError: features, task or split that are not as they should be, or another encoder's.
      ExportError: no such encoder.
    """
    out = Path(config.out)
    if out.is_dir():
        raise StoreError(f"{out}: is a folder; give --out a file, such as {out / 'probe.json'}.")
    refuse_foreign(out)
    if not config.probes:
        raise ConfigError("--probes names none; name one of them, or leave the flag out.")
    if config.select == "groups" and config.percent < 100 and "linear" in config.probes:
        raise ConfigError(
            f"--select groups: fits on all validation images too, which makes more of "
            f"--percent {config.percent:g} than it says; take --select validation."
        )
    task = open_task(config.task)
    if task.kind == "segmentation":
        raise ConfigError(
            f"{task.name}: is a segmentation task, which has no features a tile; "
            "`jaxhisto segment` trains on it."
        )
    say("\n".join(task.summary()))
    split = task_split(task, config.task)
    say(split.summary())
    images, threads = task.images, config.threads
    assert isinstance(images, NamedImages)  # as of all tasks but those with masks
    digests = functools.cache(lambda: images.digests(threads))
    if _is_features(config.features):
        rows = cached(config, task, digests)
    else:
        rows = computed(config, task)
    copies = copies_across(task, split, dict(zip(task.names, digests(), strict=True)))
    if copies:
        warn(copies)
    data = divided(task, split, rows.x, config)
    settings = settings_of(config, rows.of["arch"])
    if "last_layer" in config.probes and len(data.train) < config.batch:
        say(f"{len(data.train):,} training images are fewer than a batch of {config.batch}: one "
            "batch an epoch")  # fmt: skip
    found = [probe(name, data, settings) for name in config.probes]
    record = record_of(config, task, split, rows, data, settings, found)
    say(table(found, data))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_split(split_beside(out), split, task)
        write_atomically(out, json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise StoreError(
            f"{out}: cannot be written ({error.strerror}); give another --out."
        ) from error
    return record


def split_beside(out: Path) -> Path:
    """The split of a record."""
    return out.with_name(f"split-{out.stem}.json")


def refuse_foreign(out: Path) -> None:
    """Refuses to write over what no probe wrote, and where nothing can be written.

    Raises:
      StoreError: the file or the one of its split is something else, or their folder is none.
    """
    for path, key, value in ((out, "format", FORMAT), (split_beside(out), "task", None)):
        if path.exists() and not _holds(path, key, value):
            raise StoreError(
                f"{path}: exists and is nothing that `jaxhisto probe` wrote; give another --out."
            )
    there = next(parent for parent in out.absolute().parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise StoreError(f"{out}: {there} is no folder to write in; give another --out.")


def _holds(path: Path, key: str, value: str | None) -> bool:
    """Whether a file is a JSON object with a text of that key: the one given, or any."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    text = found.get(key) if isinstance(found, dict) else None
    return isinstance(text, str) and value in (None, text)


def cached(config: ProbeConfig, task: Task, digests: Digests) -> Rows:
    """The rows of the task's images, whose sha256 `digests` gives, in a file of features.

    Raises:
      StoreError: another encoder's, or images that are not in it or are others by now.
    """
    if not config.encoder and (config.mean or config.std):
        raise ConfigError(
            f"--mean and --std: are for an encoder, and {config.features} holds features; leave "
            "them out."
        )
    with read_features(config.features) as found:
        if config.encoder:
            encoder = open_encoder(config.encoder, config.mean, config.std)
            if encoder.sha256 != found.encoder_sha256:
                raise StoreError(
                    f"{config.features}: holds features of another encoder "
                    f"({found.encoder_sha256[:12]}, and {config.encoder} is "
                    f"{encoder.sha256[:12]}); embed the images with this one."
                )
        fed = found.attributes.get("side", config.task.side)
        if config.task.side not in (TaskConfig().side, fed):
            raise ConfigError(
                f"--task.side {config.task.side}: {config.features} holds features of images fed "
                f"at {fed} px; leave it out, or embed with --tile-px {config.task.side}."
            )
        row = {name: i for i, name in enumerate(found.names)}
        missing = [name for name in task.names if name not in row]
        if missing:
            raise StoreError(
                f"{config.features}: lacks {len(missing):,} of {len(task):,} images of {task.name} "
                f"(the first, {missing[0]}); embed the folder that the task names, with a "
                "--max-side as large as its images."
            )
        if len(row) < len(found.names):
            counts = Counter(found.names)
            twice = [name for name in task.names if counts[name] > 1]
            if twice:
                raise StoreError(
                    f"{config.features}: has {len(twice):,} names twice (the first, {twice[0]}); "
                    "embed the task's folder alone."
                )
        rows = [row[name] for name in task.names]
        if found.contents is not None:
            _check_contents(config, task, found.contents[rows], digests)
        x = found.all()[rows]
        return Rows(x, {**found.attributes})


def _check_contents(
    config: ProbeConfig, task: Task, known: NDArray[np.uint8], digests: Digests
) -> None:
    """Refuses features of images that are others by now; `known` (n, 32) were their sha256.

    Raises:
      StoreError: some are.
    """
    here = np.frombuffer(b"".join(digests()), np.uint8)
    changed = np.flatnonzero((here.reshape(known.shape) != known).any(1))
    if len(changed):
        raise StoreError(
            f"{config.features}: is of other images than {task.name} has now: {len(changed):,} of "
            f"{len(task):,} differ ({few([task.names[i] for i in changed])}); embed them again."
        )


def computed(config: ProbeConfig, task: Task) -> Rows:
    """Features of the task's images, computed here and kept nowhere."""
    encoder = open_encoder(config.features, config.mean, config.std)
    if config.encoder:
        raise ConfigError(f"--encoder: is for a file of features, and {config.features} is none.")
    side = config.task.side
    mesh = make_mesh(config.devices)

    def read(i: int) -> NDArray[np.uint8]:
        return centre_square(task.images.read(i), side)

    blocks = in_threads(read, 0, len(task), config.embed_batch * mesh.size, config.threads)
    images = (np.stack(block) for block in blocks)
    x = np.concatenate(list(features_of(encoder, images, config.embed_batch, mesh)))
    bad = np.flatnonzero(~np.isfinite(x).all(1))
    if len(bad):
        raise StoreError(
            f"{task.names[bad[0]]}: the encoder gives features that are not finite numbers "
            f"({len(bad)} of {len(x)} images); the weights are damaged, take another encoder."
        )
    known = {
        "encoder": encoder.name,
        "encoder_sha256": encoder.sha256,
        "arch": encoder.arch,
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "side": side,
        "layer": 4,
    }
    return Rows(x, known)


def divided(task: Task, split: Split, x: NDArray[np.float32], config: ProbeConfig) -> Divided:
    """Features and targets, with so many percent of the training rows."""
    train = split.train
    if config.percent < 100:
        train = fraction(task, split, config.percent, config.repeat, config.seed, config.scarce)
    return Divided(
        x, np.asarray(task.values), task.classes, task.groups, train, split.validation, split.test
    )


def settings_of(config: ProbeConfig, arch: str) -> Settings:
    """The settings of the probes; weight decay by the depth, as in the paper."""
    decay = config.weight_decay
    if decay is None:
        decay = 1e-5 if arch in ("resnet10", "resnet18") else 1e-4
    training = Training(config.epochs, config.batch, config.rate, decay, config.seed)
    return Settings(training, config.standardise, config.select, config.k, config.tau, config.draws)


def record_of(
    config: ProbeConfig,
    task: Task,
    split: Split,
    rows: Rows,
    data: Divided,
    settings: Settings,
    found: list[Probed],
) -> dict[str, Any]:
    """What probe.json holds; NaN is null there."""
    return {
        "format": FORMAT,
        "task": task.name,
        "kind": task.kind,
        "classes": list(task.classes),
        "features": rows.of,
        "split_sha256": split.sha256,
        "images": {part: len(getattr(data, part)) for part in ("train", "validation", "test")},
        "percent": config.percent,
        "repeat": config.repeat,
        "settings": dataclasses.asdict(settings),
        "bootstrap_by": metrics.drawn_by(data.groups_of(data.test)),
        "probes": [
            {
                "name": p.name,
                "chosen": {key: _number(value) for key, value in p.chosen.items()},
                "validation": {key: _number(value) for key, value in p.validation.items()},
                "test": {
                    key: {k: _number(v) for k, v in dataclasses.asdict(interval).items()}
                    for key, interval in p.test.items()
                },
            }
            for p in found
        ],
        "code_version": __version__,
        "environment": environment([]),
    }


def table(found: list[Probed], data: Divided) -> str:
    """A row a probe, a column a score with its interval."""
    names = list(found[0].test)
    cells = [["test", *(name.replace("_", " ") for name in names), "chosen"]]
    for p in found:
        chosen = ", ".join(
            f"{key.replace('_', ' ')} {value:.3g}" for key, value in p.chosen.items()
        )
        cells.append([p.name.replace("_", " "), *(str(p.test[name]) for name in names), chosen])
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
             for row in cells]  # fmt: skip
    note = metrics.told(len(data.test), data.groups_of(data.test))
    return "\n".join([*lines, f"[{note}]"])


def _is_features(name: str) -> bool:
    return name.lower().endswith((".h5", ".hdf5"))


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
