"""What is found to cut, what it is called, and of which dataset it is; empty files do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from made_slides import PINK, half_tissue, painted, write_slide

from jaxhisto.cli import main
from jaxhisto.config import DataConfig, TileConfig
from jaxhisto.data.manifest import read_manifest
from jaxhisto.data.sources import open_tiles
from jaxhisto.data.store import TileStore, dataset_of
from jaxhisto.errors import SlideError, StoreError
from jaxhisto.slides.finding import find_slides, linked_twice, misspelt


def touched(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def found(*folders: Path, by_folder: bool = True) -> dict[str, str]:
    slides = tuple(map(str, folders))
    jobs = find_slides(TileConfig(slides=slides, out="s", dataset_by_folder=by_folder))
    return {job.id: job.dataset for job in jobs}


def test_the_first_folder_is_the_dataset(tmp_path):
    folder = touched(tmp_path, "a/1.svs", "a/deep/er/1.svs", "b/1.svs", ".hidden.svs", "b/x.txt")

    assert found(folder) == {"a/1.svs": "a", "a/deep/er/1.svs": "a", "b/1.svs": "b"}
    assert set(found(folder, by_folder=False).values()) == {""}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a/1.svs", "2.svs"], r"2\.svs: lies in no folder below .*--dataset-by-folder.*above"),
        (["TCGA-BRCA/1.svs", "tcga_brca/2.svs"], "TCGA-BRCA and tcga_brca differ in spelling"),
    ],
)
def test_folders_that_name_no_dataset_are_refused(tmp_path, names, said):
    with pytest.raises(SlideError, match=said):
        found(touched(tmp_path, *names))


def test_links_to_folders_are_followed_each_folder_once(tmp_path):
    """Datasets on other disks are linked together; a loop ends, a folder's own name wins."""
    touched(tmp_path, "disk/x/1.svs", "disk/x/sub/2.svs", "cohort/real/3.svs")
    cohort = tmp_path / "cohort"
    (cohort / "linked").symlink_to(tmp_path / "disk" / "x")
    (cohort / "again").symlink_to(cohort / "real")
    (cohort / "real" / "loop").symlink_to(cohort)
    (cohort / "linked-too").symlink_to(tmp_path / "disk" / "x")
    (cohort / "self").symlink_to("self")

    assert found(cohort) == {
        "linked/1.svs": "linked",
        "linked/sub/2.svs": "linked",
        "real/3.svs": "real",
    }


def test_a_link_that_is_added_renames_no_slide(tmp_path):
    touched(tmp_path, "elsewhere/2.svs", "slides/m/own.svs")
    slides = tmp_path / "slides"
    (slides / "m" / "2.svs").symlink_to(tmp_path / "elsewhere" / "2.svs")
    before = found(slides)
    (slides / "a").mkdir()
    (slides / "a" / "own.svs").symlink_to(slides / "m" / "own.svs")
    (slides / "z").mkdir()
    (slides / "z" / "2.svs").symlink_to(tmp_path / "elsewhere" / "2.svs")

    assert found(slides) == before == {"m/2.svs": "m", "m/own.svs": "m"}


def test_two_names_of_one_file_are_one_slide_and_told(tmp_path):
    """Links that lead nowhere stay apart: each is a slide that somebody misses."""
    touched(tmp_path, "a/1.svs", "b/2.svs")
    (tmp_path / "a" / "0.svs").symlink_to("1.svs")
    (tmp_path / "b" / "3.svs").symlink_to(tmp_path / "a" / "1.svs")
    for name in ("x", "y"):
        (tmp_path / "b" / f"{name}.svs").symlink_to("nowhere.svs")
    jobs = find_slides(TileConfig(slides=(str(tmp_path), str(tmp_path / "a/1.svs")), out="s"))

    assert [job.id for job in jobs] == ["a/1.svs", "b/2.svs", "b/x.svs", "b/y.svs"]
    assert linked_twice(jobs) == [
        "3 links lead to files that are there under another name too (the first: a/0.svs is "
        "a/1.svs); each file is cut once"
    ]
    assert linked_twice(jobs[1:]) == []


def test_two_slides_with_one_name_are_refused(tmp_path):
    for folder in ("x", "y"):
        write_slide(tmp_path / folder / "a.tif", half_tissue(300, 300))
    both = (str(tmp_path / "x"), str(tmp_path / "y"))

    with pytest.raises(SlideError, match=r"both would be called a\.tif"):
        find_slides(TileConfig(slides=both, out="s"))
    once = (str(tmp_path / "x"), str(tmp_path / "x" / "a.tif"))
    assert [job.id for job in find_slides(TileConfig(slides=once, out="s"))] == ["a.tif"]


def test_a_name_that_is_no_text_is_refused(tmp_path):
    try:
        open(os.fsencode(tmp_path) + b"/bad\xff.svs", "wb").close()
    except OSError:
        pytest.skip("the file system holds UTF-8 names alone")
    with pytest.raises(SlideError, match=r"bad\\xff\.svs: its name is not UTF-8; rename it"):
        found(tmp_path, by_folder=False)


