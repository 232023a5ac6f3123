"""The fast forms of the convolution against PyTorch's in float64, and against XLA's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec as P

from jaxhisto.distributed import make_mesh, to_global
from jaxhisto.models import convolution, products, winograd
from jaxhisto.models.chunks import in_chunks, nearest_divisor, rows_of_chunk, sum_of_chunks
from jaxhisto.models.convolution import convolutions, convolve
from jaxhisto.models.pooling import max_pool
from jaxhisto.models.resnet import Conv

Arrays = tuple[np.ndarray, ...]

# (N, H, W, C), (k, D, stride): each form, odd and even sides, maps smaller than the kernel.
CASES = {
    "winograd": ((4, 8, 8, 32), (3, 40, 1)),
    "winograd, odd": ((4, 7, 5, 40), (3, 32, 1)),
    "winograd, one row": ((4, 1, 9, 32), (3, 32, 1)),
    "taps": ((4, 3, 3, 16), (3, 24, 1)),
    "taps, 2 x 3": ((4, 2, 3, 16), (3, 24, 1)),
    "taps, 1 x 1": ((4, 1, 1, 16), (3, 24, 1)),
    "narrow": ((4, 6, 7, 20), (3, 6, 1)),
    "strided": ((4, 8, 8, 20), (3, 6, 2)),
    "strided, odd": ((4, 9, 6, 20), (3, 6, 2)),
    "strided to 2": ((4, 4, 3, 20), (3, 6, 2)),
    "shortcut": ((4, 8, 8, 20), (1, 6, 2)),
    "shortcut, odd": ((4, 7, 9, 20), (1, 6, 2)),
    "bottleneck": ((4, 5, 6, 20), (1, 6, 1)),
    "stem": ((4, 16, 16, 3), (7, 8, 2)),
    "stem, odd": ((4, 15, 21, 3), (7, 8, 2)),
}


@pytest.fixture(autouse=True)
def fast_forms() -> Iterator[None]:
    with convolutions("fast"):
        yield


def made(case: str, seed: int = 0) -> tuple[Arrays, int]:
    """(image, kernel, slope) and stride; the image as after a ReLU."""
    shape, (side, D, stride) = CASES[case]
    rng = np.random.default_rng(seed)
    x = np.maximum(rng.standard_normal(shape, np.float32), 0)
    kernel = rng.standard_normal((side, side, shape[-1], D), np.float32)
    sides = [-(-size // stride) for size in shape[1:3]]
    return (x, kernel, rng.standard_normal((shape[0], *sides, D), np.float32)), stride


def of_torch(arrays: Arrays, stride: int) -> Arrays:
    """Result, slope in the image and in the kernel, by PyTorch in float64."""
    x, kernel, slope = (torch.from_numpy(a).double() for a in arrays)
    image = x.permute(0, 3, 1, 2).requires_grad_()
    weight = kernel.permute(3, 2, 0, 1).requires_grad_()
    padding = kernel.shape[0] // 2
    y = torch.nn.functional.conv2d(image, weight, stride=stride, padding=padding)
    y.backward(slope.permute(0, 3, 1, 2))
    assert image.grad is not None
    assert weight.grad is not None
    found = (
        y.detach().permute(0, 2, 3, 1),
        image.grad.permute(0, 2, 3, 1),
        weight.grad.permute(2, 3, 1, 0),
    )
    return tuple(a.numpy() for a in found)


def all_three(stride: int) -> Callable[..., Any]:
    def run(x: jax.Array, kernel: jax.Array, slope: jax.Array) -> tuple[jax.Array, ...]:
        precision = jax.lax.Precision.HIGHEST
        y, pull = jax.vjp(lambda x, kernel: convolve(x, kernel, stride, precision), x, kernel)
        return (y, *pull(slope))

    return run


def error(found: Any, exact: np.ndarray) -> float:
    """Root of the mean square, as a part of that of the exact."""
    return float(np.sqrt(((found - exact) ** 2).mean() / (exact**2).mean()))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("devices", [1, 4])
def test_is_pytorchs(case: str, devices: int) -> None:
    arrays, stride = made(case)
    mesh = make_mesh(devices)
    with jax.set_mesh(mesh):
        x, slope = to_global((arrays[0], arrays[2]), mesh)
        found = jax.jit(all_three(stride))(x, arrays[1], slope)
    assert found[0].sharding.is_equivalent_to(x.sharding, 4)
    for ours, exact in zip(found, of_torch(arrays, stride), strict=True):
        assert ours.dtype == jnp.float32
        assert error(ours, exact) < 1e-6


@pytest.mark.parametrize("case", ["winograd", "taps", "strided", "stem"])
def test_is_taken_and_as_exact_as_xlas_own(case: str) -> None:
    arrays, stride = made(case, seed=1)
    fast = jax.jit(all_three(stride))(*arrays)
    with convolutions("plain"):
        plain = jax.jit(all_three(stride))(*arrays)
    assert not np.array_equal(fast[2], plain[2])  # another order of sums at the least
    for ours, xlas, exact in zip(fast, plain, of_torch(arrays, stride), strict=True):
        # 1.0 to 2.3 times, most of all Winograd's on few channels.
        assert error(ours, exact) < 3 * error(xlas, exact)


def test_chunks_change_nothing_but_the_order_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    for case in ("winograd", "strided", "stem"):
        arrays, stride = made(case)
        for module in (winograd, products):
            monkeypatch.setattr(module, "CHUNK_BYTES", 1)
            monkeypatch.setattr(module, "SUMS_PER_CHUNK", 0)
        one_by_one = jax.jit(all_three(stride))(*arrays)
        text = jax.jit(all_three(stride)).lower(*arrays).as_text()
        assert "stablehlo.while" in text, case
        for ours, exact in zip(one_by_one, of_torch(arrays, stride), strict=True):
            assert error(ours, exact) < 1e-6, case


@pytest.mark.parametrize("case", ["winograd", "taps", "stem"])
def test_inside_shard_map_and_rematerialised(case: str) -> None:
    """As micro-batches take it: the kernel is shared, its slope summed over the devices."""
    arrays, stride = made(case)
    mesh = make_mesh(4)

    def loss(x: jax.Array, kernel: jax.Array, slope: jax.Array) -> jax.Array:
        y = jax.checkpoint(lambda x: convolve(x, kernel, stride))(x)
        return jax.lax.psum((y * slope).sum(), "data")

    with jax.set_mesh(mesh):
        x, slope = to_global((arrays[0], arrays[2]), mesh)
        spread = jax.shard_map(loss, in_specs=(P("data"), P(), P("data")), out_specs=P())
        found = jax.jit(jax.grad(spread, argnums=(0, 1)))(x, arrays[1], slope)
    for ours, exact in zip(found, of_torch(arrays, stride)[1:], strict=True):
        assert error(ours, exact) < 1e-6


def test_not_finite_stays_not_finite() -> None:
    for value in (np.nan, np.inf):
        (x, kernel, slope), stride = made("winograd")
        x[1, 3, 3, 5] = value
        y, of_image, of_kernel = jax.jit(all_three(stride))(x, kernel, slope)
        assert not np.isfinite(y[1, 2:5, 2:5]).any()
        assert np.isfinite(y[0]).all()
        assert np.isfinite(of_image).all()
        assert not np.isfinite(of_kernel[:, :, 5]).any()


def test_evaluation_takes_xlas_own() -> None:
    (x, kernel, _), _ = made("winograd")
    conv = Conv(32, 40, 3, 1, jnp.float32)
    conv.kernel[...] = jnp.asarray(kernel)
    ours = conv(jnp.asarray(x))
    with convolutions("plain"):
        np.testing.assert_array_equal(ours, conv(jnp.asarray(x), train=True))
    assert not np.array_equal(ours, conv(jnp.asarray(x), train=True))


def test_the_stems_images_get_no_slope() -> None:
    (x, kernel, slope), stride = made("stem")

    def of_kernel(kernel: jax.Array, x: jax.Array, slope: jax.Array) -> jax.Array:
        return (convolve(x, kernel, stride) * slope).sum()

    text = jax.jit(jax.grad(of_kernel)).lower(kernel, x, slope).compile().as_text()
    assert " dot(" in text  # the slope in the kernel, and nothing else:
    assert " convolution(" not in text


def test_little_work_and_other_dtypes_take_xlas_own() -> None:
    for case, dtype in (("winograd", jnp.float32), ("winograd", jnp.bfloat16)):
        arrays, stride = made(case)
        arrays = tuple(jnp.asarray(a, dtype) for a in arrays)
        texts = []
        for forms in ("auto", "plain"):
            with convolutions(forms):
                texts.append(jax.jit(all_three(stride)).lower(*arrays).compile().as_text())
        assert all(" dot(" not in text for text in texts)


def test_auto_is_fast_where_there_is_work() -> None:
    x, kernel = jnp.zeros((32, 24, 24, 64)), jnp.zeros((3, 3, 64, 64))
    with convolutions("auto"):
        text = jax.jit(lambda x, kernel: convolve(x, kernel, 1)).lower(x, kernel).as_text()
    assert "stablehlo.convolution" not in text
    assert "stablehlo.dot_general" in text


def test_nearest_divisor() -> None:
    assert [nearest_divisor(64, rows) for rows in (0.1, 5, 7, 1000)] == [1, 4, 8, 64]
    assert [nearest_divisor(7, rows) for rows in (2, 3)] == [1, 7]


def test_chunks_of_what_has_no_divisors() -> None:
    """2 x a prime: a few rows of zeros behind, not chunks of half of it or of two."""
    found = [rows_of_chunk(n, w) for n, w in ((254, 20), (2042, 30), (64, 0.1), (7, 3), (5, 99))]
    assert found == [20, 30, 1, 7, 5]
    x = np.random.default_rng(0).standard_normal((254, 3), np.float32)
    text = jax.jit(lambda x: in_chunks(lambda r: 2 * r, (x,), 20)).lower(x).as_text()
    assert "stablehlo.while" in text
    assert "13x20x3xf32" in text
    np.testing.assert_array_equal(in_chunks(lambda r: 2 * r, (jnp.asarray(x),), 20), 2 * x)
    summed = sum_of_chunks(lambda r: r.sum(0), (jnp.asarray(x),), 20)
    np.testing.assert_allclose(summed, x.sum(0), atol=1e-4)


@pytest.mark.parametrize("case", ["winograd", "taps", "strided", "stem"])
@pytest.mark.parametrize("axis", [0, 1])
def test_nothing_in_is_nothing_out(case: str, axis: int) -> None:
    """No rows, or no height: empty results, and a slope of zeros in the kernel."""
    (x, kernel, slope), stride = made(case)
    x, slope = (np.delete(a, range(a.shape[axis]), axis) for a in (x, slope))
    y, of_image, of_kernel = jax.jit(all_three(stride))(x, kernel, slope)
    assert (y.shape, of_image.shape) == (slope.shape, x.shape)
    assert not of_kernel.any()


def test_the_kernel_is_each_devices_own_where_jax_has_no_vma(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """JAX 0.11 says what varies by `manual_axis_type`."""

    class Manual:
        varying = frozenset({"data"})

    for name in ("manual_axis_type", "mat"):
        kind = type("Kind", (), {name: Manual()})()
        monkeypatch.setattr(jax, "typeof", lambda a, kind=kind: kind)
        assert convolution._varying(jnp.zeros(())) == {"data"}
    monkeypatch.setattr(jax, "typeof", lambda a: object())
    assert convolution._varying(jnp.zeros(())) is None


def test_forward_mode_is_for_the_plain_forms_as_the_docstrings_say() -> None:
    (x, kernel, _), stride = made("winograd")

    def along(x: jax.Array) -> jax.Array:
        return jax.jvp(lambda x: convolve(x, jnp.asarray(kernel), stride), (x,), (x,))[1]

    with pytest.raises(TypeError, match="forward-mode"):
        jax.jit(along).lower(x)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jit(lambda x: jax.jvp(max_pool, (x,), (x,))).lower(x)
    with convolutions("plain"):
        again = jax.jit(lambda x: along(x)).lower(x)  # what was traced before keeps its forms
        assert again.out_info.shape == (4, 8, 8, 40)
    for where in (convolve, max_pool):
        assert where.__doc__ is not None
        assert 'convolutions("plain")' in where.__doc__
