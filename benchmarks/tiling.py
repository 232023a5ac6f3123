"""Tiles a second of a core's work, and peak memory: `jaxhisto tile` and others, measured by turns.

    python benchmarks/tiling.py SLIDE... [--tile-px 224 --foreground otsu --mpp 0.25 --repeats 5
                                          --core 0 --limit 20 --json FILE
                                          --peer-env histolab=/path/to/python ...]

Every measurement is a process of its own, held to one core. Its clock, which counts the seconds
that the core worked for it, starts when it has imported and has done the same for up to --warm
seconds, save for `verb`, which is the whole command. All take level 0, side by side:

  jaxhisto       cut_slide: hash, mask, every foreground tile, JPEG 95 4:4:4, ArrayRecord, report
  passthrough    the same with --passthrough, where the slide's own JPEG tiles line up
  verb           `jaxhisto tile --processes 1`, start-up and store included
  decode         the limit: OpenSlide reads the tiles that jaxhisto kept, to RGB, and no more
  decode+mask    and the level that the mask is made of, which no tiler can do without
  files          the same tiles written as JPEG files (Pillow, 95, 4:4:4)
  clam           as CLAM does: contours on a coarse level, read_region, HDF5 (not its code)
  histolab       GridTiler as it comes: tissue checked tile by tile, PNG files
  histolab-all   GridTiler at its quickest: tissue not checked (it cannot write JPEG)
  tiatoolbox     SlidingWindowPatchExtractor on an Otsu mask, patches in memory

A peer that is not installed gives a row that says how to install it. Peers pin old packages, so
each has its own environment and runs as a child of it:

    python3.10 -m venv histolab && histolab/bin/pip install histolab openslide-bin 'setuptools<81'
    python3.11 -m venv tiatoolbox && tiatoolbox/bin/pip install tiatoolbox

What works longer than --limit is stopped, and its time counted from its first tile on, which
leaves out its mask: an error in its favour.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

MEASURED = (
    "jaxhisto", "passthrough", "verb", "decode", "decode+mask", "files", "clam", "histolab",
    "histolab-all", "tiatoolbox",
)  # fmt: skip
PACKAGES = {
    "histolab": "histolab openslide-bin 'setuptools<81'",
    "tiatoolbox": "tiatoolbox",
    "clam": "h5py",
}
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
HERE = ("core", "json", "peer_env", "slides")  # what of the command is of one machine


def main() -> None:
    args = parse()
    from jaxhisto.runlog import environment

    pythons = dict(item.split("=", 1) for item in args.peer_env)
    found = {}
    for slide in map(Path, args.slides):
        with tempfile.TemporaryDirectory() as folder:
            found[slide.name] = measure(slide, args, pythons, Path(folder))
        show(slide.name, found[slide.name])
    lines = summary(found, args)
    if args.json:
        what = {k: v for k, v in vars(args).items() if k not in HERE}
        what |= {"slides": list(found), "peers": sorted(pythons)}
        record = {"what": what, "slides": found, "summary": lines} | environment([cpu_name()])
        record["command"] = ["benchmarks/tiling.py", *record["slides"]]  # no paths of a machine
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(lines))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slides", nargs="+", help="slides that OpenSlide reads")
    parser.add_argument("--tile-px", type=int, default=224)
    parser.add_argument("--foreground", default="otsu", choices=("ciga2022", "otsu", "od"))
    parser.add_argument("--mpp", type=float, default=0.25, help="of slides that do not state one")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--core", type=int, default=-1, help="-1: the first that may be used")
    parser.add_argument(
        "--limit", type=float, default=20, help="seconds of work of one measurement"
    )
    parser.add_argument("--warm", type=float, default=2, help="seconds before the clock starts")
    parser.add_argument("--only", nargs="*", default=MEASURED, choices=MEASURED)
    parser.add_argument("--peer-env", action="append", default=[], metavar="PEER=PYTHON")
    parser.add_argument("--json", help="write the record there")
    args = parser.parse_args()
    return args


def measure(
    slide: Path, args: argparse.Namespace, pythons: dict[str, str], folder: Path
) -> dict[str, dict]:
    """By name: tiles, seconds and MiB of each turn, versions; or why there is nothing."""
    job = {
        "slide": str(slide.resolve()),
        "tile_px": args.tile_px,
        "foreground": args.foreground,
        "mpp": args.mpp,
        "limit": args.limit,
        "warm": args.warm,
    }
    first = run_child("kept", job, sys.executable, folder, args.core)
    if "error" in first:
        raise SystemExit(f"{slide}: {first['error']}")
    job |= {key: first[key] for key in ("kept", "mask_level", "verb_mpp")}
    found: dict[str, dict] = {}
    for turn in range(args.repeats):
        for name in args.only:
            before = found.setdefault(name, {"turns": []})
            if "error" in before:
                continue
            peer = name.split("-")[0]
            python = pythons.get(peer, sys.executable)
            got = run_child(name, job, python, folder, args.core)
            if "error" in got:
                missing = "No module named" in got["error"]
                packages = PACKAGES.get(peer)
                if missing and packages:
                    got["error"] = f"not installed: pip install {packages}, then --peer-env {peer}="
                found[name] = {"error": got["error"]}
                continue
            before |= {k: got.pop(k) for k in ("versions", "note") if k in got}
            before["turns"].append(got)
            print(f"\r{slide.name}: {turn + 1}/{args.repeats} {name:<14}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return found


def run_child(name: str, job: dict, python: str, folder: Path, core: int) -> dict:
    """What one process measured of itself; {error} where it failed."""
    if core < 0 and hasattr(os, "sched_getaffinity"):  # not on macOS
        core = min(os.sched_getaffinity(0))
    out = Path(tempfile.mkdtemp(dir=folder))
    task = json.dumps({**job, "name": name, "out": str(out), "core": core})
    environ = {**os.environ, **dict.fromkeys(ONE_THREAD, "1")}
    if python != sys.executable:  # a peer's Python has packages of its own
        environ.pop("PYTHONPATH", None)
    answer = out / "answer.json"
    done = subprocess.run(
        [python, str(Path(__file__).with_name("tiling_peers.py")), task],
        env=environ, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode or not answer.exists():
        lines = done.stderr.strip().splitlines() or ["no answer"]
        return {"error": lines[-1][:300]}
    got = json.loads(answer.read_text())
    shutil.rmtree(out)
    return got


def rates(found: dict) -> list[float]:
    """Tiles a second of each turn."""
    return [turn["tiles"] / turn["seconds"] for turn in found.get("turns", [])]


def show(slide: str, found: dict[str, dict]) -> None:
    print(f"\n{slide}")
    print(f"{'':<14}{'tiles':>7}{'tiles/s':>10}{'slowest':>10}{'fastest':>10}{'peak MiB':>10}")
    for name, of in found.items():
        if "error" in of:
            print(f"{name:<14}  {of['error']}")
            continue
        speed, turns = rates(of), of["turns"]
        peak = statistics.median(turn["peak_mib"] for turn in turns)
        print(
            f"{name:<14}{turns[0]['tiles']:>7}{statistics.median(speed):>10.1f}{min(speed):>10.1f}"
            f"{max(speed):>10.1f}{peak:>10.0f}  {of.get('note', '')}"
        )


def summary(found: dict[str, dict[str, dict]], args: argparse.Namespace) -> list[str]:
    """A line a slide, and the last: the worst of them."""
    lines, worst = [], {}
    for slide, of in found.items():
        said = []
        for name in ("histolab", "histolab-all"):
            if both(of, "jaxhisto", name):
                times = ratio(of["jaxhisto"], of[name])
                worst.setdefault(name, []).append(times)
                said.append(f"{times:.2f} x {name}'s tiles/s")
        for name in ("decode", "decode+mask"):
            if both(of, "jaxhisto", name):
                times = ratio(of[name], of["jaxhisto"])
                worst.setdefault(name, []).append(times)
                said.append(f"{times:.2f} x the time of {name}")
        lines.append(f"{slide}: {', '.join(said) or 'nothing to compare'}")
    least = [
        f"at least {min(worst[n]):.2f} x {n}" for n in ("histolab", "histolab-all") if n in worst
    ]
    most = [
        f"at most {max(worst[n]):.2f} x the time of OpenSlide's {n}"
        for n in ("decode", "decode+mask")
        if n in worst
    ]
    lines.append(
        f"ratio {'; '.join(least + most)} ({args.tile_px} px, {args.foreground}, one core, "
        f"{len(found)} slides, medians of {args.repeats} turns)"
    )
    return lines


def both(of: dict[str, dict], *names: str) -> bool:
    return all(of.get(name, {}).get("turns") for name in names)


def ratio(a: dict, b: dict) -> float:
    """Median over the turns of a's speed over b's: a pair is measured side by side."""
    return statistics.median(x / y for x, y in zip(rates(a), rates(b), strict=True))


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "cpu"
    return next((li.split(":", 1)[1].strip() for li in lines if li.startswith("model name")), "cpu")


if __name__ == "__main__":
    main()
