"""One slide cut at three pixel sizes, and drawn from at each and at all (paper: sec. 5.5)."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_slides import half_tissue, write_slide

from jaxhisto.cli import main
from jaxhisto.config import DataConfig
from jaxhisto.data.manifest import read_manifest
from jaxhisto.data.sources import open_tiles


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("stores")
    slide = write_slide(folder / "slides" / "s.tiff", half_tissue(1024, 512), 0.25, levels=3)
    for mpp in ("1", "0.5", "0.25"):
        flags = ["--tile-mpp", mpp, "--tile-px", "32", "--close-um", "0", "--processes", "1"]
        out = str(folder / mpp)
        assert main(["tile", str(slide), *flags, "--dataset", "D", "--out", out]) == 0
    return [folder / mpp for mpp in ("1", "0.5", "0.25")]


def test_each_resolution_and_all_of_them(stores, tmp_path: Path) -> None:
    everything: set[tuple[float | None, int | None]] = set()
    for mpp, count in (
        ("1", 16),
        ("0.5", 64),
        ("0.25", 100),
    ):  # 512 x 512 px of tissue; 100 at most
        out = tmp_path / f"{mpp}.jsonl"
        flags = ["--percent", "50", "--minimum", "0", "--mpp", mpp, "--out", str(out)]
        assert main(["sample", *map(str, stores), *flags]) == 0
        manifest = read_manifest(out)
        assert manifest.datasets[0]["available"] == count
        assert {entry.mpp for entry in manifest.entries} == {float(mpp)}
        mix = open_tiles(DataConfig(tuple(map(str, stores)), str(out)))
        assert len(mix) == count // 2
        assert mix.mpp_range() == (float(mpp), float(mpp))
        everything |= {(entry.mpp, row) for entry, row in manifest.tiles()}
    out = tmp_path / "all.jsonl"
    flags = ["--percent", "100", "--per-slide", "0", "--mpp", "1", "0.5", "0.25"]
    assert main(["sample", *map(str, stores), *flags, "--out", str(out)]) == 0
    found = {(entry.mpp, row) for entry, row in read_manifest(out).tiles()}
    assert len(found) == 180
    assert everything < found
