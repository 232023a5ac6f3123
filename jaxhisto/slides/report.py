"""report.html: one self-contained page on which a person sees what was cut, and why not more.

Each slide's section is written when the slide is cut (STORE/report/KEY.html); the page is put
together from them when the store is finished. Pictures are data URIs; there is no script and
nothing to load.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from jaxhisto.data.store_writer import slide_key
from jaxhisto.slides.reader import Flags, Pixels

SECTIONS = 60  # slides shown with pictures, about 150 kB each; all are in the table
CONTACT_COLUMNS = 12
MASK_PX = 1200  # longest side of the mask's picture
MASK_COLOUR = (0, 150, 136)  # RGB; teal is the hue H&E does not have
# Why a cell of the grid is not kept: key in the manifest -> name, explanation, colour.
REASONS = {
    "background": ("background", "less foreground than asked for", "var(--background)"),
    "pen": ("pen", "foreground with marker ink on it", "var(--pen)"),
    "outside": ("outside", "cut by the slide's right or lower edge", "var(--outside)"),
    "transparent": ("transparent", "pixels that are not in the file", "var(--transparent)"),
    "unreadable": ("unreadable", "cannot be decoded", "var(--unreadable)"),
    "over_cap": ("over the cap", "foreground beyond the tiles asked for", "var(--over)"),
}


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
    """The HTML of one slide.

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
    return f"""
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


def page(manifest: dict[str, Any], sections: Path) -> str:
    """The whole page.

    Args:
      manifest: of the store.
      sections: folder that holds the slides' sections.
    """
    slides = manifest["slides"]
    shown = slides[:SECTIONS]
    more = (
        f"<p class=note>Pictures of the first {SECTIONS} of {len(slides)} slides; the sections of "
        f"all of them are in <code>{escape(sections.name)}/</code> beside this page.</p>"
        if len(slides) > SECTIONS
        else ""
    )
    sizes = sorted({f"{slide['tile_mpp']:.3g}" for slide in slides}, key=float)
    spread = sizes[0] if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(manifest["dataset"])}: {manifest["tiles"]} tiles</title>
<style>{STYLE}</style></head><body>
<header><div><h1>{escape(manifest["dataset"])}</h1>
<p>tiles cut by jaxhisto {escape(manifest["code_version"])}</p></div>
<div class=numbers>{_number(f"{manifest['tiles']:,}", "tiles")}{_number(str(len(slides)), "slides")}
{_number(str(len(manifest["failures"])), "failed")}{_number(str(manifest["tile_px"]), "px a side")}
{_number(spread, "µm/px")}</div></header>
<main>
{_failures(manifest["failures"])}
<h2>Slides</h2>
{_legend()}
{_table(slides)}
<details><summary>Settings and hash</summary>{_settings(manifest)}</details>
<form class=switches><label><input type=checkbox id=masks checked> <i class=swatch-mask></i>
foreground mask</label><label><input type=checkbox id=boxes checked> <i class=swatch-kept></i>
tiles kept</label><label><i class=swatch-lost></i> could not be read</label></form>
{"".join(_section(sections, slide["id"]) for slide in shown)}{more}
</main></body></html>
"""


def _section(folder: Path, slide: str) -> str:
    file = folder / f"{slide_key(slide)}.html"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    return f"<section><h2>{escape(slide)}</h2><p class=note>{file.name} was removed.</p></section>"


