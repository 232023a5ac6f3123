"""`tile` as a user runs it: what comes back, what is refused, what survives a stop."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
from made_slides import GLASS, PINK, half_tissue, painted, spoil, write_slide

from jaxhisto.config import TileConfig
from jaxhisto.data.store import TileStore, is_store
from jaxhisto.errors import ConfigError, SlideError, StoreError
from jaxhisto.settings import to_json
from jaxhisto.slides.choosing import Grid, order
from jaxhisto.slides.finding import find_slides
from jaxhisto.slides.tiling import checked, tile

RUN = """
import sys
from pathlib import Path
from jaxhisto.config import TileConfig
from jaxhisto.settings import from_json
from jaxhisto.errors import JaxhistoError
from jaxhisto.slides.tiling import tile
if __name__ == "__main__":
    try:
        print(tile(from_json(TileConfig, Path(sys.argv[1]).read_text())).manifest["hash"])
    except JaxhistoError as error:
        sys.exit(str(error))
"""


def config(slides: Path, out: Path, **changes: object) -> TileConfig:
    return dataclasses.replace(
        TileConfig(slides=(str(slides),), out=str(out), dataset="d", tile_px=64, processes=1),
        **changes,
    )


def contents(store: TileStore, slide: str) -> list[tuple[int, int, bytes]]:
    tiles = [store[i] for i, name in enumerate(store.slides()) if name == slide]
    return [(t["x"], t["y"], t["image"]) for t in tiles]


def decoded(data: bytes) -> np.ndarray:
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), 1), cv2.COLOR_BGR2RGB)


@pytest.fixture(scope="module")
def real_store(shared_data, tmp_path_factory):
    """The real slides, cut as the paper does, with a pixel size for the one that has none."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "slides").mkdir()
    for path in (shared_data / "wsi").iterdir():
        (folder / "slides" / path.name).symlink_to(path)
    (folder / "slides" / "text.svs").write_text("no slide")
    return tile(TileConfig(slides=(str(folder / "slides"),), out=str(folder / "store"), mpp=0.25))


