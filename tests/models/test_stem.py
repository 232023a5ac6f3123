"""The space-to-depth form of the first convolution against PyTorch's in float64, and XLA's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxhisto.distributed import make_mesh, to_global
from jaxhisto.models.convolution import plain
from jaxhisto.models.resnet import build_resnet
from jaxhisto.models.stem import space_to_depth
from jaxhisto.pretrain.step import replicate

Arrays = tuple[np.ndarray, ...]
Form = Callable[[jax.Array, jax.Array], jax.Array]

N, WIDTH = 4, 8
SIDES = [(16, 16), (15, 21), (8, 9), (1, 1)]
HIGHEST = jax.lax.Precision.HIGHEST


def of_xla(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return plain(x, kernel, 2, HIGHEST)


def of_blocks(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return space_to_depth(x, kernel, HIGHEST)


def made(sides: tuple[int, int], whole: bool = False) -> Arrays:
    """(image, kernel, slope); whole: small integers, whose sums float32 holds exactly."""
    rng = np.random.default_rng(0)
    out = [-(-side // 2) for side in sides]
    shapes = ((N, *sides, 3), (7, 7, 3, WIDTH), (N, *out, WIDTH))
    if whole:
        return tuple(rng.integers(-4, 5, shape).astype(np.float32) for shape in shapes)
    return tuple(rng.standard_normal(shape, np.float32) for shape in shapes)


def all_three(form: Form) -> Callable[..., Any]:
    """Result, slope in the image and slope in the kernel."""

    def run(x: jax.Array, kernel: jax.Array, slope: jax.Array) -> tuple[jax.Array, ...]:
        y, pull = jax.vjp(form, x, kernel)
        return (y, *pull(slope))

    return run


def of_torch(arrays: Arrays) -> Arrays:
    """The same by PyTorch in float64."""
    x, kernel, slope = (torch.from_numpy(np.asarray(a, np.float64)) for a in arrays)
    image = x.permute(0, 3, 1, 2).requires_grad_()
    weight = kernel.permute(3, 2, 0, 1).requires_grad_()
    y = torch.nn.functional.conv2d(image, weight, stride=2, padding=3)
    y.backward(slope.permute(0, 3, 1, 2))
    assert image.grad is not None
    assert weight.grad is not None
    found = (
        y.detach().permute(0, 2, 3, 1),
        image.grad.permute(0, 2, 3, 1),
        weight.grad.permute(2, 3, 1, 0),
    )
    return tuple(a.numpy() for a in found)


def error(found: Any, exact: np.ndarray) -> float:
    """Root of the mean square, as a part of that of the exact."""
    found = np.asarray(found, np.float64)
    return float(np.sqrt(((found - exact) ** 2).mean() / (exact**2).mean()))


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("devices", [1, 4])
def test_is_pytorchs(sides: tuple[int, int], devices: int) -> None:
    arrays, mesh = made(sides), make_mesh(devices)
    with jax.set_mesh(mesh):
        x, slope = to_global((arrays[0], arrays[2]), mesh)
        found = jax.jit(all_three(of_blocks))(x, replicate(arrays[1], mesh), slope)
    assert found[0].sharding.is_equivalent_to(x.sharding, 4)
    for ours, exact in zip(found, of_torch(arrays), strict=True):
        assert (ours.dtype, ours.shape) == (jnp.float32, exact.shape)
        assert error(ours, exact) < 5e-7


@pytest.mark.parametrize("sides", SIDES)
def test_where_no_sum_rounds_it_is_pytorchs_to_the_last_bit(sides: tuple[int, int]) -> None:
    arrays = made(sides, whole=True)
    found = jax.jit(all_three(of_blocks))(*arrays)
    for ours, exact in zip(found, of_torch(arrays), strict=True):
        np.testing.assert_array_equal(np.asarray(ours, np.float64), exact)


def test_in_bfloat16_it_is_as_exact_as_xlas_own() -> None:
    arrays = [jnp.asarray(a, jnp.bfloat16) for a in made((16, 15))]
    exact = of_torch(tuple(np.asarray(a, np.float64) for a in arrays))
    pairs = zip(
        jax.jit(all_three(space_to_depth))(*arrays),
        jax.jit(all_three(lambda x, kernel: plain(x, kernel, 2, None)))(*arrays),
        exact,
        strict=True,
    )
    for ours, xlas, right in pairs:
        assert ours.dtype == jnp.bfloat16
        assert error(ours, right) < 1.1 * error(xlas, right) < 0.01


def test_inside_shard_map_and_rematerialised() -> None:
    """As micro-batches take it: the kernel is shared, its slope summed over the devices."""
    arrays, mesh = made((16, 9)), make_mesh(4)

    def loss(x: jax.Array, kernel: jax.Array, slope: jax.Array) -> jax.Array:
        y = jax.checkpoint(lambda x: of_blocks(x, kernel))(x)
        return jax.lax.psum((y * slope).sum(), "data")

    with jax.set_mesh(mesh):
        x, slope = to_global((arrays[0], arrays[2]), mesh)
        spread = jax.shard_map(loss, in_specs=(P("data"), P(), P("data")), out_specs=P())
        found = jax.jit(jax.grad(spread, argnums=(0, 1)))(x, arrays[1], slope)
    for ours, exact in zip(found, of_torch(arrays)[1:], strict=True):
        assert error(ours, exact) < 5e-7


def test_the_network_takes_it_in_training_alone_with_the_same_weights() -> None:
    """One kernel of 7x7x3x64 whatever the form; evaluation is XLA's own, as exported."""
    plain_net, other = (build_resnet("resnet10", form=form) for form in ("plain", "space_to_depth"))
    shapes = [jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(n))) for n in (plain_net, other)]
    assert shapes[0] == shapes[1]
    assert shapes[1]["conv1"]["kernel"] == (7, 7, 3, 64)
    x = jnp.ones((2, 32, 32, 3))
    for net, train, folded in ((plain_net, True, 0), (other, True, 1), (other, False, 0)):
        text = jax.jit(lambda x, net=net, train=train: net.conv1(x, train=train)).lower(x).as_text()
        assert text.count("tensor<4x4x12x64xf32>") >= folded
        assert ("tensor<4x4x12x64xf32>" in text) == bool(folded)
