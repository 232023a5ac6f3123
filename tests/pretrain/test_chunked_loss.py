"""The chunked NT-Xent against PyTorch in float64 and against the dense one; what it holds."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxhisto.config import MemoryConfig, ModelConfig, OptimConfig, PretrainConfig
from jaxhisto.distributed import make_mesh, to_global
from jaxhisto.pretrain.loss import nt_xent
from jaxhisto.pretrain.step import init_state, make_loss_and_grads, make_train_step

TEMPERATURES = [0.05, 0.1, 0.5, 1.0]
DENSE = 0
EXCHANGES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


@cache
def make_z(n: int, d: int = 32) -> np.ndarray:
    """(n, 2, d): the second view of every other image lies near its first."""
    z = np.random.default_rng(n).normal(size=(n, 2, d)).astype(np.float32)
    z[::2, 1] = z[::2, 0] + 0.7 * z[::2, 1]
    return z


def in_float64(z: np.ndarray, temperature: float) -> tuple[float, np.ndarray, dict[str, float]]:
    """Loss, gradient and metrics by PyTorch's cross entropy and autograd, all pairs at once."""
    leaf = torch.from_numpy(np.asarray(z, np.float64)).requires_grad_()
    unit = F.normalize(leaf.reshape(-1, z.shape[-1]), dim=1)
    cosine = unit @ unit.T
    n = len(cosine)
    logits = (cosine / temperature).masked_fill(torch.eye(n, dtype=torch.bool), -torch.inf)
    loss = F.cross_entropy(logits, torch.arange(n) ^ 1)
    loss.backward()
    cosine = cosine.detach().numpy()
    positive = cosine[np.arange(n), np.arange(n) ^ 1]
    np.fill_diagonal(cosine, -np.inf)
    metrics = {
        "pos_sim": positive.mean(),
        "neg_sim": (cosine[np.isfinite(cosine)].sum() - positive.sum()) / (n * (n - 2)),
        "accuracy": (cosine.max(1) <= positive).mean(),
    }
    return float(loss.detach()), leaf.grad.numpy(), metrics


@cache
def expected(n: int, temperature: float) -> tuple[float, np.ndarray, dict[str, float]]:
    return in_float64(make_z(n), temperature)


def run(z: np.ndarray, temperature: float, chunk: int, devices: int) -> tuple[Any, Any, Any]:
    """Loss, gradient and metrics, compiled, with the images sharded."""
    mesh = make_mesh(devices)
    loss = partial(nt_xent, temperature=temperature, chunk=chunk)
    with jax.set_mesh(mesh):
        both = jax.jit(jax.value_and_grad(loss, has_aux=True))(to_global(z, mesh))
    (value, metrics), gradient = jax.device_get(both)
    return value, gradient, metrics


def compare(ours: tuple[Any, Any, Any], theirs: tuple[float, np.ndarray, dict]) -> None:
    loss, gradient, metrics = ours
    assert loss.dtype == np.float32
    assert abs(loss - theirs[0]) <= 4 * np.spacing(np.float32(theirs[0]))
    assert np.abs(gradient - theirs[1]).max() <= 1e-5 * np.abs(theirs[1]).max()
    assert set(metrics) == set(theirs[2])
    for name, value in theirs[2].items():
        assert metrics[name].dtype == np.float32
        assert metrics[name] == pytest.approx(value, rel=1e-6, abs=1e-7), name


# 7 columns divide neither the 144 views nor a device's rows; 1024 are more than there are.
@pytest.mark.parametrize(("chunk", "devices"), [(DENSE, 1), (7, 1), (7, 4), (1024, 1), (1024, 4)])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_loss_gradient_and_metrics_are_float64s(
    temperature: float, chunk: int, devices: int
) -> None:
    theirs = expected(72, temperature)
    compare(run(make_z(72), temperature, chunk, devices), theirs)
    assert 0.3 < theirs[2]["accuracy"] < 0.7


@pytest.mark.parametrize(("chunk", "devices"), [(1000, 1), (1024, 4), (DENSE, 1)])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_they_are_at_2048_images(temperature: float, chunk: int, devices: int) -> None:
    compare(run(make_z(2048), temperature, chunk, devices), expected(2048, temperature))


def test_a_low_temperature_does_not_overflow() -> None:
    z = make_z(16)
    loss, gradient, _ = run(z, 1e-3, 5, 4)
    theirs = in_float64(z, 1e-3)
    # 1/tau magnifies what float32 rounds off a cosine.
    assert loss == pytest.approx(theirs[0], rel=1e-5)
    assert np.abs(gradient - theirs[1]).max() <= 1e-3 * np.abs(theirs[1]).max()


