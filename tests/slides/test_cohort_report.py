"""The report of a cohort: every slide once, every link somewhere, pages that a browser can hold."""

from __future__ import annotations

import csv
import io
import re
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import pytest
from test_report import Page

from jaxhisto.data.store_writer import slide_key
from jaxhisto.slides import cohort_report
from jaxhisto.slides.cohort_report import page_names, same_content, write_report
from jaxhisto.slides.failure_kinds import OTHER, by_kind, kind_of
from jaxhisto.slides.report_parts import REASONS, document

ODD = ["a/b?", "<script>", "0123456789abcdef0123", "naïve 肺 #1", "~", "x" * 255, ".hidden"]


def record(dataset: str, i: int) -> dict:
    """A slide's manifest entry; numbers that differ from slide to slide."""
    return {
        "id": f"{dataset}/{i}.svs", "dataset": dataset, "sha256": f"{dataset}-{i // 2 * 2}",
        "width": 80_000 + i, "height": 60_000, "mpp": 0.25, "mpp_source": "openslide.mpp",
        "notes": ["odd"] if i == 3 else [], "tile_mpp": 0.25, "tiles": 90 + i % 10,
        "rejected": {reason: 1000 * k + i for k, reason in enumerate(REASONS)},
        "foreground_share": 0.25, "part": {"file": "f", "bytes": 1, "sha256": "0"},
    }  # fmt: skip


def manifest(sizes: dict[str, int], failures: int = 0, by_folder: bool = True) -> dict:
    """As `tile` writes it; the last dataset given has the failures."""
    slides = [record(name, i) for name, n in sorted(sizes.items()) for i in range(n)]
    where = f"{list(sizes)[-1]}/" if by_folder else ""
    return {
        "dataset": "all", "code_version": "1", "tile_px": 224, "hash": "h",
        "settings": {"dataset_by_folder": True} if by_folder else {},
        "tiles": sum(s["tiles"] for s in slides), "slides": slides,
        "failures": [
            {"slide": f"{where}bad{i}", "reason": f"{where}bad{i}: is empty (0 bytes); remove it"}
            for i in range(failures)
        ],
    }  # fmt: skip


def write_slides(of: dict, store: Path, size: int = 0) -> None:
    """The pages that cutting leaves."""
    (store / "report").mkdir(parents=True, exist_ok=True)
    for slide in of["slides"]:
        section = f'<section id="{slide_key(slide["id"])}">{"." * size}</section>'
        page = store / "report" / f"{slide_key(slide['id'])}.html"
        page.write_text(document("a slide", section))


def links(page: Path) -> list[Path]:
    """Where its links lead; those into the page itself are checked here."""
    parsed = Page(page.read_text(encoding="utf-8"))
    assert parsed.open == []
    ids = {a.get("id") for a in parsed.all("section")}
    found = [a["href"] or "" for a in parsed.all("a")]
    assert all(link[1:] in ids for link in found if link.startswith("#"))
    return [page.parent / unquote(link) for link in found if not link.startswith("#")]