def test_real_slides_yield_what_they_hold(real_store):
    by_id = {s["id"]: s for s in real_store.manifest["slides"]}
    kept = {name: slide["tiles"] for name, slide in by_id.items()}

    assert kept["TCGA-CR-7395-01A-01-TS1.svs"] == kept["her2st_C2_pyramid.tiff"] == 100
    assert 40 <= kept["CMU-1-Small-Region.svs"] <= 60
    assert 1 <= kept["OS-1-detail.ome.tif"] <= 16
    assert by_id["OS-1-detail.ome.tif"]["mpp_source"] == "ome.PhysicalSize"
    assert 1 <= kept["camelyon16_lowres_tiledfull.dcm"] <= 15
    assert by_id["TCGA-CR-7395-01A-01-TS1.svs"]["mpp_source"] == "flag"
    for slide in by_id.values():
        across, down = -(-slide["width"] // 224), -(-slide["height"] // 224)
        assert slide["tiles"] + sum(slide["rejected"].values()) == across * down


def test_the_bluish_slide_alone_is_said_to_want_another_detector(real_store):
    fits = [line for line in real_store.summary() if "calls tissue" in line]

    assert len(fits) == 1
    assert fits[0].startswith("her2st_C2_pyramid.tiff: note: ciga2022 keeps 7")
    assert fits[0].endswith("of what od calls tissue (bluish stain); try --foreground od")
    assert [s["rejected"]["pen"] for s in real_store.manifest["slides"]] == [0] * 5


def test_the_unreadable_slide_is_reported_and_the_others_go_on(real_store):
    assert [f.slide for f in real_store.failures] == ["text.svs"]
    assert "OpenSlide does not read this file" in real_store.failures[0].reason
    assert real_store.exit_code == 1
    assert dataclasses.replace(real_store, failures_allowed=1).exit_code == 0
    assert "failed: text.svs" in "\n".join(real_store.summary())


def test_real_tiles_are_the_slides_pixels(real_store, shared_data):
    """Every tile against plain OpenSlide, within JPEG's loss at quality 95."""
    store = TileStore(real_store.store)
    for i in range(0, len(store), 7):
        t = store[i]
        if t["slide"].endswith(".ome.tif"):
            continue  # test_tiff_reader has it: OpenSlide does not read it
        with openslide.OpenSlide(shared_data / "wsi" / t["slide"]) as plain:
            region = np.asarray(plain.read_region((t["x"], t["y"]), 0, (224, 224)))
        assert region[..., 3].min() == 255
        error = np.abs(decoded(t["image"]).astype(int) - region[..., :3])
        assert error.mean() < 2.5
        assert error.max() < 60


def test_without_a_pixel_size_the_slide_is_refused(shared_data, tmp_path):
    name = "TCGA-CR-7395-01A-01-TS1.svs"
    with pytest.raises(SlideError, match=rf"{name}: .*pixel size.*--mpp"):
        tile(TileConfig(slides=(str(shared_data / "wsi" / name),), out=str(tmp_path / "s")))

    assert not (tmp_path / "s").exists()


def test_unreadable_tiles_are_counted_and_the_next_takes_their_place(tmp_path):
    """1024 x 1024 px of tissue: 256 cells, of which a spoilt 256-px block holds 16."""
    path = spoil(write_slide(tmp_path / "in" / "a.tif", painted(1024, 1024, PINK)), 5)
    everything = tile(config(path, tmp_path / "all", max_tiles=0)).manifest["slides"][0]
    some = tile(config(path, tmp_path / "some", max_tiles=239)).manifest["slides"][0]

    assert everything["tiles"] == 240
    assert everything["rejected"]["unreadable"] == 16
    assert some["tiles"] == 239
    assert sum(some["rejected"].values()) == 17
    corners = {(t[0], t[1]) for t in contents(TileStore(tmp_path / "all"), "a.tif")}
    assert corners == {
        (x, y)
        for x in range(0, 1024, 64)
        for y in range(0, 1024, 64)
        if not (256 <= x < 512 and 256 <= y < 512)
    }


def test_a_spoilt_coarse_level_loses_no_tile(tmp_path):
    """Where the mask's level cannot be read, the tile's own pixels decide."""
    image = half_tissue(4096, 512)
    whole = write_slide(tmp_path / "whole.tif", image, levels=5)
    spoilt = spoil(write_slide(tmp_path / "spoilt.tif", image, levels=5), 0, page=4)
    kept = [
        tile(config(path, tmp_path / path.stem, max_tiles=0, close_um=0)).manifest["slides"][0]
        for path in (whole, spoilt)
    ]

    assert kept[0]["tiles"] == kept[1]["tiles"] == 32 * 8
    assert kept[1]["rejected"]["background"] == 32 * 8


def test_the_draw_is_a_permutation_that_other_slides_do_not_change(tmp_path):
    first = order(0, "a.svs", 500)
    assert sorted(first) == list(range(500))
    assert not np.array_equal(first, order(1, "a.svs", 500))
    assert not np.array_equal(first, order(0, "b.svs", 500))

    folder = tmp_path / "in"
    for i, name in enumerate(["b.tif", "sub/c.tif"]):
        write_slide(folder / name, painted(512, 512, PINK, i))
    alone = tile(config(folder, tmp_path / "s", max_tiles=9))
    before = {s: contents(TileStore(alone.store), s) for s in ("b.tif", "sub/c.tif")}
    write_slide(folder / "a.tif", painted(512, 512, PINK, 9))
    more = tile(config(folder, tmp_path / "s", max_tiles=9))

    store = TileStore(more.store)
    assert more.reused == 2
    assert [s["id"] for s in more.manifest["slides"]] == ["a.tif", "b.tif", "sub/c.tif"]
    assert {s: contents(store, s) for s in before} == before
    assert before["b.tif"][0][:2] != before["sub/c.tif"][0][:2]
    fresh = tile(config(folder, tmp_path / "t", max_tiles=9))
    assert fresh.manifest["hash"] == store.hash


def test_tile_mpp_resamples(tmp_path):
    path = write_slide(tmp_path / "a.tif", half_tissue(1200, 800), mpp=0.25)
    manifest = tile(config(path, tmp_path / "s", tile_mpp=0.7, max_tiles=0)).manifest

    store = TileStore(tmp_path / "s")
    assert {store[i]["mpp"] for i in range(len(store))} == {0.7}
    assert decoded(store[0]["image"]).shape == (64, 64, 3)
    side = 64 * 0.7 / 0.25
    assert {t[0] for t in contents(store, "a.tif")} == {0, int(side), int(2 * side)}
    assert manifest["slides"][0]["mpp"] == pytest.approx(0.25)


def test_a_grid_counts_the_cells_it_cuts():
    grid = Grid.over(1000, 300, 150.5)

    assert grid.xs == [0, 150, 301, 451, 602, 752]
    assert grid.ys == [0]
    assert grid.outside == 7 * 2 - 6


def test_settings_that_differ_are_refused_by_name(tmp_path):
    path = write_slide(tmp_path / "a.tif", half_tissue(512, 512))
    first = config(path, tmp_path / "s")
    tile(first)

    with pytest.raises(StoreError, match=r"settings \(--seed 0 there, 1 now\); give those again"):
        tile(dataclasses.replace(first, seed=1))
    again = tile(dataclasses.replace(first, failures_allowed=3))
    assert again.reused == 1


def test_a_changed_slide_is_cut_again_and_a_missing_one_refused(tmp_path):
    for name in ("a.tif", "b.tif"):
        write_slide(tmp_path / "in" / name, half_tissue(512, 512))
    first = tile(config(tmp_path / "in", tmp_path / "s"))
    write_slide(tmp_path / "in" / "a.tif", half_tissue(512, 512, seed=5))
    second = tile(config(tmp_path / "in", tmp_path / "s"))

    assert second.reused == 1
    assert second.manifest["slides"][0]["sha256"] != first.manifest["slides"][0]["sha256"]
    assert len(TileStore(second.store)) == second.manifest["tiles"]
    (tmp_path / "in" / "a.tif").unlink()
    with pytest.raises(StoreError, match=r"holds 1 slides that are not among .*a\.tif"):
        tile(config(tmp_path / "in", tmp_path / "s"))


def test_a_slide_is_read_again_only_where_its_size_or_time_changed(tmp_path):
    """As `make` has it: what hides its change is taken as it was. Also after a stopped run."""
    path = write_slide(tmp_path / "a.tif", half_tissue(512, 512))
    first = tile(config(path, tmp_path / "s"))
    was = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    hidden = tile(config(path, tmp_path / "s"))
    os.utime(path)
    seen = tile(config(path, tmp_path / "s"))

    assert (hidden.reused, seen.reused) == (1, 0)
    assert hidden.manifest == first.manifest
    assert seen.manifest["slides"][0]["sha256"] != first.manifest["slides"][0]["sha256"]
    assert "stamp" not in json.dumps(seen.manifest)
    os.utime(path)  # touched, and the same: read, and not cut again
    assert tile(config(path, tmp_path / "s")).reused == 1


def test_failing_slides_are_listed_and_taken_up_later(tmp_path):
    folder = tmp_path / "in"
    write_slide(folder / "good.tif", half_tissue(512, 512))
    write_slide(folder / "glass.tif", painted(512, 512, GLASS))
    write_slide(folder / "bare.tif", half_tissue(512, 512), mpp=None)
    write_slide(folder / "coarse.tif", half_tissue(512, 512), mpp=2.0)
    write_slide(folder / "tiny.tif", painted(40, 40, PINK))
    spoil(write_slide(folder / "rotten.tif", half_tissue(512, 512)), 0, 1, 2, 3)
    (folder / "empty.svs").touch()
    result = tile(config(folder, tmp_path / "s", tile_mpp=1.0, close_um=0, failures_allowed=6))

    reasons = {f.slide: f.reason for f in result.failures}
    assert sorted(reasons) == [
        "bare.tif",
        "coarse.tif",
        "empty.svs",
        "glass.tif",
        "rotten.tif",
        "tiny.tif",
    ]
    assert "no foreground" in reasons["glass.tif"]
    assert "no usable pixel size" in reasons["bare.tif"]
    assert "coarser than the 1 asked for" in reasons["coarse.tif"]
    assert "smaller than one tile" in reasons["tiny.tif"]
    assert "16 of 16 cells cannot be read" in reasons["rotten.tif"]
    assert "is empty" in reasons["empty.svs"]
    assert result.exit_code == 0
    assert set(TileStore(result.store).slides()) == {"good.tif"}
    assert str(tmp_path) not in json.dumps(result.manifest)

    (folder / "mpp.csv").write_text("slide,mpp\nbare.tif,0.5\n")
    again = tile(config(folder, tmp_path / "s", tile_mpp=1.0, close_um=0))
    assert again.reused == 1
    assert {s["id"]: s["mpp_source"] for s in again.manifest["slides"]} == {
        "bare.tif": "mpp.csv",
        "good.tif": "tiff-resolution",
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [("nothing", "is not there"), ("empty", r"holds no slide .*\.svs")],
)
def test_nothing_to_cut_is_said(tmp_path, name, message):
    (tmp_path / "empty").mkdir()

    with pytest.raises(SlideError, match=message):
        tile(config(tmp_path / name, tmp_path / "s"))
    assert not (tmp_path / "s").exists()


def test_the_files_of_a_dicom_series_are_one_slide(shared_data, tmp_path):
    """A copy of a file is a second file of its series, as OpenSlide sees it."""
    data = (shared_data / "wsi" / "camelyon16_lowres_tiledfull.dcm").read_bytes()
    for name in ("2.dcm", "1.dcm"):
        (tmp_path / name).write_bytes(data)
    write_slide(tmp_path / "a.tif", half_tissue(300, 300))
    jobs = find_slides(checked(config(tmp_path, tmp_path / "s")))

    assert [job.id for job in jobs] == ["1.dcm", "a.tif"]
    assert [path.name for path in jobs[0].others] == ["2.dcm"]


@pytest.mark.parametrize("mpp", [0.0, 1000.0, -1.0, float("nan")])
def test_a_pixel_size_that_cannot_be_is_a_usage_error(mpp):
    with pytest.raises(ConfigError, match="--mpp"):
        checked(TileConfig(slides=("a.svs",), out="s", mpp=mpp))


@pytest.mark.parametrize(
    "change", [{"tile_px": 0}, {"min_foreground": 1.5}, {"jpeg_quality": 0}, {"slides": ()}]
)
def test_settings_out_of_range_are_usage_errors(change):
    with pytest.raises(ConfigError):
        checked(dataclasses.replace(TileConfig(slides=("a.svs",), out="s"), **change))


def test_output_that_is_taken_or_cannot_be_written_is_refused(tmp_path):
    path = write_slide(tmp_path / "a.tif", half_tissue(512, 512))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()

    with pytest.raises(StoreError, match=r"photos: holds other files \(cat\.jpg\)"):
        tile(config(path, tmp_path / "photos"))
    with pytest.raises(StoreError, match=r"a\.tif: is a file"):
        tile(config(path, path))
    with pytest.raises(StoreError, match="cannot be written"):
        tile(config(path, Path("/proc/store")))


def start(settings: TileConfig, folder: Path, limit: str = "") -> subprocess.Popen[str]:
    """`tile` in a session of its own, with all its worker processes."""
    (folder / "run.py").write_text(RUN)
    (folder / "config.json").write_text(to_json(settings))
    command = f"{limit} exec {sys.executable} {folder / 'run.py'} {folder / 'config.json'}"
    return subprocess.Popen(
        ["bash", "-c", command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_full_disk_is_said_and_leaves_no_store(tmp_path):
    """The limit on file sizes refuses writes as a full disk does, with another errno."""
    path = write_slide(tmp_path / "a.tif", painted(1024, 1024, PINK))
    run = start(config(path, tmp_path / "s"), tmp_path, limit="ulimit -f 100;")
    _, errors = run.communicate(timeout=100)

    assert run.returncode == 1
    last = errors.strip().splitlines()[-1]
    assert last.startswith(f"{tmp_path / 's'}: cannot be written (")
    assert "choose another --out" in last
    assert not is_store(tmp_path / "s")
    assert tile(config(path, tmp_path / "s")).exit_code == 0


@pytest.mark.slow
def test_a_killed_run_is_completed_to_the_same_store(tmp_path):
    for i in range(5):
        write_slide(tmp_path / "in" / f"{i}.tif", painted(1536, 1536, PINK, i))
    settings = config(tmp_path / "in", tmp_path / "s", max_tiles=0)
    run = start(settings, tmp_path)
    while len(list((tmp_path / "s").glob("unfinished/*.json"))) < 3:  # settings and two slides
        assert run.poll() is None
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()

    with pytest.raises(StoreError, match="tiling was stopped"):
        TileStore(tmp_path / "s")
    after = tile(settings)
    fresh = tile(dataclasses.replace(settings, out=str(tmp_path / "t")))
    assert 2 <= after.reused < 5
    assert after.manifest["hash"] == fresh.manifest["hash"] == TileStore(tmp_path / "s").hash


def test_a_second_run_on_the_same_store_is_refused(tmp_path):
    path = write_slide(tmp_path / "a.tif", half_tissue(512, 512))
    from jaxhisto.data.store_writer import StoreWriter

    with (
        StoreWriter(tmp_path / "s", {}),
        pytest.raises(StoreError, match="another run is writing it"),
    ):
        tile(config(path, tmp_path / "s"))
