"""What each setting of a study does with a cell."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence

import numpy as np

from jaxhisto.downstream.probe import settings_of
from jaxhisto.downstream.probing import Divided, probe
from jaxhisto.downstream.study_cells import Cell, Outcome
from jaxhisto.errors import ConfigError


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


SETTINGS: dict[str, Callable[[Cell], Outcome]] = {
    "last_layer": frozen,
    "linear": frozen,
    "knn": frozen,
}
"""By the name that a study's file gives it."""


def refuse_absent(settings: Sequence[str]) -> None:
    """Raises ConfigError for a setting that this version does not have."""
    for setting in settings:
        module = MODULES.get(setting)
        if setting not in SETTINGS or (module and importlib.util.find_spec(module) is None):
            raise ConfigError(
                f"settings: this version of jaxhisto has no `{setting}`; it has "
                f"{', '.join(s for s in SETTINGS if s != setting)}."
            )


MODULES: dict[str, str] = {}
"""Of settings that are trained by a verb of their own."""
