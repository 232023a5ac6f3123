"""Tiles in the devices' memory: the batches read from disk and XLA's own text are the oracles."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image

from jaxhisto.config import DataConfig, ModelConfig, PretrainConfig
from jaxhisto.data.loader import batches
from jaxhisto.data.memory import available_bytes
from jaxhisto.data.sources import Tiles, open_tiles
from jaxhisto.distributed import make_mesh
from jaxhisto.errors import RunError, StoreError
from jaxhisto.pretrain import device_cache, room
from jaxhisto.pretrain.device_cache import DeviceCache, Layout, make_gather, make_write
from jaxhisto.pretrain.feed import open_feed
from jaxhisto.pretrain.room import check_device, check_host, step_bytes
from jaxhisto.pretrain.step import init_state, make_train_step
from jaxhisto.runlog import read_metrics

N = 8
CONFIG = PretrainConfig(
    out="", batch_size=N, tile_px=32, precision="f32", model=ModelConfig(name="resnet10")
)
DTYPES = {"pred": 1, "u8": 1, "s8": 1, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8}


def write_images(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, (h, w) in enumerate(sizes):
        Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)).save(folder / f"{i:04}.png")
    return folder


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Tiles:
    """23 tiles, which 4 devices cannot share evenly, of 12 sizes, on a canvas of 9 x 7 px,
    whose 189 bytes are no whole words."""
    sizes = [(6 + i % 4, 5 + i % 3) for i in range(23)]
    folder = write_images(tmp_path_factory.mktemp("device") / "images", sizes)
    opened = open_tiles(DataConfig(stores=(str(folder),)))
    assert (len(opened), opened.canvas) == (23, (9, 7))
    return opened


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("pieces", ["whole", "small"])
def test_batches_are_those_from_disk(
    tiles: Tiles, devices: int, pieces: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the ends of two epochs; in one block and piece, or in many."""
    row = 192
    if pieces == "small":
        monkeypatch.setattr(device_cache, "BLOCK_BYTES", 4 * row)
        monkeypatch.setattr(device_cache, "GATHER_BYTES", devices * row)
    layout = Layout(23, tiles.canvas, devices)
    share = N // devices
    assert layout.blocks == {"whole": 1, "small": {1: 6, 4: 2}[devices]}[pieces]
    assert layout.piece_rows(N) == (share if pieces == "whole" else 1)
    mesh = make_mesh(devices)
    with jax.set_mesh(mesh):
        cache = DeviceCache(tiles, mesh, threads=2)
        for step, batch in batches(tiles, DataConfig(threads=2), N, 3, 0, 6):
            pixels, sizes = cache.batch(batch.index)
            assert (pixels.dtype, sizes.dtype) == (jnp.uint8, jnp.int32)
            assert np.array_equal(pixels, batch.tiles), step
            assert np.array_equal(sizes, batch.sizes), step


@pytest.mark.parametrize("devices", [1, 4])
def test_every_feed_gives_the_same(tiles: Tiles, devices: int) -> None:
    mesh = make_mesh(devices)
    with jax.set_mesh(mesh):
        for start, stop in ((0, 5), (2, 4)):
            feeds = [
                open_feed(with_cache(cache), tiles, mesh, start, stop, lambda: 0)
                for cache in ("none", "host", "device")
            ]
            steps = []
            for items in zip(*feeds, strict=True):
                (step, first), *others = items
                steps.append(step)
                for other_step, other in others:
                    assert other_step == step
                    for field in ("index", "tiles", "sizes"):
                        x, y = getattr(first, field), getattr(other, field)
                        assert (x.shape, x.dtype) == (y.shape, y.dtype)
                        assert np.array_equal(x, y)
                    assert first.tiles.sharding == other.tiles.sharding
            assert steps == list(range(start, stop))


def with_cache(cache: str) -> PretrainConfig:
    return replace(CONFIG, data=DataConfig(threads=2, cache=cache))


