"""`jaxhisto finetune`: an encoder and a task -> the trained network, its scores and its record.

OUT/config.json          the settings, augmentation included; facts.json, env.json beside it
OUT/split.json           who is trained, chosen and tested on, and of what encoder and labels
OUT/metrics.jsonl        a line an epoch
OUT/checkpoints/         to go on from
OUT/encoder.safetensors  the encoder of the best validation epoch, golden.safetensors beside it
OUT/head.safetensors     its last layer
OUT/predictions.csv      of the validation and test images
OUT/result.json          the scores; written last, so that it says that all is there
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from jaxhisto import __version__, metrics
from jaxhisto.console import say
from jaxhisto.distributed import is_main, make_mesh
from jaxhisto.downstream.batches import Part
from jaxhisto.downstream.classifier import Targets, learner_of, targets_of, trained_encoder
from jaxhisto.downstream.encoders import Encoder, open_encoder
from jaxhisto.downstream.finetune_files import (
    RESULT,
    SPLIT,
    Facts,
    facts_of,
    write_model,
    write_predictions,
)
from jaxhisto.downstream.learner import Learner, evaluate, make_outcomes
from jaxhisto.downstream.probe import table
from jaxhisto.downstream.probing import Divided, Probed
from jaxhisto.downstream.run_folder import open_run
from jaxhisto.downstream.squares import Squares, squares
from jaxhisto.downstream.training import Fitted, adam, fit, weight_decay
from jaxhisto.errors import ConfigError
from jaxhisto.pretrain.step import replicate
from jaxhisto.runlog import environment, write_atomically
from jaxhisto.tasks.splits import fraction, task_split, write_split
from jaxhisto.tasks.task import Split, Task, open_task
from jaxhisto.training_config import FinetuneConfig

FORMAT = "jaxhisto-finetune-1"
HELD_OUT = ("validation", "test")
AT_ONCE = 1024  # images


def run_finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Trains, or goes on, prints a table, and writes the folder; a finished one is read again.

    Returns:
      The record, as result.json holds it.

    Raises:
      ConfigError: settings that do not go together, a segmentation task, an encoder without
        weights.
      StoreError: a task or split that is not as it should be, an image that cannot be read.
      ExportError: no such encoder, or nothing says how it wants to be fed.
      RunError: a folder that holds something else, a loss that is not finite; see `fit`.
    """
    task = open_task(config.task)
    if task.kind == "segmentation":
        raise ConfigError(
            f"{task.name}: is a segmentation task; `jaxhisto segment` trains a network on it."
        )
    say("\n".join(task.summary()))
    split = task_split(task, config.task)
    say(split.summary())
    encoder = open_encoder(config.encoder, config.mean, config.std)
    if not encoder.params:
        raise ConfigError(
            f"{config.encoder}: has no weights to train; `jaxhisto probe` says what its features "
            "are worth."
        )
    rows = split.train
    if config.percent < 100:
        rows = fraction(task, split, config.percent, config.repeat, config.seed, config.scarce)
        say(f"{len(rows):,} of {len(split.train):,} training images ({config.percent:g} %)")
    threads = config.training.threads
    facts = facts_of(task, split, encoder, rows, threads)
    used = np.concatenate([rows, split.validation, split.test])
    read = squares(task, config.task.side, len(used), config.cache_gb, threads)
    if not (Path(config.out) / RESULT).is_file():
        # Each once: a bad image, be it one to test on, is found now and not after training.
        for start in range(0, len(used), AT_ONCE):
            read(used[start : start + AT_ONCE])
    out = open_run(config.out, config, facts.hashes())
    data = Divided(
        np.zeros((len(task), 0), np.float32), np.asarray(task.values), task.classes, task.groups,
        rows, split.validation, split.test,
    )  # fmt: skip
    if (out / RESULT).is_file():
        record: dict[str, Any] = json.loads((out / RESULT).read_text(encoding="utf-8"))
        if is_main() and not config.keep_checkpoints:  # of a line killed while they were removed
            shutil.rmtree(out / "checkpoints", ignore_errors=True)
        say(f"{out}: is finished\n{table([_found_in(record)], data)}")
        return record
    if is_main():
        told = facts.hashes() | {"trained_on": list(facts.trained_on)}
        write_split(out / SPLIT, split, task, **told)
    return _trained(config, task, split, encoder, data, read, facts, out)


