"""What `jaxhisto leakage` finds of planted duplicates, what it claims wrongly, and what it costs.

    python benchmarks/leakage.py SET... [--images 20 --tiles 400000 --labelled 10000 --json FILE]

A SET is an image folder, or a pattern of images in one (`'spots/C2_*'`). No image of one set may
be in another: images of each are copied under other names, changed in one way each, and searched
for in the sets as they are (recall), and each set is searched for in all others (false alarms:
every pair that is found). The cost is that of the indexes on random codes, as many as --tiles
pretraining tiles and --labelled images make, beside comparing all pairs, and of the whole search
on the sets. Copies count as found where the right image is named, whatever else is.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from jaxhisto.config import MANY, DataConfig
from jaxhisto.data.folder_source import image_names
from jaxhisto.data.images import decode_image
from jaxhisto.data.sources import open_tiles
from jaxhisto.file_config import LeakageConfig
from jaxhisto.leakage.hamming import HammingIndex
from jaxhisto.leakage.parts import Keypoints, PartIndex
from jaxhisto.leakage.search import KINDS, Found, search
from jaxhisto.runlog import environment, write_atomically

Change = Callable[[np.ndarray], np.ndarray]


def jpeg(quality: int) -> Change:
    """Encoded and decoded, with the colours subsampled as encoders do by default."""

    def change(image: np.ndarray) -> np.ndarray:
        data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        return cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1]

    return change


def resized(factor: float) -> Change:
    """Rescaled, by areas where it shrinks."""
    kind = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    return lambda image: cv2.resize(image, None, fx=factor, fy=factor, interpolation=kind)


def symmetry(mirrored: bool, quarters: int) -> Change:
    """Mirrored left to right, then turned."""
    return lambda image: np.rot90(image[:, ::-1] if mirrored else image, quarters)


def light(gain: float, offset: float) -> Change:
    """Brightness and contrast."""
    return lambda image: np.clip(image * gain + offset, 0, 255).astype(np.uint8)


def colour(degrees: float, saturation: float) -> Change:
    """Hue turned and saturation scaled."""

    def change(image: np.ndarray) -> np.ndarray:
        hsv = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2HSV).astype(np.float64)
        hsv[..., 0] = (hsv[..., 0] + degrees / 2) % 180
        hsv[..., 1] = np.clip(hsv[..., 1] * saturation, 0, 255)
        return cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB)

    return change


def crop(side: float) -> Change:
    """A square of so much of the shorter side, at a place drawn from the content."""

    def change(image: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng(int(image.astype(np.int64).sum()))
        size = int(min(image.shape[:2]) * side)
        top, left = (int(rng.integers(0, n - size + 1)) for n in image.shape[:2])
        return image[top : top + size, left : left + size]

    return change


def chain(*changes: Change) -> Change:
    """One after the other."""

    def change(image: np.ndarray) -> np.ndarray:
        for each in changes:
            image = each(image)
        return image

    return change


CHANGES: dict[str, Change] = {
    "PNG instead of JPEG": lambda image: image,
    "JPEG 95": jpeg(95),
    "JPEG 70": jpeg(70),
    **{
        f"{'mirrored, ' if m else ''}turned {90 * k}, JPEG 80": chain(symmetry(m, k), jpeg(80))
        for m in (False, True)
        for k in range(4)
        if m or k
    },
    "brighter x1.15 +10": light(1.15, 10),
    "darker x0.8 -5": light(0.8, -5),
    "hue +10 degrees, saturation x1.2": colour(10, 1.2),
    "resized x0.5": resized(0.5),
    "resized x0.73": resized(0.73),
    "resized x2": resized(2.0),
    "x0.6, recoloured, turned 90, JPEG 75": chain(
        resized(0.6), colour(-8, 0.85), symmetry(False, 1), jpeg(75)
    ),
    "crop 95 % of the side": crop(0.95),
    "crop 70 %, JPEG 80": chain(crop(0.7), jpeg(80)),
    "crop 70 %, mirrored, x0.6, JPEG 80": chain(
        crop(0.7), symmetry(True, 0), resized(0.6), jpeg(80)
    ),
    "crop 50 %, JPEG 80": chain(crop(0.5), jpeg(80)),
    "crop 50 %, x2, turned 90, JPEG 80": chain(
        crop(0.5), resized(2.0), symmetry(False, 1), jpeg(80)
    ),
    "crop 35 %, JPEG 80": chain(crop(0.35), jpeg(80)),
    "crop 35 %, x2, JPEG 80": chain(crop(0.35), resized(2.0), jpeg(80)),
}


def main() -> None:
    """Prints the tables and writes the record."""
    args = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        sets = linked(args.sets, Path(scratch))
        recalls = recall(sets, args.images, Path(scratch) / "copies", args.threads)
        alarms = false_alarms(sets, args.threads)
    costs = hash_cost(args.tiles, args.labelled) | part_cost(args.labelled)
    show(recalls, alarms, costs, args)
    if args.json:
        what = {"images": args.images, "tiles": args.tiles, "labelled": args.labelled}
        what |= {"sets": [f"{Path(s).parent.name}/{Path(s).name}" for s in args.sets]}
        # Where the sets lie on this machine is nobody's business.
        common = os.path.commonpath([Path(s).parent for s in args.sets]) + "/"
        record: dict[str, Any] = {"what": what, "recall": recalls, "false_alarms": alarms}
        text = json.dumps(record | {"cost": costs} | environment([]), indent=1)
        write_atomically(args.json, text.replace(common, "") + "\n")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sets", nargs="+", help="image folders, or patterns of images")
    parser.add_argument("--images", type=int, default=20, help="copied of each set")
    parser.add_argument("--tiles", type=int, default=400_000, help="codes to search")
    parser.add_argument("--labelled", type=int, default=10_000, help="images to search for")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def linked(sets: Sequence[str], scratch: Path) -> list[Path]:
    """A folder of links a set; refuses an empty one."""
    folders = []
    for n, text in enumerate(sets):
        path = Path(text).absolute()
        files = [path / f for f in image_names(path)] if path.is_dir() else []
        files = files or sorted(path.parent.glob(path.name))
        if not files:
            raise SystemExit(f"{text}: no images.")
        folders.append(scratch / f"set{n}")
        folders[-1].mkdir()
        for i, file in enumerate(files):
            (folders[-1] / f"{n}-{i}{file.suffix}").symlink_to(file)
    return folders


def compared(pretraining: Sequence[Path], against: Sequence[Path], threads: int) -> Found:
    """The search with its default thresholds."""
    sides = [
        open_tiles(DataConfig(stores=tuple(map(str, s)), max_side=MANY, failures_allowed=MANY))
        for s in (pretraining, against)
    ]
    config = LeakageConfig(pretraining=(), against=(), threads=threads)
    return search(*sides, config)


def recall(sets: Sequence[Path], images: int, scratch: Path, threads: int) -> dict[str, Any]:
    """Of each change: copies made, copies found, by which kind, and pairs named wrongly."""
    scratch.mkdir()
    for folder in sets:
        files = sorted(folder.iterdir())
        for file in files[:: max(1, len(files) // images)][:images]:
            try:
                image = decode_image(file.read_bytes())
            except Exception as error:
                print(f"left out {file.resolve().name}: {error}")
                continue
            for n, change in enumerate(CHANGES.values()):
                copy = np.ascontiguousarray(change(image)[..., ::-1])
                cv2.imwrite(str(scratch / f"{n}_{file.stem}.png"), copy)
    names = sorted(p.stem for p in scratch.iterdir())
    found = compared(sets, [scratch], threads)
    originals = [sorted(f.stem for f in folder.iterdir()) for folder in sets]
    hits, wrong = dict[str, str](), list[str]()
    opened = [image_names(folder) for folder in sets]
    for pair in sorted(found.pairs, key=lambda p: -KINDS.index(p.kind)):
        copy = names[pair.labelled[1]]
        original = Path(opened[pair.pretraining[0]][pair.pretraining[1]]).stem
        assert original in originals[pair.pretraining[0]]
        if copy.partition("_")[2] == original:
            hits[copy] = pair.kind
        else:
            wrong.append(
                f"{_original(sets, copy.partition('_')[2])} in {_original(sets, original)}"
            )
    rows = {}
    for n, change in enumerate(CHANGES):
        copies = [name for name in names if name.startswith(f"{n}_")]
        kinds = Counter(hits[name] for name in copies if name in hits)
        rows[change] = {"copies": len(copies), "found": sum(kinds.values()), "kinds": dict(kinds)}
    return {
        "changes": rows,
        "wrong_pairs": sorted(set(wrong)),
        "comparisons": len(names) * sum(map(len, opened)),
    }


def _original(sets: Sequence[Path], link: str) -> str:
    """The name of the image that a link stands for."""
    return next(f.resolve().name for s in sets for f in s.iterdir() if f.stem == link)


def false_alarms(sets: Sequence[Path], threads: int) -> dict[str, Any]:
    """Pairs claimed between sets that share no image, and the speed of the whole search."""
    pairs, kinds, tiles, seconds, flat = 0, Counter[str](), 0, 0.0, 0
    sizes = [len(list(folder.iterdir())) for folder in sets]
    for n in range(1, len(sets)):
        start = time.perf_counter()
        found = compared([sets[n]], sets[:n], threads)
        seconds += time.perf_counter() - start
        tiles += sum(sizes[: n + 1])
        pairs += sizes[n] * sum(sizes[:n])
        flat += found.flat[0]
        kinds.update({kind: found.counts[s, kind] for s in range(n) for kind in KINDS})
    return {
        "comparisons": pairs,
        "claimed": {kind: kinds[kind] for kind in KINDS},
        "images_per_s": tiles / seconds,
        "flat": flat,
    }


def hash_cost(tiles: int, labelled: int) -> dict[str, Any]:
    """Seconds and peak memory of all pairs within 10 of 63 bits, beside all pairs on a sample."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 1 << 63, 8 * labelled, np.uint64)
    queries = rng.integers(0, 1 << 63, tiles, np.uint64)
    planted = rng.choice(tiles, tiles // 100, replace=False)
    flips = np.zeros(len(planted), np.uint64)
    for _ in range(10):
        flips |= np.uint64(1) << rng.integers(0, 63, len(planted)).astype(np.uint64)
    queries[planted] = codes[rng.integers(0, len(codes), len(planted))] ^ flips
    before = peak_mb()
    start = time.perf_counter()
    index = HammingIndex(codes, 10)
    built = time.perf_counter() - start
    start = time.perf_counter()
    query, _, _ = index.pairs(queries)
    searched = time.perf_counter() - start
    sample = queries[:500]
    start = time.perf_counter()
    brute = sum(int((np.bitwise_count(codes ^ q) <= 10).sum()) for q in sample)
    all_pairs = (time.perf_counter() - start) * tiles / len(sample)
    assert brute == int((query < len(sample)).sum()), "the index missed a pair"
    assert set(planted) <= set(query.tolist()), "the index missed a planted pair"
    return {
        "hash_build_s": built,
        "hash_search_s": searched,
        "hash_all_pairs_s_extrapolated": all_pairs,
        "hash_pairs": len(query),
        "hash_peak_mb": peak_mb() - before,
    }


def part_cost(labelled: int, asked: int = 1000, each: int = 150) -> dict[str, Any]:
    """Build, lookup a tile and memory of the index of keypoints, without finding them."""
    rng = np.random.default_rng(1)

    def made(count: int) -> Keypoints:
        codes = rng.integers(0, 1 << 32, (count, 4), np.uint32)
        return Keypoints(rng.random((count, 2), np.float32), codes)

    sides = [(made(each), made(each)) for _ in range(labelled)]
    before = peak_mb()
    start = time.perf_counter()
    index = PartIndex(sides)
    built = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(asked):
        assert not list(index.candidates(made(70)))
    lookup = (time.perf_counter() - start) / asked
    return {"part_build_s": built, "part_lookup_ms": 1e3 * lookup, "part_mb": peak_mb() - before}


def peak_mb() -> float:
    """Largest memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def show(recalls: dict[str, Any], alarms: dict[str, Any], costs: dict[str, Any], args: Any) -> None:
    """The tables."""
    for change, row in recalls["changes"].items():
        kinds = ", ".join(f"{kind} {n}" for kind, n in sorted(row["kinds"].items()))
        print(f"{change:<38} {row['found']:>4} of {row['copies']:<4} {kinds}")
    print(
        f"other originals named: {', '.join(recalls['wrong_pairs']) or 'none'} "
        f"({recalls['comparisons']:,} comparisons)\n"
        f"between sets that share nothing: {sum(alarms['claimed'].values())} of "
        f"{alarms['comparisons']:,} comparisons claimed, {alarms['images_per_s']:.0f} images/s\n"
        f"{args.tiles:,} hashes against {args.labelled:,} x 8: {costs['hash_search_s']:.1f} s, "
        f"{costs['hash_peak_mb']:.0f} MB more (all pairs: "
        f"{costs['hash_all_pairs_s_extrapolated']:.0f} s)\n"
        f"keypoints of {args.labelled:,} images: {costs['part_mb']:.0f} MB, "
        f"{costs['part_lookup_ms']:.2f} ms a tile to look up"
    )


if __name__ == "__main__":
    main()
