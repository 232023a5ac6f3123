"""report.html, read as a browser would: whole, self-contained, and with the store's numbers."""

from __future__ import annotations

import base64
import dataclasses
import json
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest
from made_slides import PINK, half_tissue, painted, spoil, write_slide

from jaxhisto.config import TileConfig
from jaxhisto.slides.tiling import TileResult, tile


class Page(HTMLParser):
    """Collects text, tags with their attributes, and what is left open."""

    VOID = frozenset({"meta", "img", "input", "br", "image", "path"})
    OPTIONAL = frozenset({"th", "td", "tr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID | self.OPTIONAL:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.OPTIONAL | self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag and wanted.items() <= a.items()]


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> TileResult:
    """A slide with a spoilt block, one with a name to trip over, and a failing one."""
    folder = tmp_path_factory.mktemp("report")
    spoil(write_slide(folder / "in" / "a.tif", half_tissue(1024, 768)), 4)
    write_slide(folder / "in" / "<b> & co.tif", painted(512, 512, PINK))
    (folder / "in" / "empty.svs").touch()
    config = TileConfig((str(folder / "in"),), str(folder / "s"), tile_px=64, max_tiles=30)
    return tile(dataclasses.replace(config, dataset="<set>", close_um=0))


def test_the_page_is_whole_and_self_contained(cut):
    page = Page((cut.store / "report.html").read_text(encoding="utf-8"))

    assert page.open == []
    assert not page.all("script")
    sources = [a.get("src") or a.get("href") for t, a in page.tags if t in ("img", "image")]
    assert len(sources) == 2 * 3  # slide, mask and contact sheet of two slides
    for source in sources:
        data = base64.b64decode(source.split(",", 1)[1])
        assert cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) is not None
    links = [a["href"] for a in page.all("a")]
    assert all(any(s["id"] == link[1:] for s in page.all("section")) for link in links)


def test_the_page_shows_what_the_store_holds(cut):
    page = Page((cut.store / "report.html").read_text(encoding="utf-8"))
    slides = {s["id"]: s for s in cut.manifest["slides"]}

    drawn = [a["d"].count("M") for a in page.all("path") if "kept" in a["class"]]
    assert sorted(drawn) == sorted(s["tiles"] for s in slides.values()) == [30, 30]
    lost = [a["d"].count("M") for a in page.all("path") if "lost" in a["class"]]
    assert sum(lost) == slides["a.tif"]["rejected"]["unreadable"] > 0
    words = " ".join(page.words)
    for text in ("<b> & co.tif", "<set>", "a.tif", "empty.svs: is empty", "tiff-resolution"):
        assert text in words
    for slide in slides.values():
        for count in slide["rejected"].values():
            assert not count or str(count) in words


def test_the_boxes_lie_where_the_tiles_were_cut(cut):
    from jaxhisto.data.store import TileStore

    store = TileStore(cut.store)
    expected = {f"M{t['x']} {t['y']}h64v64h-64z" for t in (store[i] for i in range(len(store)))}
    page = Page((cut.store / "report.html").read_text(encoding="utf-8"))
    drawn = "".join(a["d"] for a in page.all("path") if "kept" in a["class"])

    assert {f"{box}z" for box in drawn.split("z") if box} == expected
    assert "<b>" not in json.dumps([t for t, _ in page.tags])
