"""Optimizers and schedule against numpy, PyTorch and optax."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
import optax
import pytest
import torch

from jaxhisto.config import OptimConfig
from jaxhisto.errors import ConfigError
from jaxhisto.optim import build_optimizer, build_schedule, decayed, peak_rate, warmup_steps

STEPS, EPOCH = 60, 1.0
Tree = dict[str, dict[str, np.ndarray]]


@pytest.fixture
def params() -> Tree:
    rng = np.random.default_rng(0)
    shapes = {
        "conv": {"kernel": (3, 3, 2, 4)},
        "bn": {"scale": (4,), "bias": (4,)},
        "linear": {"kernel": (4, 5), "bias": (5,)},
    }
    return {
        layer: {n: rng.normal(size=s).astype(np.float32) for n, s in leaves.items()}
        for layer, leaves in shapes.items()
    }


def gradients(params: Tree) -> Iterator[Tree]:
    rng = np.random.default_rng(1)
    for _ in range(STEPS):
        yield jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)


def optimise(config: OptimConfig, params: Tree, batch_size: int = 512) -> Tree:
    tx, _ = build_optimizer(config, batch_size, STEPS, EPOCH)
    state = tx.init(params)
    update = jax.jit(tx.update)
    # optax's Adam raises a float to an integer power, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        for grads in gradients(params):
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
    return params


def rates(peak: float, warmup: int) -> list[float]:
    """The learning rate of each step, from its definition."""
    rising = [peak * t / warmup for t in range(warmup)]
    span = STEPS - warmup
    return rising + [peak * (1 + np.cos(np.pi * t / span)) / 2 for t in range(span)]


def lars_by_hand(params: Tree, peak: float, warmup: int, decay: float) -> Tree:
    """LARS as google-research/simclr runs it, in float64.

    The gradient takes up the decay; weights scale it by 0.001 |w| / |g|; momentum 0.9 gathers
    rate times gradient, and its sum is subtracted. Vectors (biases, BatchNorm) neither decay
    nor scale.
    """
    weights = jax.tree.map(lambda p: p.astype(np.float64), params)
    sums = jax.tree.map(np.zeros_like, weights)
    for rate, grads in zip(rates(peak, warmup), gradients(params), strict=True):
        for layer, leaves in weights.items():
            for name, w in leaves.items():
                g = grads[layer][name].astype(np.float64)
                pace = rate
                if w.ndim > 1:
                    g = g + decay * w
                    pace *= 0.001 * np.linalg.norm(w) / np.linalg.norm(g)
                sums[layer][name] = 0.9 * sums[layer][name] + pace * g
                leaves[name] = w - sums[layer][name]
    return weights


def assert_close(ours: Tree, theirs: Tree, params: Tree, tolerance: float) -> None:
    """Compares how far each tensor has moved."""
    for layer, leaves in theirs.items():
        for name, expected in leaves.items():
            moved = expected - params[layer][name]
            error = np.linalg.norm(np.asarray(ours[layer][name], np.float64) - expected)
            assert error < tolerance * np.linalg.norm(moved), f"{layer}.{name}"


@pytest.mark.parametrize("decay", [1e-6, 0.05])
def test_lars_is_simclrs(params: Tree, decay: float) -> None:
    config = OptimConfig(weight_decay=decay)
    ours = optimise(config, params)
    # min(10 epochs of one step, a tenth of the steps) = 6 steps of warm-up
    assert_close(ours, lars_by_hand(params, 0.6, 6, decay), params, 1e-4)


def test_adam_is_pytorchs_with_l2(params: Tree) -> None:
    ours = optimise(OptimConfig(name="adam", weight_decay=0.1), params)
    leaves, treedef = jax.tree.flatten(params)
    tensors = [torch.nn.Parameter(torch.from_numpy(p.copy())) for p in leaves]
    adam = torch.optim.Adam(tensors, lr=1.0, weight_decay=0.1)
    for rate, grads in zip(rates(1e-4, 6), gradients(params), strict=True):
        adam.param_groups[0]["lr"] = rate
        for tensor, grad in zip(tensors, jax.tree.leaves(grads), strict=True):
            tensor.grad = torch.from_numpy(grad)
        adam.step()
    theirs = jax.tree.unflatten(treedef, [t.detach().numpy() for t in tensors])
    assert_close(ours, theirs, params, 1e-3)


@pytest.mark.parametrize(
    ("name", "batch_size", "rate"),
    [
        ("lars", 256, 0.3),
        ("lars", 512, 0.6),
        # sec. 4: 4 / (2^(3 - (log2 B - 9)/2) * 100)
        ("lamb", 256, 0.005 / 2**0.5),
        ("lamb", 512, 0.005),
        ("lamb", 1024, 0.005 * 2**0.5),
        ("adam", 256, 1e-4),
        ("adam", 1024, 1e-4),
    ],
)
def test_peak_rates_are_the_papers(name: str, batch_size: int, rate: float) -> None:
    assert peak_rate(OptimConfig(name=name), batch_size) == pytest.approx(rate, rel=1e-12)


def test_lamb_decays_weights_alone(params: Tree) -> None:
    plain = optimise(OptimConfig(name="lamb", weight_decay=0.0), params)
    heavy = optimise(OptimConfig(name="lamb", weight_decay=0.5), params)
    same = jax.tree.map(np.array_equal, plain, heavy)
    assert same == {
        "conv": {"kernel": False},
        "bn": {"scale": True, "bias": True},
        "linear": {"kernel": False, "bias": True},
    }


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (60, 6), (1000, 20)])
def test_schedule_is_optaxs(steps: int, warmup: int) -> None:
    config = OptimConfig(rate=0.7)
    assert warmup_steps(config, steps, steps_per_epoch=2.0) == warmup
    ours = build_schedule(config, 512, steps, 2.0)
    theirs = optax.warmup_cosine_decay_schedule(0.0, 0.7, warmup, steps)
    for step in {0, 1, warmup, steps // 2, steps}:
        assert float(ours(step)) == pytest.approx(float(theirs(step)), abs=1e-7)
    assert float(ours(steps)) == pytest.approx(0.0, abs=1e-9)


def test_a_misnamed_parameter_is_refused(params: Tree) -> None:
    params["bn"]["gain"] = np.ones(4, np.float32)
    params["conv"]["bias"] = np.ones((2, 2), np.float32)
    with pytest.raises(ConfigError, match=r"bn\.gain, conv\.bias"):
        decayed(params)


@pytest.mark.parametrize(("name", "decay"), [("lars", 0.0), ("lars", 0.05), ("lamb", 0.05)])
def test_updates_and_state_are_optaxs(params: Tree, name: str, decay: float) -> None:
    config = OptimConfig(name=name, rate=0.3, weight_decay=decay)
    params["still"] = {"kernel": np.zeros((3, 2), np.float32)}
    ours, schedule = build_optimizer(config, 512, STEPS, EPOCH)
    theirs = {
        "lars": optax.lars(schedule, decay, decayed, 0.001, trust_ratio_mask=decayed),
        "lamb": optax.lamb(schedule, eps=1e-6, weight_decay=decay, mask=decayed),
    }[name]
    state, expected = ours.init(params), theirs.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for grads, _ in zip(gradients(params), range(3), strict=False):
            updates, state = ours.update(grads, state, params)
            wanted, expected = theirs.update(grads, expected, params)
            # A checkpoint of optax's own is read as ours.
            assert jax.tree.structure(state) == jax.tree.structure(expected)
            for leaf, other in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(leaf, other, rtol=2e-6, atol=1e-9)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 3e-6, 1e-9), updates, wanted)
            params = optax.apply_updates(params, updates)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="how XLA compiles for a CPU")
def test_lars_keeps_no_copies_of_the_weights() -> None:
    # optax.lars keeps three: gradient and decay, and what its norms are differentiable for
    params = {f"{i}": {"kernel": np.ones((256, 512), np.float32)} for i in range(6)}
    tx, _ = build_optimizer(OptimConfig(), 512, STEPS, EPOCH)

    def update(params: Tree, state: optax.OptState, grads: Tree) -> tuple[Tree, optax.OptState]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(update, donate_argnums=(0, 1)).lower(params, tx.init(params), params)
    assert compiled.compile().memory_analysis().temp_size_in_bytes < 2 * 256 * 512 * 4
