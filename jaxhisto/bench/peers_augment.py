"""Two random views of each tile by torchvision v2 or by kornia, with our recipe's transforms.

torchvision draws once a call, so it goes image by image; kornia draws for each image of a batch.
On a CPU torchvision works in as many processes as there are cores, a thread each, which is what a
DataLoader's workers do and the most it gives: threads within an operation and threads over images
both lose. What can be set up in more than one way is tried in all, and the quickest is taken.
"""

from __future__ import annotations

import ctypes
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxhisto.bench.peer_job import PeerJob, Prepared
from jaxhisto.bench.peers_torch import configure, device_of, quickest, timed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
TRIED = 8  # tiles of which the ways are timed
CROPS = ("slice", "resample")
PLACES = ("from the start", "after geometry", "before blur")
CROP_AREA, CROP_RATIO = (0.01, 1.0), (3 / 4, 4 / 3)
JITTERED, BLURRED, SIGMA = 0.8, 0.5, (0.1, 2.0)


def prepare(job: PeerJob) -> Prepared:
    """Views of tiles that lie on the device, as ours do."""
    configure(job)
    device = device_of(job)
    tiles = made_tiles(job).to(device)
    views = augmenter(job, device)

    def make() -> None:
        for _ in range(job.calls):
            views.make(tiles)
        wait(device)

    return Prepared(lambda: timed(make, views.workers), views.settings, views.close)


