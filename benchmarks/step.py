"""Images a second of our training step and of PyTorch's, measured in one run, by turns.

    python benchmarks/step.py [--model resnet18 --tile-px 224 --batch 32 --precision f32
                               --threads 2 --repeats 5 --json FILE]

Both train the same network (encoder, head, NT-Xent, LARS) on the same two views of the same
batch. PyTorch runs torchvision's ResNet, channels-last, under autocast for bf16; TF32 is off on
both sides, so that f32 means float32. The ratio is that of the steps on given views; our whole
step, which also draws and makes the views, stands beside it. An image counts once, not once a
view.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = {"f32": "float32", "bf16": "bfloat16"}
Run = Callable[[], float]


def main() -> None:
    args = parse()
    # Before jax starts its thread pool; PyTorch is told by number below.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    # JAX would otherwise take three quarters of a GPU that PyTorch shares.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    views = np.random.default_rng(0).random(
        (args.batch, 2, args.tile_px, args.tile_px, 3), dtype=np.float32
    )
    runs = {"ours": ours(args, views), "ours, with views": ours_whole(args)}
    runs["PyTorch"] = pytorch(args, views)
    seconds = measure(runs, args.repeats)
    speed = {name: args.batch / statistics.median(times) for name, times in seconds.items()}
    show(seconds, speed)
    if args.json:
        record = {"what": vars(args), "images_per_s": speed, "seconds": seconds} | origin()
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n")
    print(
        f"ratio {speed['ours'] / speed['PyTorch']:.2f} = ours {speed['ours']:.1f} / "
        f"PyTorch {speed['PyTorch']:.1f} images/s ({args.model}, {args.tile_px} px, "
        f"batch {args.batch}, {DTYPES[args.precision]}, {args.threads} threads, "
        f"median of {args.repeats})"
    )


def parse() -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    models = ("resnet18", "resnet34", "resnet50", "resnet101")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18", choices=models)
    parser.add_argument("--tile-px", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32, help="images; twice as many views")
    parser.add_argument("--precision", default="f32", choices=DTYPES)
    parser.add_argument("--threads", type=int, default=cores)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="write the record there")
    return parser.parse_args()


def measure(runs: dict[str, Run], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, by turns, after one that is not counted."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def show(seconds: dict[str, list[float]], speed: dict[str, float]) -> None:
    print(f"{'step':<18}{'images/s':>10}{'s, median':>11}{'s, fastest':>12}{'s, slowest':>12}")
    for name, times in seconds.items():
        middle = statistics.median(times)
        print(
            f"{name:<18}{speed[name]:>10.1f}{middle:>11.3f}{min(times):>12.3f}{max(times):>12.3f}"
        )


def config_of(args: argparse.Namespace) -> Any:
    from jaxhisto.config import ModelConfig, OptimConfig, PretrainConfig

    return PretrainConfig(
        out="",
        batch_size=args.batch,
        tile_px=args.tile_px,
        precision=args.precision,
        model=ModelConfig(name=args.model),
        optim=OptimConfig(warmup_epochs=0.0),
    )


def ours(args: argparse.Namespace, views: np.ndarray) -> Run:
    """Forward, backward and LARS on given views."""
    import jax

    from jaxhisto.pretrain.step import make_loss_and_grads, make_update

    config = config_of(args)
    loss_and_grads, update = make_loss_and_grads(config), make_update(config, 1000, 100)

    def step(state: Any, views: jax.Array) -> Any:
        loss, _, stats, grads = loss_and_grads(state.params, state.batch_stats, views)
        return update(replace(state, batch_stats=stats), grads)[0], loss

    return runner(config, jax.jit(step, donate_argnums=0), (views,))


def ours_whole(args: argparse.Namespace) -> Run:
    """The step as it is trained with: the views too."""
    from jaxhisto.pretrain.step import make_train_step

    config = config_of(args)
    side = args.tile_px
    tiles = np.random.default_rng(1).integers(0, 256, (args.batch, side, side, 3), np.uint8)
    sizes = np.full((args.batch, 2), side, np.int32)
    return runner(config, make_train_step(config, 1000, 100), (tiles, sizes))


def runner(config: Any, step: Callable[..., Any], batch: tuple[np.ndarray, ...]) -> Run:
    """Calls a step on one device and waits for it, keeping the state."""
    import jax

    from jaxhisto.distributed import make_mesh, to_global
    from jaxhisto.pretrain.step import init_state

    mesh = make_mesh(1)
    placed = to_global(batch, mesh)
    state = init_state(config, 1000, 100, mesh)

    def run() -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            state, out = step(state, *placed)
        return float(out["loss"] if isinstance(out, dict) else out)

    return run


def pytorch(args: argparse.Namespace, views: np.ndarray) -> Run:
    """Forward, backward and LARS of torchvision's ResNet with the same head."""
    import torch
    import torchvision

    torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = getattr(torchvision.models, args.model)()
    width = model.fc.in_features
    model.fc = torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(width, width),
        torch.nn.ReLU(),
        torch.nn.Linear(width, 128),
    )
    model = model.to(device, memory_format=torch.channels_last).train()
    parameters = list(model.parameters())
    momenta = [torch.zeros_like(p) for p in parameters]
    images = torch.from_numpy((views.reshape(-1, *views.shape[2:]) - 0.5) / 0.5)
    images = images.permute(0, 3, 1, 2).to(device, memory_format=torch.channels_last)
    partner = torch.arange(len(images), device=device) ^ 1
    rate = 0.3 * args.batch / 256

    def run() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            z = model(images)
        z = torch.nn.functional.normalize(z.float(), dim=1)
        logits = (z @ z.T / 0.1).fill_diagonal_(-torch.inf)
        loss = torch.nn.functional.cross_entropy(logits, partner)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p, m in zip(parameters, momenta, strict=True):
                lars(torch, p, m, rate)
        return float(loss.detach())  # waits for the device

    return run


def lars(torch: Any, parameter: Any, momentum: Any, rate: float) -> None:
    """One LARS update in place; vectors neither decay nor adapt."""
    step = parameter.grad
    if parameter.ndim > 1:
        step = step + 1e-6 * parameter
        step = step * (0.001 * torch.linalg.vector_norm(parameter) / torch.linalg.vector_norm(step))
    momentum.mul_(0.9).add_(step, alpha=rate)
    parameter.sub_(momentum)


def origin() -> dict[str, Any]:
    """Device, versions and date of a record."""
    import jax
    import torch
    import torchvision

    return {
        "device": jax.devices()[0].device_kind,
        "machine": platform.platform(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    main()
