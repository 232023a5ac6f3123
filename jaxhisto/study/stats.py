"""How sure the numbers of a study are: intervals, and tests between encoders.

Two things vary, and they are asked about apart.

Other test images: the test part (whole groups of it, where there are several), the repeats and the
pretraining seeds are drawn again with replacement; two encoders meet the same draws. That gives
the intervals, and the first p value, of the difference, which holds at 100 % of the labels too.

Other labels: repeats share training images, so their scores are not independent, and a paired t
test over them finds too much. Nadeau and Bengio (2003) correct it: with a correlation rho between
two repeats the variance of their mean is s^2 (1 / R + rho / (1 - rho)). They take the share of the
test images for rho, as their splits are drawn anew; here the split stays, the training images are
drawn, and rho is the share of them that two repeats have in common. Where few groups are drawn some
repeats are all but the same: rho then differs from pair to pair, and the degrees of freedom are
those of Satterthwaite (1946), R - 1 where it does not. At 100 % all repeats train on the same
images: they say nothing of others, and there is no such p value.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class Runs:
    """Scores of one encoder's row on one task, share and setting.

    Fields:
      scores: (K, R, 1 + B): pretraining seeds, repeats, the test part as it is and its draws.
      name: of the row; the seeds' draw depends on it.
      repeats: which ones these are; rows that lack one of them are not compared with others.
    """

    name: str
    scores: Floats
    repeats: tuple[int, ...]


@dataclass(frozen=True)
class Summary:
    """A mean over runs: its deviation over them and over the pretraining seeds (NaN of one), and
    the 95 % interval."""

    mean: float
    sd: float
    sd_seeds: float
    low: float
    high: float
    runs: int


@dataclass(frozen=True)
class Comparison:
    """Row a minus row b.

    Fields:
      difference, low, high: of the means, with the 95 % interval.
      p: two-sided, over other test images, repeats and seeds.
      p_labels: two-sided, over other training images; NaN where repeats cannot say.
      p_holm, p_labels_holm: corrected for all comparisons of the family.
    """

    a: str
    b: str
    task: str
    percent: float
    difference: float
    low: float
    high: float
    p: float
    p_labels: float
    p_holm: float = float("nan")
    p_labels_holm: float = float("nan")


def drawn_means(runs: Runs, seed: Sequence[int]) -> Floats:
    """(1 + B,): the mean over runs, then that of each draw of seeds, repeats and test images.

    The draws of the repeats are those of any other row with the same `seed` and R.
    """
    seeds, repeats, columns = runs.scores.shape
    draws = columns - 1
    of_repeats = _shares(np.random.default_rng([*seed, repeats]), draws, repeats)
    own = [*seed, seeds, *runs.name.encode()]
    of_seeds = _shares(np.random.default_rng(own), draws, seeds)
    drawn = np.einsum("bk,br,krb->b", of_seeds, of_repeats, runs.scores[:, :, 1:])
    return np.concatenate([[runs.scores[:, :, 0].mean()], drawn])


def summarise(runs: Runs, means: Floats) -> Summary:
    """Of runs, and what `drawn_means` made of them."""
    single = runs.scores[:, :, 0]
    low, high = interval(means[1:])
    return Summary(
        float(means[0]),
        _deviation(single.ravel()),
        _deviation(single.mean(1)),
        low,
        high,
        single.size,
    )


def interval(drawn: Floats) -> tuple[float, float]:
    """The middle 95 % of the draws; those in which a score is not defined do not count."""
    known = drawn[~np.isnan(drawn)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.percentile(known, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)


def p_drawn(difference: Floats) -> float:
    """Two-sided p of draws of a difference: twice the smaller share on one side of 0.

    One is added above and below (Davison and Hinkley 1997, sec. 4.2.5): no p is 0.
    """
    known = difference[~np.isnan(difference)]
    if not len(known):
        return float("nan")
    fewer = min((known <= 0).sum(), (known >= 0).sum()) + 1
    return float(min(1.0, 2 * fewer / (len(known) + 1)))


def p_resampled(differences: Floats, overlaps: Floats) -> float:
    """Two-sided p of the corrected resampled t test (Nadeau and Bengio 2003).

    Args:
      differences: (R,) of two encoders, one a repeat.
      overlaps: (R, R) share of training images that two repeats have in common, 1 on the diagonal.

    Returns:
      NaN for one repeat or one training set; 1 where all differences are 0.
    """
    count = len(differences)
    if np.isnan(differences).any():
        return float("nan")
    centred = np.eye(count) - 1 / count
    # Of differences with this correlation: s^2 has the mean `within` times their variance.
    quadratic = centred @ overlaps
    within = np.trace(quadratic) / max(count - 1, 1)
    if within < 1e-6:
        return float("nan")
    mean, variance = differences.mean(), differences.var(ddof=1) / within
    if variance == 0:
        return 1.0 if mean == 0 else float("nan")
    t = mean / np.sqrt(variance * overlaps.sum() / count**2)
    freedom = np.trace(quadratic) ** 2 / np.trace(quadratic @ quadratic)
    return float(2 * stats.t.sf(abs(t), freedom))


def holm(p: Sequence[float]) -> list[float]:
    """The p values corrected for how many there are (Holm 1979); NaN ones stay and do not count."""
    known = [i for i, value in enumerate(p) if not np.isnan(value)]
    found = [float("nan")] * len(p)
    worst = 0.0
    for rank, i in enumerate(sorted(known, key=lambda i: p[i])):
        worst = max(worst, min(1.0, (len(known) - rank) * p[i]))
        found[i] = worst
    return found


def overlaps_of(rows: Sequence[NDArray[np.int64]]) -> Floats:
    """(R, R) share of training rows that two draws have in common, 1 on the diagonal."""
    found = np.eye(len(rows))
    for (i, a), (j, b) in itertools.combinations(enumerate(rows), 2):
        found[i, j] = found[j, i] = len(np.intersect1d(a, b)) / max(len(a), len(b))
    return found


def compare(
    runs: Mapping[str, Runs],
    means: Mapping[str, Floats],
    task: str,
    percent: float,
    overlaps: Floats,
) -> list[Comparison]:
    """All pairs of rows, which have the same repeats; uncorrected.

    Args:
      overlaps: of the training images of these repeats, (R, R).
    """
    found = []
    for a, b in itertools.combinations(runs, 2):
        difference = means[a] - means[b]
        low, high = interval(difference[1:])
        repeats = runs[a].scores[:, :, 0].mean(0) - runs[b].scores[:, :, 0].mean(0)
        found.append(
            Comparison(a, b, task, percent, float(difference[0]), low, high,
                       p_drawn(difference[1:]), p_resampled(repeats, overlaps))
        )  # fmt: skip
    return found


def _shares(rng: np.random.Generator, draws: int, count: int) -> Floats:
    """(draws, count): how much each of `count` counts in a draw of as many with replacement."""
    chosen = rng.integers(0, count, (draws, count))
    flat = (chosen + count * np.arange(draws)[:, None]).ravel()
    return np.bincount(flat, minlength=draws * count).reshape(draws, count) / count


def _deviation(values: Floats) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else float("nan")
