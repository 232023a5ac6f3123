"""Tiles in the devices' memory: the batches read from disk and XLA's own text are the oracles."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image

from jaxhisto.config import DataConfig, ModelConfig, PretrainConfig
from jaxhisto.data.loader import batches
from jaxhisto.data.sources import Tiles, open_tiles
from jaxhisto.distributed import make_mesh
from jaxhisto.errors import StoreError
from jaxhisto.pretrain import device_cache
from jaxhisto.pretrain.device_cache import DeviceCache, Layout, make_gather, make_write
from jaxhisto.pretrain.feed import open_feed
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


@pytest.mark.slow
def test_two_processes_hold_and_get_what_one_does(tiles: Tiles, tmp_path: Path) -> None:
    """Over loopback: each decodes the tiles of its own two devices alone, and gets its rows."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    folder = tiles.names(0).rpartition("/")[0]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(port), str(p), folder, str(tmp_path / f"{p}.npz")],
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for p in range(2)
    ]
    for worker in workers:
        _, err = worker.communicate(timeout=240)
        assert worker.returncode == 0, err
    got = [np.load(tmp_path / f"{p}.npz") for p in range(2)]
    # 6 of the 23 tiles on each device, so 12 in process 0 and 11 in process 1.
    assert [sorted(g["read"].tolist()) for g in got] == [list(range(12)), list(range(12, 23))]
    for step, batch in batches(tiles, DataConfig(threads=2), N, 3, 0, 4):
        for field in ("index", "tiles", "sizes"):
            ours = np.concatenate([g[f"{field}{step}"] for g in got])
            assert np.array_equal(ours, getattr(batch, field)), (step, field)


WORKER = """
import sys
import jax, numpy as np
from jaxhisto.config import DataConfig, PretrainConfig
from jaxhisto.data.sources import open_tiles
from jaxhisto.distributed import make_mesh, own_rows
from jaxhisto.pretrain.feed import open_feed

port, process, folder, out = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
config = PretrainConfig(
    out="", batch_size=8, seed=3, data=DataConfig(stores=(folder,), threads=2, cache="device")
)
tiles, mesh, seen = open_tiles(config.data), make_mesh(), []
read = tiles.read
tiles.read = lambda i: (seen.append(i), read(i))[1]
found = {}
with jax.set_mesh(mesh):
    for step, batch in open_feed(config, tiles, mesh, 0, 4, lambda: 0):
        found |= {f"index{step}": batch.index}
        found |= {f"tiles{step}": own_rows(batch.tiles), f"sizes{step}": own_rows(batch.sizes)}
np.savez(out, read=np.array(seen), **found)
jax.distributed.shutdown()
"""


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


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
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


@pytest.mark.parametrize(("cache", "devices"), [("host", 1), ("host", 4), ("device", 4)])
@pytest.mark.slow
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
