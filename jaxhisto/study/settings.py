"""What each setting of a study does with a cell."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxhisto.downstream import segment as segmenting
from jaxhisto.downstream.finetune import run_finetune
from jaxhisto.downstream.probe import settings_of
from jaxhisto.downstream.probing import Divided, probe
from jaxhisto.errors import StoreError
from jaxhisto.study.cells import Cell, Outcome


def frozen(cell: Cell) -> Outcome:
    """A probe on cached features: `last_layer`, `linear` or `knn`."""
    ready, task = cell.ready, cell.ready.task
    data = Divided(
        cell.features(cell.entry, ready),
        np.asarray(task.values),
        task.classes,
        task.groups,
        cell.train,
        ready.split.validation,
        ready.split.test,
    )
    settings = settings_of(cell.study.probe, cell.entry.arch)
    training = dataclasses.replace(settings.training, seed=cell.training_seed)
    # The study draws its own bootstrap, over repeats and seeds as well.
    settings = dataclasses.replace(settings, training=training, draws=1)
    found = probe(cell.setting, data, settings)
    test = {name: interval.value for name, interval in found.test.items()}
    return Outcome(found.chosen, found.validation, test, found.predictions)


def finetune(cell: Cell) -> Outcome:
    """All layers trained, as `jaxhisto finetune` does it."""
    with contextlib.redirect_stdout(io.StringIO()):  # a table a cell
        record = run_finetune(supervised(cell))
    _refuse_changed(cell, record["encoder"]["sha256"])
    return _outcome(record, _predictions(cell))


def segment(cell: Cell) -> Outcome:
    """A UNet on the encoder, as `jaxhisto segment` trains and scores it; no weights are kept."""
    config = supervised(cell)
    with contextlib.redirect_stdout(io.StringIO()):
        windows = segmenting.windows_of(config.crop_px, config.overlap_px, config.margin_px)
        ready = segmenting.prepare(config)
        _refuse_changed(cell, ready.encoder.sha256)
        out = segmenting.open_run(config.out, config, ready.facts())
        fitted, *trees = segmenting.train(config, ready, out)
        matrices = segmenting.judge(config, ready, windows, out, *trees)
        record = segmenting.result_of(config, ready, fitted, matrices)
    return _outcome(record, np.asarray(matrices))


def supervised(cell: Cell) -> Any:
    """The settings of the verb for this cell."""
    config = cell.study.others[cell.setting]
    own = {
        "encoder": cell.entry.name,
        "out": str(cell.run),
        "task": cell.ready.config,
        "percent": cell.percent,
        "scarce": cell.study.probe.scarce,
        "repeat": cell.repeat,
        "seed": cell.study.seed,
        "mean": cell.entry.mean,
        "std": cell.entry.std,
        "draws": 1,  # the study draws its own
        "training": dataclasses.replace(
            config.training, seed=cell.training_seed, devices=cell.devices, threads=cell.threads
        ),
    }
    fields = {f.name for f in dataclasses.fields(config)}
    return dataclasses.replace(config, **{k: v for k, v in own.items() if k in fields})


def _refuse_changed(cell: Cell, sha256: str) -> None:
    """Of an encoder's file that was written over: the cell's name says which weights it is of."""
    if sha256 != cell.entry.sha256:
        shutil.rmtree(cell.run, ignore_errors=True)
        raise StoreError(
            f"{cell.entry.name}: has changed since the study was started; start it again."
        )


def _predictions(cell: Cell) -> NDArray[np.float64]:
    """Of the test images, in the split's order, from the run's predictions.csv."""
    classes = cell.ready.task.classes
    columns = [f"score_{name}" for name in classes] or ["predicted"]
    with (cell.run / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["part"] == "test"]
    of = {row["name"]: [float(row[c]) for c in columns] for row in rows}
    found = np.array([of[cell.ready.task.names[i]] for i in cell.ready.split.test])
    return found if classes else found[:, 0]


def _outcome(record: Mapping[str, Any], predictions: NDArray[Any]) -> Outcome:
    """From a verb's result.json, in which NaN is null."""

    def floats(values: Mapping[str, float | None]) -> dict[str, float]:
        return {k: float("nan") if v is None else float(v) for k, v in values.items()}

    test = {name: of["value"] for name, of in record["test"].items()}
    return Outcome(
        {"epoch": float(record["epoch"])}, floats(record["validation"]), floats(test), predictions
    )


SETTINGS: dict[str, Callable[[Cell], Outcome]] = {
    "last_layer": frozen,
    "linear": frozen,
    "knn": frozen,
    "finetune": finetune,
    "segment": segment,
}
"""By the name that a study's file gives it."""
