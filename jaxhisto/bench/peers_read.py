"""torch DataLoaders over JPEG tiles, with the decoders that PyTorch's users have; and the pipeline.

`read` hands over batches of uint8 in host memory, the same pixels as our loader's. A turn opens
its loader, takes WARM batches that do not count until its workers are at work, and then counts.
`pipeline` goes on to updated weights. How many workers is tried, and the quickest is taken.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from jaxhisto.bench.peer_job import PeerJob, Prepared
from jaxhisto.bench.worker_clock import cpu_seconds, on_cores

WARM = 6  # batches that do not count: more than any side reads ahead
TRIED = 4  # batches of which the numbers of workers are timed
READERS = ("files+torchvision", "files+pillow", "files+simplejpeg", "store+torchvision",
           "store+tfds")  # fmt: skip
Batches = Iterator[Any]


def prepare(job: PeerJob) -> Prepared:
    """The loader, or the pipeline."""
    import torch

    torch.manual_seed(0)
    if job.stage == "pipeline":
        return pipeline(job)
    # Without workers, batches are stacked here, by threads that spin: where a core is taken
    # from them, that costs twenty times the decoding.
    torch.set_num_threads(1)
    dataset = dataset_of(job)
    tried = {n: counted(loader(dataset, job, n), job.batch, TRIED)[0] for n in counts(job)}
    workers = min(tried, key=tried.__getitem__)
    settings = {
        "workers": workers,
        "loader": "DataLoader, shuffled, persistent workers, prefetch_factor 2, pin_memory off",
        "tried_s": {str(n): round(seconds, 4) for n, seconds in tried.items()},
    }

    def run() -> tuple[float, float]:
        with on_cores(job.threads):
            return counted(loader(dataset, job, workers), job.batch, job.images // job.batch)

    return Prepared(run, settings)


def counts(job: PeerJob) -> list[int]:
    """Numbers of workers to try: none to one a core; on many cores none, half of them, and all."""
    return sorted({0, 1, job.threads // 2, job.threads})


def loader(dataset: Any, job: PeerJob, workers: int, pinned: bool = False) -> Batches:
    """Batches without end; `pinned`: in memory that a GPU copies from at its own pace."""
    from torch.utils.data import DataLoader

    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    batches = DataLoader(
        dataset, job.batch, shuffle=True, drop_last=True, num_workers=workers, pin_memory=pinned,
        persistent_workers=workers > 0, multiprocessing_context=method if workers else None,
    )  # fmt: skip
    if not len(batches):
        raise RuntimeError(f"{len(dataset)} tiles are fewer than a batch of {job.batch}")
    while True:
        yield from batches


def counted(batches: Batches, batch: int, steps: int) -> tuple[float, float]:
    """Seconds by the clock, and those that cores worked, of `steps` batches after WARM others."""
    with contextlib.closing(batches):  # type: ignore[type-var]
        for _ in itertools.islice(batches, WARM):
            pass
        workers = [child.pid for child in multiprocessing.active_children()]
        began, worked = time.perf_counter(), cpu_seconds(workers)
        n = sum(len(one) for one in itertools.islice(batches, steps))
        seconds, cpu = time.perf_counter() - began, cpu_seconds(workers) - worked
    if n != steps * batch:
        raise RuntimeError(f"the loader gave {n} images of {steps * batch}")
    return seconds, cpu


def pipeline(job: PeerJob) -> Prepared:
    """JPEG to updated weights, the views made where that is quickest.

    On a CPU in the DataLoader's workers; on a GPU there or on the device, as tried.
    """
    from jaxhisto.bench.peers_augment import Views, augmenter, torchvision_transform
    from jaxhisto.bench.peers_torch import Setup

    setup = Setup(job)
    views: Views | None = None
    where = ["workers"]
    if setup.device.type == "cuda":
        views, where = augmenter(job, setup.device), ["workers", "device"]
    files = dataset_of(replace(job, who="files+torchvision"))
    # Channels first and float32 after the geometry: the quickest on a CPU core, see `augmenter`.
    transform = torchvision_transform(job, "after geometry")
    datasets = {"workers": TwoViews(files, transform), "device": files}

    def feed(way: str, workers: int) -> Iterator[Any]:
        for batch in loader(datasets[way], job, workers, setup.device.type == "cuda"):
            if way == "device" and views is not None:
                yield views(batch.permute(0, 3, 1, 2))
            else:
                yield as_images(batch, setup.device)

    def steps(way: str, workers: int, count: int) -> float:
        with contextlib.closing(feed(way, workers)) as images:  # type: ignore[type-var]
            setup.step(next(images))  # starts the workers
            setup.wait()
            began = time.perf_counter()
            train(setup, itertools.islice(images, count))
            return time.perf_counter() - began

    ways = [(way, n) for way in where for n in counts(job)[1:]]
    tried = {way: steps(*way, 2) for way in ways} if len(ways) > 1 else {ways[0]: 0.0}
    way, workers = min(tried, key=tried.__getitem__)
    settings = setup.settings() | {
        "workers": workers,
        "views_made_in": way,
        "decoder": "torchvision",
        "tried_s": {f"{w}/{n}": round(s, 4) for (w, n), s in tried.items()},
    }

    def run() -> tuple[float, float]:
        worked = cpu_seconds()
        return steps(way, workers, max(1, job.images // job.batch)), cpu_seconds() - worked

    return Prepared(run, settings)


def train(setup: Any, batches: Iterable[Any]) -> None:
    """A step on each batch. As our loop, it waits for a step when the next one is handed over."""
    before: Callable[[], None] = lambda: None  # noqa: E731
    for batch in batches:
        setup.step(batch)
        now = setup.mark()
        before()
        before = now
    setup.wait()


def as_images(batch: Any, device: Any) -> Any:
    """(n, 2, 3, S, S) float32 in 0..1 as the network takes it."""
    import torch

    flat = batch.flatten(0, 1).to(device, non_blocking=True)
    return flat.sub_(0.5).div_(0.5).contiguous(memory_format=torch.channels_last)


class TwoViews:
    """A map-style Dataset of two views of each tile, (2, 3, S, S) float32."""

    def __init__(self, tiles: Any, transform: Callable[[Any], Any]) -> None:
        self.tiles, self.transform = tiles, transform

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, i: int) -> Any:
        import torch

        tile = self.tiles[i].permute(2, 0, 1).contiguous()
        return torch.stack([self.transform(tile), self.transform(tile)])


def dataset_of(job: PeerJob) -> Any:
    """A map-style Dataset of (H, W, 3) uint8 tensors; ImportError where its decoder is missing."""
    kind, _, decoder = job.who.partition("+")
    if kind == "store":
        return Stored(job.store, encoded=decoder == "torchvision")
    files = sorted(Path(job.files).glob("*.jpg"))
    if decoder == "torchvision":
        import torchvision  # noqa: F401

        return Files(files, by_torchvision, torchvision_reads)
    decode = {"pillow": by_pillow, "simplejpeg": by_simplejpeg}[decoder]
    __import__({"pillow": "PIL", "simplejpeg": "simplejpeg"}[decoder])
    return Files(files, partial(as_tensor, decode))


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
    """The whole file."""
    with open(file, "rb") as opened:
        return opened.read()


def torchvision_reads(file: str) -> Any:
    """The whole file, by torchvision."""
    from torchvision.io import read_file

    return read_file(file)


def by_torchvision(data: Any) -> Any:
    """(H, W, 3), as it lies in memory."""
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(data, mode=ImageReadMode.RGB).permute(1, 2, 0)


def as_tensor(decode: Callable[[bytes], np.ndarray], data: bytes) -> Any:
    """A decoder's array as a tensor."""
    import torch

    return torch.from_numpy(decode(data))


def by_pillow(data: bytes) -> np.ndarray:
    """(H, W, 3) uint8."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"))  # a copy: torch wants to write


def by_opencv(data: bytes) -> np.ndarray:
    """(H, W, 3) uint8."""
    import cv2

    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    assert pixels is not None
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def by_simplejpeg(data: bytes) -> np.ndarray:
    """(H, W, 3) uint8."""
    import simplejpeg

    pixels: np.ndarray = simplejpeg.decode_jpeg(data, "RGB")
    return pixels


def decoders(jpegs: list[bytes], repeats: int) -> dict[str, list[float]]:
    """Images a CPU second of each decoder that is installed, alone, in one thread, by turns."""
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
    modules = {"jaxhisto": "cv2", "opencv": "cv2", "pillow": "PIL"}
    ways = {name: way for name, way in ways.items() if find_spec(modules.get(name, name))}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, (decode, data) in ways.items():
            began = time.thread_time()
            for one in data:
                decode(one)
            if turn:  # the first does not count
                found[name].append(len(data) / (time.thread_time() - began))
    return found
