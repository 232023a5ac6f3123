"""Scores against scikit-learn and SciPy, absent classes included, and the bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as theirs

from jaxhisto import metrics


def scored(classes: int, n: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and probabilities that know something of them."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    logits = np.eye(classes)[y] + rng.normal(size=(n, classes))
    p = np.exp(logits)
    return y, p / p.sum(1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 5])
def test_classification_is_scikit_learns(classes):
    y, p = scored(classes)
    predicted = p.argmax(1)
    whole = p[:, 1] if classes == 2 else p
    assert metrics.classification(y, p) == pytest.approx(
        {
            "macro_f1": theirs.f1_score(y, predicted, average="macro"),
            "auc": theirs.roc_auc_score(y, whole, multi_class="ovr"),
            "balanced_accuracy": theirs.balanced_accuracy_score(y, predicted),
            "accuracy": theirs.accuracy_score(y, predicted),
        },
        abs=1e-12,
    )


def test_a_class_that_is_absent_counts_as_in_scikit_learn():
    y, p = scored(4, seed=2)
    y, p = y[y != 2], p[y != 2]  # no label of it, but predictions
    predicted = p.argmax(1)
    assert (predicted == 2).any()
    found = metrics.classification(y, p)
    assert found["macro_f1"] == pytest.approx(theirs.f1_score(y, predicted, average="macro"))
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        expected = theirs.balanced_accuracy_score(y, predicted)
    assert found["balanced_accuracy"] == pytest.approx(expected)


def test_regression_is_scikit_learns_and_scipys_with_ties():
    rng = np.random.default_rng(1)
    y = np.round(rng.uniform(0, 100, 50), -1)
    guess = np.round(y + 30 * rng.normal(size=50), -1)
    assert len(np.unique(guess)) < 50
    assert metrics.regression(y, guess) == pytest.approx(
        {
            "mae": theirs.mean_absolute_error(y, guess),
            "r2": theirs.r2_score(y, guess),
            "pearson": stats.pearsonr(y, guess)[0],
            "spearman": stats.spearmanr(y, guess)[0],
        },
        abs=1e-12,
    )


def test_what_does_not_vary_has_no_correlation():
    found = metrics.regression(np.arange(4.0), np.ones(4))
    assert np.isnan(found["pearson"])
    assert np.isnan(found["spearman"])
    assert np.isnan(metrics.r2(np.ones(3), np.arange(3.0)))


def test_the_interval_of_an_accuracy_is_the_binomials():
    y = np.zeros(200, int)
    p = np.tile([0.9, 0.1], (200, 1))
    p[:60] = [0.1, 0.9]  # 70 % right
    found = metrics.bootstrap(metrics.classification, y, p, draws=1500)["accuracy"]
    low, high = stats.binom(200, 0.7).ppf([0.025, 0.975]) / 200
    assert found.value == 0.7
    assert found.low == pytest.approx(low, abs=0.011)
    assert found.high == pytest.approx(high, abs=0.011)


def test_images_of_a_group_are_drawn_together():
    y, p = np.zeros(80, int), np.tile([0.9, 0.1], (80, 1))
    p[:40] = [0.1, 0.9]  # all of two groups wrong, all of two right
    groups = [f"g{i // 20}" for i in range(80)]
    by_group = metrics.bootstrap(metrics.classification, y, p, groups, 500)["accuracy"]
    by_image = metrics.bootstrap(metrics.classification, y, p, None, 500)["accuracy"]
    assert (by_group.low, by_group.high) == (0.0, 1.0)
    assert by_image.high - by_image.low < 0.25
    one = metrics.bootstrap(metrics.classification, y, p, ["g"] * 80, 500)["accuracy"]
    assert (one, metrics.drawn_by(["g"] * 80)) == (by_image, "image")


def test_draws_of_one_class_alone_do_not_count():
    y, p = np.array([0, 0, 0, 1]), np.array([[0.8, 0.2], [0.7, 0.3], [0.6, 0.4], [0.1, 0.9]])
    found = metrics.bootstrap(metrics.classification, y, p, None, 200)["auc"]
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)
    assert np.isnan(metrics.bootstrap(metrics.classification, y[:3], p[:3], None, 9)["auc"].low)


def test_what_intervals_are_over_says_when_they_are_too_narrow():
    """Of two groups with scores 0 and 1 the mean's bootstrap has half of its variance."""
    few = metrics.told(8, ["a", "b"] * 4)
    assert few.endswith("over 8 test images, drawn by 2 groups, of so few it is too narrow")
    assert metrics.told(20, [str(i) for i in range(20)]).endswith("drawn by 20 groups")
    assert "says nothing of other groups" in metrics.told(8, ["a"] * 8)
    assert metrics.told(8, None).endswith("over 8 test images")
