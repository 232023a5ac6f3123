"""Tiles a second of one core, and peak memory: `jaxhisto tile` beside others, by turns in one run.

    python benchmarks/tiling.py SLIDE... [--tile-px 224 --foreground otsu --mpp 0.25 --repeats 5
                                          --core 0 --limit 20 --json FILE
                                          --peer-env histolab=/path/to/python ...]

Every measurement is a process of its own, held to one core. Its clock starts when it has imported
and has done the same for up to --warm seconds, save for `verb`, which is the whole command. All
take level 0, side by side:

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

What runs longer than --limit is stopped, and its time counted from its first tile on, which leaves
out its mask: an error in its favour.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Only the standard library above: peers run this file under their own Python, 3.10 and later.

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
LEAST = 0.5  # share of a tile that is tissue, for all that ask for one
SEED_UM = 8.0  # um/px of the coarse level that a mask is made of, where a peer lets one choose


def main() -> None:
    args = parse()
    if args.child:
        child(json.loads(args.child))
        return
    from jaxhisto.runlog import environment

    pythons = dict(item.split("=", 1) for item in args.peer_env)
    found = {}
    for slide in map(Path, args.slides):
        with tempfile.TemporaryDirectory() as folder:
            found[slide.name] = measure(slide, args, pythons, Path(folder))
        show(slide.name, found[slide.name])
    lines = summary(found, args)
    if args.json:
        what = {k: v for k, v in vars(args).items() if k not in ("child", "peer_env", "slides")}
        what |= {"slides": list(found), "peers": sorted(pythons)}
        record = {"what": what, "slides": found, "summary": lines} | environment([cpu_name()])
        record["command"] = ["benchmarks/tiling.py", *record["slides"]]  # no paths of a machine
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(lines))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slides", nargs="*", help="slides that OpenSlide reads")
    parser.add_argument("--tile-px", type=int, default=224)
    parser.add_argument("--foreground", default="otsu", choices=("ciga2022", "otsu", "od"))
    parser.add_argument("--mpp", type=float, default=0.25, help="of slides that do not state one")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--core", type=int, default=-1, help="-1: the first that may be used")
    parser.add_argument("--limit", type=float, default=20, help="seconds of one measurement")
    parser.add_argument("--warm", type=float, default=2, help="seconds before the clock starts")
    parser.add_argument("--only", nargs="*", default=MEASURED, choices=MEASURED)
    parser.add_argument("--peer-env", action="append", default=[], metavar="PEER=PYTHON")
    parser.add_argument("--json", help="write the record there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.slides and not args.child:
        parser.error("name at least one slide")
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
    core = min(os.sched_getaffinity(0)) if core < 0 else core
    out = Path(tempfile.mkdtemp(dir=folder))
    task = json.dumps({**job, "name": name, "out": str(out), "core": core})
    environ = {**os.environ, **dict.fromkeys(ONE_THREAD, "1")}
    if python != sys.executable:  # a peer's Python has packages of its own
        environ.pop("PYTHONPATH", None)
    answer = out / "answer.json"
    done = subprocess.run(
        [python, os.path.abspath(__file__), "--child", task],
        env=environ, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode or not answer.exists():
        lines = done.stderr.strip().splitlines() or ["no answer"]
        return {"error": lines[-1][:300]}
    got = json.loads(answer.read_text())
    shutil.rmtree(out)
    return got


class Stop(Exception):
    """The time of a measurement is over."""


def child(job: dict) -> None:
    """One measurement in this process; its result as a file, since peers print what they like."""
    os.sched_setaffinity(0, {job["core"]})
    out = Path(job["out"])
    work = out / "work"
    work.mkdir()
    got = PREPARED[job["name"]](job, work)  # imports, and returns what is to be timed
    if callable(got):

        def stop(*_: object) -> None:
            raise Stop

        signal.signal(signal.SIGALRM, stop)
        if job["name"] != "verb":
            with contextlib.suppress(Stop):
                signal.setitimer(signal.ITIMER_REAL, job["warm"])
                got()
            signal.setitimer(signal.ITIMER_REAL, 0)
            shutil.rmtree(work)
            work.mkdir()
        signal.setitimer(signal.ITIMER_REAL, job["limit"])
        begun, began = time.time(), time.perf_counter()
        try:
            got = got()
        except Stop:
            got = cut_short(work, begun)
        else:
            got.setdefault("seconds", time.perf_counter() - began)
        signal.setitimer(signal.ITIMER_REAL, 0)
    who = resource.RUSAGE_CHILDREN if job["name"] == "verb" else resource.RUSAGE_SELF
    unit = 1 if sys.platform == "darwin" else 1024
    got["peak_mib"] = round(resource.getrusage(who).ru_maxrss * unit / 2**20, 1)
    got["versions"] = versions()
    (out / "answer.json").write_text(json.dumps(got))


def cut_short(work: Path, begun: float) -> dict:
    """Tiles that a stopped peer wrote, and the seconds from its first to its last."""
    times = sorted(p.stat().st_mtime for p in work.rglob("*") if p.suffix in (".png", ".jpg"))
    if len(times) < 2:
        raise SystemExit("wrote no two tiles in --limit seconds")
    note = f"stopped; its first tile came after {times[0] - begun:.1f} s"
    return {"tiles": len(times) - 1, "seconds": times[-1] - times[0], "note": note}


def versions() -> dict[str, str]:
    """Of the packages that matter, as this Python has them."""
    from importlib import metadata

    found = {"python": sys.version.split()[0]}
    for name in (
        "jaxhisto", "histolab", "tiatoolbox", "openslide-python", "openslide-bin", "numpy",
        "pillow", "opencv-python-headless", "simplejpeg", "h5py", "array-record",
    ):  # fmt: skip
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def config_of(job: dict, out: Path, **changes: object):
    from jaxhisto.config import TileConfig

    return TileConfig(
        slides=(job["slide"],), out=str(out), dataset="benchmark", tile_px=job["tile_px"],
        foreground=job["foreground"], max_tiles=0, mpp=job.get("verb_mpp"), processes=1, **changes,
    )  # fmt: skip


def prepare_kept(job: dict, work: Path) -> dict:
    """Which tiles jaxhisto keeps, in its order, as the verb leaves them; and the mask's level."""
    from jaxhisto.data.store import TileStore
    from jaxhisto.errors import SlideError
    from jaxhisto.slides.foreground import MASK_MPP
    from jaxhisto.slides.pixel_size import GivenPixelSize
    from jaxhisto.slides.reader import Slide
    from jaxhisto.slides.tiling import tile

    path, given = Path(job["slide"]), None
    try:
        Slide(path).__exit__(None, None, None)
    except SlideError:
        given = job["mpp"]
    result = tile(config_of({**job, "verb_mpp": given}, work / "store"))
    store = TileStore(result.store)
    with Slide(path, GivenPixelSize(given)) as slide:
        wanted = MASK_MPP / slide.mpp
        nearest = min(slide.downsamples, key=lambda d: max(d, wanted) / min(d, wanted))
        level = slide.downsamples.index(nearest)
    tiles = [store[i] for i in range(len(store))]
    kept = [[int(t["x"]), int(t["y"])] for t in tiles]
    return {"kept": kept, "mask_level": level, "verb_mpp": given}


