"""Probes and scores against scikit-learn, spread against its definition written out."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import RidgeClassifier, RidgeCV
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from jaxhisto import probes


def problem(classes: int, n: int = 90, d: int = 12, seed: int = 0):
    """Overlapping clouds: (train, labels, test, labels)."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, d))
    y = rng.integers(0, classes, 2 * n)
    x = (centres[y] + 1.5 * rng.normal(size=(2 * n, d))).astype(np.float32)
    return x[:n], y[:n], x[n:], y[n:]


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize(("k", "tau"), [(5, 0.07), (20, 1.0)])
def test_knn_is_scikit_learns_with_exponential_weights(classes, k, tau):
    x, y, test, _ = problem(classes)
    theirs = KNeighborsClassifier(
        k, weights=lambda d: np.exp((1 - d) / tau), metric="cosine", algorithm="brute"
    ).fit(x.astype(float), y)
    ours = probes.knn_scores(x, y, test, classes, k, tau)
    np.testing.assert_allclose(ours, theirs.predict_proba(test.astype(float)), atol=1e-10)


def test_knn_takes_all_rows_when_there_are_fewer_than_k_and_any_temperature():
    x, y, test, _ = problem(3, n=7)
    many = probes.knn_scores(x, y, test, 3, k=200)
    np.testing.assert_array_equal(many, probes.knn_scores(x, y, test, 3, k=7))
    sharp = probes.knn_scores(x, y, test, 3, tau=1e-4)  # exp(1 / tau) is no float64
    nearest = probes.knn_scores(x, y, test, 3, k=1).argmax(1)
    np.testing.assert_allclose(sharp, np.eye(3)[nearest], atol=1e-12)


def test_knn_of_more_rows_than_are_taken_at_once(monkeypatch):
    x, y, test, _ = problem(3)
    whole = probes.knn_scores(x, y, test, 3)
    monkeypatch.setattr(probes, "AT_ONCE", 7)
    np.testing.assert_allclose(probes.knn_scores(x, y, test, 3), whole, atol=1e-13)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("d", [12, 200])
def test_ridge_is_scikit_learns(classes, d):
    x, y, test, _ = problem(classes, d=d)
    scaler = StandardScaler().fit(x.astype(float))
    fit_on, test_on = scaler.transform(x.astype(float)), scaler.transform(test.astype(float))
    search = RidgeCV(probes.LAMBDAS).fit(fit_on, np.eye(classes)[y])
    ours, lam = probes.ridge_scores(x, y, test, classes)
    assert lam == search.alpha_
    np.testing.assert_allclose(ours, search.predict(test_on), atol=1e-8)
    theirs = RidgeClassifier(alpha=lam).fit(fit_on, y).decision_function(test_on)
    if classes == 2:
        np.testing.assert_allclose(2 * ours[:, 1] - 1, theirs, atol=1e-8)
    else:
        np.testing.assert_allclose(2 * ours - 1, theirs, atol=1e-8)


@pytest.mark.parametrize("lam", [0.01, 30.0])
def test_the_left_out_error_is_that_of_refitting_without_each_row(lam):
    x, y, _, _ = problem(3, n=25, d=40)
    x, _, _ = probes.standardised(x)
    onehot = np.eye(3)[y]
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    centred = onehot - onehot.mean(0)
    ours = probes._left_out(u, s, u.T @ centred, centred, lam)
    errors = []
    for i in range(len(x)):
        keep = np.arange(len(x)) != i
        offset, mean = x[keep].mean(0), onehot[keep].mean(0)
        a = x[keep] - offset
        w = np.linalg.solve(a.T @ a + lam * np.eye(40), a.T @ (onehot[keep] - mean))
        errors.append((((x[i] - offset) @ w + mean - onehot[i]) ** 2).mean())
    assert ours == pytest.approx(np.mean(errors), rel=1e-8)


