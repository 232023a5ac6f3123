"""Probes on frozen features of a divided set: fitted on its training rows, chosen on validation,
scored on test. Functions of arrays; on one device, whatever there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from jaxhisto import metrics, probes
from jaxhisto.downstream.last_layer import Trained, Training, train
from jaxhisto.downstream.linear import Linear, logistic_path, ridge_path
from jaxhisto.errors import StoreError

FOLDS = 5

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Divided:
    """Features with what is to be predicted, and how the rows are divided.

    Fields:
      x: (n, d) float32.
      y: (n,) int64 labels, or float64 targets.
      classes: of labels; empty for a regression.
      groups: n group names, or None.
      train, validation, test: rows.
    """

    x: NDArray[np.float32]
    y: NDArray[Any]
    classes: tuple[str, ...]
    groups: tuple[str, ...] | None
    train: Ints
    validation: Ints
    test: Ints

    def groups_of(self, rows: Ints) -> list[str] | None:
        """Their groups."""
        return None if self.groups is None else [self.groups[i] for i in rows]

    def standardised(self) -> Divided:
        """With the training rows' mean 0 and deviation 1."""
        _, offset, scale = probes.standardised(self.x[self.train])
        return replace(self, x=((self.x - offset) / scale).astype(np.float32))

    def scores(self, rows: Ints, predictions: Floats) -> metrics.Scores:
        """All scores of predictions (m, C) or (m,) for these rows."""
        return self.measure()(self.y[rows], predictions)

    def measure(self) -> Callable[[Any, Floats], metrics.Scores]:
        """`metrics.classification` or `metrics.regression`."""
        return metrics.classification if self.classes else metrics.regression


@dataclass(frozen=True)
class Settings:
    """See `ProbeConfig`."""

    training: Training = field(default_factory=Training)
    standardise: bool = True
    select: str = "validation"
    k: int = 20
    tau: float = 0.07
    draws: int = 1000


@dataclass(frozen=True)
class Probed:
    """What a probe found.

    Fields:
      name: `last_layer`, `linear` or `knn`.
      chosen: what the validation rows chose, by name.
      validation: scores there, by name; of what was chosen by them, and so too good.
      test: scores on the test rows, with intervals.
      predictions: (m, C) class probabilities or (m,) numbers, of the test rows.
    """

    name: str
    chosen: dict[str, float]
    validation: metrics.Scores
    test: dict[str, metrics.Interval]
    predictions: Floats


def probe(name: str, data: Divided, settings: Settings) -> Probed:
    """Runs a probe by name: `last_layer`, `linear` (logistic or ridge) or `knn`.

    Raises:
      StoreError: `select` by groups where there are fewer than two to choose on.
    """
    scaled = data.standardised() if settings.standardise else data
    if name == "knn":  # by cosine, of the features as they are
        predict, chosen = _knn(data, settings)
        seen = data
    else:
        fit = _last_layer if name == "last_layer" else _linear
        predict, chosen = fit(scaled, settings)
        seen = scaled
    predictions = predict(seen.x[data.test])
    test = metrics.bootstrap(
        data.measure(),
        data.y[data.test],
        predictions,
        data.groups_of(data.test),
        settings.draws,
        settings.training.seed,
    )
    validation = data.scores(data.validation, predict(seen.x[data.validation]))
    return Probed(name, chosen, validation, test, predictions)


Predict = Callable[[NDArray[np.float32]], Floats]


