"""NT-Xent against a loop in float64 and against optax, on one device and on four."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxhisto.distributed import make_mesh, to_global
from jaxhisto.pretrain.loss import nt_xent

N, D = 8, 16
TEMPERATURES = [0.05, 0.1, 0.5, 1.0]


@pytest.fixture(scope="module")
def z() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(N, 2, D)).astype(np.float32)


def by_hand(z: np.ndarray, temperature: float) -> tuple[float, float, float, float]:
    """Loss, mean positive and negative cosine, and accuracy, one pair at a time, in float64."""
    rows = [v / np.sqrt((v**2).sum()) for image in z.astype(np.float64) for v in image]
    losses, positives, negatives, hits = [], [], [], []
    for i, a in enumerate(rows):
        partner = i + 1 if i % 2 == 0 else i - 1
        others = {j: float(a @ b) for j, b in enumerate(rows) if j != i}
        total = sum(np.exp(s / temperature) for s in others.values())
        losses.append(-np.log(np.exp(others[partner] / temperature) / total))
        positives.append(others[partner])
        negatives += [s for j, s in others.items() if j != partner]
        hits.append(max(others, key=others.__getitem__) == partner)
    return tuple(float(np.mean(x)) for x in (losses, positives, negatives, hits))


def gradient_by_hand(z: np.ndarray, temperature: float) -> np.ndarray:
    """Central differences of the loop."""
    z = z.astype(np.float64)
    out = np.zeros_like(z)
    for at in np.ndindex(*z.shape):
        ends = []
        for sign in (1, -1):
            moved = z.copy()
            moved[at] += sign * 1e-5
            ends.append(by_hand(moved, temperature)[0])
        out[at] = (ends[0] - ends[1]) / 2e-5
    return out


def run(z: np.ndarray, devices: int, of: Callable) -> tuple:
    mesh = make_mesh(devices)
    with jax.set_mesh(mesh):
        return jax.device_get(jax.jit(of)(to_global(z, mesh)))


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_loss_and_metrics_are_the_loops(z: np.ndarray, devices: int, temperature: float) -> None:
    near = z.copy()
    near[: N // 2, 1] = near[: N // 2, 0] + 0.1 * near[: N // 2, 1]  # some positives are found
    loss, metrics = run(near, devices, lambda z: nt_xent(z, temperature))
    expected = by_hand(near, temperature)
    ours = (loss, metrics["pos_sim"], metrics["neg_sim"], metrics["accuracy"])
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    assert 0 < metrics["accuracy"] < 1


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_loss_and_gradient_are_optaxs(z: np.ndarray, devices: int, temperature: float) -> None:
    labels = jnp.repeat(jnp.arange(N), 2)

    def theirs(z: jax.Array) -> jax.Array:
        return optax.losses.ntxent(z.reshape(2 * N, D), labels, temperature)

    # optax mixes dtypes, so strict promotion is off for its side alone.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        expected, slope = jax.value_and_grad(theirs)(jnp.asarray(z))
    loss, gradient = run(z, devices, jax.value_and_grad(lambda z: nt_xent(z, temperature)[0]))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=0, atol=1e-5 * float(jnp.abs(slope).max()))


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_gradient_is_the_loops(z: np.ndarray, temperature: float) -> None:
    z = z[:4, :, :4]
    gradient = run(z, 1, jax.grad(lambda z: nt_xent(z, temperature)[0]))
    expected = gradient_by_hand(z, temperature)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_length_does_not_matter_and_zero_has_a_gradient(z: np.ndarray) -> None:
    np.testing.assert_allclose(nt_xent(3 * z, 0.1)[0], nt_xent(z, 0.1)[0], rtol=1e-5)
    z = z.copy()
    z[0, 0] = 0
    loss, gradient = jax.value_and_grad(lambda z: nt_xent(z, 0.1)[0])(z)
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()


def test_needs_no_mesh(z: np.ndarray) -> None:
    np.testing.assert_allclose(nt_xent(jnp.asarray(z), 0.1)[0], by_hand(z, 0.1)[0], rtol=1e-5)
