"""A batch in micro-batches is the same batch: against the gradient of all of it at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_text import collectives
from jax.sharding import PartitionSpec as P

from jaxhisto.config import MemoryConfig, ModelConfig, OptimConfig, PretrainConfig
from jaxhisto.distributed import make_mesh, to_global
from jaxhisto.errors import RunError
from jaxhisto.models import simclr
from jaxhisto.pretrain.accumulate import cut, in_micro_batches
from jaxhisto.pretrain.loss import nt_xent
from jaxhisto.pretrain.plan import check_batch
from jaxhisto.pretrain.step import (
    augmented,
    init_state,
    of_tiles,
    row_numbers,
)
from jaxhisto.settings import identity

N, SIDE, PARTS = 32, 32, 2
# The last maps of a 32-px tile have one pixel: groups of 4 images give BatchNorm 8 values there.
CONFIG = PretrainConfig(
    out="run",
    batch_size=N,
    tile_px=SIDE,
    precision="f32",
    model=ModelConfig(name="resnet10", bn_group=4),
    optim=OptimConfig(rate=0.6, warmup_epochs=0.0),
)
STEP = 3  # of the augmentation
Result = tuple[Any, ...]


def in_parts(parts: int) -> PretrainConfig:
    return replace(CONFIG, memory=MemoryConfig(accumulate=parts))


@pytest.fixture(scope="module")
def batch() -> tuple[np.ndarray, np.ndarray]:
    """Tiles of unlike colour, the last ones smaller than the canvas."""
    rng = np.random.default_rng(0)
    colour = rng.uniform(40, 215, (N, 1, 1, 3))
    tiles = np.clip(colour + rng.normal(0, 30, (N, 40, 40, 3)), 0, 255).astype(np.uint8)
    sizes = np.full((N, 2), 40, np.int32)
    sizes[-4:] = 36
    return tiles, sizes


def run_whole(config: PretrainConfig, devices: int, batch: Any) -> tuple[Result, str]:
    """(loss, metrics, BatchNorm statistics, gradient) of the step, augmentation inside; and the
    compiled program."""
    mesh = make_mesh(devices)
    with jax.set_mesh(mesh):
        state = init_state(config, 50, 1.0, mesh)
        tiles, sizes = to_global(batch, mesh)
        fixed = (state.batch_stats, jnp.int32(STEP))
        rows = (tiles, sizes, row_numbers(sizes))
        inputs = (state.params, fixed, rows)
        compiled = jax.jit(of_tiles(config)).lower(*inputs).compile()
        return jax.device_get(compiled(*inputs)), compiled.as_text()


@pytest.fixture(scope="module")
def at_once(batch: Any) -> Result:
    return run_whole(CONFIG, 1, batch)[0]


@pytest.fixture(scope="module")
def on_four(batch: Any) -> tuple[Result, str]:
    return run_whole(in_parts(PARTS), 4, batch)


def gradient_error(found: Any, expected: Any) -> float:
    """Largest difference of two gradients, over the largest entry of the expected one."""
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    size = max(np.abs(theirs).max() for _, theirs in pairs)
    return max(float(np.abs(ours - theirs).max()) for ours, theirs in pairs) / float(size)


@pytest.mark.slow
def test_micro_batches_are_the_same_training(at_once: Result, on_four: tuple[Result, str]) -> None:
    check_same_training(on_four[0], at_once)


@pytest.mark.slow
def test_micro_batches_are_the_same_training_on_one_device(at_once: Result, batch: Any) -> None:
    check_same_training(run_whole(in_parts(8), 1, batch)[0], at_once)


def check_same_training(found: Result, expected: Result) -> None:
    loss, metrics, stats, grads = expected
    np.testing.assert_allclose(found[0], loss, rtol=1e-6)
    error = gradient_error(found[3], grads)
    print("gradient:", error)
    assert error < 1e-5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found[1], metrics)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found[2], stats
    )


@pytest.mark.slow
def test_that_comparison_sees_negatives_of_the_own_micro_batch_only(
    at_once: Result, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def own_only(z: jax.Array, temperature: float, chunk: int) -> tuple[jax.Array, dict]:
        losses, metrics = jax.vmap(lambda z: nt_xent(z, temperature))(cut(z, PARTS))
        return losses.mean(), jax.tree.map(jnp.mean, metrics)

    monkeypatch.setattr("jaxhisto.pretrain.step.nt_xent", own_only)
    found, _ = run_whole(in_parts(PARTS), 1, batch)
    assert gradient_error(found[3], at_once[3]) > 1e-2


def frozen(config: PretrainConfig) -> Callable[..., tuple[jax.Array, Any]]:
    """The network in evaluation mode: BatchNorm by its running statistics, which stay."""
    graphdef, _, _ = simclr.structure(config.model.name, config.model.projection)

    def embed(params: Any, batch_stats: Any, views: jax.Array) -> tuple[jax.Array, Any]:
        n, _, *image = views.shape
        images = views.reshape(2 * n, *image)
        z, stats = simclr.project(graphdef, params, batch_stats, images, train=False)
        return z.reshape(n, 2, -1), stats

    return embed


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_with_frozen_statistics_any_micro_batch_will_do(devices: int) -> None:
    views = np.random.default_rng(1).random((N, 2, SIDE, SIDE, 3), dtype=np.float32) - 0.5
    embed, parts = frozen(CONFIG), N // 4  # one image on each of four devices
    mesh = make_mesh(devices)

    def contrast(z: jax.Array) -> tuple[jax.Array, Any]:
        return nt_xent(z, CONFIG.optim.temperature)

    def loss_of(params: Any, stats: Any, views: jax.Array) -> jax.Array:
        return contrast(embed(params, stats, views)[0])[0]

    with jax.set_mesh(mesh):
        state = init_state(CONFIG, 50, 1.0, mesh)
        placed = to_global(views, mesh)
        expected = jax.jit(jax.value_and_grad(loss_of))(state.params, state.batch_stats, placed)
        cached = jax.jit(in_micro_batches(embed, contrast, parts))
        found = cached(state.params, state.batch_stats, placed)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    error = gradient_error(jax.device_get(found[3]), jax.device_get(expected[1]))
    print("frozen:", devices, error)
    assert error < 1e-5
    assert jax.tree.all(jax.tree.map(np.array_equal, found[2], state.batch_stats))


def test_views_do_not_depend_on_micro_batches(batch: Any) -> None:
    def views_in_parts(*rows: jax.Array) -> jax.Array:
        def of_device(*rows: jax.Array) -> jax.Array:
            views = jax.lax.map(lambda r: augmented(CONFIG, jnp.int32(STEP), *r), cut(rows, PARTS))
            return views.reshape(-1, *views.shape[2:])

        return jax.shard_map(of_device, in_specs=P("data"), out_specs=P("data"))(*rows)

    with jax.set_mesh(make_mesh(1)):
        placed = to_global(batch, make_mesh(1))
        whole = jax.jit(lambda *b: augmented(CONFIG, jnp.int32(STEP), *b))(*placed)
    with jax.set_mesh(make_mesh(4)):
        tiles, sizes = to_global(batch, make_mesh(4))
        found = jax.jit(views_in_parts)(tiles, sizes, row_numbers(sizes))
    assert np.asarray(whole).std() > 0.1
    np.testing.assert_array_equal(found, whole)


@pytest.fixture(scope="module")
def exchanges(on_four: tuple[Result, str]) -> list[tuple[str, int, bool]]:
    return collectives(on_four[1])


def test_images_stay_and_projections_are_exchanged_once(
    exchanges: list[tuple[str, int, bool]],
) -> None:
    operations = [operation for operation, _, _ in exchanges]
    assert set(operations) == {"all-gather", "all-reduce"}
    gathered = [size for operation, size, _ in exchanges if operation == "all-gather"]
    assert gathered == [4 * N * 2 * 128]


def test_gradients_are_summed_over_devices_once(exchanges: list[tuple[str, int, bool]]) -> None:
    assert not any(inside for _, _, inside in exchanges)
    sizes = [size for operation, size, _ in exchanges if operation == "all-reduce"]
    print("all-reduce:", sizes)
    params, stats = simclr.init("resnet10", 128, 0)
    weights = sum(4 * leaf.size for leaf in jax.tree.leaves((params, stats)))
    assert weights <= sum(sizes) < 1.01 * weights


def test_the_pattern_finds_exchanges_inside_a_loop() -> None:
    mesh = make_mesh(4)

    @jax.shard_map(in_specs=P("data"), out_specs=P())
    def total(x: jax.Array) -> jax.Array:
        sums = jax.lax.map(lambda row: jax.lax.psum(row, "data"), x.reshape(4, 8))
        return sums.sum(0)

    with jax.set_mesh(mesh):
        x = to_global(np.ones((128,), np.float32), mesh)
        text = jax.jit(total).lower(x).compile().as_text()
    assert collectives(text) == [("all-reduce", 32, True)]


@pytest.mark.parametrize(
    ("group", "parts", "devices", "sentence"),
    [
        (5, 1, 1, r"--model.bn-group 5: does not divide --batch-size 32; take 1 or"),
        (0, 2, 4, r"--memory.accumulate 2: BatchNorm over .* pass --model.bn-group 4,"),
        (8, 4, 2, r"4 images on each device, .*bn-group 8 do not fill it; pass .* 4,"),
        (2, 3, 2, r"accumulate 3: --batch-size 32 on 2 device\(s\) .* take 30 images"),
    ],
)
def test_what_cannot_be_is_refused(group: int, parts: int, devices: int, sentence: str) -> None:
    config = replace(in_parts(parts), model=replace(CONFIG.model, bn_group=group))
    with pytest.raises(RunError, match=sentence):
        check_batch(config, 1000, devices)


def test_what_fits_is_not_refused() -> None:
    for group, parts, devices in ((0, 1, 4), (4, 2, 4), (4, 8, 1), (16, 1, 4)):
        model = replace(CONFIG.model, bn_group=group)
        check_batch(replace(in_parts(parts), model=model), 1000, devices)


def test_the_step_itself_refuses_the_global_batch_in_parts(batch: Any) -> None:
    config = replace(in_parts(2), model=ModelConfig(name="resnet10"))
    with pytest.raises(RunError, match="needs the whole batch"):
        run_whole(config, 1, batch)


def test_rows_that_make_no_equal_parts_are_refused() -> None:
    cached = in_micro_batches(frozen(CONFIG), lambda z: nt_xent(z, 0.1), 3)
    with jax.set_mesh(make_mesh(1)), pytest.raises(RunError, match="32 images on 1 device"):
        cached({}, {}, jnp.zeros((N, 2, SIDE, SIDE, 3)))


def test_groups_are_the_runs_identity_and_micro_batches_are_not() -> None:
    names = identity(CONFIG)
    assert names["model.bn_group"] == 4
    assert not any(name.startswith("memory.") for name in names)
