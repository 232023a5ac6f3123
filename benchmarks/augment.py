"""Images a second and core of our augmentation and of a peer's, measured in one run, by turns.

    python benchmarks/augment.py [--tile-px 224 --batch 32 --repeats 5 --threads 2
                                  --peer torchvision --json FILE]

Both make two views of each tile with parameters of their own: crop of 1..100 %, quarter turns,
flips, jitter .8 .8 .8 .2 with 80 % in random order, blur of a tenth of the side with 50 %.
torchvision works in as many processes as there are cores, image after image, which is the most it
does for a core; the ways to set a peer up are tried and the quickest counts. An image counts once,
not once a view. What is compared is images a second of CPU time, which other work on the machine
leaves alone; on an accelerator both figures are by the clock and for the device. The clock's time
stands beside it.
"""

from __future__ import annotations

import argparse
import os


def main() -> None:
    args = parse()
    # Before jax starts its thread pool.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    from jaxhisto.bench import ratio
    from jaxhisto.bench.machine import describe
    from jaxhisto.bench.ours import ON_ACCELERATOR, Point, Setup
    from jaxhisto.bench.peers import prepare_peer
    from jaxhisto.bench.record import OURS, Record, write_record
    from jaxhisto.bench.report import one_by_one
    from jaxhisto.bench.run import line_of
    from jaxhisto.bench.runner import attempt, measure

    calls = 1 if jax.default_backend() == "cpu" else ON_ACCELERATOR
    setup = Setup(Point("resnet18", args.tile_px, args.batch, "f32"), calls=calls)
    ours = attempt(lambda: setup.runner("augment"), "augment", OURS, setup.settings)
    machine = describe(args.threads, peaks=False)
    settings = {**ours.settings, "platform": machine["platform"]}
    rows = measure([ours, prepare_peer("augment", settings, args.peer)], args.repeats, print)
    for row in rows:
        print(f"{line_of(row)}, {row.images_per_cpu_s:,.1f} images/s per core")
    if args.json:
        what = {k: v for k, v in vars(args).items() if k != "json"}
        write_record(args.json, Record(what, machine, tuple(rows)))
    per, speed = "device", ratio.BY_CLOCK
    if machine["platform"] == "cpu":
        per, speed = "core", ratio.BY_CORE
    said = ratio.compared(*rows, ("ours", args.peer), speed, f"images/s per {per}")
    said += one_by_one(rows[1])
    setting = (
        f"two views each, {args.tile_px} px, batch {args.batch}, {args.threads} threads, median "
        f"of {args.repeats}"
    )
    print(ratio.line([said], setting))


def parse() -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tile-px", type=int, default=224, help="side of a tile and of a view")
    parser.add_argument("--batch", type=int, default=32, help="images; twice as many views")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=cores)
    parser.add_argument("--peer", default="torchvision", choices=("torchvision", "kornia"))
    parser.add_argument("--json", help="write the record there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
