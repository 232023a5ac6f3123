"""One side of `loader.py`: answers each line of JSON on stdin with one on stdout."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxhisto.bench.peer_job import PeerJob
from jaxhisto.bench.peers_read import dataset_of, decoders
from jaxhisto.bench.runner import missing
from jaxhisto.bench.worker_clock import cpu_seconds, on_cores

CHECKED = 16  # tiles whose pixels are compared
WARM = 6  # batches that do not count: more than any side reads ahead
PACKAGES = (
    "torch", "torchvision", "pillow", "opencv-python-headless", "simplejpeg", "array-record",
    "tensorflow-datasets",
)  # fmt: skip
Batches = Iterator[Any]


def main() -> None:
    side, job = sys.argv[1], json.loads(sys.argv[2])
    answers = sys.stdout
    sys.stdout = sys.stderr  # what a library prints is no answer
    measured = {"jaxhisto": Jaxhisto, "torch": Torch}[side](job)
    hello = {"missing": measured.missing, "settings": measured.settings}
    print(json.dumps(hello), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answered(measured, job, json.loads(line))), file=answers, flush=True)


def answered(measured: Any, job: dict[str, Any], question: dict[str, Any]) -> dict[str, Any]:
    if "pixels" in question:
        return measured.pixels()
    if "decoders" in question:
        return {"decoders": decoders(measured.jpegs, question["decoders"])}
    if "versions" in question:
        return {name: version(name) for name in PACKAGES}
    with on_cores(question["cores"]):
        opened = measured.opened(question["turn"], question["workers"])
        return counted(opened, job["batch"], job["images"])


def counted(batches: Batches, batch: int, images: int) -> dict[str, float]:
    """Images a second by the clock, and by the CPU seconds of this process and its workers."""
    steps = -(-images // batch)
    with contextlib.closing(batches):
        for _ in itertools.islice(batches, WARM):
            pass
        workers = [child.pid for child in multiprocessing.active_children()]
        began, worked = time.perf_counter(), cpu_seconds(workers)
        n = sum(len(one) for one in itertools.islice(batches, steps))
        seconds, cpu = time.perf_counter() - began, cpu_seconds(workers) - worked
    assert n == steps * batch
    return {"images_per_s": n / seconds, "images_per_cpu_s": n / cpu}


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def digest(tiles: Iterator[Any]) -> str:
    found = hashlib.sha256()
    for tile in tiles:
        found.update(np.ascontiguousarray(tile).tobytes())
    return found.hexdigest()


class Jaxhisto:
    """`loader.batches`, as a run without a cache uses it."""

    def __init__(self, job: dict[str, Any]) -> None:
        from jaxhisto.config import DataConfig
        from jaxhisto.data.sources import open_tiles

        self.config, self.batch = DataConfig(stores=(job["store"],)), job["batch"]
        self.tiles = open_tiles(self.config)
        threads, prefetch = self.config.threads, self.config.prefetch
        self.missing: dict[str, str] = {}
        self.settings = f"threads {threads or 'one a core'}, prefetch {prefetch} (defaults)"

    def pixels(self) -> dict[str, Any]:
        from jaxhisto.data.store import TileStore

        store = TileStore(self.config.stores[0], verify=False)
        size = statistics.mean(len(store.image(i)) for i in range(len(store)))
        data = {"tiles": len(store), "side": store.tile_px, "kb": size / 1000, "hash": store.hash}
        tiles = (self.tiles.read(i) for i in range(min(CHECKED, len(self.tiles))))
        return {"pixels": digest(tiles), "data": data}

    def opened(self, name: str, workers: int) -> Batches:
        from jaxhisto.data.loader import batches

        for _, batch in batches(self.tiles, self.config, self.batch, 0, 0, 10**9):
            yield batch.tiles


class Torch:
    """torch DataLoaders over the same tiles, (N, H, W, 3) uint8 like ours: nothing is turned.

    `missing`: why a peer that was asked for is not among `datasets`, by name.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        import torch

        from jaxhisto.data.store import TileStore

        torch.manual_seed(0)
        # Without workers, batches are stacked here, by threads that spin: where a core is taken
        # from them, that costs twenty times the decoding.
        torch.set_num_threads(1)
        store = TileStore(job["store"], verify=False)
        self.batch, self.jpegs = job["batch"], [store.image(i) for i in range(len(store))]
        folder = Path(job["files"]) / "jpegs"
        folder.mkdir()
        files = [folder / f"{i:06}.jpg" for i in range(len(self.jpegs))]
        for file, data in zip(files, self.jpegs, strict=True):
            file.write_bytes(data)
        self.datasets: dict[str, Any] = {}
        self.missing: dict[str, str] = {}
        for name in job["peers"]:
            one = PeerJob("read", name, store=job["store"], files=str(folder))
            try:
                self.datasets[name] = dataset_of(one)
            except ImportError as error:
                self.missing[name] = missing(error)
        self.settings = "shuffled, persistent workers, prefetch_factor 2, pin_memory off"

    def pixels(self) -> dict[str, Any]:
        first = range(min(CHECKED, len(self.jpegs)))
        found = {
            name: digest(data[i].numpy() for i in first) for name, data in self.datasets.items()
        }
        return {"pixels": found | dict.fromkeys(self.missing, "")}

    def opened(self, name: str, workers: int) -> Batches:
        from torch.utils.data import DataLoader

        loader = DataLoader(
            self.datasets[name], self.batch, shuffle=True, drop_last=True, num_workers=workers,
            persistent_workers=workers > 0,
        )  # fmt: skip
        while True:
            yield from loader


if __name__ == "__main__":
    main()