def prepare_jaxhisto(job: dict, work: Path, **changes: object):
    import array_record.python.array_record_module  # noqa: F401

    from jaxhisto.data import store_writer
    from jaxhisto.slides.cutting import Job, cut_slide
    from jaxhisto.slides.pixel_size import GivenPixelSize

    store_writer._tfds()
    path, config = Path(job["slide"]), config_of(job, work, **changes)

    def timed() -> dict:
        (work / "unfinished").mkdir()
        record = cut_slide(Job(path, path.name, GivenPixelSize(config.mpp), config)).record
        if record["tiles"] != len(job["kept"]):
            raise SystemExit(f"{record['tiles']} tiles now, {len(job['kept'])} before")
        return {
            "tiles": record["tiles"],
            "bytes": record["part"]["bytes"],
            "notes": record["notes"],
        }

    return timed


def prepare_passthrough(job: dict, work: Path):
    return prepare_jaxhisto(job, work, passthrough=True)


def prepare_verb(job: dict, work: Path):
    command = [
        sys.executable, "-c", "from jaxhisto.cli import main; main()", "tile", job["slide"],
        "--out", str(work / "store"), "--tile-px", str(job["tile_px"]), "--foreground",
        job["foreground"], "--max-tiles", "0", "--processes", "1", "--dataset", "benchmark",
        *(["--mpp", str(job["verb_mpp"])] if job["verb_mpp"] else []),
    ]  # fmt: skip

    def timed() -> dict:
        subprocess.run(command, check=True, capture_output=True)
        return {"tiles": len(job["kept"])}

    return timed


def prepare_decode(job: dict, work: Path, mask: bool = False, files: bool = False):
    import openslide

    side = job["tile_px"]

    def timed() -> dict:
        with openslide.OpenSlide(job["slide"]) as slide:
            if mask:
                block, ratio = 2048, slide.level_downsamples[job["mask_level"]]
                width, height = slide.level_dimensions[job["mask_level"]]
                for y in range(0, height, block):
                    for x in range(0, width, block):
                        size = min(block, width - x), min(block, height - y)
                        at = round(x * ratio), round(y * ratio)
                        slide.read_region(at, job["mask_level"], size).convert("RGB")
            for x, y in job["kept"]:
                tile = slide.read_region((x, y), 0, (side, side)).convert("RGB")
                if files:
                    tile.save(work / f"{x}_{y}.jpg", quality=95, subsampling=0)
        return {"tiles": len(job["kept"])}

    return timed


