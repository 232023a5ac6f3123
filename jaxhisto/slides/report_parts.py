"""What all pages of the report are made of: the frame, the look, a slide's cells as a bar."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

# Why a cell of the grid is not kept: key in the manifest -> name, explanation, colour.
REASONS = {
    "background": ("background", "less foreground than asked for", "var(--background)"),
    "pen": ("pen", "foreground with marker ink on it", "var(--pen)"),
    "outside": ("outside", "cut by the slide's right or lower edge", "var(--outside)"),
    "transparent": ("transparent", "pixels that are not in the file", "var(--transparent)"),
    "unreadable": ("unreadable", "cannot be decoded", "var(--unreadable)"),
    "over_cap": ("over the cap", "foreground beyond the tiles asked for", "var(--over)"),
}

SWITCHES = """<form class=switches><label><input type=checkbox id=masks checked>
<i class=swatch-mask></i> foreground mask</label><label><input type=checkbox id=boxes checked>
<i class=swatch-kept></i> tiles kept</label><label><i class=swatch-lost></i> could not be read
</label></form>"""


def document(title: str, body: str) -> str:
    """A whole page, self-contained: no script and nothing to load."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style></head><body>
{body}
</body></html>
"""


def header(name: str, below: str, numbers: Mapping[str, str]) -> str:
    """The head of a page.

    Args:
      name: its headline. below: HTML under it.
      numbers: unit -> value, in large type.
    """
    shown = "".join(
        f"<div><b>{escape(value)}</b><span>{unit}</span></div>" for unit, value in numbers.items()
    )
    return (
        f"<header><div><h1>{escape(name)}</h1>\n<p>{below}</p></div>"
        f"<div class=numbers>{shown}</div></header>"
    )


def bar(kept: int, rejected: Mapping[str, int]) -> str:
    """All cells of a grid as one bar: kept first, then each reason."""
    cells = [("kept", kept, "var(--kept)")]
    cells += [(name, rejected[r], colour) for r, (name, _, colour) in REASONS.items()]
    pieces = "".join(
        f'<i style="flex:{count};background:{colour}" title="{name} {count:,}"></i>'
        for name, count, colour in cells
        if count
    )
    return f"<div class=bar>{pieces}</div>"


def legend() -> str:
    """What the colours of the bars mean."""
    items = [("kept", "var(--kept)"), *((name, colour) for name, _, colour in REASONS.values())]
    return (
        "<p class=legend>"
        + "".join(f'<span><i style="background:{c}"></i>{name}</span>' for name, c in items)
        + "</p>"
    )


def facts_table(facts: Mapping[str, Any]) -> str:
    """Names and values, one a row."""
    rows = "".join(f"<tr><th>{escape(k)}<td>{escape(str(v))}</tr>" for k, v in facts.items())
    return f"<table class=facts>{rows}</table>"


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
.scroll td:first-child{overflow-wrap:anywhere;min-width:12rem}
.scroll td:nth-child(3){white-space:nowrap}
tbody tr:last-child td,.facts tr:last-child>*{border-bottom:0}
.facts th{color:var(--soft);font-weight:500;white-space:nowrap;width:1%}
.facts td{overflow-wrap:anywhere}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
nav{margin:0 0 .8rem;color:var(--soft)}
nav a,header a{color:inherit}
.failures details{padding:.5rem .9rem;margin:.5rem 0 0}
.failures .facts{margin-top:.4rem}
td a{color:inherit;text-decoration-color:var(--line);text-underline-offset:3px}
.wide{width:18%;min-width:100px}
.bar{display:flex;height:.8rem;margin-top:.35rem;border-radius:3px;overflow:hidden;gap:1px}
.bar i{min-width:2px}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;margin:0 0 .7rem;color:var(--soft)}
.legend i,.facts i{display:inline-block;width:.75rem;height:.75rem;border-radius:3px;
margin-right:.4rem}
summary{cursor:pointer;color:var(--soft)}
.failures summary{color:var(--ink)}
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
.note{margin:0 0 .7rem;overflow-wrap:anywhere}
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
