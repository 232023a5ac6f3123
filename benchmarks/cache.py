"""Images a second of whole training steps by where their tiles come from, measured by turns.

    python benchmarks/cache.py [--model resnet18 --tile-px 224 --batch 512 --precision bf16
                                --tiles 4096 --data FOLDER_OR_STORE --steps 8 --repeats 5
                                --devices 0 --threads 0 --json FILE]

The same step takes its batches from `none` (read and decoded anew), from `host` and from `device`
(decoded before), and from `synthetic`: one batch that lies on the devices, which costs nothing and
so bounds the others. Every turn opens its input anew and takes two steps that do not count. `wait`
is what the loop waited until it had a batch to hand to the step. The gather of `device` is also
timed alone, against a wait for its end. Without --data, tiles are JPEGs as a store holds them
(quality 95, 4:4:4), made of noise, and `none` decodes them from memory.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

WARM_UP = 2
DISTINCT = 64  # tiles that are made; a tile is one of them, decoded for itself
BOUNDED = ("device", "synthetic")  # the ratio: the cache, over what bounds it
NAMES = ("synthetic", "device", "host", "none")
Rows = tuple[Any, Any]
Opener = Callable[[int, int], Iterator[Rows]]


def main() -> None:
    args = parse()
    # Before jax starts its thread pool.
    if hasattr(os, "sched_setaffinity") and args.threads:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    import jax

    from jaxhisto.bench import ratio
    from jaxhisto.bench.record import Row
    from jaxhisto.data.images import jpeg_decoder
    from jaxhisto.distributed import make_mesh
    from jaxhisto.runlog import environment

    mesh = make_mesh(args.devices)
    with jax.set_mesh(mesh):
        tiles, trainer = tiles_of(args), Trainer(args, mesh)
        inputs, cache, filling = open_inputs(args, tiles, mesh)
        found = measure(trainer, inputs, args)
        gather = time_gather(cache, args)
    step = {name: statistics.median(turn["seconds"]) for name, turn in found.items()}
    speed = {name: args.batch / seconds for name, seconds in step.items()}
    gather |= {"share_of_step": statistics.median(gather["seconds"]) / step["device"]}
    show(args, found, gather, filling)
    if args.json:
        devices = [f"{d.platform} {d.device_kind}" for d in mesh.devices.flat]
        record = {"what": vars(args), "images_per_s": speed, "turns": found, "gather": gather}
        record |= {"tiles_decoded_per_s": filling, "decoder": jpeg_decoder()}
        record |= environment(devices)
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n")
    fed = [Row("step", name, {}, tuple(found[name]["seconds"]), args.batch) for name in BOUNDED]
    said = ratio.compared(*fed, ("device cache", "synthetic"))
    setting = (
        f"{args.model}, {args.tile_px} px, batch {args.batch}, {args.precision}, {mesh.size} x "
        f"{mesh.devices.flat[0].device_kind}, median of {args.repeats}"
    )
    print(ratio.line([said], setting))


def parse() -> argparse.Namespace:
    models = ("resnet10", "resnet18", "resnet34", "resnet50", "resnet101")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18", choices=models)
    parser.add_argument("--tile-px", type=int, default=224, help="side of tiles and views")
    parser.add_argument("--batch", type=int, default=512, help="images; twice as many views")
    parser.add_argument("--precision", default="bf16", choices=("f32", "bf16"))
    parser.add_argument("--tiles", type=int, default=4096, help="how many are made")
    parser.add_argument("--data", default="", help="train on these instead of made tiles")
    parser.add_argument("--steps", type=int, default=8, help="steps of a turn that count")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--devices", type=int, default=0, help="0: all")
    parser.add_argument("--threads", type=int, default=0, help="cores to use; 0: all")
    parser.add_argument("--json", help="write the record there")
    return parser.parse_args()


class MadeTiles:
    """Tiles as `Tiles` gives them, decoded from JPEGs in memory."""

    name = "made tiles"

    def __init__(self, count: int, side: int) -> None:
        import cv2

        rng, self._count, self.canvas = np.random.default_rng(0), count, (side, side)
        self._jpegs = []
        for _ in range(DISTINCT):
            # Large spots with a fine grain take about the bytes of a stained tile.
            spots = cv2.resize(
                rng.integers(0, 256, (side // 8, side // 8, 3), np.uint8), (side,) * 2
            )
            grain = rng.normal(0, 8, (side, side, 3))
            flags = [cv2.IMWRITE_JPEG_QUALITY, 95]
            flags += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
            pixels = np.clip(spots + grain, 0, 255).astype(np.uint8)
            self._jpegs.append(cv2.imencode(".jpg", pixels, flags)[1].tobytes())

    def __len__(self) -> int:
        return self._count

    def read(self, i: int, out: np.ndarray | None = None) -> np.ndarray:
        from jaxhisto.data.images import decode_jpeg

        return decode_jpeg(self._jpegs[i % DISTINCT], out)

    def sizes(self, i: int) -> tuple[int, int]:
        return self.canvas


def tiles_of(args: argparse.Namespace) -> Any:
    from jaxhisto.config import DataConfig
    from jaxhisto.data.sources import open_tiles

    return open_tiles(DataConfig(stores=(args.data,))) if args.data else made(args)


def made(args: argparse.Namespace) -> MadeTiles:
    return MadeTiles(max(args.tiles, args.batch), args.tile_px)


class Trainer:
    """Takes steps and keeps the state."""

    def __init__(self, args: argparse.Namespace, mesh: Any) -> None:
        from jaxhisto.config import ModelConfig, PretrainConfig
        from jaxhisto.pretrain.step import init_state, make_train_step

        config = PretrainConfig(
            out="",
            batch_size=args.batch,
            tile_px=args.tile_px,
            precision=args.precision,
            model=ModelConfig(name=args.model),
        )
        self._step = make_train_step(config, 100_000, 100)
        self._state = init_state(config, 100_000, 100, mesh)

    def turn(self, feed: Iterator[Rows], steps: int) -> tuple[float, float]:
        """(seconds, seconds waited for input) a step, of `steps` after the warm-up."""
        for _ in range(WARM_UP):
            self._state, metrics = self._step(self._state, *next(feed))
        metrics["loss"].block_until_ready()
        waited, held, began = 0.0, None, time.perf_counter()
        for _ in range(steps):
            asked = time.perf_counter()
            rows = next(feed)
            waited += time.perf_counter() - asked
            self._state, metrics = self._step(self._state, *rows)
            if held is not None:  # as the loop does: a step's loss is read a step later
                float(held)
            held = metrics["loss"]
        if not math.isfinite(float(held)):
            raise RuntimeError("the loss is not finite")
        return (time.perf_counter() - began) / steps, waited / steps


def open_inputs(
    args: argparse.Namespace, tiles: Any, mesh: Any
) -> tuple[dict[str, Opener], Any, dict[str, float]]:
    """By name, what opens an input for steps a to b; the device's cache; tiles decoded a second."""
    from jaxhisto.config import DataConfig
    from jaxhisto.data.cache import HostCache
    from jaxhisto.data.loader import batches, global_indices
    from jaxhisto.distributed import to_global
    from jaxhisto.pretrain.device_cache import DeviceCache

    config, total = DataConfig(threads=args.threads), len(tiles)
    filling = {}

    def filled(name: str, make: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        cache = make()
        filling[name] = total / (time.perf_counter() - began)
        return cache

    host = filled("host", lambda: HostCache(tiles, args.threads))
    device = filled("device", lambda: DeviceCache(tiles, mesh, args.threads))
    fixed = to_global((host.tiles[: args.batch], host.sizes[: args.batch]), mesh)

    def placed(feed: Any) -> Iterator[Rows]:
        try:
            for _, batch in feed:
                yield to_global((batch.tiles, batch.sizes), mesh)
        finally:
            feed.close()

    inputs: dict[str, Opener] = {
        "synthetic": lambda a, b: (fixed for _ in range(a, b)),
        "device": lambda a, b: (
            device.batch(global_indices(0, step, total, args.batch)) for step in range(a, b)
        ),
        "host": lambda a, b: placed(host.batches(config, args.batch, 0, a, b)),
        "none": lambda a, b: placed(batches(tiles, config, args.batch, 0, a, b)),
    }
    try:
        import grain  # noqa: F401  # what `none` reads with
    except ImportError:
        del inputs["none"]
    return inputs, device, filling


def measure(
    trainer: Trainer, inputs: dict[str, Opener], args: argparse.Namespace
) -> dict[str, dict[str, list[float]]]:
    """Seconds and seconds waited a step, by input and turn, after a turn that is not counted."""
    found: dict[str, dict[str, list[float]]] = {
        name: {"seconds": [], "wait_s": []} for name in inputs
    }
    for turn in range(-1, args.repeats):
        for name, opened in inputs.items():
            steps = 1 if turn < 0 else args.steps
            start = max(turn, 0) * (WARM_UP + args.steps)
            feed: Any = opened(start, start + WARM_UP + steps)
            seconds, waited = trainer.turn(feed, steps)
            feed.close()
            if turn >= 0:
                found[name]["seconds"].append(seconds)
                found[name]["wait_s"].append(waited)
    return found


def time_gather(cache: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The gather alone: seconds of each, bytes of its batch, bytes that each device sends."""
    import jax

    from jaxhisto.data.loader import global_indices

    def once(step: int) -> float:
        index = global_indices(0, step, cache.layout.tiles, args.batch)
        began = time.perf_counter()
        jax.block_until_ready(cache.batch(index))
        return time.perf_counter() - began

    once(0)
    return {
        "seconds": [once(step) for step in range(1, 4 * args.repeats + 1)],
        "batch_bytes": args.batch * cache.layout.tile_bytes,
        "sent_bytes_by_each_device": cache.layout.sent_bytes(args.batch),
        "store_bytes_on_each_device": cache.layout.device_bytes,
    }


def show(
    args: argparse.Namespace,
    found: dict[str, dict[str, list[float]]],
    gather: dict[str, Any],
    filling: dict[str, float],
) -> None:
    from jaxhisto.data.images import jpeg_decoder

    print(
        f"{'input':<12}{'images/s':>10}{'ms a step':>12}{'fastest':>10}{'slowest':>10}{'wait':>9}"
    )
    for name in NAMES:
        if name not in found:
            print(f"{name:<12}  not measured: grain is not installed")
            continue
        times = [1e3 * s for s in found[name]["seconds"]]
        middle, wait = statistics.median(times), 1e3 * statistics.median(found[name]["wait_s"])
        print(
            f"{name:<12}{1e3 * args.batch / middle:>10.1f}{middle:>12.2f}{min(times):>10.2f}"
            f"{max(times):>10.2f}{wait:>9.2f}"
        )
    print(
        f"gather {1e3 * statistics.median(gather['seconds']):.2f} ms, "
        f"{100 * gather['share_of_step']:.2f} % of a step: a batch of "
        f"{gather['batch_bytes'] / 1e6:.1f} MB, each device sends "
        f"{gather['sent_bytes_by_each_device'] / 1e6:.1f} MB"
    )
    by = jpeg_decoder()
    print(f"decoded by {by}", ", ".join(f"{v:.0f} tiles/s for {n}" for n, v in filling.items()))


if __name__ == "__main__":
    main()