@pytest.mark.parametrize("devices", [1, 4])
def test_bfloat16s_values_are_as_good_as_others(devices: int) -> None:
    z = np.asarray(jnp.asarray(make_z(64)).astype(jnp.bfloat16).astype(jnp.float32))
    compare(run(z, 0.1, 24, devices), in_float64(z, 0.1))


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("chunk", [DENSE, 5, 8])
def test_a_tie_with_the_positive_is_a_hit(chunk: int, devices: int) -> None:
    # One-hot rows: cosines are 0 and 1 in any arithmetic, and images 0..3 are all the same.
    image = np.array([0, 0, 0, 0, 1, 2, 3, 4])
    z = np.stack([np.eye(16)[image], np.eye(16)[image + 8 * (image > 2)]], axis=1)
    z = z.astype(np.float32)
    ours, theirs = run(z, 0.5, chunk, devices), in_float64(z, 0.5)
    compare(ours, theirs)
    assert ours[2]["accuracy"] == 1.0  # images 6 and 7 are as near to any other as to themselves
    apart = z.copy()
    apart[0, 1] = np.eye(16)[9]  # leaves view (0, 0) with nearer negatives than its positive
    assert run(apart, 0.5, chunk, devices)[2]["accuracy"] == in_float64(apart, 0.5)[2]["accuracy"]
    assert in_float64(apart, 0.5)[2]["accuracy"] == 15 / 16


@pytest.mark.parametrize("devices", [1, 4])
def test_a_collapsed_batch_is_all_ties(devices: int) -> None:
    z = np.broadcast_to(make_z(8)[:1, :1], (32, 2, 32))
    loss, gradient, metrics = run(z, 0.1, 24, devices)
    assert loss == pytest.approx(math.log(63), rel=1e-6)
    assert metrics["accuracy"] == 1.0
    assert metrics["neg_sim"] == pytest.approx(1.0, rel=1e-6)
    assert np.abs(gradient).max() < 1e-6


@pytest.mark.parametrize("devices", [1, 4])
def test_a_zero_vector_has_pytorchs_gradient(devices: int) -> None:
    z = make_z(16).copy()
    z[0, 0] = z[5] = 0
    loss, gradient, metrics = run(z, 0.5, 12, devices)
    theirs = in_float64(z, 0.5)
    assert loss == pytest.approx(theirs[0], rel=1e-6)
    assert metrics["neg_sim"] == pytest.approx(theirs[2]["neg_sim"], rel=1e-6, abs=1e-7)
    zero = (z == 0).all(-1)
    for rows in (zero, ~zero):  # divided by the floor of the length, 1e-12, and by a length
        error = np.abs(gradient[rows] - theirs[1][rows]).max()
        assert error <= 1e-5 * np.abs(theirs[1][rows]).max()


def test_what_is_not_finite_stays_so() -> None:
    z = make_z(16).copy()
    z[3, 1, 0] = np.nan
    assert np.isnan(run(z, 0.1, 5, 4)[0])


@pytest.mark.parametrize("temperature", [0.1, 0.001])
def test_two_opposite_views_of_one_image_are_a_batch(temperature: float) -> None:
    v = make_z(2)[:1, :1]
    loss, gradient, metrics = run(np.concatenate([v, -v], axis=1), temperature, 1, 1)
    assert (loss, metrics["accuracy"]) == (0.0, 1.0)
    assert metrics["pos_sim"] == pytest.approx(-1.0)
    # What float32 rounds off a cosine over tau, where 2 p - 2 is 0.
    np.testing.assert_allclose(gradient, 0, atol=1e-7 / temperature)


@pytest.mark.parametrize("chunk", [DENSE, 1024])
def test_65536_images_are_traced(chunk: int) -> None:
    z = jax.ShapeDtypeStruct((65536, 2, 128), jnp.float32)  # 2N (2N - 2) is beyond int32
    loss, metrics = jax.eval_shape(partial(nt_xent, temperature=0.1, chunk=chunk), z)
    assert loss.shape == metrics["neg_sim"].shape == ()


def test_needs_no_mesh_and_no_jit() -> None:
    z = jnp.asarray(make_z(72))
    (loss, metrics), gradient = jax.value_and_grad(nt_xent, has_aux=True)(z, 0.1, 96)
    compare((loss, gradient, metrics), expected(72, 0.1))


def test_projections_that_lie_on_each_device_are_taken_too() -> None:
    mesh = make_mesh(4)
    with jax.set_mesh(mesh):
        z = jax.device_put(make_z(72), NamedSharding(mesh, P()))
        both = jax.jit(
            jax.value_and_grad(partial(nt_xent, temperature=0.1, chunk=96), has_aux=True)
        )
        (loss, metrics), gradient = both(z)
    assert gradient.sharding.is_fully_replicated
    compare((loss, gradient, metrics), expected(72, 0.1))


