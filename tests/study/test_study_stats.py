"""Statistics of a study against scikit-learn, SciPy, and numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score, mean_absolute_error, roc_auc_score

from jaxhisto.study import weighted
from jaxhisto.study.stats import (
    Runs,
    drawn_means,
    holm,
    interval,
    overlaps_of,
    p_drawn,
    p_resampled,
    summarise,
)

DRAWS = 30


@pytest.fixture(params=[2, 4])
def labelled(request):
    """Labels, scores with ties, weights of resamples."""
    rng = np.random.default_rng(request.param)
    labels = rng.integers(0, request.param, 40)
    scores = rng.random((40, request.param)).round(1) + 0.01
    scores /= scores.sum(1, keepdims=True)
    return labels, scores.round(2), np.concatenate(list(weighted.resamples(None, 40, DRAWS, [3])))


def repeated(weights: np.ndarray) -> np.ndarray:
    """The rows of a resample."""
    return np.repeat(np.arange(len(weights)), weights.astype(int))


def test_the_first_resample_is_the_rows_as_they_are_and_the_others_are_as_many(labelled):
    weights = labelled[2]
    assert weights.shape == (1 + DRAWS, 40)
    assert (weights[0] == 1).all()
    assert (weights.sum(1) == 40).all()
    assert len(np.unique(weights, axis=0)) == 1 + DRAWS


def test_groups_are_drawn_whole():
    groups = ["a", "a", "b", "c", "c", "c"]
    weights = np.concatenate(list(weighted.resamples(groups, 6, 200, [1])))
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 3] == weights[:, 5]).all()
    assert ((weights[:, 0] + weights[:, 2] + weights[:, 3]) == 3).all()
    one = np.concatenate(list(weighted.resamples(["a"] * 6, 6, 50, [1])))
    assert len(np.unique(one, axis=0)) > 10


def test_blocks_do_not_change_the_draws(monkeypatch):
    whole = np.concatenate(list(weighted.resamples(None, 12, 40, [5])))
    monkeypatch.setattr(weighted, "AT_ONCE", 36)
    assert (np.concatenate(list(weighted.resamples(None, 12, 40, [5]))) == whole).all()


def test_weighted_scores_of_classes_are_scikit_learns(labelled):
    labels, scores, weights = labelled
    f1, area = weighted.macro_f1(labels, scores, weights), weighted.auc(labels, scores, weights)
    for b, w in enumerate(weights):
        rows = repeated(w)
        expected = f1_score(labels[rows], scores[rows].argmax(1), average="macro")
        assert f1[b] == pytest.approx(expected)
        if scores.shape[1] == 2:
            expected = roc_auc_score(labels[rows], scores[rows, 1])
        else:
            expected = np.mean(
                [roc_auc_score(labels[rows] == c, scores[rows, c]) for c in range(scores.shape[1])]
            )
        assert area[b] == pytest.approx(expected)


def test_auc_of_one_class_is_not_defined():
    labels, scores = np.array([0, 0, 1]), np.array([[0.6, 0.4], [0.7, 0.3], [0.2, 0.8]])
    weights = np.array([[1.0, 1, 1], [2, 1, 0]])
    assert weighted.auc(labels, scores, weights)[0] == 1
    assert np.isnan(weighted.auc(labels, scores, weights)[1])
    three = np.c_[scores, np.zeros(3)]
    assert weighted.auc(labels, three, weights)[0] == 1  # the absent class does not count


def test_weighted_scores_of_numbers_are_scikit_learns_and_scipys():
    rng = np.random.default_rng(0)
    truth, guess = rng.random(30) * 100, rng.random(30) * 100 + 1e4
    weights = np.concatenate(list(weighted.resamples(None, 30, DRAWS, [3])))
    error, r = weighted.mae(truth, guess, weights), weighted.pearson(truth, guess, weights)
    for b, w in enumerate(weights):
        rows = repeated(w)
        assert error[b] == pytest.approx(mean_absolute_error(truth[rows], guess[rows]))
        assert r[b] == pytest.approx(stats.pearsonr(truth[rows], guess[rows]).statistic)
    assert np.isnan(weighted.pearson(truth, np.full(30, 0.1), weights)).all()


def test_pixels_are_counted_as_if_each_were_a_row():
    rng = np.random.default_rng(1)
    truth, guess = rng.integers(0, 3, (5, 50)), rng.integers(0, 3, (5, 50))
    confusion = np.zeros((5, 3, 3), np.int64)
    for i in range(5):
        np.add.at(confusion[i], (truth[i], guess[i]), 1)
    weights = np.array([[1.0] * 5, [2, 0, 1, 2, 0]])
    found = weighted.pixel_f1(confusion, weights)
    for b, w in enumerate(weights):
        rows = repeated(w)
        expected = f1_score(truth[rows].ravel(), guess[rows].ravel(), average="macro")
        assert found[b] == pytest.approx(expected)


def test_holm_by_hand():
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1, never smaller than the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    with_none = holm([0.01, float("nan"), 0.02])
    assert with_none[0] == pytest.approx(0.02)
    assert np.isnan(with_none[1])
    assert with_none[2] == pytest.approx(0.02)


def alike(repeats: int, share: float) -> np.ndarray:
    """Overlaps of repeats that all share as much."""
    return np.full((repeats, repeats), share) + (1 - share) * np.eye(repeats)


def test_the_corrected_t_test_without_overlap_is_scipys_and_with_it_nadeau_and_bengios():
    d = np.array([0.02, 0.05, -0.01, 0.04, 0.03])
    assert p_resampled(d, alike(5, 0)) == pytest.approx(stats.ttest_1samp(d, 0).pvalue)
    # By hand: mean 0.026, s^2 5.3e-4, factor 1/5 + 0.5/0.5, t = 0.026 / sqrt(6.36e-4) = 1.03097.
    assert p_resampled(d, alike(5, 0.5)) == pytest.approx(2 * stats.t.sf(1.03097, 4), rel=1e-4)
    # The form in the paper: n2 / n1 for test and training sets of 10 and 90.
    t = d.mean() / np.sqrt(d.var(ddof=1) * (1 / 5 + 10 / 90))
    assert p_resampled(d, alike(5, 0.1)) == pytest.approx(2 * stats.t.sf(t, 4))
    assert np.isnan(p_resampled(d, alike(5, 1)))
    assert np.isnan(p_resampled(d[:1], alike(1, 0)))
    assert p_resampled(np.zeros(4), alike(4, 0.2)) == 1.0


def test_repeats_that_are_all_but_the_same_do_not_count_as_many():
    """Four repeats that are two pairs of twins: one degree of freedom, as of two."""
    twins = np.kron(np.eye(2), np.ones((2, 2)))
    pairs = np.array([0.02, 0.02, 0.05, 0.05])
    expected = stats.ttest_1samp([0.02, 0.05], 0).pvalue
    assert p_resampled(pairs, twins) == pytest.approx(expected)
    assert p_resampled(pairs, alike(4, 0)) < expected / 5


def test_the_overlap_of_draws():
    a, b, c = np.arange(4), np.arange(2, 6), np.arange(4, 8)
    expected = [[1, 0.5, 0], [0.5, 1, 0.5], [0, 0.5, 1]]
    assert overlaps_of([a, b, c]) == pytest.approx(np.array(expected))


def test_p_of_draws_counts_both_sides_and_is_never_0():
    assert p_drawn(np.arange(1.0, 100)) == pytest.approx(2 / 100)
    assert p_drawn(np.r_[np.full(4, -1.0), np.full(95, 1.0)]) == pytest.approx(2 * 5 / 100)
    assert p_drawn(np.zeros(99)) == 1.0


def test_intervals_hold_images_repeats_and_seeds():
    """Of normal effects of each: the deviation of the draws is what the theory says."""
    rng = np.random.default_rng(0)
    seeds, repeats, images, draws = 40, 30, 400, 4000
    table = (
        rng.normal(0, 1, (seeds, 1, 1)) + rng.normal(0, 1, (1, repeats, 1))
        + rng.normal(0, 5, (1, 1, images))
    )  # fmt: skip
    weights = np.concatenate(list(weighted.resamples(None, images, draws, [2])))
    scores = np.stack([[x @ weights.T / images for x in row] for row in table])
    means = drawn_means(Runs("a", scores, tuple(range(repeats))), (0, 1))
    assert means[0] == pytest.approx(table.mean())
    parts = [table.mean((1, 2)).var() / seeds, table.mean((0, 2)).var() / repeats,
             table.mean((0, 1)).var() / images]  # fmt: skip
    assert means[1:].std() == pytest.approx(np.sqrt(sum(parts)), rel=0.05)
    low, high = interval(means[1:])
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(sum(parts)), rel=0.06)
    found = summarise(Runs("a", scores, tuple(range(repeats))), means)
    runs = table.mean(2)
    assert found.sd == pytest.approx(runs.std(ddof=1))
    assert found.sd_seeds == pytest.approx(runs.mean(1).std(ddof=1))
    assert found.runs == seeds * repeats


def test_two_rows_meet_the_same_draws():
    rng = np.random.default_rng(0)
    weights = np.concatenate(list(weighted.resamples(None, 50, 500, [2])))
    values = rng.normal(0, 1, (1, 5, 50))
    scores = values @ weights.T / 50
    a = drawn_means(Runs("a", scores, tuple(range(5))), (0, 1))
    b = drawn_means(Runs("b", scores + 0.5, tuple(range(5))), (0, 1))
    assert np.allclose(b - a, 0.5)
    assert p_drawn(b[1:] - a[1:]) == pytest.approx(2 / 501)


def test_p_under_the_null_is_rarely_small():
    """Two encoders that differ by chance alone: about 5 % of studies say p < 0.05."""
    rng = np.random.default_rng(3)
    weights = np.concatenate(list(weighted.resamples(None, 100, 400, [2])))
    small = 0
    for _ in range(400):
        d = rng.normal(0, 1, 100)
        small += p_drawn((weights @ d / 100)[1:]) < 0.05
    assert 6 <= small <= 36  # 400 x 5 % = 20, four deviations either way
