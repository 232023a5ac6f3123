"""What the report shows of one slide: what was cut, and why not more.

Written when the slide is cut, as STORE/report/KEY.html: a page by itself, whose section the
store's pages (`cohort_report`) take over. Pictures are data URIs.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from jaxhisto.data.store_writer import slide_key
from jaxhisto.slides.reader import Flags, Pixels
from jaxhisto.slides.report_parts import REASONS, SWITCHES, document, facts_table

CONTACT_COLUMNS = 12
MASK_PX = 1200  # longest side of the mask's picture
MASK_COLOUR = (0, 150, 136)  # RGB; teal is the hue H&E does not have


def slide_section(
    record: dict[str, Any],
    picture: Pixels,
    mask: Flags,
    mask_downsample: float,
    side: float,
    kept: Sequence[tuple[int, int]],
    lost: Sequence[tuple[int, int]],
    contacts: Sequence[Pixels],
) -> str:
    """The page of one slide.

    Args:
      record: its manifest entry.
      picture: (h, w, 3) uint8, the whole slide.
      mask: (h, w) bool, foreground, each pixel `mask_downsample` level-0 pixels wide.
      side: of a tile in level-0 pixels.
      kept, lost: top-left corners of tiles drawn and of tiles that could not be read, level 0.
      contacts: the first tiles, all of one side.
    """
    width, height = record["width"], record["height"]
    mask_size = (mask.shape[1] * mask_downsample, mask.shape[0] * mask_downsample)
    stroke = max(width, height) / 400
    notes = "".join(f"<p class=note>{escape(note)}</p>" for note in record["notes"])
    section = f"""
<section id="{slide_key(record["id"])}">
<h2>{escape(record["id"])}</h2>{notes}
<div class=pair>
<figure><svg viewBox="0 0 {width} {height}" role="img" aria-label="slide with mask and tiles">
<image width="{width}" height="{height}" preserveAspectRatio="none" href="{_jpeg(picture)}"/>
<image class=mask width="{mask_size[0]:.0f}" height="{mask_size[1]:.0f}"
 preserveAspectRatio="none" href="{_mask_png(mask)}"/>
<path class="boxes kept" stroke-width="{stroke:.0f}" d="{_squares(kept, side)}"/>
<path class="boxes lost" stroke-width="{stroke:.0f}" d="{_squares(lost, side)}"/>
</svg></figure>
<div>{_facts(record)}{_rejections(record)}</div>
</div>
<figure class=sheet><img alt="tiles" src="{_jpeg(_sheet(contacts))}">
<figcaption>the first {len(contacts)} tiles drawn</figcaption></figure>
</section>
"""
    back = '<nav><a href="../report.html">all slides</a></nav>'
    return document(record["id"], f"<main>{back}{SWITCHES}{section}</main>")


def section_of(folder: Path, slide: str) -> str:
    """The section of a slide in the page that was written for it, or a note in its place."""
    file = folder / f"{slide_key(slide)}.html"
    try:
        text = file.read_text(encoding="utf-8")
        return text[text.index("<section") : text.rindex("</section>")] + "</section>"
    except (OSError, ValueError):
        return (
            f"<section><h2>{escape(slide)}</h2><p class=note>{file.name} was removed.</p></section>"
        )


def _facts(record: dict[str, Any]) -> str:
    facts = {
        "size": f"{record['width']:,} x {record['height']:,} px",
        "level 0": f"{record['mpp']:.4g} µm/px, from {record['mpp_source']}",
        "tiles": f"{record['tiles']} at {record['tile_mpp']:.4g} µm/px",
        "foreground": f"{record['foreground_share']:.1%} of the slide",
        "sha256": f"{record['sha256'][:16]}…",
    }
    return facts_table(facts)


def _rejections(record: dict[str, Any]) -> str:
    rows = "".join(
        f'<tr><th><i style="background:{colour}"></i>{name}<td class=n>{record["rejected"][reason]}'
        f"<td>{why}</tr>"
        for reason, (name, why, colour) in REASONS.items()
    )
    return f"<h3>Cells not kept</h3><table class=facts>{rows}</table>"


def _squares(corners: Sequence[tuple[int, int]], side: float) -> str:
    return "".join(f"M{x} {y}h{side:.0f}v{side:.0f}h-{side:.0f}z" for x, y in corners)


def _sheet(tiles: Sequence[Pixels]) -> Pixels:
    """Tiles in rows of `CONTACT_COLUMNS`, two white pixels between."""
    side = tiles[0].shape[0] + 2
    columns = min(CONTACT_COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = np.full((rows * side - 2, columns * side - 2, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        y, x = i // columns * side, i % columns * side
        sheet[y : y + side - 2, x : x + side - 2] = tile
    return sheet


def fitted(image: Pixels, longest: int) -> Pixels:
    """The image reduced (area averaging) to a longest side of `longest` pixels, or as it is."""
    factor = longest / max(image.shape[:2])
    if factor >= 1:
        return image
    size = tuple(max(1, round(side * factor)) for side in image.shape[1::-1])
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)


def _jpeg(rgb: Pixels) -> str:
    bgr = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)
    data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


def _mask_png(mask: Flags) -> str:
    """The mask as a tint: the colour where True, nothing elsewhere."""
    opacity = fitted(mask.astype(np.uint8) * 75, MASK_PX)
    bgra = np.zeros((*opacity.shape, 4), np.uint8)
    bgra[opacity > 0] = (*MASK_COLOUR[::-1], 0)
    bgra[..., 3] = opacity
    data = cv2.imencode(".png", bgra)[1].tobytes()
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
