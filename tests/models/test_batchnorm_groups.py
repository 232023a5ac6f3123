"""BatchNorm in groups against PyTorch's BatchNorm on each group by itself."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxhisto.distributed import make_mesh, to_global
from jaxhisto.models.batchnorm import BatchNorm

ROWS, SIDE, WIDTH = 24, 3, 5
# Of the 6 rows on each of four devices: some (2), all (6), across a border (4), more than one
# device's (8, 12) and all rows.
GROUPS = [2, 6, 4, 8, 12, 24]
SHARED = ("scale", "bias")


@pytest.fixture(scope="module")
def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    level = rng.normal(0, 2, (ROWS, 1, 1, WIDTH))  # so that groups differ
    return {
        "x": (level + rng.normal(size=(ROWS, SIDE, SIDE, WIDTH))).astype(np.float32),
        "weight": rng.normal(size=(ROWS, SIDE, SIDE, WIDTH)).astype(np.float32),
        "scale": rng.uniform(0.5, 2, WIDTH).astype(np.float32),
        "bias": rng.normal(size=WIDTH).astype(np.float32),
    }


def ours(inputs: dict[str, np.ndarray], group: int, devices: int) -> dict[str, np.ndarray]:
    """The output, a loss's gradients and the running statistics after one batch."""
    graphdef, _, stats = nnx.split(BatchNorm(WIDTH, group), nnx.Param, nnx.BatchStat)

    def loss_of(x: jax.Array, scale: jax.Array, bias: jax.Array, weight: jax.Array) -> Any:
        params = nnx.State({"scale": scale, "bias": bias})
        norm = nnx.merge(graphdef, params, stats, copy=True)
        y = norm(x, train=True)
        return (weight * jnp.sin(y)).sum(), (y, norm.mean[...], norm.var[...])

    mesh = make_mesh(devices)
    with jax.set_mesh(mesh):
        x, weight = to_global((inputs["x"], inputs["weight"]), mesh)
        gradient = jax.jit(jax.value_and_grad(loss_of, argnums=(0, 1, 2), has_aux=True))
        (loss, aux), slopes = gradient(x, inputs["scale"], inputs["bias"], weight)
    names = ("loss", "y", "mean", "var", "x", "scale", "bias")
    return dict(zip(names, jax.device_get((loss, *aux, *slopes)), strict=True))


def theirs(inputs: dict[str, np.ndarray], group: int) -> dict[str, np.ndarray]:
    """PyTorch, one BatchNorm a group from the same start, in float64."""
    scale, bias = (torch.tensor(inputs[n].astype(np.float64), requires_grad=True) for n in SHARED)
    x = torch.tensor(inputs["x"].astype(np.float64)).permute(0, 3, 1, 2).requires_grad_()
    weight = torch.tensor(inputs["weight"].astype(np.float64)).permute(0, 3, 1, 2)
    outputs, means, variances = [], [], []
    for rows in x.split(group):
        mean, var = torch.zeros(WIDTH).double(), torch.ones(WIDTH).double()
        outputs.append(
            torch.nn.functional.batch_norm(rows, mean, var, scale, bias, True, 0.1, 1e-5)
        )
        means.append(mean)
        variances.append(var)
    y = torch.cat(outputs)
    loss = (weight * torch.sin(y)).sum()
    loss.backward()
    found = {
        "loss": loss,
        "y": y.permute(0, 2, 3, 1),
        "mean": torch.stack(means).mean(0),
        "var": torch.stack(variances).mean(0),
        "x": x.grad.permute(0, 2, 3, 1),
        "scale": scale.grad,
        "bias": bias.grad,
    }
    return {name: value.detach().numpy() for name, value in found.items()}


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("group", GROUPS)
def test_each_group_is_pytorchs(inputs: dict[str, np.ndarray], group: int, devices: int) -> None:
    found, expected = ours(inputs, group, devices), theirs(inputs, group)
    for name, value in expected.items():
        size = np.abs(value).max()
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5 * size, err_msg=name)


def test_that_comparison_sees_another_group(inputs: dict[str, np.ndarray]) -> None:
    found, expected = ours(inputs, 4, 4), theirs(inputs, 6)
    for name in ("y", "x", "scale", "var"):
        value = expected[name]
        assert np.abs(found[name] - value).max() > 1e-2 * np.abs(value).max(), name


def test_one_group_is_the_global_batch(inputs: dict[str, np.ndarray]) -> None:
    found, expected = ours(inputs, ROWS, 4), ours(inputs, 0, 4)
    for name, value in expected.items():
        size = np.abs(value).max()
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5 * size, err_msg=name)


@pytest.mark.parametrize("group", GROUPS)
def test_groups_within_a_device_send_nothing(inputs: dict[str, np.ndarray], group: int) -> None:
    graphdef, params, stats = nnx.split(BatchNorm(WIDTH, group), nnx.Param, nnx.BatchStat)

    def loss_of(x: jax.Array) -> jax.Array:
        y = nnx.merge(graphdef, params, stats, copy=True)(x, train=True)
        return jax.grad(lambda x: jnp.sin(x).sum())(y)

    def both_passes(x: jax.Array) -> jax.Array:
        y, pull = jax.vjp(loss_of, x)
        return pull(y)[0]

    mesh = make_mesh(4)
    with jax.set_mesh(mesh):
        text = jax.jit(both_passes).lower(to_global(inputs["x"], mesh)).compile().as_text()
    sent = set(re.findall(r"all-reduce|all-gather|all-to-all|collective-permute", text))
    assert sent == (set() if group in (2, 6) else {"all-reduce"})


def test_rows_that_fill_no_group_are_refused(inputs: dict[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="24 rows are no whole number of groups of 5"):
        BatchNorm(WIDTH, 5)(jnp.asarray(inputs["x"]), train=True)


def test_the_global_batch_is_refused_where_a_device_is_alone(
    inputs: dict[str, np.ndarray],
) -> None:
    graphdef, params, stats = nnx.split(BatchNorm(WIDTH), nnx.Param, nnx.BatchStat)

    @jax.shard_map(in_specs=P("data"), out_specs=P("data"))
    def alone(x: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params, stats, copy=True)(x, train=True)

    mesh = make_mesh(4)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="its own rows alone"):
        alone(to_global(inputs["x"], mesh))
