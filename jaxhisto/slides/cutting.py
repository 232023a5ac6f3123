"""One slide to one part of the store: choose cells, read, write. Runs in a worker process.

Every cell of the grid is either kept or rejected for one of `report_parts.REASONS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2

from jaxhisto.config import TileConfig
from jaxhisto.data.store_writer import (
    Tile,
    encode_jpeg,
    slide_key,
    write_file,
    write_part,
    write_record,
)
from jaxhisto.errors import SlideError
from jaxhisto.slides.choosing import Choice, choose_cells, no_tile, own_reason, small
from jaxhisto.slides.pixel_size import GivenPixelSize
from jaxhisto.slides.reader import Overview, Pixels, RegionError, Scale, Slide
from jaxhisto.slides.report import fitted, slide_section
from jaxhisto.slides.report_parts import REASONS
from jaxhisto.slides.slide_files import content_hash, file_stamp

CONTACTS, CONTACT_PX = 24, 96  # tiles on the contact sheet, and their side
PICTURE_PX = 900  # longest side of the report's picture of the slide, about


@dataclass(frozen=True)
class Job:
    """One slide to cut.

    Args:
      path: of the file.
      id: name relative to the folder given.
      given: what the user says of pixel sizes.
      config: all settings of the run; `dataset` filled in.
      known: manifest entry of this slide if a whole part of it is there.
      others: further files of the same slide (a DICOM series).
      dataset: of its tiles; empty: the config's.
      also: further ids under which the same file is found.
    """

    path: Path
    id: str
    given: GivenPixelSize
    config: TileConfig
    known: dict[str, Any] | None = None
    others: tuple[Path, ...] = ()
    dataset: str = ""
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cut:
    """A finished slide: its manifest entry, and whether its part was there already."""

    record: dict[str, Any]
    reused: bool


@dataclass
class Draw:
    """What became of the cells of one slide; positions in level-0 pixels."""

    rejected: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    kept: list[tuple[int, int]] = field(default_factory=list)
    lost: list[tuple[int, int]] = field(default_factory=list)
    contacts: list[Pixels] = field(default_factory=list)
    copied: int = 0


def cut_slide(job: Job) -> Cut:
    """Cuts one slide, or finds that it is cut already; a file whose size and time of change are as
    they were is not read again.

    Raises:
      SlideError: not readable, no pixel size, coarser than asked for, or no foreground tile.
      StoreError: the store cannot be written.
    """
    cv2.setNumThreads(1)  # the pool has a process a core
    known = job.known
    stamp = file_stamp(job.path, job.others)  # before the bytes are read: they may change meanwhile
    if known and known.get("stamp") == stamp:
        sha256 = known["sha256"]
    else:
        sha256 = content_hash(job.path, job.others)
    with Slide(job.path, job.given) as slide:
        if known and (known["sha256"], known["mpp"], known["mpp_source"]) == (
            sha256, slide.mpp, slide.mpp_source,
        ):  # fmt: skip
            return Cut({**known, "stamp": stamp}, reused=True)
        return Cut(_cut(slide, job, {"sha256": sha256, "stamp": stamp}), reused=False)


def _cut(slide: Slide, job: Job, file: dict[str, str]) -> dict[str, Any]:
    config = job.config
    choice = choose_cells(slide, job.id, config)
    picture = _picture(slide, choice.view)  # before the tiles: what it reads is decoded still
    draw = Draw()
    draw.rejected |= choice.rejected
    part = write_part(Path(config.out), job.id, _tiles(slide, job, choice, draw))
    if not part["tiles"]:
        raise SlideError(no_tile(slide.path, config, choice, draw.rejected))
    record = {
        "id": job.id,
        "dataset": job.dataset or config.dataset,
        **file,
        "width": slide.width,
        "height": slide.height,
        "mpp": slide.mpp,
        "mpp_source": slide.mpp_source,
        "notes": [
            *slide.notes,
            *_damage(draw),
            *choice.notes,
            *_passed_through(slide, config, choice.scale, draw),
        ],
        "tile_mpp": choice.scale.mpp,
        "tiles": part["tiles"],
        "rejected": draw.rejected,
        "foreground_share": round(float(choice.mask.mean()), 4),
        "part": {k: part[k] for k in ("bytes", "sha256", "records")},
    }
    section = slide_section(
        record,
        picture,
        choice.mask,
        choice.view.downsample,
        choice.scale.side,
        draw.kept,
        draw.lost,
        draw.contacts,
    )
    shown = Path(config.out) / "report" / f"{slide_key(job.id)}.html"
    write_file(Path(config.out), shown, section, durable=False)
    write_record(Path(config.out), record)
    return record


def _tiles(slide: Slide, job: Job, choice: Choice, draw: Draw) -> Iterator[Tile]:
    """Draws and reads: exactly min(max_tiles, readable foreground cells), counted in `draw`."""
    config, scale = job.config, choice.scale
    for rank, cell in enumerate(choice.cells.tolist()):
        if config.max_tiles and len(draw.kept) == config.max_tiles:
            draw.rejected["over_cap"] = choice.cells.size - rank
            return
        x, y = choice.grid.cell(cell)
        try:
            rgb = slide.read(x, y, config.tile_px, scale)
        except RegionError as error:
            draw.rejected[error.reason] += 1
            draw.lost.append((x, y))
            continue
        if choice.unsure[cell] and (reason := own_reason(rgb, scale.mpp, config)):
            draw.rejected[reason] += 1
            continue
        draw.kept.append((x, y))
        if len(draw.contacts) < CONTACTS:
            draw.contacts.append(small(rgb, CONTACT_PX))
        jpeg = slide.copied(x, y, config.tile_px, scale) if config.passthrough else None
        draw.copied += jpeg is not None
        if jpeg is None:
            jpeg = encode_jpeg(rgb, config.jpeg_quality, config.jpeg_subsampling)
        dataset = job.dataset or config.dataset
        yield Tile(jpeg, job.id, dataset, x, y, scale.mpp, slide.mpp_source)


def _passed_through(slide: Slide, config: TileConfig, scale: Scale, draw: Draw) -> list[str]:
    """What became of --passthrough, as a note of the slide."""
    if not config.passthrough:
        return []
    if draw.copied:
        return [f"passthrough: {draw.copied} of {len(draw.kept)} tiles are the slide's own JPEGs"]
    why = slide.own.refusal(scale.level, config.tile_px)
    if scale.level_side != config.tile_px:
        why = "they are resized from another um/px"
    return [f"passthrough: all tiles are encoded anew, since {why or 'none lies on the grid'}"]


def _picture(slide: Slide, view: Overview) -> Pixels:
    """The slide for the report, about `PICTURE_PX` long; read again where the mask's is smaller."""
    rgb = view.rgb
    if max(rgb.shape) < PICTURE_PX:
        rgb = slide.overview(max(slide.width, slide.height) / PICTURE_PX).rgb
    return fitted(rgb, PICTURE_PX)


def _damage(draw: Draw) -> list[str]:
    """A note where cells were lost: the rest of a file that was cut off is still a slide."""
    lost = draw.rejected["unreadable"]
    return [f"{lost} cells cannot be read: the file is damaged or cut off there"] if lost else []
