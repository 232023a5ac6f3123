"""One measurement of `tiling.py`, in a process of its own: `python tiling_peers.py JOB` (JSON).

Peers run this under a Python of their own, 3.10 or later, so that only the standard library is
imported here, and each thing that is measured imports what it needs. Its result is a file, since
peers print what they like.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

LEAST = 0.5  # share of a tile that is tissue, for all that ask for one


class Stop(Exception):
    """The time of a measurement is over."""


def child(job: dict) -> None:
    """Measures what the job names, and writes what came of it to OUT/answer.json."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {job["core"]})
    out = Path(job["out"])
    work = out / "work"
    work.mkdir()
    got = PREPARED[job["name"]](job, work)  # imports, and returns what is to be timed
    if callable(got):

        def stop(*_: object) -> None:
            raise Stop

        signal.signal(signal.SIGPROF, stop)
        if job["name"] != "verb":
            with contextlib.suppress(Stop):
                signal.setitimer(signal.ITIMER_PROF, job["warm"])
                got()
            signal.setitimer(signal.ITIMER_PROF, 0)
            shutil.rmtree(work)
            work.mkdir()
            SAVED.clear()
        signal.setitimer(signal.ITIMER_PROF, job["limit"])
        began = worked(), time.perf_counter()
        try:
            got = got()
        except Stop:
            got = cut_short(began)
        else:
            got["seconds"], got["wall_s"] = worked() - began[0], time.perf_counter() - began[1]
        signal.setitimer(signal.ITIMER_PROF, 0)
    who = resource.RUSAGE_CHILDREN if job["name"] == "verb" else resource.RUSAGE_SELF
    unit = 1 if sys.platform == "darwin" else 1024
    got["peak_mib"] = round(resource.getrusage(who).ru_maxrss * unit / 2**20, 1)
    got["versions"] = versions()
    (out / "answer.json").write_text(json.dumps(got))


def worked() -> float:
    """Seconds that a core worked for this process and for those it waited for."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


SAVED: list[tuple[float, float]] = []  # of tiles that a peer had done: `worked`, clock


def note_saves() -> None:
    """Fills `SAVED` from here on."""
    from PIL import Image

    save = Image.Image.save

    def noted(self, *args, **kwargs) -> None:
        save(self, *args, **kwargs)
        SAVED.append((worked(), time.perf_counter()))

    Image.Image.save = noted


def cut_short(began: tuple[float, float]) -> dict:
    """Tiles that a stopped peer wrote, and the seconds from its first to its last."""
    if len(SAVED) < 2:
        raise SystemExit("wrote no two tiles in --limit seconds")
    (first, first_wall), (last, last_wall) = SAVED[0], SAVED[-1]
    note = f"stopped; its first tile took {first - began[0]:.1f} s"
    got = {"tiles": len(SAVED) - 1, "seconds": last - first, "wall_s": last_wall - first_wall}
    return {**got, "note": note}


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

    from jaxhisto.slides.cutting import Job, cut_slide
    from jaxhisto.slides.pixel_size import GivenPixelSize

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
        sys.executable, "-m", "jaxhisto.cli", "tile", job["slide"],
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
    note_saves()
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
        for _ in patches:
            SAVED.append((worked(), time.perf_counter()))
        return {"tiles": len(SAVED)}

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


if __name__ == "__main__":
    child(json.loads(sys.argv[1]))
