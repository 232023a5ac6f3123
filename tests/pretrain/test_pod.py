"""`doctor --pod` agrees where the code is right, and names what is wrong where it is not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxhisto.distributed import make_mesh
from jaxhisto.models.batchnorm import BatchNorm
from jaxhisto.pretrain import pod
from jaxhisto.pretrain import step as step_module
from jaxhisto.pretrain.loss import nt_xent
from jaxhisto.pretrain.pod import TOLERANCE, Difference, badness, compare, exchanges, median

pytestmark = pytest.mark.slow


def shards(x: jax.Array) -> jax.Array:
    """(N, ...) as (devices, N / devices, ...), on every device."""
    whole = jax.reshard(x, P())
    return whole.reshape(jax.sharding.get_abstract_mesh().size, -1, *x.shape[1:])


def own_negatives(z: jax.Array, temperature: float, chunk: int) -> tuple[jax.Array, dict]:
    losses, metrics = jax.vmap(lambda part: nt_xent(part, temperature))(shards(z))
    return losses.mean(), jax.tree.map(jnp.mean, metrics)


def own_statistics(self: BatchNorm, x: jax.Array, *, train: bool = False) -> jax.Array:
    """BatchNorm as it is without a thought: each device normalises by its own rows."""
    parts = shards(x).astype(jnp.float32)
    mean = parts.mean((1, 2, 3))
    var = parts.var((1, 2, 3))
    for running, new in ((self.mean, mean[0]), (self.var, var[0])):
        blended = self.MOMENTUM * running[...] + (1 - self.MOMENTUM) * new
        running[...] = jax.lax.stop_gradient(blended)
    gain = self.scale[...][None] * jax.lax.rsqrt(var + self.EPSILON)
    offset = self.bias[...][None] - mean * gain
    y = parts * gain[:, None, None, None] + offset[:, None, None, None]
    return jax.reshard(y.reshape(x.shape), P("data")).astype(x.dtype)


@contextmanager
def planted(fault: str):
    if fault == "negatives":
        with mock.patch.object(step_module, "nt_xent", own_negatives):
            yield
    else:
        with mock.patch.object(BatchNorm, "__call__", own_statistics):
            yield


def faulty(fault: str) -> Callable[[Any], pod.Probe]:
    """The real step with a fault in it: what runs on the mesh, never what runs on one device."""

    def make(config: Any) -> pod.Probe:
        right = pod.probe(config)

        def step(*args: Any) -> Any:
            with planted(fault):
                return right(*args)

        return step

    return make


def test_four_devices_train_as_one():
    found = compare(make_mesh(4))
    print(found)
    assert all(found[name].error <= tolerance for name, tolerance in TOLERANCE.items()), found


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        # The forward pass up to z is right, and with it BatchNorm.
        ("negatives", {"loss", "gradient", "update"}),
        ("BatchNorm", {"loss", "gradient", "BatchNorm statistics", "update"}),
    ],
)
def test_a_planted_fault_fails_that_comparison(fault, seen, capsys):
    found = compare(make_mesh(4), faulty(fault))
    print(found)
    failed = {name for name in TOLERANCE if not found[name].error <= TOLERANCE[name]}
    assert failed == seen, found
    assert min(found[name].error for name in seen) > 1e-2
    assert len(pod.table(found)) == len(seen)


def test_exchanges_are_checked_on_known_numbers(monkeypatch, capsys):
    assert [line[:4] for line in exchanges(make_mesh(4))] == ["ok  "] * 3
    monkeypatch.setattr(jax, "reshard", lambda x, _: x[::-1])
    assert [line[:4] for line in exchanges(make_mesh(4))] == ["ok  ", "FAIL", "ok  "]


def test_what_is_no_number_fails(capsys):
    nan = Difference(float("nan"), "here")
    fine = Difference(0.0, "there")
    assert median([nan, fine, nan]) is nan
    assert max([fine, nan, fine], key=badness) is nan
    assert len(pod.table(dict.fromkeys(TOLERANCE, fine) | {"loss": nan})) == 1
    assert np.isnan(pod.relative(np.array([1.0]), np.array([np.nan])))
