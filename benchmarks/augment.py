"""Images a second and core of our augmentation and of torchvision's, measured in one run, by turns.

    python benchmarks/augment.py [--side 224 --tile-px 224 --batch 32 --repeats 5 --threads 2
                                  --json FILE]

Both make two views of each tile with parameters of their own: crop of 1..100 %, quarter turns,
flips, jitter .8 .8 .8 .2 with 80 % in random order, blur of a tenth of the side with 50 %.
torchvision works in one thread, image after image, which is the most it does for a core: threads
within an operation and threads over images both lose. Six ways to set it up are tried (where
pixels become float32, channels first or last) and the best counts. An image counts once, not
once a view. What is compared is images a second of CPU time, which other work on the machine
leaves alone; ours may use `--threads` cores at once, and on an accelerator its figure is by the
clock and for the device. The clock's time stands beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[], Any]


def main() -> None:
    args = parse()
    # Before jax starts its thread pool.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    runs = {"ours": ours(args)} | torchvision_runs(args)
    seconds = measure(runs, args.repeats)
    clock = dict.fromkeys(runs, 1) | {"ours": 1 if on_cpu() else 0}
    speed = {name: args.batch / middle(times, clock[name]) for name, times in seconds.items()}
    best = max((name for name in runs if name != "ours"), key=speed.__getitem__)
    show(seconds, speed, best)
    ours_per = "core" if on_cpu() else "device"
    if args.json:
        record = {
            "what": vars(args),
            "images_per_s_and_core": speed,
            "ours_per": ours_per,
            "best_of_torchvision": best,
            "seconds_wall_and_cpu": seconds,
        } | origin()
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n")
    print(
        f"ratio {speed['ours'] / speed[best]:.2f} = ours {speed['ours']:.1f} / "
        f"torchvision {speed[best]:.1f} images/s per core (ours per {ours_per}, two views each, "
        f"{args.tile_px} -> {args.side} px, batch {args.batch}, {args.threads} threads, "
        f"{best}, median of {args.repeats})"
    )


def parse() -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=224, help="of a view, px")
    parser.add_argument("--tile-px", type=int, help="side of a tile; default: as the view")
    parser.add_argument("--batch", type=int, default=32, help="images; twice as many views")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=cores)
    parser.add_argument("--json", help="write the record there")
    args = parser.parse_args()
    args.tile_px = args.tile_px or args.side
    return args


def on_cpu() -> bool:
    import jax

    return jax.default_backend() == "cpu"


def pixels(args: argparse.Namespace) -> np.ndarray:
    """(N, H, W, 3) uint8, smooth at the scale of nuclei, with noise."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(40, 216, (args.batch, args.tile_px // 8 + 1, args.tile_px // 8 + 1, 3))
    fine = coarse.repeat(8, 1).repeat(8, 2)[:, : args.tile_px, : args.tile_px]
    return (fine + rng.integers(-30, 30, fine.shape)).astype(np.uint8)


def ours(args: argparse.Namespace) -> Run:
    """Draws the parameters and makes the views, under jit, on jax's first device."""
    import jax
    import jax.numpy as jnp

    from jaxhisto.augment import two_views
    from jaxhisto.config import AugmentConfig

    tiles = jnp.asarray(pixels(args))
    sizes = jnp.full((args.batch, 2), args.tile_px, jnp.int32)
    views = jax.jit(partial(two_views, side=args.side, config=AugmentConfig()))
    keys = iter(range(1_000_000))
    return lambda: jax.block_until_ready(views(jax.random.key(next(keys)), tiles, sizes))


def torchvision_runs(args: argparse.Namespace) -> dict[str, Run]:
    """`float32 WHERE, LAYOUT` -> run, each a fair way to set torchvision up."""
    import torch

    torch.set_num_threads(1)
    first = torch.from_numpy(pixels(args)).permute(0, 3, 1, 2).contiguous()
    last = first.contiguous(memory_format=torch.channels_last)
    runs = {}
    for where in ("from the start", "after geometry", "before blur"):
        transform = torchvision_transform(args.side, where)
        for layout, tiles in (("channels first", first), ("channels last", last)):
            runs[f"float32 {where}, {layout}"] = partial(two_each, transform, tiles)
    return runs


def two_each(transform: Callable[[Any], Any], tiles: Any) -> list[Any]:
    return [(transform(tile), transform(tile)) for tile in tiles]


def torchvision_transform(side: int, where: str) -> Callable[[Any], Any]:
    import torch
    from torchvision.transforms import v2

    class QuarterTurns(v2.Transform):
        def make_params(self, inputs: list[Any]) -> dict[str, int]:
            return {"turns": int(torch.randint(4, ()))}

        def transform(self, image: Any, params: dict[str, int]) -> Any:
            return torch.rot90(image, params["turns"], (-2, -1))

    taps = 2 * int(0.1 * side / 2) + 1
    to_float = v2.ToDtype(torch.float32, scale=True)
    geometry = [
        v2.RandomResizedCrop(side, scale=(0.01, 1.0), antialias=True),
        QuarterTurns(),
        v2.RandomVerticalFlip(),
        v2.RandomHorizontalFlip(),
    ]
    jitter = [v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8)]
    blur = [v2.RandomApply([v2.GaussianBlur(taps, (0.1, 2.0))], p=0.5)]
    steps = {
        "from the start": [to_float, *geometry, *jitter, *blur],
        "after geometry": [*geometry, to_float, *jitter, *blur],
        "before blur": [*geometry, *jitter, to_float, *blur],
    }
    return v2.Compose(steps[where])


def measure(runs: dict[str, Run], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of each run, by turns, after one that is not counted."""
    for run in runs.values():
        run()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            run()
            seconds[name].append((time.perf_counter() - start, time.process_time() - start_cpu))
    return seconds


def middle(times: list[tuple[float, float]], which: int) -> float:
    return statistics.median(pair[which] for pair in times)


def show(seconds: dict[str, list[tuple[float, float]]], speed: dict[str, float], best: str) -> None:
    heads = ("images/s/core", "CPU s, median", "s, median", "s, fastest", "s, slowest")
    print(f"{'augmentation':<42}" + "".join(f"{head:>14}" for head in heads))
    for name, times in seconds.items():
        walls = [wall for wall, _ in times]
        label = name + (" *" if name == best else "")
        columns = (middle(times, 1), middle(times, 0), min(walls), max(walls))
        print(f"{label:<42}{speed[name]:>14.1f}" + "".join(f"{s:>14.3f}" for s in columns))


def origin() -> dict[str, Any]:
    import jax
    import torch
    import torchvision

    import jaxhisto

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "processor": processor(),
        "versions": {
            "jaxhisto": jaxhisto.__version__,
            "jax": jax.__version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "python": platform.python_version(),
        },
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


if __name__ == "__main__":
    main()
