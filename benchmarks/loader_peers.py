"""One side of `loader.py`: answers each line of JSON on stdin with one on stdout."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

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
    hello = {"names": measured.names, "settings": measured.settings}
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


def cpu_seconds(workers: list[int | None]) -> float:
    """Of this process and of some that it started."""
    # Linux's clock of another process: clock_getcpuclockid(3), which Python does not have.
    clocks = [(~pid << 3) | 2 for pid in workers if pid]
    return time.process_time() + sum(time.clock_gettime(clock) for clock in clocks)


@contextlib.contextmanager
def on_cores(count: int) -> Iterator[None]:
    """Threads and processes that are started inside use the first `count` cores of those here."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


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

    names = ("jaxhisto",)

    def __init__(self, job: dict[str, Any]) -> None:
        from jaxhisto.config import DataConfig
        from jaxhisto.data.sources import open_tiles

        self.config, self.batch = DataConfig(stores=(job["store"],)), job["batch"]
        self.tiles = open_tiles(self.config)
        threads, prefetch = self.config.threads, self.config.prefetch
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
    """torch DataLoaders over the same tiles, (N, H, W, 3) uint8 like ours: nothing is turned."""

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
        self.datasets = {
            "files+torchvision": Files(files, by_torchvision, torchvision_reads),
            "files+pillow": Files(files, Tensors(by_pillow)),
            "files+simplejpeg": Files(files, Tensors(by_simplejpeg)),
            "store+torchvision": Stored(job["store"], encoded=True),
            "store+tfds": Stored(job["store"], encoded=False),
        }
        self.names = tuple(self.datasets)
        self.settings = "shuffled, persistent workers, prefetch_factor 2, pin_memory off"

    def pixels(self) -> dict[str, Any]:
        first = range(min(CHECKED, len(self.jpegs)))
        return {
            "pixels": {
                name: digest(data[i].numpy() for i in first) for name, data in self.datasets.items()
            }
        }

    def opened(self, name: str, workers: int) -> Batches:
        from torch.utils.data import DataLoader

        loader = DataLoader(
            self.datasets[name], self.batch, shuffle=True, drop_last=True, num_workers=workers,
            persistent_workers=workers > 0,
        )  # fmt: skip
        while True:
            yield from loader


class Files:
    """A map-style Dataset of JPEG files."""

    def __init__(self, files: list[Path], decode: Callable[[Any], Any], read: Any = None) -> None:
        self.files, self.decode, self.read = [str(file) for file in files], decode, read or bytes_of

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Any:
        return self.decode(self.read(self.files[i]))


class Stored:
    """A map-style Dataset over TFDS's data source of a store."""

    def __init__(self, store: str, encoded: bool) -> None:
        import tensorflow_datasets as tfds

        skip = {"image": tfds.decode.SkipDecoding()} if encoded else None
        builder = tfds.builder_from_directory(store)
        self.source, self.encoded = builder.as_data_source("train", decoders=skip), encoded

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Any:
        import torch

        image = self.source[int(i)]["image"]
        if not self.encoded:
            return torch.from_numpy(image)
        return by_torchvision(torch.frombuffer(bytearray(image), dtype=torch.uint8))


def bytes_of(file: str) -> bytes:
    with open(file, "rb") as opened:
        return opened.read()


def torchvision_reads(file: str) -> Any:
    from torchvision.io import read_file

    return read_file(file)


def by_torchvision(data: Any) -> Any:
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(data, mode=ImageReadMode.RGB).permute(1, 2, 0)  # as it lies in memory


class Tensors:
    """A decoder's arrays as tensors; a class, for workers that are spawned."""

    def __init__(self, decode: Callable[[bytes], np.ndarray]) -> None:
        self.decode = decode

    def __call__(self, data: bytes) -> Any:
        import torch

        return torch.from_numpy(self.decode(data))


def by_pillow(data: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"))  # a copy: torch wants to write


def by_opencv(data: bytes) -> np.ndarray:
    import cv2

    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), flags), cv2.COLOR_BGR2RGB)


def by_simplejpeg(data: bytes) -> np.ndarray:
    import simplejpeg

    return simplejpeg.decode_jpeg(data, "RGB")


def decoders(jpegs: list[bytes], repeats: int) -> dict[str, list[float]]:
    """Images a CPU second of each decoder alone, in one thread, by turns."""
    import torch

    from jaxhisto.data.images import decode_jpeg

    tensors = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in jpegs]
    ways: dict[str, tuple[Callable[[Any], Any], list[Any]]] = {
        "jaxhisto": (decode_jpeg, jpegs),
        "simplejpeg": (by_simplejpeg, jpegs),
        "opencv": (by_opencv, jpegs),
        "torchvision": (by_torchvision, tensors),
        "pillow": (by_pillow, jpegs),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, (decode, data) in ways.items():
            began = time.thread_time()
            for one in data:
                decode(one)
            if turn:  # the first does not count
                found[name].append(len(data) / (time.thread_time() - began))
    return found


if __name__ == "__main__":
    main()
