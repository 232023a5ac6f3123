"""Scores of counted pixels against scikit-learn's of the pixels."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn import metrics as sk

from jaxhisto.downstream.pixel_scores import IGNORED, class_f1, class_iou, confusion, scores


@pytest.mark.parametrize(
    ("true", "found"),
    [
        ((0, 1, 2, 3), (0, 1, 2, 3)),
        ((0, 1), (0, 1)),  # two classes are nowhere
        ((0, 1, 2), (0, 1)),  # one is never predicted
        ((0, 1), (0, 1, 3)),  # one is predicted and nowhere true
        ((2,), (2,)),
        ((0,), (1,)),
    ],
)
def test_as_scikit_learn(true: tuple[int, ...], found: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    truth, predicted = rng.choice(true, (9, 40, 50)), rng.choice(found, (9, 40, 50))
    # Summed image by image, as the test images are.
    counts = sum(confusion(t, p, 4) for t, p in zip(truth, predicted, strict=True))
    flat = truth.ravel(), predicted.ravel()
    np.testing.assert_array_equal(counts, sk.confusion_matrix(*flat, labels=range(4)))
    ours = scores(counts)
    assert ours["macro_f1"] == pytest.approx(sk.f1_score(*flat, average="macro"), abs=1e-12)
    assert ours["mean_iou"] == pytest.approx(sk.jaccard_score(*flat, average="macro"), abs=1e-12)
    assert ours["accuracy"] == pytest.approx(sk.accuracy_score(*flat), abs=1e-12)
    there = np.union1d(true, found)
    each = sk.f1_score(*flat, average=None, labels=range(4), zero_division=0)
    np.testing.assert_allclose(class_f1(counts)[there], each[there], atol=1e-12)
    nowhere = np.setdiff1d(range(4), there)
    assert np.isnan(class_f1(counts)[nowhere]).all()
    assert np.isnan(class_iou(counts)[nowhere]).all()


def test_ignored_pixels_do_not_count() -> None:
    rng = np.random.default_rng(1)
    truth, predicted = rng.integers(0, 3, 500), rng.integers(0, 3, 500)
    hidden = truth.copy()
    hidden[::3] = IGNORED
    kept = hidden != IGNORED
    expected = sk.confusion_matrix(truth[kept], predicted[kept], labels=range(3))
    np.testing.assert_array_equal(confusion(hidden, predicted, 3), expected)


def test_nothing_counted_is_no_number() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(list(scores(np.zeros((2, 2), np.int64)).values())).all()