def test_a_path_beyond_the_systems_limit_is_told_as_such(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(20):  # step by step, which may go beyond what a single path can say
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
    os.chdir(tmp_path)

    with pytest.raises(SlideError, match=r"name too long\); shorten the names on the way"):
        found(tmp_path, by_folder=False)


def test_names_near_those_of_the_catalogue_are_told():
    assert misspelt({"TCGA-BRCA", "tcga brca", "my own slides"}) == []
    (line,) = misspelt({"TCGA-BRAC", "xyz"})
    assert line.startswith("dataset TCGA-BRAC is not in the catalogue (did you mean ")


@pytest.fixture(scope="module")
def cohort_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three datasets in one store, by the verb: 4 x 4 tiles of each slide."""
    folder = tmp_path_factory.mktemp("cohort")
    for i, name in enumerate(
        ["TCGA-BRCA/a.tif", "TCGA-BRCA/b.tif", "TCGA-BRAC/a.tif", "own/a.tif"]
    ):
        write_slide(folder / "slides" / name, painted(128, 128, PINK, i))
    line = ["tile", str(folder / "slides"), "--out", str(folder / "all"), "--dataset-by-folder"]
    assert main([*line, "--tile-px", "32", "--processes", "1"]) == 0
    return folder / "all"


def test_the_store_says_of_which_dataset_each_tile_is(cohort_store, capsys):
    store = TileStore(cohort_store)
    slides = {s["id"]: dataset_of(store.manifest, s) for s in store.manifest["slides"]}

    assert store.dataset == "all"
    assert slides == {name: name.partition("/")[0] for name in slides}
    assert len(slides) == 4
    for i in range(len(store)):
        assert store[i]["dataset"] == slides[store[i]["slide"]]
    tiles = open_tiles(DataConfig(stores=(str(cohort_store),)))
    assert "64 tiles of 4 slides of 3 datasets" in tiles.summary()
    without = open_tiles(DataConfig(stores=(str(cohort_store),), exclude=("TCGA-*",)))
    assert len(without) == 16


def drawn(store: Path, out: Path, *flags: str) -> dict[str, tuple[int, int]]:
    """Dataset -> (tiles there, tiles taken), as `sample` by the verb lists them."""
    assert main(["sample", str(store), "--out", str(out), "--per-slide", "12", *flags]) == 0
    manifest = read_manifest(out)
    for entry in manifest.entries:
        assert entry.dataset == entry.slide.partition("/")[0]
    assert {s["dataset"] for s in manifest.sources} == {d["name"] for d in manifest.datasets}
    hashes = {s["hash"] for s in manifest.sources}
    assert hashes == {TileStore(store).hash}
    return {d["name"]: (d["available"], d["taken"]) for d in manifest.datasets}


def test_sample_keeps_the_datasets_of_a_store_apart(cohort_store, tmp_path):
    assert drawn(cohort_store, tmp_path / "a", "--per-dataset", "10") == {
        "TCGA-BRAC": (12, 10), "TCGA-BRCA": (24, 10), "own": (12, 10),
    }  # fmt: skip
    assert drawn(cohort_store, tmp_path / "b", "--per-dataset", "20", "--only", "TCGA-BRCA") == {
        "TCGA-BRCA": (24, 20)
    }
    tiles = open_tiles(DataConfig(stores=(str(cohort_store),), manifest=str(tmp_path / "b")))
    assert len(tiles) == 20
    assert {"TCGA-BRCA/" in tiles.names(i) for i in range(20)} == {True}


def test_sample_finds_organs_by_the_dataset_of_each_slide(cohort_store, tmp_path, capsys):
    table = tmp_path / "own.csv"
    table.write_text("dataset,organ,stain\nown,skin,H&E\nTCGA-BRAC,breast,H&E\n")
    flags = ("--per-dataset", "99", "--datasets", str(table), "--organ")

    assert drawn(cohort_store, tmp_path / "a", *flags, "breast") == {
        "TCGA-BRAC": (12, 12), "TCGA-BRCA": (24, 24),
    }  # fmt: skip
    assert drawn(cohort_store, tmp_path / "b", *flags, "skin") == {"own": (12, 12)}
    assert main(["sample", str(cohort_store), "--out", str(tmp_path / "c"), "--per-dataset", "9",
                 "--organ", "breast"]) == 1  # fmt: skip
    assert "TCGA-BRAC: its organ is not known (did you mean " in capsys.readouterr().err


def test_a_store_of_many_datasets_takes_no_other_name(cohort_store, tmp_path, capsys):
    line = ["sample", f"new={cohort_store}", "--out", str(tmp_path / "m"), "--per-dataset", "1"]

    assert main(line) == 1
    assert "is a store of dataset 'TCGA-BRAC' and 2 more; give it without new=" in (
        capsys.readouterr().err
    )


def test_the_misspelt_folder_is_told_in_the_report(cohort_store):
    assert "dataset TCGA-BRAC is not in the catalogue (did you mean" in (
        cohort_store / "report.html"
    ).read_text(encoding="utf-8")


def test_an_unfinished_store_is_refused_by_all_who_read_one(cohort_store, tmp_path, capsys):
    """As a killed run leaves it: no manifest, finished slides in `unfinished`."""
    from jaxhisto.data.store_writer import StoreWriter

    with StoreWriter(tmp_path / "s", {}):
        said = rf"{tmp_path / 's'}: tiling was stopped; run the same `jaxhisto tile` again"
        with pytest.raises(StoreError, match=said):
            TileStore(tmp_path / "s")
        with pytest.raises(StoreError, match=said):
            open_tiles(DataConfig(stores=(str(tmp_path / "s"),)))
        for verb in (["sample", "--per-dataset", "1"], ["pretrain", "pretrain_small"]):
            source = ["--data.stores"] if verb[0] == "pretrain" else []
            line = [*verb, *source, str(tmp_path / "s"), "--out", str(tmp_path / "out")]
            assert main(line) == 1
            err = capsys.readouterr().err
            assert err.strip().count("\n") == 0
            assert "tiling was stopped; run the same `jaxhisto tile` again" in err
