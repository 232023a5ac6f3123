"""What fits into memory: planned sizes, made-up devices, and one real refusal."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from jaxhisto.config import DataConfig, ModelConfig, PretrainConfig
from jaxhisto.data.memory import available_bytes
from jaxhisto.data.sources import Tiles, open_tiles
from jaxhisto.distributed import make_mesh
from jaxhisto.errors import RunError
from jaxhisto.pretrain import room
from jaxhisto.pretrain.device_cache import Layout
from jaxhisto.pretrain.feed import open_feed
from jaxhisto.pretrain.room import check_device, check_host, step_bytes
from jaxhisto.pretrain.step import init_state, make_train_step

N = 8


def with_cache(cache: str) -> PretrainConfig:
    return PretrainConfig(
        out="",
        batch_size=N,
        tile_px=32,
        precision="f32",
        model=ModelConfig(name="resnet10"),
        data=DataConfig(threads=2, cache=cache),
    )


def write_images(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    folder.mkdir()
    for i, (h, w) in enumerate(sizes):
        Image.fromarray(np.full((h, w, 3), i % 256, np.uint8)).save(folder / f"{i:05}.png")
    return folder


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Tiles:
    folder = write_images(tmp_path_factory.mktemp("room") / "images", [(9, 7)] * 23)
    return open_tiles(DataConfig(stores=(str(folder),)))


@pytest.mark.parametrize("cache", ["device", pytest.param("host", marks=pytest.mark.slow)])
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
    # Another process of the run on this host wants as much again.
    monkeypatch.setattr(room, "available_bytes", lambda: 2 * (int(wanted / 0.95) + 2))
    monkeypatch.setattr(room, "exchange", lambda name: [name, "another host", name])
    check_host(config, tiles, mesh, lambda: step)
    monkeypatch.setattr(room, "available_bytes", lambda: 2 * (int(wanted / 0.95) - 2))
    with pytest.raises(RunError, match=r"^--data\.cache host: "):
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


def test_a_run_whose_tiles_do_not_fit_is_refused_before_decoding(tmp_path: Path) -> None:
    """Two long and narrow images make the canvas, and little ones fill the memory."""
    side = 8192
    there = available_bytes()
    assert there is not None
    count = there // (side * side * 3) + 2
    folder = write_images(tmp_path / "images", [(side, 1), (1, side)] + [(8, 8)] * count)
    flags = ("--data.max-side", str(side), "--data.cache", "device")
    line = ("pretrain", "--data.stores", folder, "--out", tmp_path / "run", *flags)
    line += ("--steps", 8, "--batch-size", 8, "--model.name", "resnet10", "--devices", 1)
    done = subprocess.run(
        [sys.executable, "-m", "jaxhisto.cli", *map(str, line)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    err = done.stderr
    assert done.returncode == 1, err
    assert "Traceback" not in err
    assert "decoding" not in err
    total = (count + 2) * side * side * 3 / 1e9
    assert re.search(
        rf"--data\.cache device: {count + 2:,} tiles on a canvas of 8192 x 8192 px are "
        rf"{total:,.1f} GB, {total:,.1f} GB on each of 1 device\(s\), and [\d.]+ GB more are "
        r"wanted there for training, where [\d.]+ GB are free; use fewer tiles",
        err,
    )
