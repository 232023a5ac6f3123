"""The stem's max-pool and its gradient against PyTorch's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxhisto.distributed import make_mesh, to_global
from jaxhisto.models.pooling import max_pool


@pytest.mark.parametrize("shape", [(7, 7), (8, 8), (2, 2), (1, 1), (9, 6)])
@pytest.mark.parametrize("devices", [1, 4])
def test_gradient_is_pytorchs_with_ties_too(shape: tuple[int, int], devices: int) -> None:
    rng = np.random.default_rng(0)
    # Small whole numbers: most windows have several largest pixels.
    x = rng.integers(-2, 3, (4, *shape, 3)).astype(np.float32)
    theirs = torch.from_numpy(x).permute(0, 3, 1, 2).requires_grad_()
    y = torch.nn.functional.max_pool2d(theirs, 3, 2, 1)
    slope = rng.normal(size=y.permute(0, 2, 3, 1).shape).astype(np.float32)
    y.backward(torch.from_numpy(slope).permute(0, 3, 1, 2))

    def both(x: jax.Array, slope: jax.Array) -> tuple[jax.Array, jax.Array]:
        out, pull = jax.vjp(max_pool, x)
        return out, pull(slope)[0]

    mesh = make_mesh(devices)
    with jax.set_mesh(mesh):
        out, gradient = jax.jit(both)(*to_global((x, slope), mesh))
    np.testing.assert_array_equal(out, y.detach().permute(0, 2, 3, 1))
    np.testing.assert_allclose(gradient, theirs.grad.permute(0, 2, 3, 1), rtol=0, atol=1e-6)


def test_gradient_takes_no_more_than_its_input() -> None:
    x = jnp.zeros((8, 64, 64, 16), jnp.float32)
    slope = jnp.zeros((8, 32, 32, 16), jnp.float32)

    def gradient(x: jax.Array, slope: jax.Array) -> jax.Array:
        return jax.vjp(max_pool, x)[1](slope)[0]

    compiled = jax.jit(gradient).lower(x, slope).compile()
    assert "scatter" not in compiled.as_text()
    # XLA's own takes 7.6 times the input.
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * x.nbytes