def test_the_gradient_follows_what_is_made_of_the_loss() -> None:
    def total(z: jax.Array, loss: float, metrics: float) -> jax.Array:
        value, others = nt_xent(2.0 * z, 0.1, 5)
        return loss * value + metrics * sum(others.values()) + (z**2).sum()

    z, slope = jnp.asarray(make_z(16)), jax.jit(jax.grad(total))
    of_loss = slope(z, 3.0, 0.0) - 2 * z
    np.testing.assert_allclose(of_loss, 3 * in_float64(z, 0.1)[1], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(slope(z, 0.0, 1.0), 2 * z)  # metrics are not trained on


def compiled(n: int, d: int, chunk: int, devices: int) -> Any:
    mesh = make_mesh(devices)
    loss = partial(nt_xent, temperature=0.1, chunk=chunk)
    z = jax.ShapeDtypeStruct((n, 2, d), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        return jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(z).compile()


def sizes(text: str) -> set[int]:
    """Elements of every array that a compiled text names."""
    shapes = re.findall(r"\b(?:pred|bf16|[fsu]\d+)\[([\d,]*)\]", text)
    return {math.prod(int(side) for side in shape.split(",") if side) for shape in shapes}


def exchanged(text: str) -> dict[str, list[str]]:
    return {name: re.findall(rf"= (\S+) {name}(?:-start)?\(", text) for name in EXCHANGES}


def test_no_device_holds_all_pairs() -> None:
    n, d, chunk, devices = 48, 24, 32, 4
    views = 2 * n
    assert views**2 in sizes(compiled(n, d, DENSE, devices).as_text())  # the pattern finds it
    for columns in (chunk, 40):
        largest = max(sizes(compiled(n, d, columns, devices).as_text()))
        assert largest == max(views * d, views // devices * columns) < views**2 / 3


def test_samples_are_exchanged_once_and_three_numbers_a_view() -> None:
    found = exchanged(compiled(48, 24, 32, 4).as_text())
    gathered = sorted(shape.split("{")[0] for shape in found.pop("all-gather"))
    assert gathered == ["f32[96,24]", "f32[96,3]"]
    assert not any(found.values()), found


def test_memory_grows_with_the_batch_and_not_with_its_square() -> None:
    def growth(chunk: int) -> float:
        small, large = (
            compiled(n, 32, chunk, 4).memory_analysis().temp_size_in_bytes for n in (512, 4096)
        )
        return math.log(large / small, 8)

    assert growth(DENSE) > 1.9
    assert growth(256) < 1.1


STEP = PretrainConfig(
    out="run",
    batch_size=16,
    tile_px=32,
    precision="f32",
    model=ModelConfig(name="resnet10"),
    optim=OptimConfig(rate=0.6, warmup_epochs=0.0),
)


def one_step(memory: MemoryConfig, devices: int) -> tuple[dict[str, np.ndarray], Any, str]:
    """Every tensor's update, the metrics, and the compiled text."""
    config = replace(STEP, memory=memory)
    rng = np.random.default_rng(0)
    tiles = (
        rng.integers(0, 256, (16, 40, 40, 3), np.uint8)
        // np.arange(1, 17, dtype=np.uint8)[:, None, None, None]
    )
    mesh = make_mesh(devices)
    with jax.set_mesh(mesh):
        state = init_state(config, 50, 1.0, mesh)
        batch = to_global((tiles, np.full((16, 2), 40, np.int32)), mesh)
        step = make_train_step(config, 50, 1.0).lower(state, *batch).compile()
        state, metrics = step(state, *batch)
    leaves, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(state.opt_state))
    updates = {jax.tree_util.keystr(path): leaf for path, leaf in leaves if leaf.ndim}
    return updates, jax.device_get(metrics), step.as_text()


@pytest.mark.parametrize(("form", "pairs"), [("dense", True), ("auto", True), ("chunked", False)])
def test_the_flag_reaches_the_step(form: Any, pairs: bool) -> None:
    config = replace(STEP, memory=MemoryConfig(loss=form, loss_chunk=5))
    mesh = make_mesh(4)
    with jax.set_mesh(mesh):
        state = init_state(config, 50, 1.0, mesh)
        views = to_global(np.zeros((16, 2, 32, 32, 3), np.float32), mesh)
        step = jax.jit(make_loss_and_grads(config))
        text = step.lower(state.params, state.batch_stats, views).as_text()
    assert ("tensor<32x32xf32>" in text) is pairs


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_a_whole_step_is_the_dense_ones(devices: int) -> None:
    dense, of_dense, _ = one_step(MemoryConfig(loss="dense"), devices)
    chunked, of_chunked, text = one_step(MemoryConfig(loss="chunked", loss_chunk=5), devices)
    assert len(dense) == 40
    for name, update in dense.items():
        error = np.linalg.norm(chunked[name] - update) / np.linalg.norm(update)
        assert error < 1e-4, name
    assert set(of_chunked) == set(of_dense)
    for name, value in of_dense.items():
        assert of_chunked[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    if devices > 1:
        found = exchanged(text)
        assert "f32[32,3]" in [shape.split("{")[0] for shape in found["all-gather"]]
        assert len(found["all-gather"]) == 2
        assert not found["all-to-all"] + found["collective-permute"] + found["reduce-scatter"]


@pytest.mark.parametrize(
    ("flag", "batch_size", "columns"),
    [
        ("auto", 1024, 0),
        ("auto", 1025, 512),
        ("dense", 65536, 0),
        ("chunked", 2, 512),
    ],
)
def test_the_form_is_chosen_by_the_global_batch(flag: Any, batch_size: int, columns: int) -> None:
    assert MemoryConfig(loss=flag, loss_chunk=512).columns(batch_size) == columns