def test_a_constant_feature_changes_nothing():
    x, y, test, _ = problem(2)
    wider = [np.column_stack([a, np.full(len(a), 0.1, np.float32)]) for a in (x, test)]
    ours, _ = probes.ridge_scores(wider[0], y, wider[1], 2)
    np.testing.assert_allclose(ours, probes.ridge_scores(x, y, test, 2)[0], atol=1e-9)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_scores_are_scikit_learns(classes):
    x, y, test, truth = problem(classes)
    scores = probes.knn_scores(x, y, test, classes)
    predicted = scores.argmax(1)
    assert probes.accuracy(truth, scores) == accuracy_score(truth, predicted)
    f1 = f1_score(truth, predicted, average="macro")
    assert probes.macro_f1(truth, scores) == pytest.approx(f1, abs=1e-12)
    area = roc_auc_score(truth, scores[:, 1] if classes == 2 else scores, multi_class="ovr")
    assert probes.auc(truth, scores) == pytest.approx(area, abs=1e-12)


def test_scores_with_absent_classes_and_ties():
    rng = np.random.default_rng(3)
    truth = rng.choice([0, 1, 3], 60)  # 2 is never true, 4 neither true nor predicted
    scores = rng.integers(0, 4, (60, 5)) / 4.0
    scores[:, 4] = -1
    predicted = scores.argmax(1)
    assert 2 in predicted
    f1 = f1_score(truth, predicted, average="macro", zero_division=0)
    assert probes.macro_f1(truth, scores) == pytest.approx(f1, abs=1e-12)
    areas = [roc_auc_score(truth == c, scores[:, c]) for c in (0, 1, 3)]
    assert probes.auc(truth, scores) == pytest.approx(np.mean(areas), abs=1e-12)
    assert np.isnan(probes.auc(np.ones(5, int), scores[:5, :2]))
    assert np.isnan(probes.auc(np.ones(5, int), scores[:5]))


def test_effective_rank():
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(50, 8)))
    assert probes.effective_rank(q) == pytest.approx(8)  # eight equal singular values
    line = np.outer(rng.normal(size=50), rng.normal(size=8))
    assert probes.effective_rank(line) == pytest.approx(1)
    x = rng.normal(size=(50, 8)) * np.arange(1, 9)
    s = np.sqrt(np.linalg.eigvalsh(x.T @ x))
    p = s / s.sum()
    assert probes.effective_rank(x) == pytest.approx(np.exp(-sum(p * np.log(p))))
    assert np.isnan(probes.effective_rank(np.zeros((3, 2))))
    assert np.isnan(probes.effective_rank(np.array([[1.0, np.nan]])))


def test_alignment_uniformity_and_cosines_are_their_definitions():
    z = np.random.default_rng(0).normal(size=(9, 2, 5)) + 0.5
    u = z / np.linalg.norm(z, axis=-1, keepdims=True)
    pulled = [np.linalg.norm(a - b) ** 2 for a, b in u]
    assert probes.alignment(z) == pytest.approx(np.mean(pulled))
    pairs = [(i, j) for i in range(9) for j in range(i)]
    pushed = [np.exp(-2 * np.linalg.norm(u[i, 0] - u[j, 0]) ** 2) for i, j in pairs]
    assert probes.uniformity(z[:, 0]) == pytest.approx(np.log(np.mean(pushed)))
    views = [(i, v) for i in range(9) for v in (0, 1)]
    negatives = [u[a] @ u[b] for a in views for b in views if a[0] != b[0]]
    positive, negative = probes.pair_cosines(z)
    assert positive == pytest.approx(np.mean([a @ b for a, b in u]))
    assert negative == pytest.approx(np.mean(negatives))


def test_a_collapsed_embedding_looks_like_one():
    z = np.broadcast_to(np.array([1.0, 2.0, 3.0]), (4, 2, 3))
    assert probes.alignment(z) == 0
    assert probes.uniformity(z[:, 0]) == pytest.approx(0, abs=1e-12)
    assert probes.pair_cosines(z) == pytest.approx((1, 1))
    assert probes.effective_rank(z[:, 0]) == pytest.approx(1)
