"""The report of a store: report.html and report.csv, and report/DATASET.html for a cohort.

A small store of one dataset is one page. A cohort is an index, with the datasets as a table and
the failures by kind, and a page a dataset (more, where it is large); the pictures of the first
slides are on it, those of the others are one link away, so that a page is a few megabytes however
many slides there are. One page at a time is held in memory.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jaxhisto.data.store import dataset_of
from jaxhisto.data.store_writer import slide_key, write_file
from jaxhisto.slides.failure_kinds import by_kind, kind_of
from jaxhisto.slides.report import section_of
from jaxhisto.slides.report_parts import (
    REASONS,
    SWITCHES,
    bar,
    document,
    facts_table,
    header,
    legend,
)

ROWS = 500  # slides in the table of one page: a browser lays that out at once
SECTIONS = 60  # of them with pictures where there is one page, about 150 kB each
SECTIONS_EACH = 24  # and on the first page of each of many datasets
LISTED = 200  # failures of a kind that a page names; report.csv has all
FEW = 12  # failures are shown as they are up to here, by kind beyond
COLUMNS = (
    "slide", "dataset", "status", "kind", "reason", "tiles", "tile_mpp", "mpp", "mpp_source",
    "width", "height", "foreground_share", *REASONS, "same_as", "notes", "sha256",
)  # fmt: skip

Record = Mapping[str, Any]


def write_report(manifest: Record, store: Path, notes: Sequence[str] = ()) -> str:
    """Writes report.csv and, for a cohort, the datasets' pages.

    Args:
      manifest: of the store.
      store: its folder; the slides' pages are in its folder `report`.
      notes: what else the person should read, a sentence each.

    Returns:
      The text of report.html.

    Raises:
      StoreError: the folder cannot be written.
    """
    _drop_halves(store)
    write_file(store, store / "report.csv", csv_text(manifest))
    pages: dict[str, Callable[[], str]] = {}
    slides = manifest["slides"]
    datasets = _by_dataset(manifest)
    notes = [*notes, *_twin_notes(manifest)]
    if len(datasets) == 1 and len(slides) <= ROWS:
        text = _one_page(manifest, store / "report", notes)
    else:
        text = _index(manifest, datasets, notes)
        pages = {
            name: render
            for dataset, (cut, failed) in datasets.items()
            for name, render in _dataset_pages(manifest, dataset, cut, failed, store / "report")
        }
    for name, render in pages.items():
        write_file(store, store / "report" / name, render())
    _drop_other_pages(store / "report", set(pages))
    return text


def csv_text(manifest: Record) -> str:
    """report.csv: a row a slide, those that failed too, sorted by slide id."""
    twins = same_content(manifest)
    rows: list[dict[str, Any]] = [
        {name: slide[name] for name in COLUMNS if name in slide}
        | slide["rejected"]
        | {
            "dataset": dataset_of(manifest, slide),
            "status": "cut",
            "same_as": twins.get(slide["id"]),
        }
        | {"slide": slide["id"], "notes": "; ".join(slide["notes"])}
        for slide in manifest["slides"]
    ]
    rows += [
        {"slide": failure["slide"], "dataset": _dataset_of_failure(manifest, failure)}
        | {"status": "failed", "kind": kind_of(failure["reason"]), "reason": failure["reason"]}
        for failure in manifest["failures"]
    ]
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda row: row["slide"]))
    return out.getvalue()


def same_content(manifest: Record) -> dict[str, str]:
    """Slide id -> id of the first slide that has the same bytes, for those that are no first."""
    first: dict[str, str] = {}
    return {
        slide["id"]: other
        for slide in manifest["slides"]
        if (other := first.setdefault(slide["sha256"], slide["id"])) != slide["id"]
    }


def page_names(dataset: str, slides: int) -> list[str]:
    """File names of a dataset's pages; its own name, as far as file systems and links allow."""
    name = re.sub(r'[\\/:*?"<>|#%~\x00-\x1f]', "_", dataset)[:40]
    if name != dataset or re.fullmatch(r"[0-9a-f]{20}", name) or name.startswith("."):
        name = f"{name.lstrip('.')}-{hashlib.sha256(dataset.encode()).hexdigest()[:8]}"
    more = range(2, max(1, -(-slides // ROWS)) + 1)
    return [f"{name}.html", *(f"{name}~{i}.html" for i in more)]


def _one_page(manifest: Record, sections: Path, notes: Sequence[str]) -> str:
    slides = manifest["slides"]
    shown = slides[:SECTIONS]
    more = (
        f"<p class=note>Pictures of the first {SECTIONS} of {len(slides)} slides; those of the "
        "others are behind their names in the table.</p>"
        if len(slides) > SECTIONS
        else ""
    )
    body = f"""{_head(manifest)}
<main>
{_notes(notes)}{_failures(manifest["failures"])}
<h2>Slides</h2>
{legend()}
{_table(slides, len(shown), f"{sections.name}/")}
{_settings(manifest)}
{SWITCHES}
{"".join(section_of(sections, slide["id"]) for slide in shown)}{more}
</main>"""
    return document(f"{manifest['dataset']}: {manifest['tiles']} tiles", body)


def _index(
    manifest: Record,
    datasets: Mapping[str, tuple[list[Record], list[Record]]],
    notes: Sequence[str],
) -> str:
    rows = "".join(_dataset_row(name, *both) for name, both in datasets.items())
    heads = "".join(f'<th class=n title="{why}">{name}' for name, why, _ in REASONS.values())
    body = f"""{_head(manifest, datasets)}
<main>
{_notes(notes)}{_failures(manifest["failures"])}
<h2>Datasets</h2>
{legend()}
<div class=scroll><table><thead><tr><th>dataset<th class=n>slides<th class=n>failed<th class=n>µm/px
<th class=n>foreground<th class=n>kept{heads}<th></tr></thead><tbody>{rows}</tbody></table></div>
<p class=note>A row a slide, those that failed too: <a href="report.csv">report.csv</a></p>
{_settings(manifest)}
</main>"""
    return document(f"{manifest['dataset']}: {manifest['tiles']} tiles", body)


def _dataset_row(name: str, cut: Sequence[Record], failed: Sequence[Record]) -> str:
    kept = sum(slide["tiles"] for slide in cut)
    rejected = {r: sum(slide["rejected"][r] for slide in cut) for r in REASONS}
    share = sum(slide["foreground_share"] for slide in cut) / len(cut) if cut else None
    link = f"report/{quote(page_names(name, len(cut))[0])}"
    return (
        f'<tr><td><a href="{link}">{escape(name)}</a><td class=n>{len(cut):,}'
        f"<td class=n>{f'{len(failed):,}' if failed else '·'}<td class=n>{_spread(cut)}"
        f"<td class=n>{'·' if share is None else f'{share:.0%}'}<td class=n><b>{kept:,}</b>"
        + "".join(f"<td class=n>{rejected[r] or '·':{',' if rejected[r] else ''}}" for r in REASONS)
        + f"<td class=wide>{bar(kept, rejected)}</tr>\n"
    )


def _dataset_pages(
    manifest: Record, dataset: str, cut: Sequence[Record], failed: Sequence[Record], sections: Path
) -> list[tuple[str, Callable[[], str]]]:
    """(file name, what makes its text) of each page of a dataset."""
    names = page_names(dataset, len(cut))

    def rendered(number: int) -> str:
        slides = cut[number * ROWS : (number + 1) * ROWS]
        shown = slides[: 0 if number else SECTIONS_EACH]
        links = [
            f'<a href="{quote(name)}">{i}</a>' if i != number + 1 else f"<b>{i}</b>"
            for i, name in enumerate(names, 1)
        ]
        pages = f"; page {' '.join(links)}" if len(names) > 1 else ""
        tiles = f"{sum(slide['tiles'] for slide in cut):,}"
        numbers = {"tiles": tiles, "slides": f"{len(cut):,}", "failed": f"{len(failed):,}"}
        below = f'<a href="../report.html">{escape(manifest["dataset"])}</a>{pages}'
        pictures = "".join(section_of(sections, slide["id"]) for slide in shown)
        below_too = f"; of the first {len(shown)} slides they are below" if shown else ""
        body = f"""{header(dataset, below, numbers | {"µm/px": _spread(cut)})}
<main>
{"" if number else _failures(failed)}
<h2>Slides</h2>
<p class=note>Pictures are behind the names{below_too}.</p>
{legend()}
{_table(slides, len(shown), "")}
{SWITCHES if shown else ""}
{pictures}
</main>"""
        return document(f"{dataset}: {tiles} tiles", body)

    return [(name, lambda number=i: rendered(number)) for i, name in enumerate(names)]  # type: ignore[misc]


def _table(slides: Sequence[Record], shown: int, folder: str) -> str:
    """A row a slide; the first `shown` have their pictures on this page, the others in `folder`."""
    links = [
        f"#{slide_key(s['id'])}" if i < shown else f"{folder}{slide_key(s['id'])}.html"
        for i, s in enumerate(slides)
    ]
    rows = "".join(
        f'<tr><td><a href="{link}">{escape(s["id"])}</a></td>'
        f"<td class=n>{s['mpp']:.4g}</td><td>{escape(s['mpp_source'])}</td>"
        f"<td class=n>{s['foreground_share']:.0%}</td><td class=n><b>{s['tiles']}</b></td>"
        + "".join(f"<td class=n>{s['rejected'][reason] or '·'}</td>" for reason in REASONS)
        + f"<td class=wide>{bar(s['tiles'], s['rejected'])}</td></tr>\n"
        for link, s in zip(links, slides, strict=True)
    )
    heads = "".join(f'<th class=n title="{why}">{name}' for name, why, _ in REASONS.values())
    return (
        "<div class=scroll><table><thead><tr><th>slide<th class=n>µm/px<th>from"
        f"<th class=n>foreground<th class=n>kept{heads}<th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _failures(failures: Sequence[Mapping[str, str]]) -> str:
    if not failures:
        return ""
    inside = (
        _reasons(failures)
        if len(failures) <= FEW
        else "".join(
            f"<details><summary>{escape(kind)}: {len(of):,}</summary>{_reasons(of)}</details>"
            for kind, of in by_kind(failures).items()
        )
    )
    return f"<div class=failures><h2>{len(failures):,} not in the store</h2>{inside}</div>"


def _reasons(failures: Sequence[Mapping[str, str]]) -> str:
    items = "".join(f"<li>{escape(failure['reason'])}</li>" for failure in failures[:LISTED])
    more = f"<li>and {len(failures) - LISTED:,} more, in report.csv</li>"
    return f"<ul>{items}{more if len(failures) > LISTED else ''}</ul>"


def _notes(notes: Iterable[str]) -> str:
    return "".join(f"<p class=note>{escape(note)}</p>" for note in notes)


def _twin_notes(manifest: Record) -> list[str]:
    twins = same_content(manifest)
    if not twins:
        return []
    later, first = next(iter(twins.items()))
    return [
        f"{len(twins):,} slides have the same bytes as another one (the first: {later} as {first}; "
        "report.csv has all, under same_as), so their tissue counts twice"
    ]


def _head(manifest: Record, datasets: Mapping[str, Any] | None = None) -> str:
    numbers = {"tiles": f"{manifest['tiles']:,}", "slides": f"{len(manifest['slides']):,}"}
    if datasets:
        numbers["datasets"] = str(len(datasets))
    numbers |= {"failed": f"{len(manifest['failures']):,}", "px a side": str(manifest["tile_px"])}
    numbers |= {"µm/px": _spread(manifest["slides"])}
    return header(
        manifest["dataset"], f"tiles cut by jaxhisto {escape(manifest['code_version'])}", numbers
    )


def _spread(slides: Iterable[Record]) -> str:
    sizes = sorted({f"{slide['tile_mpp']:.3g}" for slide in slides}, key=float)
    return f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else "".join(sizes)


def _settings(manifest: Record) -> str:
    facts = {**manifest["settings"], "manifest hash": manifest["hash"]}
    return f"<details><summary>Settings and hash</summary>{facts_table(facts)}</details>"


def _by_dataset(manifest: Record) -> dict[str, tuple[list[Record], list[Record]]]:
    """Dataset -> (its slides, its failures), by name; one of which all failed is there too."""
    found: dict[str, tuple[list[Record], list[Record]]] = defaultdict(lambda: ([], []))
    for slide in manifest["slides"]:
        found[dataset_of(manifest, slide)][0].append(slide)
    for failure in manifest["failures"]:
        found[_dataset_of_failure(manifest, failure)][1].append(failure)
    return dict(sorted(found.items()))


def _dataset_of_failure(manifest: Record, failure: Mapping[str, str]) -> str:
    by_folder = manifest["settings"].get("dataset_by_folder")
    return str(failure["slide"].partition("/")[0] if by_folder else manifest["dataset"])


def _drop_halves(store: Path) -> None:
    """What a killed run was writing: nobody else writes here once all slides are cut."""
    for half in (*store.glob("report.*.tmp"), *(store / "report").glob("*.tmp")):
        half.unlink(missing_ok=True)


def _drop_other_pages(folder: Path, keep: set[str]) -> None:
    """Pages of datasets that are no longer; slides' pages, named by hash, are the store's."""
    for page in folder.glob("*.html"):
        if page.name not in keep and not re.fullmatch(r"[0-9a-f]{20}", page.stem):
            page.unlink(missing_ok=True)