def test_every_slide_is_on_one_page_and_every_link_leads_somewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(cohort_report, "ROWS", 4)
    monkeypatch.setattr(cohort_report, "SECTIONS_EACH", 2)
    all_of = manifest({name: i + 2 for i, name in enumerate(ODD)}, failures=3)
    write_slides(all_of, tmp_path)
    stale = tmp_path / "report" / "gone.html"
    halves = [tmp_path / "report.csv.17.tmp", tmp_path / "report" / "0123.html.17.tmp"]
    for file in (stale, *halves):
        file.touch()
    (tmp_path / "report.html").write_text(write_report(all_of, tmp_path), encoding="utf-8")

    assert not any(file.exists() for file in (stale, *halves))
    index = links(tmp_path / "report.html")
    assert len(index) == len(ODD) + 1  # report.csv too
    assert all(page.is_file() for page in index)
    shown: Counter[str] = Counter()
    pages = [p for p in (tmp_path / "report").iterdir() if not re.fullmatch("[0-9a-f]{20}", p.stem)]
    assert len(pages) == sum(-(-(i + 2) // 4) for i in range(len(ODD)))
    for page in pages:
        assert all(target.is_file() for target in links(page))
        text = page.read_text(encoding="utf-8")
        table = text[text.index("<tbody>") : text.index("</tbody>")]
        shown.update(re.findall(r'"(?:#|)([0-9a-f]{20})(?:\.html)?"', table))
        assert text.count("<section") == (0 if "~2" in page.stem or "~3" in page.stem else 2)
        assert "<script>" not in text
    assert shown == {slide_key(s["id"]): 1 for s in all_of["slides"]}


def test_the_index_adds_up(tmp_path):
    all_of = manifest({"a": 3, "b": 5}, failures=14)
    page = Page(write_report(all_of, tmp_path))
    words = " ".join(page.words)

    for number in (sum(90 + i for i in range(3)), sum(90 + i for i in range(5))):
        assert str(number) in words
    unreadable = list(REASONS).index("unreadable")
    assert f"{5000 * unreadable + 10:,}" in words
    assert "empty file: 14" in words
    assert "bad13: is empty" in words
    assert "3 slides have the same bytes as another one (the first: a/1.svs as a/0.svs" in words


def test_a_small_store_of_one_dataset_is_one_page(tmp_path):
    one = manifest({"a": 3}, failures=2, by_folder=False)
    one["dataset"] = "a"
    write_slides(one, tmp_path)
    text = write_report(one, tmp_path, ["dataset a is not known"])

    assert text.count("<section") == 3
    assert "dataset a is not known" in text
    assert not [p for p in (tmp_path / "report").iterdir() if len(p.stem) != 20]


def test_the_table_is_a_row_a_slide(tmp_path):
    write_report(manifest({"a": 4, "b,c": 2}, failures=1), tmp_path)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "report.csv").read_text("utf-8"))))

    assert [r["slide"] for r in rows] == sorted(r["slide"] for r in rows)
    assert Counter(r["status"] for r in rows) == {"cut": 6, "failed": 1}
    by_id = {r["slide"]: r for r in rows}
    assert by_id["a/3.svs"]["same_as"] == "a/2.svs"
    assert by_id["a/3.svs"]["notes"] == "odd"
    assert by_id["a/3.svs"]["over_cap"] == str(1000 * list(REASONS).index("over_cap") + 3)
    assert by_id["b,c/bad0"] == dict.fromkeys(by_id["b,c/bad0"], "") | {
        "slide": "b,c/bad0", "dataset": "b,c", "status": "failed", "kind": "empty file",
        "reason": "b,c/bad0: is empty (0 bytes); remove it",
    }  # fmt: skip


def test_page_names_are_files_and_differ():
    names = [name for dataset in [*ODD, "a_b_", "x" * 41] for name in page_names(dataset, 1100)]

    assert len(set(names)) == len(names) == 3 * (len(ODD) + 2)
    assert all(len(name.encode()) < 200 and "/" not in name for name in names)
    assert not any(re.fullmatch("[0-9a-f]{20}.html", name) for name in names)
    assert page_names("TCGA-BRCA", 0) == ["TCGA-BRCA.html"]


def test_failures_are_grouped_by_what_they_share():
    said = ["a: is empty (0 bytes)", "b: took longer than 3 s", "c: is empty (0 bytes)", "d: ?"]
    groups = by_kind([{"slide": s[0], "reason": s} for s in said])

    assert {kind: [f["slide"] for f in of] for kind, of in groups.items()} == {
        "empty file": ["a", "c"], OTHER: ["d"], "took too long": ["b"],
    }  # fmt: skip
    assert next(iter(groups)) == "empty file"
    assert kind_of("x: its process died (exit code -9), twice: the file is") == "process died"


def test_the_first_of_the_same_bytes_is_named():
    assert same_content(manifest({"a": 5})) == {"a/1.svs": "a/0.svs", "a/3.svs": "a/2.svs"}


@pytest.mark.slow
def test_twenty_five_thousand_slides_are_reported(tmp_path):
    """57 datasets, a third of all slides in one; pictures of the size that they have."""
    sizes = {f"set-{i:02}": 300 for i in range(56)} | {"large": 25_000 - 56 * 300}
    whole = manifest(sizes, failures=2000)
    first = {
        **whole,
        "slides": [s for s in whole["slides"] if int(s["id"][:-4].split("/")[1]) < 24],
    }
    write_slides(first, tmp_path, size=150_000)
    begun = time.perf_counter()
    (tmp_path / "report.html").write_text(write_report(whole, tmp_path), encoding="utf-8")
    seconds = time.perf_counter() - begun
    pages = [p for p in (tmp_path / "report").iterdir() if len(p.stem) != 20]
    sizes_of = [p.stat().st_size / 1e6 for p in [*pages, tmp_path / "report.html"]]
    tracemalloc.start()
    write_report(whole, tmp_path)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    print(
        f"\n{len(pages)} pages and the index ({sizes_of[-1]:.1f} MB) in {seconds:.1f} s, at most "
        f"{peak:.0f} MiB; the largest {max(sizes_of):.1f} MB, all {sum(sizes_of):.0f} MB"
    )

    assert len(pages) == 56 + -(-sizes["large"] // 500)
    assert max(sizes_of) < 6
    assert sizes_of[-1] < 1
    assert peak < 100
    text = (tmp_path / "report.csv").read_text(encoding="utf-8")
    assert len(list(csv.reader(io.StringIO(text)))) == 27_001