def _last_layer(data: Divided, settings: Settings) -> tuple[Predict, dict[str, float]]:
    """Trained by Adam; the epoch with the best macro F1, or least error, on validation."""
    x, held_out = data.x[data.train], data.x[data.validation]
    truth = data.y[data.validation]
    if data.classes:

        def by_f1(layer: Callable[[Any], Floats]) -> float:
            return probes.macro_f1(truth, layer(held_out))

        layer = train(x, data.y[data.train], len(data.classes), by_f1, settings.training)
        best = layer.scores[layer.epoch - 1]
        return lambda rows: _probabilities(layer, rows), {"epoch": layer.epoch, "macro_f1": best}
    targets = data.y[data.train]
    mean, deviation = targets.mean(), targets.std() or 1.0

    def by_error(layer: Callable[[Any], Floats]) -> float:
        return -float(np.abs(layer(held_out)[:, 0] * deviation + mean - truth).mean())

    scaled = ((targets - mean) / deviation).astype(np.float32)[:, None]
    layer = train(x, scaled, 1, by_error, settings.training)
    best = -layer.scores[layer.epoch - 1]
    return lambda rows: layer(rows)[:, 0] * deviation + mean, {"epoch": layer.epoch, "mae": best}


def _linear(data: Divided, settings: Settings) -> tuple[Predict, dict[str, float]]:
    """Logistic or ridge regression, its strength by the score on validation or left-out groups."""
    rows = data.train
    if settings.select == "groups":
        rows = np.sort(np.concatenate([data.train, data.validation]))
        scores = _over(_group_folds(data, rows), data)
    else:
        scores = _over([(data.train, data.validation)], data)
    strength = max(scores, key=lambda s: scores[s])  # of equals the first: the strongest
    # Along the whole path down to it, so that it is the very optimum that was judged.
    *_, last = _path(data, rows, [s for s in scores if s >= strength])
    chosen = {"strength": strength}
    if data.classes:
        return lambda x: _probabilities(last, x), chosen | {"macro_f1": scores[strength]}
    return lambda x: last(x)[:, 0], chosen | {"mae": -scores[strength]}


def _knn(data: Divided, settings: Settings) -> tuple[Predict, dict[str, float]]:
    x, y = data.x[data.train], data.y[data.train]
    k, tau = settings.k, settings.tau
    chosen = {"k": float(min(k, len(x)))}
    if data.classes:
        return lambda rows: probes.knn_scores(x, y, rows, len(data.classes), k, tau), chosen
    return lambda rows: probes.knn_values(x, y[:, None], rows, k, tau)[:, 0], chosen


def _over(folds: Sequence[tuple[Ints, Ints]], data: Divided) -> dict[float, float]:
    """Mean score of each strength over (fitted on, judged on), the strongest first."""
    scores: dict[float, list[float]] = {}
    for fitted, judged in folds:
        for model in _path(data, fitted):
            score = _score(data, judged, model(data.x[judged]))
            scores.setdefault(model.strength, []).append(score)
    return {strength: float(np.mean(found)) for strength, found in scores.items()}


def _path(data: Divided, rows: Ints, strengths: Sequence[float] = ()) -> Iterator[Linear]:
    extra = (strengths,) if strengths else ()
    if data.classes:
        return logistic_path(data.x[rows], data.y[rows], len(data.classes), *extra)
    return ridge_path(data.x[rows], data.y[rows], *extra)


def _score(data: Divided, rows: Ints, out: Floats) -> float:
    """The paper's validation score, higher is better: macro F1, or the negative mean error.

    Not the likelihood, which on a section of another colour is best of a probe that says nothing.
    """
    if data.classes:
        return probes.macro_f1(data.y[rows], out)
    return -float(np.abs(out[:, 0] - data.y[rows]).mean())


def _group_folds(data: Divided, rows: Ints) -> list[tuple[Ints, Ints]]:
    """At most five folds of whole groups, larger groups dealt out first."""
    found = data.groups_of(rows) or []
    names = sorted(set(found), key=lambda g: (-found.count(g), g))
    if len(names) < 2:
        raise StoreError(
            f"--select groups: there are {len(names)} groups outside the test; name a group column "
            "with --task.group, or take --select validation."
        )
    fold_of = {name: i % min(FOLDS, len(names)) for i, name in enumerate(names)}
    folds = np.array([fold_of[g] for g in found])
    return [(rows[folds != f], rows[folds == f]) for f in range(folds.max() + 1)]


def _probabilities(model: Linear | Trained, x: NDArray[np.float32]) -> Floats:
    return np.asarray(softmax(model(x), axis=1))