def _table(slides: Iterable[dict[str, Any]]) -> str:
    rows = "".join(
        f'<tr><td><a href="#{slide_key(s["id"])}">{escape(s["id"])}</a></td>'
        f"<td class=n>{s['mpp']:.4g}</td><td>{escape(s['mpp_source'])}</td>"
        f"<td class=n>{s['foreground_share']:.0%}</td><td class=n><b>{s['tiles']}</b></td>"
        + "".join(f"<td class=n>{s['rejected'][reason] or '·'}</td>" for reason in REASONS)
        + f"<td class=wide>{_bar(s)}</td></tr>"
        for s in slides
    )
    heads = "".join(f'<th class=n title="{why}">{name}' for name, why, _ in REASONS.values())
    return (
        "<div class=scroll><table><thead><tr><th>slide<th class=n>µm/px<th>from"
        f"<th class=n>foreground<th class=n>kept{heads}<th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _bar(slide: dict[str, Any]) -> str:
    """All cells of the slide's grid as one bar: kept first, then each reason."""
    parts = [("kept", slide["tiles"], "var(--kept)")]
    parts += [(name, slide["rejected"][r], colour) for r, (name, _, colour) in REASONS.items()]
    cells = "".join(
        f'<i style="flex:{count};background:{colour}" title="{name} {count}"></i>'
        for name, count, colour in parts
        if count
    )
    return f"<div class=bar>{cells}</div>"


def _legend() -> str:
    items = [("kept", "var(--kept)"), *((name, colour) for name, _, colour in REASONS.values())]
    return (
        "<p class=legend>"
        + "".join(f'<span><i style="background:{c}"></i>{name}</span>' for name, c in items)
        + "</p>"
    )


def _facts(record: dict[str, Any]) -> str:
    facts = {
        "size": f"{record['width']:,} x {record['height']:,} px",
        "level 0": f"{record['mpp']:.4g} µm/px, from {record['mpp_source']}",
        "tiles": f"{record['tiles']} at {record['tile_mpp']:.4g} µm/px",
        "foreground": f"{record['foreground_share']:.1%} of the slide",
        "sha256": f"{record['sha256'][:16]}…",
    }
    rows = "".join(f"<tr><th>{k}<td>{escape(v)}</tr>" for k, v in facts.items())
    return f"<table class=facts>{rows}</table>"


def _rejections(record: dict[str, Any]) -> str:
    rows = "".join(
        f'<tr><th><i style="background:{colour}"></i>{name}<td class=n>{record["rejected"][reason]}'
        f"<td>{why}</tr>"
        for reason, (name, why, colour) in REASONS.items()
    )
    return f"<h3>Cells not kept</h3><table class=facts>{rows}</table>"


def _failures(failures: Sequence[dict[str, str]]) -> str:
    if not failures:
        return ""
    items = "".join(f"<li>{escape(failure['reason'])}</li>" for failure in failures)
    return f"<div class=failures><h2>{len(failures)} not in the store</h2><ul>{items}</ul></div>"


def _settings(manifest: dict[str, Any]) -> str:
    facts = {**manifest["settings"], "manifest hash": manifest["hash"]}
    rows = "".join(f"<tr><th>{escape(k)}<td>{escape(str(v))}</tr>" for k, v in facts.items())
    return f"<table class=facts>{rows}</table>"


def _number(value: str, unit: str) -> str:
    return f"<div><b>{escape(value)}</b><span>{unit}</span></div>"


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


STYLE = """
:root{--ink:#20242c;--soft:#667085;--line:#e4e7ec;--paper:#fff;--ground:#f6f5f8;--accent:#7a2f6f;
--kept:#7a2f6f;--background:#d9dce3;--outside:#b9bec9;--transparent:#8fb8de;--unreadable:#e5484d;
--over:#d9b8d4;--pen:#3f9c7a;--box:#14213d}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
header{display:flex;flex-wrap:wrap;gap:1rem 3rem;align-items:center;justify-content:space-between;
padding:1.6rem max(1.5rem,calc(50vw - 580px));background:var(--accent);color:#fff}
header p{margin:0;opacity:.75}
h1{margin:0;font-size:1.7rem;font-weight:650;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:0 0 .6rem;overflow-wrap:anywhere}
h3{font-size:.95rem;margin:1.2rem 0 .3rem}
.numbers{display:flex;flex-wrap:wrap;gap:.5rem 2rem}
.numbers b{display:block;font-size:1.5rem;line-height:1.2;font-variant-numeric:tabular-nums}
.numbers span{opacity:.75;font-size:.85rem}
main{max-width:1208px;margin:0 auto;padding:1.6rem 1.5rem 4rem}
section,.scroll,.failures,details{background:var(--paper);border:1px solid var(--line);
border-radius:10px;padding:1.2rem 1.4rem;margin:0 0 1.2rem}
.scroll{overflow-x:auto;padding:.4rem 1rem}
.failures{border-color:#f2b8b5;background:#fff6f5}
.failures h2{color:#a3261f}
.failures ul{margin:0;padding-left:1.1rem}
table{border-collapse:collapse;width:100%}
th,td{padding:.4rem .42rem;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
thead th{color:var(--soft);font-weight:500;font-size:.82rem;white-space:nowrap}
.scroll table{font-size:.92rem}
tbody tr:last-child td,.facts tr:last-child>*{border-bottom:0}
.facts th{color:var(--soft);font-weight:500;white-space:nowrap;width:1%}
.facts td{overflow-wrap:anywhere}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td a{color:inherit;text-decoration-color:var(--line);text-underline-offset:3px}
.wide{width:18%;min-width:100px}
.bar{display:flex;height:.8rem;margin-top:.35rem;border-radius:3px;overflow:hidden;gap:1px}
.bar i{min-width:2px}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;margin:0 0 .7rem;color:var(--soft)}
.legend i,.facts i{display:inline-block;width:.75rem;height:.75rem;border-radius:3px;
margin-right:.4rem}
summary{cursor:pointer;color:var(--soft)}
.pair{display:grid;grid-template-columns:minmax(0,1.35fr) minmax(280px,1fr);gap:1.6rem}
@media(max-width:820px){.pair{grid-template-columns:1fr}}
figure{margin:0}
svg{display:block;width:100%;max-height:620px;border:1px solid var(--line);border-radius:6px;
background:#fff}
.mask{image-rendering:pixelated}
.boxes{fill:none;stroke:var(--box)}
.boxes.lost{stroke:var(--unreadable)}
.sheet{margin-top:1.2rem}
.sheet img{display:block;max-width:100%;border-radius:4px}
figcaption,.note{color:var(--soft);font-size:.87rem;margin:.4rem 0 0}
.note{margin:0 0 .7rem}
.switches{position:sticky;top:0;z-index:1;display:flex;flex-wrap:wrap;gap:.3rem 1.6rem;
padding:.7rem 1.4rem;margin:0 0 1.2rem;background:var(--paper);border:1px solid var(--line);
border-radius:10px}
.switches i{display:inline-block;width:.8rem;height:.8rem;border-radius:3px;margin:0 .2rem 0 .3rem}
.swatch-mask{background:rgba(0,150,136,.45)}
.swatch-kept{border:2px solid var(--box)}
.swatch-lost{border:2px solid var(--unreadable)}
body:has(#masks:not(:checked)) .mask,body:has(#boxes:not(:checked)) .kept{display:none}
@media print{.switches{display:none}section{break-inside:avoid}}
"""
