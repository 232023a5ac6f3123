"""Slides at paths that people meet: links, rights, long and foreign names."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from made_slides import PINK, painted, write_slide

from jaxhisto.config import TileConfig
from jaxhisto.data.store import TileStore
from jaxhisto.errors import SlideError
from jaxhisto.slides.reader import Slide
from jaxhisto.slides.tiling import tile


def config(slides: Path, out: Path, failures_allowed: int = 0) -> TileConfig:
    return TileConfig(
        slides=(str(slides),), out=str(out), tile_px=64, processes=1,
        failures_allowed=failures_allowed,
    )  # fmt: skip


def test_links_that_lead_nowhere_cost_only_themselves(tmp_path):
    """A link onto itself and a dangling one fail; a folder linked into itself is not followed."""
    folder = tmp_path / "slides"
    write_slide(folder / "a.tif", painted(128, 128, PINK))
    (folder / "loop.tif").symlink_to("loop.tif")
    (folder / "gone.tif").symlink_to("nowhere.tif")
    (folder / "again").symlink_to(folder)
    result = tile(config(folder, tmp_path / "store", failures_allowed=2))

    assert result.exit_code == 0
    assert [s["id"] for s in result.manifest["slides"]] == ["a.tif"]
    assert [(f.slide, f.reason.partition(";")[0]) for f in result.failures] == [
        ("gone.tif", "gone.tif: cannot be read (No such file or directory)"),
        ("loop.tif", "loop.tif: cannot be read (Too many levels of symbolic links)"),
    ]


def test_non_ascii_and_very_long_names_are_cut(tmp_path):
    deep = Path(*["größe-厚み-" + "n" * 60] * 5)
    folder = tmp_path / "slides"
    name = "Präparat №7 " + "x" * 180 + ".tif"
    write_slide(folder / deep / name, painted(128, 128, PINK))
    result = tile(config(folder, tmp_path / "store"))

    assert [s["id"] for s in result.manifest["slides"]] == [(deep / name).as_posix()]
    assert len(TileStore(tmp_path / "store")) == 4
    with pytest.raises(SlideError, match=r"xxx: is not there; check the path"):
        tile(config(tmp_path / ("x" * 300), tmp_path / "other"))


def test_a_slide_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    """Asked of the system where it refuses; root may read all, so there the refusal is made up."""
    path = write_slide(tmp_path / "a.tif", painted(128, 128, PINK))
    path.chmod(0)
    if os.access(path, os.R_OK):
        real = Path.open

        def refused(self, *args, **kwargs):
            if self == path:
                raise PermissionError(errno.EACCES, "Permission denied", str(self))
            return real(self, *args, **kwargs)

        monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(SlideError, match=r"a\.tif: cannot be read \(Permission denied\)"):
        Slide(path)
