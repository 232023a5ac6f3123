"""What a bit-exact run costs on a GPU: seconds a step with and without `--deterministic`.

    python benchmarks/deterministic.py [--model resnet50 --tile-px 224 --batch 256
                                        --precision bf16 --steps 20 --json FILE]

Each setting is a process of its own, since XLA reads its flags once:

    free                XLA as it comes
    deterministic       a first start under --deterministic: no kernel whose sums depend on timing
    deterministic, 2    the next start, which loads what autotuning chose in the one before
    XLA's own           --xla_gpu_deterministic_ops, which also switches autotuning off

Beside the time stands a hash of the weights after the steps: two starts of a bit-exact run have
the same. On a CPU the flags do nothing, the ratios lie near 1 and all hashes are the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SETTINGS = ("free", "deterministic", "deterministic, 2", "XLA's own")


def main() -> None:
    args = parse()
    if args.child:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as run:
        records = {setting: child(setting, run) for setting in SETTINGS}
    free = records["free"]["seconds"]
    print(f"{'setting':<18}{'s a step':>10}{'ratio':>8}{'compile s':>11}  weights")
    for setting, record in records.items():
        print(
            f"{setting:<18}{record['seconds']:>10.4f}{record['seconds'] / free:>8.2f}"
            f"{record['compile_s']:>11.1f}  {record['weights']}"
        )
    device = records["free"]["device"]
    if records["free"]["platform"] == "cpu":
        print(f"{device}: these flags do nothing on a CPU; the ratios are noise around 1")
    first, again = records["deterministic"]["weights"], records["deterministic, 2"]["weights"]
    same = "the same" if first == again else "OTHER"
    print(f"{device}: two deterministic starts end in {same} bits")
    if args.json:
        Path(args.json).write_text(json.dumps({"what": vars(args)} | records, indent=1) + "\n")
    sys.exit(first != again)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--tile-px", type=int, default=224)
    parser.add_argument("--batch", type=int, default=256, help="images; twice as many views")
    parser.add_argument("--precision", default="bf16", choices=("f32", "bf16"))
    parser.add_argument("--steps", type=int, default=20, help="measured, after one that compiles")
    parser.add_argument("--json", help="write the record there")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def child(setting: str, run: str) -> dict[str, Any]:
    """Measures a setting in a process with its XLA_FLAGS and no compilation cache."""
    from jaxhisto import xla_flags

    given = os.environ.get("XLA_FLAGS", "")
    fresh = Path(run) / "fresh" / xla_flags.AUTOTUNE
    fresh.parent.mkdir(exist_ok=True)
    flags = given
    if setting.startswith("deterministic"):
        flags = xla_flags.deterministic_flags(run, given, fresh)
    elif setting == "XLA's own":
        flags = f"{given} {xla_flags.OWN}=true"
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, *sys.argv, "--child"],
        env=env | {"XLA_FLAGS": flags.strip(), "JAXHISTO_BENCH_RUN": run},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds a step of the whole training step on one device, and what the weights became."""
    import jax

    from jaxhisto import xla_flags
    from jaxhisto.config import ModelConfig, OptimConfig, PretrainConfig
    from jaxhisto.distributed import make_mesh, to_global
    from jaxhisto.pretrain.step import init_state, make_train_step

    config = PretrainConfig(
        out="",
        batch_size=args.batch,
        tile_px=args.tile_px,
        precision=args.precision,
        model=ModelConfig(name=args.model),
        optim=OptimConfig(warmup_epochs=0.0),
    )
    mesh, side = make_mesh(1), args.tile_px
    tiles = np.random.default_rng(1).integers(0, 256, (args.batch, side, side, 3), np.uint8)
    rows = to_global((tiles, np.full((args.batch, 2), side, np.int32)), mesh)
    seconds = []
    with jax.set_mesh(mesh):
        state = init_state(config, 1000, 100, mesh)
        step = make_train_step(config, 1000, 100)
        for _ in range(args.steps + 1):
            begun = time.perf_counter()
            state, metrics = step(state, *rows)
            float(metrics["loss"])  # waits for the device
            seconds.append(time.perf_counter() - begun)
    xla_flags.keep_autotune(os.environ["JAXHISTO_BENCH_RUN"])
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        digest.update(np.asarray(leaf).tobytes())
    device = jax.devices()[0]
    return {
        "seconds": statistics.median(seconds[1:]),
        "compile_s": seconds[0],
        "weights": digest.hexdigest()[:12],
        "device": device.device_kind,
        "platform": device.platform,
        "jax": jax.__version__,
    }


if __name__ == "__main__":
    main()
