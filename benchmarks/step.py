"""Images a second of our training step and of PyTorch's, measured in one run, by turns.

    python benchmarks/step.py [--model resnet18 --tile-px 224 --batch 32 --precision f32
                               --threads 2 --repeats 5 --peer pytorch --json FILE]

Both train the same network (encoder, head, NT-Xent, LARS) on given views. PyTorch runs
torchvision's ResNet, channels-last, under autocast for bf16; TF32 is off on both sides, so that
f32 means float32. The ratio is that of the steps on given views; our whole step, which also draws
and makes the views, stands beside it (`jaxhisto bench` holds PyTorch's whole step against that).
An image counts once, not once a view. Without --batch and --precision it is 32 and f32 on a CPU,
512 and bf16 on an accelerator.
"""

from __future__ import annotations

import argparse
import os


def main() -> None:
    args = parse()
    # Before jax starts its thread pool; PyTorch is told by number.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    # JAX would otherwise take three quarters of a GPU that PyTorch shares.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    from jaxhisto.bench import ratio
    from jaxhisto.bench.machine import describe
    from jaxhisto.bench.ours import ON_ACCELERATOR, Point, Setup
    from jaxhisto.bench.peers import prepare_peer
    from jaxhisto.bench.record import OURS, Record, write_record
    from jaxhisto.bench.run import line_of
    from jaxhisto.bench.runner import attempt, measure

    platform = jax.default_backend()
    batch = args.batch or (32 if platform == "cpu" else 512)
    precision = args.precision or ("f32" if platform == "cpu" else "bf16")
    calls = 1 if platform == "cpu" else ON_ACCELERATOR
    setup = Setup(Point(args.model, args.tile_px, batch, precision), calls=calls)
    settings = {**setup.settings, "platform": platform, "augment": False}
    given = attempt(lambda: setup.runner("given"), "step", OURS, setup.settings)
    whole = attempt(lambda: setup.runner("step"), "step", OURS, setup.settings)
    peer = prepare_peer("step", settings, args.peer)
    rows = measure([given, whole, peer], args.repeats, print)
    for row in rows:
        print(line_of(row))
    if args.json:
        what = {k: v for k, v in vars(args).items() if k != "json"}
        what |= {"batch": batch, "precision": precision}
        write_record(args.json, Record(what, describe(args.threads, peaks=False), tuple(rows)))
    ours, _, theirs = rows
    said = ratio.compared(ours, theirs, ("ours", args.peer))
    setting = (
        f"{args.model}, {args.tile_px} px, batch {batch}, {precision}, {platform}, "
        f"{args.threads} threads, median of {args.repeats}"
    )
    print(ratio.line([said], setting))


def parse() -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    models = ("resnet18", "resnet34", "resnet50", "resnet101")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18", choices=models)
    parser.add_argument("--tile-px", type=int, default=224)
    parser.add_argument("--batch", type=int, help="images; 32 on a CPU, else 512")
    parser.add_argument("--precision", choices=("f32", "bf16"), help="f32 on a CPU, else bf16")
    parser.add_argument("--threads", type=int, default=cores)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer", default="pytorch", choices=("pytorch", "pytorch-compiled"))
    parser.add_argument("--json", help="write the record there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
