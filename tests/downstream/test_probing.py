"""Probes against scikit-learn and PyTorch on the same features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsRegressor

from jaxhisto import probes
from jaxhisto.downstream import last_layer
from jaxhisto.downstream.handmade import PATTERNS, WIDTH, features, lbp_codes
from jaxhisto.downstream.last_layer import Training, batch_order
from jaxhisto.downstream.linear import STRENGTHS, logistic_path, ridge_path
from jaxhisto.downstream.probing import Divided, Settings, probe
from jaxhisto.errors import StoreError
from jaxhisto.models.initial import as_torchvision


def clouds(classes: int, n: int = 120, d: int = 10, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, d))
    y = np.arange(n) % classes
    return (centres[y] + 1.5 * rng.normal(size=(n, d))).astype(np.float32), y


def divided(y: np.ndarray, x: np.ndarray, classes: int, groups: int = 6) -> Divided:
    rows = np.arange(len(x))
    named = tuple(f"g{i * groups // len(x)}" for i in rows)
    parts = np.split(rows, [len(x) // 2, len(x) * 3 // 4])
    return Divided(x, y, tuple(map(str, range(classes))), named, *parts)


@pytest.mark.parametrize("classes", [2, 4])
def test_the_logistic_path_is_scikit_learns(classes):
    x, y = clouds(classes)
    n = len(x)
    path = list(logistic_path(x, y, classes, [1e-4, 1e-2, 1.0]))
    assert [m.strength for m in path] == [1.0, 1e-2, 1e-4]
    for model in path:
        # Of two classes scikit-learn has one vector w = w1 - w0, whose penalty is half of ours.
        c = 1 / (n * model.strength) * (2 if classes == 2 else 1)
        theirs = LogisticRegression(C=c, tol=1e-10, max_iter=10000).fit(x.astype(float), y)
        logits = model(x)
        ours = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        # Measured: 1.6e-6.
        np.testing.assert_allclose(ours, theirs.predict_proba(x.astype(float)), atol=1e-5)


def test_a_class_without_rows_is_never_predicted():
    x, y = clouds(3)
    *_, model = logistic_path(x[y != 1], y[y != 1], 3)
    assert set(model(x).argmax(1)) == {0, 2}


@pytest.mark.parametrize("d", [10, 200])
def test_the_ridge_path_is_scikit_learns(d):
    x, _ = clouds(2, d=d)
    y = x[:, 0] * 3 + np.random.default_rng(1).normal(size=len(x)) + 50
    for model in ridge_path(x, y, [1e-3, 1.0]):
        theirs = Ridge(alpha=model.strength * len(x)).fit(x.astype(float), y)
        np.testing.assert_allclose(model(x)[:, 0], theirs.predict(x.astype(float)), atol=1e-8)


def test_neighbours_of_numbers_are_scikit_learns():
    x, _ = clouds(2)
    y = x[:, :1].astype(float)
    theirs = KNeighborsRegressor(
        5, weights=lambda d: np.exp((1 - d) / 0.1), metric="cosine", algorithm="brute"
    ).fit(x[:80].astype(float), y[:80])
    ours = probes.knn_values(x[:80], y[:80], x[80:], 5, 0.1)
    np.testing.assert_allclose(ours, theirs.predict(x[80:].astype(float)), atol=1e-10)


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_the_last_layer_is_trained_as_by_pytorch(kind):
    x, y = clouds(3, n=50, d=8)
    if kind == "regression":
        y = x[:, :1] * 2 + 0.3
    outputs = 3 if kind == "classification" else 1
    settings = Training(epochs=4, batch=16, rate=1e-2, weight_decay=0.1, seed=3)

    rng = np.random.default_rng(settings.seed)
    shapes = last_layer._shapes(8, outputs)
    start = as_torchvision(shapes, rng)
    order, mask = batch_order(50, settings, rng)
    layer = torch.nn.Linear(8, outputs)
    layer.load_state_dict(
        {"weight": torch.tensor(start["kernel"].T.copy()), "bias": torch.tensor(start["bias"])}
    )
    adam = torch.optim.Adam(layer.parameters(), lr=1e-2, weight_decay=0.1)
    targets = torch.tensor(y)
    loss_of = torch.nn.CrossEntropyLoss() if kind == "classification" else torch.nn.MSELoss()
    ends = []
    for epoch in order:
        for rows, counts in zip(epoch, mask, strict=True):
            chosen = torch.tensor(rows[counts > 0], dtype=torch.long)
            adam.zero_grad()
            loss_of(layer(torch.tensor(x)[chosen]), targets[chosen]).backward()
            adam.step()
        ends.append(layer.weight.detach().numpy().T.copy())
    assert [int(m.sum()) for m in mask] == [16, 16, 16, 2]
    assert all(sorted(e.ravel()[mask.ravel() > 0]) == list(range(50)) for e in order)

    seen = []

    def third_is_best(found) -> float:
        seen.append(found)
        return [0.0, 0.5, 1.0, 1.0][len(seen) - 1]

    trained = last_layer.train(x, y, outputs, third_is_best, settings)
    assert trained.epoch == 3
    # Measured: 1.1e-6, of float32 sums in another order.
    for ours, theirs in zip(seen, ends, strict=True):
        np.testing.assert_allclose(ours.weights, theirs, atol=5e-6)
    np.testing.assert_array_equal(trained.weights, seen[2].weights)


@pytest.mark.parametrize("name", ["last_layer", "linear", "knn"])
def test_probes_learn_and_standardise(name):
    x, y = clouds(3, n=240)
    scale = np.logspace(-3, 3, 10).astype(np.float32)
    data = divided(y, x * scale + 5 * scale, 3)
    settings = Settings(Training(epochs=20, rate=1e-2), draws=50)
    found = probe(name, data, settings)
    floor = 0.6 if name != "knn" else 0.3  # neighbours see the features as they are
    assert found.test["accuracy"].value > floor
    assert found.predictions.sum(1) == pytest.approx(1)
    again = probe(name, data, settings)
    np.testing.assert_array_equal(found.predictions, again.predictions)
    if name == "last_layer":
        raw = probe(name, data, Settings(settings.training, standardise=False, draws=50))
        assert raw.test["accuracy"].value < found.test["accuracy"].value


@pytest.mark.parametrize("name", ["last_layer", "linear", "knn"])
def test_probes_of_numbers(name):
    x, _ = clouds(2, n=240)
    y = 40 + 5 * x[:, 0].astype(float)
    data = divided(y, x, 0)
    found = probe(name, data, Settings(Training(epochs=40, rate=1e-2), draws=50))
    assert found.test["pearson"].value > (0.95 if name != "knn" else 0.6)
    assert found.chosen.keys() >= ({"mae"} if name != "knn" else {"k"})


def test_the_strength_is_the_best_on_validation_or_on_left_out_groups():
    x, y = clouds(3, n=120, d=60)
    data = divided(y, x, 3)
    found = probe("linear", data, Settings(draws=5))
    scaled = data.standardised()
    scores = {}
    for strength in sorted(STRENGTHS, reverse=True):
        theirs = LogisticRegression(C=1 / (60 * strength), tol=1e-10, max_iter=100000)
        theirs.fit(scaled.x[data.train].astype(float), y[data.train])
        out = theirs.decision_function(scaled.x[data.validation].astype(float))
        scores[strength] = probes.macro_f1(y[data.validation], out)
    assert found.chosen["strength"] == max(scores, key=scores.get)
    assert found.chosen["macro_f1"] == pytest.approx(max(scores.values()))
    by_groups = probe("linear", data, Settings(select="groups", draws=5))
    assert by_groups.chosen["strength"] in STRENGTHS
    lone = Divided(x, y, data.classes, None, data.train, data.validation, data.test)
    with pytest.raises(StoreError, match=r"--select groups: there are 0 groups"):
        probe("linear", lone, Settings(select="groups"))


@pytest.mark.parametrize(("points", "radius"), PATTERNS)
def test_patterns_are_scikit_images(points, radius):
    from skimage.feature import local_binary_pattern

    grey = np.random.default_rng(0).permutation(1200).reshape(30, 40)  # no ties
    theirs = local_binary_pattern(grey, points, radius, "uniform")
    ours = lbp_codes(grey.astype(float), points, radius)
    np.testing.assert_array_equal(ours, theirs[radius:-radius, radius:-radius])
    assert len(np.unique(ours)) > 5
    flat = np.full((12, 12), 77.0)  # where scikit-image's codes are up to rounding
    assert (lbp_codes(flat, points, radius) == points).all()


def test_handmade_features_of_a_plain_tile():
    pink = np.full((2, 16, 16, 3), (200, 100, 180), np.uint8)
    found = features(pink)
    assert found.shape == (2, WIDTH)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[0], found[1])
    assert found[0, :6].tolist() == pytest.approx([0, 0, 0, 1, 200 / 255, 0], abs=1e-6)