def _trained(
    config: FinetuneConfig,
    task: Task,
    split: Split,
    encoder: Encoder,
    data: Divided,
    read: Squares,
    facts: Facts,
    out: Path,
) -> dict[str, Any]:
    """Trains and writes what `run_finetune` promises."""
    training = config.training
    targets = targets_of(data.y[data.train], len(task.classes))
    learner = learner_of(encoder, targets, config.freeze, training.precision, training.seed)
    parts = parts_of(task, data, read, targets)
    fitted = fit(
        learner,
        parts["train"],
        parts["validation"],
        adam(training, encoder.arch),
        training,
        out,
        verb="finetune",
        facts=facts.hashes(),
    )
    held_out = {part: parts[part] for part in HELD_OUT}
    predictions = predicted(learner, fitted, held_out, targets, training.devices)
    test = metrics.bootstrap(
        data.measure(),
        data.y[data.test],
        predictions["test"],
        data.groups_of(data.test),
        config.draws,
        config.seed,
    )
    validation = data.scores(data.validation, predictions["validation"])
    found = Probed("finetune", {"epoch": fitted.epoch}, validation, test, predictions["test"])
    record = record_of(config, task, split, encoder, data, targets, fitted, found)
    if is_main():
        params, stats = trained_encoder(encoder, fitted.params, fitted.batch_stats)
        head = fitted.params["head"]
        write_model(out, config, task, encoder, targets, params, stats, head, fitted, facts)
        write_predictions(out, task, data, predictions)
        write_atomically(out / RESULT, json.dumps(record, indent=1) + "\n")
        if not config.keep_checkpoints:
            shutil.rmtree(out / "checkpoints", ignore_errors=True)
    say(table([found], data))
    return record


def parts_of(task: Task, data: Divided, read: Squares, targets: Targets) -> dict[str, Part]:
    """What is trained, chosen and tested on, by the part's name; `read` gives images."""
    rows = {"train": data.train, "validation": data.validation, "test": data.test}
    scaled = targets.scaled(data.y)

    def load(wanted: NDArray[np.int64], epoch: int) -> tuple[NDArray[np.uint8], NDArray[Any]]:
        return read(wanted), scaled[wanted]

    return {part: Part(of, load, lambda row: task.names[row]) for part, of in rows.items()}


def predicted(
    learner: Learner, fitted: Fitted, parts: Mapping[str, Part], targets: Targets, devices: int
) -> dict[str, NDArray[np.float64]]:
    """Probabilities (n, C) or numbers (n,) for each part's images, by the chosen weights."""
    mesh, outcomes = make_mesh(devices), make_outcomes(learner)
    with jax.set_mesh(mesh):
        trees = (fitted.params, fitted.batch_stats, learner.fixed)
        params, stats, fixed = (replicate(tree, mesh) for tree in trees)
        found = {
            name: evaluate(outcomes, params, stats, fixed, part, fitted.batch, mesh)
            for name, part in parts.items()
        }
    return {name: targets.predictions(of["outputs"]) for name, of in found.items()}


def record_of(
    config: FinetuneConfig,
    task: Task,
    split: Split,
    encoder: Encoder,
    data: Divided,
    targets: Targets,
    fitted: Fitted,
    found: Probed,
) -> dict[str, Any]:
    """What result.json holds; NaN is null there."""
    return {
        "format": FORMAT,
        "task": task.name,
        "kind": task.kind,
        "classes": list(task.classes),
        "encoder": {
            "name": encoder.name,
            "sha256": encoder.sha256,
            "arch": encoder.arch,
            "mean": list(encoder.mean),
            "std": list(encoder.std),
        },
        "side": config.task.side,
        "freeze": config.freeze,
        "split_sha256": split.sha256,
        "images": {part: len(getattr(data, part)) for part in ("train", *HELD_OUT)},
        "percent": config.percent,
        "scarce": config.scarce,
        "repeat": config.repeat,
        "seed": config.seed,
        "training": dataclasses.asdict(config.training)
        | {"weight_decay": weight_decay(config.training, encoder.arch), "batch": fitted.batch},
        "target": None if task.classes else [targets.mean, targets.deviation],
        "epochs": fitted.epochs,
        "steps": fitted.steps,
        "epoch": fitted.epoch,
        "bootstrap_by": metrics.drawn_by(data.groups_of(data.test)),
        "validation": {key: _number(value) for key, value in found.validation.items()},
        "test": {
            key: {k: _number(v) for k, v in dataclasses.asdict(interval).items()}
            for key, interval in found.test.items()
        },
        "code_version": __version__,
        "environment": environment([f"{d.platform} {d.device_kind}" for d in jax.devices()]),
    }


def _found_in(record: dict[str, Any]) -> Probed:
    """What a record says of the test; predictions are in a file of their own."""

    def known(value: float | None) -> float:
        return math.nan if value is None else value

    test = {
        name: metrics.Interval(*(known(of[key]) for key in ("value", "low", "high")))
        for name, of in record["test"].items()
    }
    validation = {name: known(value) for name, value in record["validation"].items()}
    return Probed("finetune", {"epoch": record["epoch"]}, validation, test, np.zeros(0))


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
