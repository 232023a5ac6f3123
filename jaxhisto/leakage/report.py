"""What a search leaves: pairs.csv, a picture of the worst pairs, and lines to print."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from jaxhisto.data.sources import Tiles
from jaxhisto.leakage import hashes
from jaxhisto.leakage.search import KINDS, Found, Pair, Place

FILES = {"pairs.csv", "leakage.json", "leakage.png"}
COLUMNS = (
    *("kind", "pretraining", "labelled", "distance", "correlation", "symmetry", "share"),
    *("shared_id", "pretraining_tiles", "labelled_images"),
)
WORDS = {
    "file": "identical file",
    "pixels": "identical pixels",
    "near": "near-identical",
    "part": "a common piece",
    "slide": "a shared slide",
    "patient": "a shared patient",
    "name": "an equal name (proves nothing)",
}
CELL, GAP, TEXT, ACROSS = 224, 8, 50, 2
GREY = (200, 200, 200)


def write_pairs(path: Path, found: Found, pretraining: Tiles, against: Tiles) -> None:
    """A row a pair of images, then a row a shared slide, patient or name with both counts."""
    rows: list[list[object]] = []
    for pair in sorted(found.pairs, key=lambda p: (KINDS.index(p.kind), p.labelled)):
        turn = hashes.SYMMETRIES[pair.symmetry]
        both = _name(pretraining, pair.pretraining), _name(against, pair.labelled)
        numbers = f"{pair.distance:.4g}", f"{pair.correlation:.4f}", turn, f"{pair.share:.3f}"
        rows.append([pair.kind, *both, *numbers])
    for groups in found.shared:
        for s in groups:
            row = [s.kind, s.pretraining.example, s.labelled.example, "", "", "", ""]
            rows.append([*row, s.id, s.pretraining.tiles, s.labelled.tiles])
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows([*row, *[""] * (len(COLUMNS) - len(row))] for row in rows)


def summary(record: Mapping[str, Any], out: Path) -> list[str]:
    """Counts of each labelled set, one verdict for all, and where the report is."""
    ours = record["pretraining"]
    lines = [f"{ours['tiles']:,} pretraining tiles, {ours['too_flat']:,} too flat to tell"]
    for each in record["against"]:
        lines.append(f"{each['name']}: {each['images']:,} images, {each['too_flat']:,} too flat")
        for kind, count in each["counts"].items():
            if kind == "part" and not record["thresholds"]["parts"]:
                lines.append(f"  {WORDS[kind] + ':':<32} not looked for (--no-parts)")
                continue
            more = f"{count['pairs']:,} pairs" if "pairs" in count else f"{count['ids']:,} ids"
            lines.append(f"  {WORDS[kind] + ':':<32} {count['images']:,} images, {more}")
    return [*lines, verdict(record), f"{out}: pairs.csv, leakage.json, leakage.png"]


def verdict(record: Mapping[str, Any]) -> str:
    """The answer in one line."""
    if record["overlap"]:
        clauses = [_clause(each) for each in record["against"] if each["overlap"]]
        return f"leakage: OVERLAP with {'; with '.join(clauses)}."
    flat = sum(each["too_flat"] for each in record["against"])
    limit = f", {flat:,} of them too flat to tell unless identical" if flat else ""
    images = sum(each["images"] for each in record["against"])
    return f"leakage: no overlap found between the pretraining tiles and {images:,} images{limit}."


def _clause(each: Mapping[str, Any]) -> str:
    seen = f"{each['seen_again']:,} of {each['images']:,} images seen in pretraining"
    ids = [
        f"{each['counts'][kind]['ids']:,} {kind}s shared"
        for kind in ("slide", "patient")
        if each["counts"][kind]["ids"]
    ]
    return f"{each['name']}: {', '.join([seen, *ids])}"


def draw(path: Path, found: Found, pretraining: Tiles, against: Tiles, most: int) -> None:
    """Draws pairs beside each other, aligned: the labelled image left, the tile right.

    Each kind gets its turn, one pair a labelled image; of a kind, by turns the best correlated and
    the most doubtful.
    """
    pairs = _worst(found.pairs, most)
    rows = max(1, -(-len(pairs) // ACROSS))
    width, height = 2 * CELL + 3 * GAP, CELL + TEXT + GAP
    sheet = Image.new("RGB", (ACROSS * width + GAP, rows * height + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    if not pairs:
        pen.text((GAP, GAP), "No image of both sides is alike.", "black", font)
    for n, pair in enumerate(pairs):
        x, y = GAP + n % ACROSS * width, GAP + n // ACROSS * height
        left, right = _aligned(pair, pretraining, against)
        sheet.paste(_cell(left), (x, y))
        sheet.paste(_cell(right), (x + CELL + GAP, y))
        for line, text in enumerate(_caption(pair, pretraining, against)):
            pen.text((x, y + CELL + 2 + 15 * line), _fit(text, 2 * CELL, font), "black", font)
    sheet.save(path)


def _worst(pairs: Sequence[Pair], most: int) -> list[Pair]:
    """In turn one of each kind, until there are enough."""
    queues = []
    for kind in KINDS:
        best: dict[Place, Pair] = {}
        for pair in sorted((p for p in pairs if p.kind == kind), key=lambda p: -p.correlation):
            best.setdefault(pair.labelled, pair)
        ordered = list(best.values())
        middle = -(-len(ordered) // 2)
        ends = itertools.zip_longest(ordered[:middle], reversed(ordered[middle:]))
        queues.append([pair for two in ends for pair in two if pair is not None])
    chosen: list[Pair] = []
    for turn in range(max(map(len, queues))):
        chosen += [queue[turn] for queue in queues if turn < len(queue)]
    kept = chosen[:most]
    return sorted(kept, key=lambda p: (KINDS.index(p.kind), -p.correlation))


def _aligned(
    pair: Pair, pretraining: Tiles, against: Tiles
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The labelled image as it is, and the tile brought into its place."""
    theirs = against.sources[pair.labelled[0]].read(pair.labelled[1])
    ours = pretraining.sources[pair.pretraining[0]].read(pair.pretraining[1])
    if pair.matrix is None:
        back = hashes.turned(ours, -pair.symmetry % 4)
        # Undone in reverse: first the turn, then the mirror.
        return theirs, hashes.turned(back, 4) if pair.symmetry >= 4 else back
    h, w = theirs.shape[:2]
    placed = np.asarray(cv2.warpAffine(ours, pair.matrix, (w, h), borderValue=GREY), np.uint8)
    return theirs, hashes.turned(placed, 4) if pair.symmetry >= 4 else placed


def _cell(image: NDArray[np.uint8]) -> Image.Image:
    picture = Image.fromarray(image)
    scale = CELL / max(picture.size)
    w, h = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((w, h), Image.Resampling.LANCZOS)


def _caption(pair: Pair, pretraining: Tiles, against: Tiles) -> tuple[str, str, str]:
    turn = f", {hashes.SYMMETRIES[pair.symmetry]}" if pair.symmetry else ""
    share = f", {pair.share:.0%} of the image" if pair.kind == "part" else ""
    return (
        f"{WORDS[pair.kind]}{share}{turn}, r {pair.correlation:.3f}",
        f"labelled: {_name(against, pair.labelled)}",
        f"pretraining: {_name(pretraining, pair.pretraining)}",
    )


def _fit(text: str, width: int, font: Any) -> str:
    """The text, or its kind and its end, in so many pixels."""
    if font.getlength(text) <= width:
        return text
    head, _, rest = text.partition(" ")
    while rest and font.getlength(f"{head} ...{rest}") > width:
        rest = rest[1:]
    return f"{head} ...{rest}"


def _name(tiles: Tiles, place: Place) -> str:
    return tiles.sources[place[0]].name(place[1])