def made_tiles(job: PeerJob) -> Tensor:
    """(N, 3, H, W) uint8, smooth at the scale of nuclei, with noise."""
    import torch

    rng, side = np.random.default_rng(0), job.tile_px
    coarse = rng.integers(40, 216, (job.batch, side // 8 + 1, side // 8 + 1, 3))
    fine = coarse.repeat(8, 1).repeat(8, 2)[:, :side, :side]
    pixels = (fine + rng.integers(-30, 30, fine.shape)).astype(np.uint8)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def augmenter(job: PeerJob, device: torch.device) -> Views:
    """The peer's quickest way on this device.

    kornia's is taken where it is named, and in a step on a GPU where it is installed and quicker.
    """
    ways: dict[str, Callable[[Any], Any]] = {}
    if job.who != "kornia":
        ways |= torchvision_ways(job)
    on_gpu = device.type == "cuda" and job.stage != "augment" and find_spec("kornia")
    if job.who == "kornia" or on_gpu:
        ways |= {f"kornia, by {mode}": kornia_transform(job, device, mode) for mode in CROPS}
    # kornia's strength is the batch at once; torchvision takes image after image.
    tried = job.batch if on_gpu else TRIED
    sample = made_tiles(job)[:tried].to(device)
    # One thread's work: by its own clock, which other programs on the machine leave alone.
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    best, seconds = one_thread(lambda: quickest(waiting(ways, sample, device), clock))
    cores = job.threads if device.type == "cpu" else 1
    settings: dict[str, Any] = {"form": best, "tried_s": {"tiles": len(sample), **seconds}}
    if best.startswith("kornia"):
        return Views(job, ways[best], settings)
    settings["processes"] = cores
    if cores > 1:
        return Pooled(job, ways[best], settings)
    return Views(job, ways[best], settings, serial=device.type == "cpu")


def torchvision_ways(job: PeerJob) -> dict[str, Callable[[Any], Any]]:
    """Where pixels become float32, and in which layout they lie."""
    return {
        f"torchvision v2, float32 {place}, {layout}": partial(
            by_torchvision, torchvision_transform(job, place), layout == "channels last"
        )
        for place in PLACES
        for layout in ("channels first", "channels last")
    }


def waiting(
    ways: dict[str, Callable[[Any], Any]], sample: Tensor, device: torch.device
) -> dict[str, Callable[[], Any]]:
    """The ways on a sample, each waiting for the device."""

    def one(make: Callable[[Any], Any]) -> None:
        make(sample)
        wait(device)

    return {name: partial(one, make) for name, make in ways.items()}


class Views:
    """(N, 3, H, W) uint8 to (2N, 3, S, S): called, normalised; `make`, in 0..1.

    Attributes:
      settings: for the record.
      workers: ids of processes that work for it.
    """

    def __init__(
        self,
        job: PeerJob,
        make: Callable[[Any], Any],
        settings: dict[str, Any],
        serial: bool = False,
    ) -> None:
        self.job, self.settings, self._make, self._serial = job, settings, make, serial
        self.workers: tuple[int | None, ...] = ()

    def make(self, tiles: Tensor) -> Tensor:
        """The views of an image next to each other, float32 in 0..1."""
        made: Any = one_thread(lambda: self._make(tiles)) if self._serial else self._make(tiles)
        return made

    def __call__(self, tiles: Tensor) -> Tensor:
        import torch

        device = device_of(self.job)
        views = self.make(tiles.to(device, non_blocking=True))
        # In place: it is a copy of our own, and this is (x - mean) / std of our recipe.
        views = views.sub_(0.5).div_(0.5)
        return views.contiguous(memory_format=torch.channels_last)

    def close(self) -> None:
        """Nothing to end."""


_pool: dict[str, Any] = {}  # what the forked workers see: tiles and views in shared memory


class Pooled(Views):
    """Shares a batch out among processes, as a DataLoader's workers do."""

    def __init__(self, job: PeerJob, make: Callable[[Any], Any], settings: dict[str, Any]) -> None:
        import torch

        super().__init__(job, make, settings)
        _pool["make"] = make
        _pool["tiles"] = made_tiles(job).share_memory_()
        _pool["views"] = torch.empty(2 * job.batch, 3, job.side, job.side).share_memory_()
        self._processes = multiprocessing.get_context("fork").Pool(job.threads, _begin)
        self.workers = tuple(p.pid for p in self._processes._pool)  # type: ignore[attr-defined]
        cuts = np.linspace(0, job.batch, job.threads + 1).astype(int).tolist()
        self._shares = list(itertools.pairwise(cuts))

    def make(self, tiles: Tensor) -> Tensor:
        _pool["tiles"].copy_(tiles)
        self._processes.map(_share, self._shares, chunksize=1)
        made: Tensor = _pool["views"]
        return made

    def close(self) -> None:
        self._processes.terminate()
        self._processes.join()


def _begin() -> None:
    import torch

    _end_with_parent()
    torch.set_num_threads(1)
    torch.manual_seed(os.getpid())


def _end_with_parent() -> None:
    """A pool's workers wait for work that never comes where their parent was killed (Linux)."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _share(rows: tuple[int, int]) -> None:
    first, last = rows
    if last > first:
        _pool["views"][2 * first : 2 * last] = _pool["make"](_pool["tiles"][first:last])


def one_thread(work: Callable[[], Any]) -> Any:
    """Runs `work` with one thread within operations."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return work()
    finally:
        torch.set_num_threads(before)


def wait(device: torch.device) -> None:
    """Until the device is done."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def by_torchvision(transform: Callable[[Any], Any], channels_last: bool, tiles: Tensor) -> Tensor:
    """Each image twice, with parameters of its own."""
    import torch

    if channels_last:
        tiles = tiles.contiguous(memory_format=torch.channels_last)
    return torch.stack([transform(tile) for tile in tiles for _ in range(2)])


def torchvision_transform(job: PeerJob, place: str) -> Callable[[Any], Any]:
    """Our recipe in v2's transforms; `place`, one of PLACES, is where pixels become float32."""
    import torch
    from torchvision.transforms import v2

    class QuarterTurns(v2.Transform):
        def make_params(self, flat_inputs: list[Any]) -> dict[str, int]:
            return {"turns": int(torch.randint(4, ()))}

        def transform(self, inpt: Any, params: dict[str, int]) -> Any:
            return torch.rot90(inpt, params["turns"], (-2, -1))

    to_float = v2.ToDtype(torch.float32, scale=True)
    geometry = [
        v2.RandomResizedCrop(job.side, scale=CROP_AREA, ratio=CROP_RATIO, antialias=True),
        QuarterTurns(),
        v2.RandomVerticalFlip(),
        v2.RandomHorizontalFlip(),
    ]
    jitter = [v2.RandomApply([v2.ColorJitter(*job.jitter)], p=JITTERED)]
    blur = [v2.RandomApply([v2.GaussianBlur(taps(job.side), SIGMA)], p=BLURRED)]
    steps = {
        "from the start": [to_float, *geometry, *jitter, *blur],
        "after geometry": [*geometry, to_float, *jitter, *blur],
        "before blur": [*geometry, *jitter, to_float, *blur],
    }
    made: Callable[[Any], Any] = v2.Compose(steps[place])
    return made


def kornia_transform(job: PeerJob, device: torch.device, crop: str) -> Callable[[Any], Any]:
    """Our recipe in kornia's transforms, which draw for each image of a batch.

    `crop`, one of CROPS, is how crops are cut: one after the other and resized, or all at once
    by sampling. kornia's resize knows no antialias here; ours and torchvision's have it.
    """
    import torch
    from kornia import augmentation as K

    side = (job.side, job.side)
    sequence = K.AugmentationSequential(
        K.RandomResizedCrop(side, scale=CROP_AREA, ratio=CROP_RATIO, cropping_mode=crop),
        K.RandomRotation90(times=(0, 3), p=1.0),
        K.RandomVerticalFlip(p=0.5),
        K.RandomHorizontalFlip(p=0.5),
        K.ColorJitter(*job.jitter, p=JITTERED),
        K.RandomGaussianBlur((taps(job.side),) * 2, SIGMA, p=BLURRED),
        data_keys=["input"],
        same_on_batch=False,
    ).to(device)

    def make(tiles: Tensor) -> Tensor:
        with torch.no_grad():
            made: Tensor = sequence(tiles.repeat_interleave(2, 0).float().div_(255))
        return made

    return make


def taps(side: int) -> int:
    """Of the blur: a tenth of the side, odd (23 at 224)."""
    return 2 * int(0.1 * side / 2) + 1