def prepare_decode_mask(job: dict, work: Path):
    return prepare_decode(job, work, mask=True)


def prepare_files(job: dict, work: Path):
    return prepare_decode(job, work, files=True)


def prepare_clam(job: dict, work: Path):
    """CLAM's way: saturation, median, threshold, close, contours; then patches appended to HDF5."""
    import cv2
    import h5py
    import numpy as np
    import openslide

    cv2.setNumThreads(1)
    side = job["tile_px"]

    def contours(slide) -> tuple[list, float]:
        level = slide.get_best_level_for_downsample(64)
        image = np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]))
        saturation = cv2.cvtColor(np.ascontiguousarray(image[..., :3]), cv2.COLOR_RGB2HSV)[..., 1]
        _, mask = cv2.threshold(
            cv2.medianBlur(saturation, 7), 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU
        )
        mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((4, 4), np.uint8))
        found, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        return list(found), slide.level_downsamples[level]

    def timed() -> dict:
        count = 0
        with openslide.OpenSlide(job["slide"]) as slide, h5py.File(work / "a.h5", "w") as file:
            found, ratio = contours(slide)
            shape = (0, side, side, 3)
            patches = file.create_dataset(
                "imgs", shape, np.uint8, maxshape=(None, *shape[1:]), chunks=(1, *shape[1:])
            )
            places = file.create_dataset("coords", (0, 2), np.int64, maxshape=(None, 2))
            seen = set()
            for y in range(0, slide.dimensions[1] - side + 1, side):
                for x in range(0, slide.dimensions[0] - side + 1, side):
                    centre = ((x + side / 2) / ratio, (y + side / 2) / ratio)
                    inside = any(cv2.pointPolygonTest(c, centre, False) >= 0 for c in found)
                    if not inside or (x, y) in seen:
                        continue
                    seen.add((x, y))
                    tile = slide.read_region((x, y), 0, (side, side)).convert("RGB")
                    patches.resize(count + 1, axis=0)
                    places.resize(count + 1, axis=0)
                    patches[count], places[count] = np.asarray(tile), (x, y)
                    count += 1
        return {"tiles": count}

    return timed


def prepare_histolab(job: dict, work: Path, quick: bool = False):
    with_openslide_bin()
    from histolab.slide import Slide
    from histolab.tiler import GridTiler

    tiler = GridTiler(
        (job["tile_px"],) * 2, level=0, check_tissue=not quick, tissue_percent=100 * LEAST,
        prefix="tiles/",
    )  # fmt: skip

    def timed() -> dict:
        (work / "tiles").mkdir()
        tiler.extract(Slide(job["slide"], str(work)), log_level="ERROR")
        return {"tiles": len(list((work / "tiles").iterdir()))}

    return timed


def prepare_histolab_all(job: dict, work: Path):
    return prepare_histolab(job, work, quick=True)


def with_openslide_bin() -> None:
    """openslide-python before 1.4 does not know the package; once loaded, its library is found."""
    try:
        import ctypes

        import openslide_bin

        library = next(Path(openslide_bin.__file__).parent.glob("libopenslide*"))
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except (ImportError, StopIteration):
        pass


def prepare_tiatoolbox(job: dict, work: Path):
    from tiatoolbox.tools.patchextraction import get_patch_extractor
    from tiatoolbox.wsicore.wsireader import WSIReader

    side = (job["tile_px"],) * 2

    def timed() -> dict:
        reader = WSIReader.open(job["slide"])
        patches = get_patch_extractor(
            "slidingwindow", input_img=reader, patch_size=side, stride=side, resolution=0,
            units="level", input_mask="otsu", min_mask_ratio=LEAST, within_bound=True,
        )  # fmt: skip
        count, began, limit = 0, time.perf_counter(), job["limit"]
        for _ in patches:
            count += 1
            if time.perf_counter() - began > limit:
                break
        return {"tiles": count}

    return timed


PREPARED = {
    "kept": prepare_kept,
    "jaxhisto": prepare_jaxhisto,
    "passthrough": prepare_passthrough,
    "verb": prepare_verb,
    "decode": prepare_decode,
    "decode+mask": prepare_decode_mask,
    "files": prepare_files,
    "clam": prepare_clam,
    "histolab": prepare_histolab,
    "histolab-all": prepare_histolab_all,
    "tiatoolbox": prepare_tiatoolbox,
}


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
