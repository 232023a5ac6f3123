"""Runs as a user starts and ends them: a process each, and what it leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from jaxhisto.data.store_writer import StoreWriter, Tile, encode_jpeg, write_part, write_record
from jaxhisto.runlog import read_metrics

FLAGS = [
    *("--batch-size", "8", "--tile-px", "32", "--precision", "f32", "--model.name", "resnet10"),
    *("--optim.temperature", "0.5"),
]


def write_images(folder: Path, count: int = 24) -> Path:
    rng = np.random.default_rng(0)
    for i in range(count):
        low = rng.integers(0, 256, (6, 6, 3), np.uint8)
        Image.fromarray(low).resize((40, 40)).save(folder / f"tile_{i:02d}.png")
    return folder


def write_store(path: Path, seed: int) -> Path:
    """A tile store of two slides with 8 tiles of 32 px each, as `jaxhisto tile` leaves it."""
    rng = np.random.default_rng(seed)
    with StoreWriter(path, {}) as writer:
        records = []
        for slide in ("a", "b"):
            pixels = rng.integers(0, 256, (8, 32, 32, 3), np.uint8)
            tiles = (
                Tile(encode_jpeg(image, 95, "4:4:4"), slide, "made", 0, i, 0.5, "flag")
                for i, image in enumerate(pixels)
            )
            part = write_part(path, slide, tiles)
            entry = {"bytes": part["bytes"], "sha256": part["sha256"]}
            records.append({"id": slide, "tile_mpp": 0.5, "tiles": part["tiles"], "part": entry})
            write_record(path, records[-1])
        facts = {"dataset": "made", "tile_px": 32, "failures": [], "code_version": "0"}
        writer.finish(records, facts, lambda manifest: "<html>")
    return path


def start(
    out: Path, images: Path, *flags: object, devices: int = 1, **env: str
) -> subprocess.Popen[str]:
    """`jaxhisto pretrain` in a process of its own."""
    count = f"--xla_force_host_platform_device_count={devices}"
    args = ["pretrain", *FLAGS, "--data.stores", images, "--out", out, *flags]
    return subprocess.Popen(
        [sys.executable, "-m", "jaxhisto.cli", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"XLA_FLAGS": count} | env,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Returns when it holds; fails when the process ends before."""
    deadline = time.monotonic() + 180
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def checkpoints(run: Path) -> list[str]:
    folder = run / "checkpoints"
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


def being_written(run: Path) -> list[str]:
    return [name for name in checkpoints(run) if name.endswith(".writing")]


def lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def losses(run: Path) -> list[float]:
    """The loss of each step, each step once and none missing."""
    found = read_metrics(run)
    assert [line["step"] for line in found] == list(range(1, len(found) + 1))
    return [line["loss"] for line in found]