@pytest.mark.parametrize("devices", [1, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 5, 23, 400_000])
def test_each_tile_has_one_place_and_hardly_any_place_is_empty(count: int, devices: int) -> None:
    layout = Layout(count, (224, 224), devices)
    assert layout.words * 4 == 224 * 224 * 3
    assert layout.rows == layout.blocks * layout.block_rows
    assert layout.rows * devices >= count
    assert layout.rows - -(-count // devices) < layout.blocks
    assert layout.block_rows * layout.words * 4 <= device_cache.BLOCK_BYTES or layout.rows == 1


def test_400_thousand_tiles_are_60_gb() -> None:
    layout = Layout(400_000, (224, 224), 8)
    assert 60.2e9 < layout.tiles * layout.tile_bytes < layout.device_bytes * 8 < 60.5e9
    assert layout.sent_bytes(512) / 1e6 == pytest.approx(77.07 * 7 / 8, abs=0.1)
    assert layout.piece_rows(512) == 64
    large = Layout(400_000, (224, 224), 512)
    assert large.gather_bytes(65_536) < 1.01 * device_cache.GATHER_BYTES
    assert 128 % large.piece_rows(65_536) == 0


def counts(text: str) -> dict[str, int]:
    """How often each collective stands in a compiled text."""
    names = ("reduce-scatter", "all-gather", "all-reduce", "all-to-all", "collective-permute")
    return {name: len(re.findall(rf"= \S.* {name}(?:-start)?\(", text)) for name in names}


def largest(text: str) -> int:
    """Bytes of the largest array in a compiled text that is no argument."""
    passed_on = ("parameter(", "get-tuple-element(")
    made = [line for line in text.splitlines() if not any(word in line for word in passed_on)]
    shapes = [s for line in made for s in re.findall(r"= (\w+)\[([\d,]+)\]", line)]
    return max(
        DTYPES[kind] * int(np.prod([int(d) for d in dims.split(",")])) for kind, dims in shapes
    )


@pytest.fixture(scope="module")
def on_four() -> tuple[Layout, list[jax.ShapeDtypeStruct]]:
    """A store of 4,000 tiles on 4 devices, and what its gather takes for a batch of 16."""
    layout, mesh = Layout(4000, (16, 16), 4), make_mesh(4)
    shapes = [
        ((layout.rows * 4, layout.words), jnp.uint32, P("data")),
        ((layout.tiles, 2), jnp.int32, P()),
        ((16,), jnp.int32, P()),
    ]
    return layout, [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in shapes
    ]


@pytest.mark.parametrize("pieces", [1, 4])
def test_a_gather_moves_the_batch_and_never_the_store(
    on_four: tuple[Layout, list], pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, arguments = on_four
    row = layout.words * 4
    monkeypatch.setattr(device_cache, "GATHER_BYTES", 16 * row // pieces)
    with jax.set_mesh(make_mesh(4)):
        compiled = make_gather(layout, make_mesh(4)).lower(*arguments).compile()
    text = compiled.as_text()
    assert counts(text) == {
        "reduce-scatter": 1,
        "all-gather": 0,
        "all-reduce": 0,
        "all-to-all": 0,
        "collective-permute": 0,
    }
    # Each device gets 4 rows of the batch, at once or one by one; a ring sends that thrice.
    found = re.search(r"u32\[(\d+),(\d+)\]\S* reduce-scatter\(.*groups=\{\{([\d,]+)\}\}", text)
    rows, words, group = found.groups()
    assert group == "0,1,2,3"
    assert (int(rows), int(words)) == (4 // pieces, layout.words)
    assert 3 * pieces * int(rows) * int(words) * 4 == layout.sent_bytes(16) == 3 * 4 * 16 * 16 * 3
    # Nothing is as large as the store, or a device's share of it; the rows for all are bounded.
    assert largest(text) == 16 // pieces * row
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < layout.gather_bytes(16) + 2 * 4 * row + 1024
    assert memory.output_size_in_bytes < 4 * row + 1024


def test_that_look_sees_a_gather_that_moves_the_store(on_four: tuple[Layout, list]) -> None:
    _, (store, _, index) = on_four

    def naive(store: jax.Array, index: jax.Array) -> jax.Array:
        return jax.reshard(store, P())[index]

    with jax.set_mesh(make_mesh(4)):
        text = jax.jit(naive).lower(store, index).compile().as_text()
    assert counts(text)["all-gather"] == 1
    assert largest(text) == store.size * 4


def test_filling_writes_into_the_store_in_place(on_four: tuple[Layout, list]) -> None:
    layout, (store, *_) = on_four
    mesh = make_mesh(4)
    block = jax.ShapeDtypeStruct(
        (4 * 10, layout.words), jnp.uint32, sharding=NamedSharding(mesh, P("data"))
    )
    with jax.set_mesh(mesh):
        memory = make_write(mesh).lower(store, block, np.int32(0)).compile().memory_analysis()
    assert memory.alias_size_in_bytes == layout.device_bytes
    assert memory.temp_size_in_bytes < 10 * layout.words * 4


def test_a_tile_that_cannot_be_read_is_named_before_the_first_step(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", [(5, 5)] * 12)
    opened = open_tiles(DataConfig(stores=(str(folder),)))
    (folder / "0007.png").unlink()
    mesh = make_mesh(4)
    for cache in ("host", "device"):
        with jax.set_mesh(mesh), pytest.raises(StoreError, match=r"0007\.png: cannot be read any"):
            open_feed(with_cache(cache), opened, mesh, 0, 1, lambda: 0)
    with jax.set_mesh(mesh):
        assert list(open_feed(with_cache("device"), opened, mesh, 3, 3, lambda: 0)) == []


@pytest.mark.parametrize("cache", ["host", "device"])
def test_a_step_is_measured_and_compiled_once(
    tiles: Tiles, cache: str, caplog: pytest.LogCaptureFixture
) -> None:
    mesh, config = make_mesh(4), with_cache(cache)
    measured = []

    def measure() -> int:
        measured.append(step_bytes(train_step, state, config, tiles, mesh))
        return measured[0]

    with jax.set_mesh(mesh), jax.log_compiles(), caplog.at_level(logging.WARNING):
        state, train_step = init_state(config, 5, 1.0, mesh), make_train_step(config, 5, 1.0)
        for _, batch in open_feed(config, tiles, mesh, 0, 2, measure):
            state, metrics = train_step(state, batch.tiles, batch.sizes)
        assert np.isfinite(float(metrics["loss"]))
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    # At least the gradient and the stem's output for the views (16 x 16 x 64), and not the state.
    assert weights + 2 * N // 4 * 16 * 16 * 64 * 4 < measured[0] < 4 * weights
    said = [r for r in caplog.messages if r.startswith("Finished XLA compilation of jit(step)")]
    assert len(said) == 1, caplog.messages


def test_host_memory_that_does_not_suffice_is_refused(
    tiles: Tiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh, tile, step = make_mesh(4), 9 * 7 * 3, 1000
    config = with_cache("host")
    wanted = (23 + 4 * N) * tile + 4 * step
    monkeypatch.setattr(room, "available_bytes", lambda: int(wanted / 0.95) + 2)
    check_host(config, tiles, mesh, lambda: step)
    monkeypatch.setattr(room, "available_bytes", lambda: int(wanted / 0.95) - 2)
    with pytest.raises(RunError, match=r"^--data\.cache host: 23 tiles .* are 0\.0 MB .* none\.$"):
        check_host(config, tiles, mesh, lambda: step)
    monkeypatch.setattr(room, "available_bytes", lambda: None)
    check_host(config, tiles, mesh, lambda: step)


def gpus(count: int, limit: int, used: list[int]) -> SimpleNamespace:
    """A mesh of which this process has the first devices, as a GPU describes itself."""
    local = [
        SimpleNamespace(
            platform="gpu",
            memory_stats=lambda u=u: {"bytes_limit": limit, "bytes_in_use": u, "num_allocs": 1},
        )
        for u in used
    ]
    return SimpleNamespace(size=count, local_devices=local)


def test_device_memory_that_does_not_suffice_is_refused() -> None:
    config = PretrainConfig(out="", batch_size=512)
    # 8 devices: 7.6 GB of tiles, 9.7 MB of batch twice, 87 MB for the gather, and the step.
    layout = Layout(400_000, (224, 224), 8)
    wanted = layout.device_bytes + 2 * 64 * 150_528 + 9 * 64 * 150_528 + int(2e9)
    limit = int((wanted + 5e8) / 0.95) + 2
    check_device(config, Paper(), gpus(8, limit, [int(4e8), int(5e8)]), lambda: int(2e9))
    with pytest.raises(RunError) as refused:
        check_device(config, Paper(), gpus(8, limit, [int(4e8), int(5e8) + 9]), lambda: int(2e9))
    sentence = str(refused.value)
    assert "400,000 tiles on a canvas of 224 x 224 px are 60.2 GB, 7.6 GB on each of 8" in sentence
    assert "2.1 GB more are wanted there for training, where 9.7 GB are free" in sentence
    assert "--data.cache host, take 9 devices like these, or raise XLA_PYTHON_CLIENT" in sentence


def test_where_the_tiles_alone_are_too_many_no_step_is_compiled() -> None:

    def never() -> int:
        raise AssertionError("compiled")

    with pytest.raises(RunError, match=r"take 7 devices like these"):
        check_device(PretrainConfig(out=""), Paper(), gpus(1, int(1e10), [0]), never)
    with pytest.raises(RunError, match=r"or pass --data\.cache none\.$"):
        check_device(PretrainConfig(out=""), Huge(), make_mesh(4), never)
    with pytest.raises(RunError, match=r"or pass --data\.cache none\.$"):
        check_host(PretrainConfig(out=""), Huge(), make_mesh(4), never)


class Paper:
    """The paper's 400 thousand tiles, as far as their size is asked for."""

    canvas = (224, 224)

    def __len__(self) -> int:
        return 400_000


class Huge:
    """More tiles than any machine holds."""

    canvas = (1024, 1024)

    def __len__(self) -> int:
        return 2**31 - 1


def test_a_device_that_does_not_know_its_memory_is_not_asked_twice() -> None:
    silent = SimpleNamespace(platform="tpu", memory_stats=lambda: None)
    mesh = SimpleNamespace(size=1, local_devices=[silent])
    check_device(PretrainConfig(out=""), Huge(), mesh, lambda: 0)


# The whole run, as a user starts it.

STEPS = 8
FLAGS = [
    *("--steps", str(STEPS), "--batch-size", "8", "--tile-px", "32", "--precision", "f32"),
    *("--model.name", "resnet10", "--checkpoint-every", "4", "--optim.temperature", "0.5"),
]


def pretrain(out: Path, images: Path, *flags: str, devices: int = 1) -> tuple[int, str]:
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    args = ("pretrain", *FLAGS, "--data.stores", str(images), "--out", str(out), *flags)
    done = subprocess.run(
        [sys.executable, "-m", "jaxhisto.cli", *args],
        capture_output=True,
        text=True,
        env=env,
        timeout=240,
        check=False,
    )
    return done.returncode, done.stderr


def losses(run: Path) -> list[float]:
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(
        tmp_path_factory.mktemp("run") / "images", [(36 + i % 5, 40) for i in range(26)]
    )


@pytest.fixture(scope="module")
def from_disk(images: Path, tmp_path_factory: pytest.TempPathFactory):
    """The run folder without a cache, by number of devices."""
    made: dict[int, Path] = {}

    def run(devices: int) -> Path:
        if devices not in made:
            made[devices] = tmp_path_factory.mktemp("none") / "run"
            code, err = pretrain(made[devices], images, devices=devices)
            assert code == 0, err
        return made[devices]

    return run


@pytest.mark.parametrize("devices", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_from_the_devices_has_the_same_losses(
    from_disk, images: Path, tmp_path: Path, devices: int
) -> None:
    code, err = pretrain(tmp_path / "run", images, "--data.cache", "device", devices=devices)
    assert code == 0, err
    assert "decoding tiles 26/26" in err
    assert losses(tmp_path / "run") == losses(from_disk(devices))
    with (
        Image.open(tmp_path / "run/views.png") as ours,
        Image.open(from_disk(devices) / "views.png") as theirs,
    ):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("cache", "devices"),
    [("host", 1), *(pytest.param(c, 4, marks=pytest.mark.slow) for c in ("host", "device"))],
)
def test_a_run_goes_on_from_a_cache_with_the_same_losses(
    from_disk, images: Path, tmp_path: Path, cache: str, devices: int
) -> None:
    """Begun from disk and stopped after step 4; the rest comes from the cache."""
    out = tmp_path / "run"
    shutil.copytree(from_disk(devices), out)
    shutil.rmtree(out / "checkpoints" / str(STEPS))
    code, err = pretrain(out, images, "--data.cache", cache, devices=devices)
    assert code == 0, err
    assert "decoding tiles 26/26" in err
    assert losses(out) == losses(from_disk(devices))


def test_a_run_whose_tiles_do_not_fit_is_refused_before_decoding(tmp_path: Path) -> None:
    """Two long and narrow images make the canvas, and little ones fill the memory."""
    side = 8192
    there = available_bytes()
    assert there is not None
    count = there // (side * side * 3) + 2
    folder = write_images(tmp_path / "images", [(side, 1), (1, side)] + [(8, 8)] * count)
    flags = ("--data.max-side", str(side), "--data.cache", "device")
    code, err = pretrain(tmp_path / "run", folder, *flags)
    assert code == 1, err
    assert "Traceback" not in err
    assert "decoding" not in err
    total = (count + 2) * side * side * 3 / 1e9
    assert re.search(
        rf"--data\.cache device: {count + 2:,} tiles on a canvas of 8192 x 8192 px are "
        rf"{total:,.1f} GB, {total:,.1f} GB on each of 1 device\(s\), and [\d.]+ GB more are "
        r"wanted there for training, where [\d.]+ GB are free; use fewer tiles",
        err,
    )
