"""Images a second that jaxhisto's loader and torch DataLoaders give of the same JPEG tiles.

    python benchmarks/loader.py [--store STORE --batch 64 --images 1536 --repeats 5 --cores 1 2
                                 --peers files+torchvision ... --step IMAGES_PER_S --json FILE]

All read the same tiles in a random order and hand over the same pixels, which is checked: batches
of uint8 in host memory. jaxhisto runs in one process, its peers in another (`loader_peers.py`);
both stay, and take their turns one after the other. A turn opens its loader, takes batches that do
not count until its threads or processes are at work, and then counts. `images/s` is by the clock,
`/ CPU s` by the seconds that cores worked for it, workers' included: on a machine that others use
too, the second is the one to believe.

  jaxhisto             `loader.batches` over the store, threads and prefetch as they come
  files+DECODER        a torch DataLoader over a Dataset of the same JPEGs as files, decoded by
                       torchvision.io, Pillow or simplejpeg
  store+torchvision    the same over the store's own ArrayRecord: TFDS's as_data_source, its image
                       left encoded
  store+tfds           as_data_source as it comes, which decodes as well

Each peer runs with 0 workers (`/0`) to as many as there are cores (persistent, nothing pinned,
prefetch_factor as it comes), and the best of them is what counts: by the clock the quickest, by
CPU seconds the thriftiest. `decoders` are alone on one core, bytes in memory to a new array.
Without --store, one of made tiles is written; `jaxhisto tile` cuts real ones. --step is what a
training step takes, for the verdict. A row whose turns spread by more than a quarter is
inconclusive by the clock and says so; so does the ratio, last.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from jaxhisto.bench import ratio
from jaxhisto.bench.machine import processor
from jaxhisto.bench.made import made_store
from jaxhisto.bench.record import Row
from jaxhisto.bench.runner import missing

OF_STORE = ("store+torchvision", "store+tfds")
OF_FILES = ("files+torchvision", "files+pillow")
BY_HAND = ("files+simplejpeg",)  # a decoder that a user has to bring


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        try:
            store = Path(args.store).resolve() if args.store else made_store(Path(folder) / "made")
        except ImportError as error:
            raise SystemExit(f"no ratio: no store can be made: {missing(error)}") from error
        job = {"store": str(store), "batch": args.batch, "images": args.images, "files": folder}
        job |= {"peers": args.peers}
        with Child("jaxhisto", job) as ours, Child("torch", job) as torch:
            data = same_pixels(ours, torch)
            decoders = torch.ask(decoders=args.repeats)["decoders"]
            there = [name for name in args.peers if name not in torch.hello["missing"]]
            found = {
                cores: measure(ours, torch, there, cores, args.repeats) for cores in args.cores
            }
            versions = ours.ask(versions=True) | torch.ask(versions=True)
    record = {
        "what": {
            "batch": args.batch,
            "images": args.images,
            "repeats": args.repeats,
            "peers": list(args.peers),
            **data,
        },
        "settings": {"jaxhisto": ours.hello["settings"], "torch": torch.hello["settings"]},
        "decoders": decoders,
        "cores": found,
        "peer_versions": versions,
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
    }
    if args.step:
        record["verdict"] = verdict(rate(found[args.cores[-1]]["jaxhisto"]), args.step)
    print(tables(record))
    record["ratio"] = ratio_line(record)
    if args.json:
        from jaxhisto.runlog import environment

        record |= environment([processor()])
        record["command"] = ["benchmarks/loader.py", "--batch", str(args.batch)]
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n")
    if args.step:
        print(record["verdict"])
    print(record["ratio"])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", default="", help="what `jaxhisto tile` wrote")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=1536, help="of a turn that count")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--cores", type=int, nargs="+", default=[], help="how many to use, by turns"
    )
    peers = (*OF_FILES, *OF_STORE, *BY_HAND)
    parser.add_argument("--peers", nargs="+", default=peers, choices=peers)
    parser.add_argument("--step", type=float, default=0.0, help="images/s of a training step")
    parser.add_argument("--json", help="write the record there")
    args = parser.parse_args()
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    args.cores = sorted({min(n, allowed) for n in args.cores or (1, 2)})
    return args


class Child:
    """A process that measures one side: a line of JSON in, a line of JSON out."""

    def __init__(self, side: str, job: dict[str, Any]) -> None:
        file = Path(__file__).with_name("loader_peers.py")
        self.side = side
        self._process = subprocess.Popen(
            [sys.executable, str(file), side, json.dumps(job)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.hello = self._answer()

    def ask(self, **question: Any) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"benchmarks/loader.py: the {self.side} side ended; see above")
        return json.loads(line)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def same_pixels(ours: Child, torch: Child) -> dict[str, Any]:
    """What the tiles are; SystemExit where the sides do not hand over the same pixels."""
    mine, theirs = ours.ask(pixels=True), torch.ask(pixels=True)["pixels"]
    differing = [name for name, digest in theirs.items() if digest not in (mine["pixels"], "")]
    if differing:
        raise SystemExit(f"benchmarks/loader.py: {', '.join(differing)} gave other pixels than we")
    return {**mine["data"], "missing": torch.hello["missing"]}


def measure(
    ours: Child, torch: Child, only: list[str], cores: int, repeats: int
) -> dict[str, dict[str, Any]]:
    """By name (a peer's with its workers): images/s and images a CPU second of each turn."""
    names = [f"{name}/{n}" for name in only for n in range(cores + 1)]
    found: dict[str, dict[str, Any]] = {name: {"turns": []} for name in ("jaxhisto", *names)}
    for turn in range(repeats):
        for name, row in found.items():
            what, _, workers = name.partition("/")
            side = torch if workers else ours
            row["turns"].append(side.ask(turn=what, workers=int(workers or 0), cores=cores))
            print(f"\r{cores} cores: {turn + 1}/{repeats} {name:<20}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return found


def rate(row: dict[str, Any], what: str = ratio.BY_CLOCK) -> float:
    return statistics.median(turn[what] for turn in row["turns"])


def as_row(name: str, row: dict[str, Any]) -> Row:
    """The turns as seconds an image."""
    clock, core = (
        tuple(1 / turn[what] for turn in row["turns"]) for what in (ratio.BY_CLOCK, ratio.BY_CORE)
    )
    return Row("read", name, {}, clock, 1, cpu_seconds=core)


def paired(ours: dict[str, Any], theirs: dict[str, Any], what: str) -> float:
    """Median over the turns of ours over theirs: a pair is measured side by side."""
    pairs = zip(ours["turns"], theirs["turns"], strict=True)
    return statistics.median(a[what] / b[what] for a, b in pairs)


def best_of(rows: dict[str, Any], names: tuple[str, ...], what: str) -> str:
    some = [name for name in rows if name.partition("/")[0] in names]
    return max(some, key=lambda name: rate(rows[name], what))


def ratio_line(record: dict[str, Any]) -> str:
    """The last line, a number of cores after the other: best on the store, on files, of all."""
    said = []
    for cores, rows in record["cores"].items():
        ours = rows["jaxhisto"]
        for names in (OF_STORE, OF_FILES, BY_HAND):
            if not any(row.partition("/")[0] in names for row in rows):
                continue
            for what, unit in ((ratio.BY_CLOCK, "images/s"), (ratio.BY_CORE, "images/CPU s")):
                name = best_of(rows, names, what)
                said.append(
                    ratio.compared(
                        as_row("jaxhisto", ours), as_row(name, rows[name]), ("jaxhisto", name),
                        what, unit, 0, paired(ours, rows[name], what),
                        f" on {cores} core{'s' * (int(cores) > 1)}",
                    )
                )  # fmt: skip
    what = record["what"]
    if not said:
        raise SystemExit(f"no ratio: {'; '.join(absent(what)) or 'no peer was asked for'}")
    setting = (
        f"{what['side']} px, {what['kb']:.0f} kB a tile, batch {what['batch']}, median of "
        f"{what['repeats']}"
    )
    return ratio.line(said, setting)


def absent(what: dict[str, Any]) -> list[str]:
    """The peers that were asked for and are not there, each with the reason."""
    return [f"{name} {why}" for name, why in dict(what.get("missing") or {}).items()]


def tables(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    lines = ["| decoder, one core | images / CPU s | of ours |", "|---|---|---|"]
    decoders = {name: statistics.median(turns) for name, turns in record["decoders"].items()}
    lines += [
        f"| {name} | {speed:,.0f} | {speed / decoders['jaxhisto']:.2f} |"
        for name, speed in sorted(decoders.items(), key=lambda item: -item[1])
    ]
    for cores, rows in record["cores"].items():
        head = f"loader, {cores} core{'s' * (int(cores) > 1)}"
        lines += ["", f"| {head} | images/s | slowest to fastest | images / CPU s |"]
        lines += ["|---|---|---|---|"]
        lines += [line(name, rows[name]) for name in sorted(rows, key=lambda n: -rate(rows[n]))]
    lines += [f"\n{one}" for one in absent(record["what"])]
    return "\n".join(lines)


def line(name: str, row: dict[str, Any]) -> str:
    speeds = [turn["images_per_s"] for turn in row["turns"]]
    noisy = ", inconclusive" if as_row(name, row).doubt else ""
    by_clock = f"{rate(row):,.0f} | {min(speeds):,.0f} to {max(speeds):,.0f}{noisy}"
    return f"| {name} | {by_clock} | {rate(row, 'images_per_cpu_s'):,.0f} |"


def verdict(loader: float, step: float) -> str:
    """Which of two, both in images/s, a run waits for, and by how much."""
    if loader < step:
        return (
            f"input-bound: the loader gives {loader:,.0f} images/s and the step takes {step:,.0f}; "
            f"{step / loader:.1f} x the cores would feed it, or --data.cache host or device"
        )
    return (
        f"compute-bound: the step takes {step:,.0f} images/s and the loader gives {loader:,.0f}, "
        f"{loader / step:.1f} x as many"
    )


if __name__ == "__main__":
    main()
