"""k-means against scikit-learn, NumPy in float64, and planted clusters."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from made_features import planted
from sklearn.cluster import MiniBatchKMeans

from jaxhisto.clusters import kmeans as km
from jaxhisto.distributed import make_mesh
from jaxhisto.errors import RunError


def run(rows, k, seed=0, devices=1, known=None):
    rows = km.Held(rows) if isinstance(rows, np.ndarray) else rows
    mesh = make_mesh(devices)
    with jax.set_mesh(mesh):
        return km.kmeans(rows, k, seed, known or km.moments(rows), mesh)


@pytest.fixture(scope="module")
def mixture():
    """Overlapping clusters of unlike sizes in 32 dimensions, nonnegative as features are."""
    random = np.random.default_rng(3)
    labels = random.choice(60, 9000, p=random.dirichlet(np.ones(60)))
    centres = 1.5 * random.standard_normal((60, 32))
    spread = random.uniform(0.3, 1.2, 60)[labels, None]
    return np.maximum(centres[labels] + spread * random.standard_normal((9000, 32)), 0).astype("f4")


@pytest.mark.parametrize("k", [8, 40])
def test_inertia_is_within_a_percent_of_scikit_learn(mixture, k):
    theirs = [MiniBatchKMeans(k, random_state=s, n_init=1).fit(mixture).inertia_ for s in range(3)]
    ours = [run(mixture, k, seed).inertia for seed in range(3)]
    assert np.mean(ours) <= 1.01 * np.mean(theirs)


def test_labels_distances_and_variance_are_what_they_say(mixture):
    found = run(mixture, 40)
    x, c = mixture.astype(np.float64), found.centres.astype(np.float64)
    distances = np.sqrt(((x[:, None] - c[None]) ** 2).sum(-1))
    # Of rows between two centres float32 may take either.
    np.testing.assert_allclose(found.distances, distances.min(1), atol=2e-4)
    chosen = np.take_along_axis(distances, found.labels[:, None].astype(int), 1)[:, 0]
    np.testing.assert_allclose(chosen, distances.min(1), atol=2e-4)
    inertia = (distances.min(1) ** 2).sum()
    assert found.inertia == pytest.approx(inertia, rel=1e-5)
    total = ((x - x.mean(0)) ** 2).sum()
    assert found.explained == pytest.approx(1 - inertia / total, abs=1e-5)
    np.testing.assert_array_equal(found.sizes, np.bincount(found.labels, minlength=40))


def test_the_numbers_are_the_same_on_one_and_four_devices(mixture):
    one, four = run(mixture, 40, devices=1), run(mixture, 40, devices=4)
    np.testing.assert_array_equal(one.labels, four.labels)
    np.testing.assert_array_equal(one.centres, four.centres)
    assert one.inertia == four.inertia
    assert not np.array_equal(one.labels, run(mixture, 40, seed=1).labels)


class Counted:
    """Rows that say how many are read at a time."""

    def __init__(self, rows):
        self.rows, self.most, self.width = rows, 0, rows.shape[1]

    def __len__(self):
        return len(self.rows)

    def read(self, start, stop):
        self.most = max(self.most, stop - start)
        return self.rows[start:stop]


def test_rows_that_do_not_fit_are_read_in_pieces(mixture, monkeypatch):
    whole = run(mixture, 40)
    monkeypatch.setattr(km, "FITS", 1 << 16)
    monkeypatch.setattr(km, "CHUNK", 1 << 16)
    rows = Counted(mixture)
    found = run(rows, 40)
    assert rows.most <= km.BATCH
    assert found.inertia == pytest.approx(whole.inertia, rel=0.02)
    assert (run(Counted(mixture), 40).labels == found.labels).all()


def test_moments_keep_their_digits_under_a_large_offset(monkeypatch):
    monkeypatch.setattr(km, "CHUNK", 4 * 5 * 64)
    rows = (1000 + np.random.default_rng(0).standard_normal((1000, 5))).astype(np.float32)
    known = km.moments(km.Held(rows))
    exact = rows.astype(np.float64)
    np.testing.assert_allclose(known.mean, exact.mean(0), rtol=1e-6)
    assert known.total == pytest.approx(((exact - exact.mean(0)) ** 2).sum(), rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_rows_that_are_all_the_same_are_refused(value):
    with pytest.raises(RunError, match="all 50 rows of features are the same"):
        km.moments(km.Held(np.full((50, 7), value, np.float32)))


def test_more_clusters_than_rows_are_refused():
    with pytest.raises(RunError, match=r"--k 21: there are 20 rows"):
        run(planted(20, 4, 2), 21)


def test_a_cluster_a_row_leaves_nothing_over():
    rows = planted(30, 32, 30)
    found = run(rows, 30)
    assert found.inertia <= 1e-6 * km.moments(km.Held(rows)).total
    assert (found.sizes == 1).all()


def test_fewer_different_rows_than_clusters_leave_empty_ones():
    rows = np.repeat(planted(5, 8, 5), 20, axis=0)
    found = run(rows, 9)
    assert found.sizes.sum() == 100
    assert (found.sizes > 0).sum() == 5
    assert np.isfinite(found.centres).all()
    assert found.explained == pytest.approx(1, abs=1e-6)


def test_a_centre_without_rows_is_moved_to_the_farthest():
    rows = km._Centred(km.Held(np.array([[0.0], [1.0], [2.0], [50.0]], "f4")), np.zeros(1, "f4"))
    mesh = make_mesh(1)
    with jax.set_mesh(mesh):
        moved = km._lloyd(rows, np.array([[1.0], [-900.0]], "f4"), km.Stepper(mesh, 2, 1))
    np.testing.assert_allclose(moved, [[13.25], [50.0]])


@pytest.mark.parametrize("groups", [4, 9])
def test_the_elbow_of_planted_clusters_is_their_number(groups):
    rows = planted(1500, 16, groups, seed=groups)
    known, ks = km.moments(km.Held(rows)), np.arange(1, 17)
    explained = np.array([run(rows, int(k), known=known).explained for k in ks])
    assert km.elbow(ks, explained) == groups


def test_a_centre_that_is_nearest_to_nothing_is_moved_among_the_rows(mixture):
    known, mesh = km.moments(km.Held(mixture)), make_mesh(1)
    rows = km._Centred(km.Held(mixture), known.mean.astype(np.float32))
    start = np.vstack([rows.read(0, 7), np.full((1, 32), 1e4, np.float32)])
    with jax.set_mesh(mesh):
        centres = km._mini_batches(rows, start, km.Stepper(mesh, 8, 32), 0)
    assert np.abs(centres).max() <= np.abs(rows.read(0, len(rows))).max()


def test_the_elbow_is_the_point_farthest_above_the_chord():
    ks = np.array([10, 20, 40, 50])
    # x: 0 1/4 3/4 1; scaled y: 0 0.5 0.9 1; above the chord: 0 0.25 0.15 0.
    assert km.elbow(ks, np.array([0.2, 0.6, 0.92, 1.0])) == 20
    assert km.elbow(ks, np.array([0.1, 0.2, 0.4, 0.5])) is None
    assert km.elbow(ks[:2], np.array([0.1, 0.9])) is None
    assert km.elbow(ks, np.full(4, 0.5)) is None
