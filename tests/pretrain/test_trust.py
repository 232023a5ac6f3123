"""Trust ratios against optax's own updates, and against one worked by hand."""

from __future__ import annotations

import csv

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxhisto.config import OptimConfig, PretrainConfig
from jaxhisto.optim import build_optimizer, build_schedule, trust_norms
from jaxhisto.pretrain.step import TrainState, make_update
from jaxhisto.pretrain.trust import report_trust_ratios, trust_ratios
from jaxhisto.weights import torch_name

RATE = 0.7


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = {
        "encoder": {
            "conv1": {"kernel": (3, 3, 3, 8)},
            "bn1": {"scale": (8,), "bias": (8,)},
        },
        "projection": {"1": {"kernel": (8, 4), "bias": (4,)}},
    }
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


@pytest.fixture(scope="module")
def grads(params):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: (0.3 * rng.normal(size=p.shape)).astype(np.float32), params)


def stepped(config, params, grads, steps=1):
    """(update of the last step, norms), all gradients the same."""
    tx, _ = build_optimizer(config, 512, 100, 1.0)
    state = tx.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(steps):
            updates, state = tx.update(grads, state, params)
        return updates, trust_norms(config, params, grads, state)


def by_name(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {torch_name(tuple(k.key for k in path)): np.asarray(x, float) for path, x in leaves}


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lars_ratios_are_what_optax_multiplies_the_rate_with(params, grads, decay):
    config = OptimConfig("lars", rate=RATE, warmup_epochs=0, weight_decay=decay)
    updates, norms = stepped(config, params, grads)
    ratios = trust_ratios(config, params, np.asarray(norms))
    w, g, u = by_name(params), by_name(grads), by_name(updates)
    assert {r.parameter for r in ratios} == set(w)
    for r in ratios:
        is_weight = w[r.parameter].ndim > 1
        assert (r.adapted, r.decayed) == (is_weight, is_weight)
        direction = g[r.parameter] + (decay * w[r.parameter] if is_weight else 0)
        np.testing.assert_allclose(
            u[r.parameter], -RATE * r.trust_ratio * direction, rtol=1e-4, atol=1e-9
        )
        assert r.weight_norm == pytest.approx(np.linalg.norm(w[r.parameter]), rel=1e-5)
        assert r.gradient_norm == pytest.approx(np.linalg.norm(g[r.parameter]), rel=1e-5)
        if not is_weight:
            assert r.trust_ratio == 1


@pytest.mark.parametrize("steps", [1, 3])
def test_lamb_ratios_are_what_optax_multiplies_the_rate_with(params, grads, steps):
    config = OptimConfig("lamb", rate=RATE, warmup_epochs=0, weight_decay=0.1)
    updates, norms = stepped(config, params, grads, steps)
    adam = optax.scale_by_adam(eps=1e-6)
    state = adam.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(steps):
            directions, state = adam.update(grads, state)
    rate = float(build_schedule(config, 512, 100, 1.0)(steps - 1))
    w, u, d = by_name(params), by_name(updates), by_name(directions)
    for r in trust_ratios(config, params, np.asarray(norms)):
        assert (r.adapted, r.decayed) == (True, w[r.parameter].ndim > 1)
        whole = d[r.parameter] + (0.1 * w[r.parameter] if r.decayed else 0)
        np.testing.assert_allclose(
            u[r.parameter], -rate * r.trust_ratio * whole, rtol=1e-4, atol=1e-7
        )


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_the_compiled_step_gives_the_norms(params, grads, name):
    config = PretrainConfig(out="run", optim=OptimConfig(name, rate=RATE, warmup_epochs=0))
    tx, _ = build_optimizer(config.optim, config.batch_size, 100, 1.0)
    state = TrainState(jnp.zeros((), jnp.int32), params, {}, tx.init(params))
    _, metrics = jax.jit(make_update(config, 100, 1.0))(state, grads)
    _, norms = stepped(config.optim, params, grads)
    np.testing.assert_allclose(metrics["trust_norms"], norms, rtol=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(np.linalg.norm(norms[1]), rel=1e-5)


def test_a_ratio_by_hand_and_the_file(tmp_path):
    params = {
        "encoder": {"conv1": {"kernel": jnp.array([[3.0, 4.0]])}, "bn1": {"bias": jnp.ones(4)}}
    }
    grads = {
        "encoder": {"conv1": {"kernel": jnp.array([[0.6, 0.8]])}, "bn1": {"bias": jnp.ones(4)}}
    }
    config = OptimConfig("lars", weight_decay=0.1)
    norms = trust_norms(config, params, grads, None)
    said = report_trust_ratios(config, tmp_path, params, {"trust_norms": norms})
    assert "1 parameters adapted, 1 exempt; trust ratios 0.00333 (conv1.weight) to 0.00333" in said
    with (tmp_path / "trust_ratios.csv").open(newline="") as file:
        rows = {row["parameter"]: row for row in csv.DictReader(file)}
    # ||w|| = 5, g + 0.1 w = (0.9, 1.2) of length 1.5: 0.001 * 5 / 1.5
    conv, bias = rows["conv1.weight"], rows["bn1.bias"]
    assert float(conv["trust_ratio"]) == pytest.approx(0.001 * 5 / 1.5, rel=1e-6)
    assert (float(conv["weight_norm"]), float(conv["gradient_norm"])) == pytest.approx((5, 1))
    assert (conv["adapted"], conv["decayed"]) == ("yes", "yes")
    assert (bias["trust_ratio"], bias["adapted"], bias["decayed"]) == ("1", "no", "no")


def test_a_layer_of_zeros_has_ratio_one_as_in_optax(params, grads):
    still = jax.tree.map(np.zeros_like, params)
    config = OptimConfig("lars", rate=RATE, warmup_epochs=0)
    updates, norms = stepped(config, still, grads)
    assert {r.trust_ratio for r in trust_ratios(config, still, np.asarray(norms))} == {1.0}
    u, g = by_name(updates), by_name(grads)
    np.testing.assert_allclose(u["conv1.weight"], -RATE * g["conv1.weight"], rtol=1e-6)


def test_adam_has_none_and_says_so(tmp_path):
    said = report_trust_ratios(OptimConfig("adam"), tmp_path, {}, {"loss": 1.0})
    assert said == "no trust_ratios.csv: adam has no trust ratios"
    assert not list(tmp_path.iterdir())
