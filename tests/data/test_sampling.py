"""The draw against tables made by hand and hashes made by hashlib; what adding data changes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_images import encoded, noise, write_raw_store

from jaxhisto.cli import main
from jaxhisto.data.candidates import Slide
from jaxhisto.data.catalog import read_catalog
from jaxhisto.data.manifest import Manifest, read_manifest
from jaxhisto.data.sampling import available, draw, quotas_of, sample
from jaxhisto.errors import ConfigError, StoreError
from jaxhisto.file_config import SampleConfig

THERE = {"a": 7, "b": 50, "c": 1000, "d": 199_999}
OF = SampleConfig(sources=(), out="list.jsonl")


def store(path: Path, dataset: str, mpp: float = 0.5, **slides: int) -> Path:
    """A store whose images are not looked at."""
    tiles = {s: [f"{s} {i}".encode() for i in range(n)] for s, n in slides.items()}
    return write_raw_store(path, tiles, 8, mpp, dataset)


def drawn(*sources: Path | str, **settings: object) -> Manifest:
    config = SampleConfig(sources=tuple(map(str, sources)), out="list.jsonl")
    return sample(replace(config, **settings)).manifest


def tiles_of(manifest: Manifest, dataset: str) -> set[tuple[str, float | None, int | None]]:
    return {(e.slide, e.mpp, row) for e, row in manifest.tiles() if e.dataset == dataset}


def by_hash(seed: int, dataset: str, tiles: list[tuple[str, float, int]]) -> list:
    """The tiles in the order of the draw, as its documentation states it."""

    def place(tile: tuple[str, float, int]) -> str:
        slide, mpp, row = tile
        text = f"jaxhisto-draw-1\0{seed}\0{dataset}\0{slide}\0{mpp:.6g}\0{row}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    return sorted(tiles, key=place)


@pytest.mark.parametrize(
    ("rule", "taken"),
    [
        # 0.01 %: 0, 0.005, 0.1 and 19.9999 tiles; ten at least, and never more than there are.
        ({"percent": 0.01}, [7, 10, 10, 20]),
        ({"percent": 0.1}, [7, 10, 10, 200]),
        ({"percent": 1}, [7, 10, 10, 2000]),
        ({"percent": 10}, [7, 10, 100, 2000]),
        ({"percent": 10, "maximum": 0}, [7, 10, 100, 20_000]),
        ({"percent": 100, "maximum": 0}, [7, 50, 1000, 199_999]),
        ({"percent": 1, "minimum": 0}, [0, 1, 10, 2000]),  # 0.07, 0.5, 10, 1999.99
        ({"percent": 2.9, "minimum": 0, "maximum": 30}, [0, 1, 29, 30]),  # 0.203, 1.45, 29
        ({"per_dataset": 10}, [7, 10, 10, 10]),
        ({"per_dataset": 3000}, [7, 50, 1000, 3000]),
        # 7 + 10 + 10 + 10, and 63 more: 73 of d is a smaller share than 11 of c.
        ({"total": 100}, [7, 10, 10, 73]),
        # d ends at its maximum; the other 993 of b and c: 47/50 and 946/1000 are nearest to equal.
        ({"total": 3000}, [7, 47, 946, 2000]),
        ({"total": 4, "minimum": 0}, [0, 0, 0, 4]),
        ({"total": 37}, [7, 10, 10, 10]),
        ({"total": 3057}, [7, 50, 1000, 2000]),
    ],
)
def test_the_rules_against_a_table_made_by_hand(rule, taken) -> None:
    quotas = quotas_of(replace(OF, **rule), THERE)
    assert [quota.taken for quota in quotas.values()] == taken
    assert list(quotas) == list(THERE)


def test_each_count_says_why() -> None:
    quotas = quotas_of(replace(OF, percent=10.0), THERE)
    assert [(q.asked, q.why) for q in quotas.values()] == [
        (1, "all there are"), (5, "minimum"), (100, "10 %"), (20_000, "maximum"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"total": 36}, "the minimum alone takes 37"),
        ({"total": 3058}, "only 3,057 can be taken"),
    ],
)
def test_a_total_out_of_reach_is_refused(rule, said) -> None:
    with pytest.raises(ConfigError, match=said):
        quotas_of(replace(OF, **rule), THERE)


def test_a_slide_gives_at_most_its_share_over_all_its_resolutions() -> None:
    slides = [
        Slide("d", "s", 0.25, "1", 90, 0),
        Slide("d", "s", 0.5, "2", 90, 1),
        Slide("d", "t", 0.5, "3", 30, 1),
    ]
    assert available(slides, 100) == 130
    assert available(slides, 0) == 210
    got = draw(slides, 130, 0, 100)
    count = {s: sum(len(e.rows or ()) for e in got if e.slide == s) for s in ("s", "t")}
    assert count == {"s": 100, "t": 30}
    both = [("s", mpp, row) for mpp in (0.25, 0.5) for row in range(90)]
    taken = {(e.slide, e.mpp, row) for e in got if e.slide == "s" for row in e.rows or ()}
    assert taken == set(by_hash(0, "d", both)[:100])


def test_the_draw_is_uniform() -> None:
    slides = [Slide("d", f"s{i}", 0.5, str(i), 50, 0) for i in range(20)]
    counts = np.zeros((20, 50))
    for seed in range(400):
        for entry in draw(slides, 100, seed, 0):
            counts[int(entry.slide[1:]), list(entry.rows or ())] += 1
    # 400 draws of a tenth: 40 each, SD 6; slides 2000, SD 40; rows 800, SD 26 or so.
    assert abs(counts.mean() - 40) < 1e-9
    assert 5.5 < counts.std() < 6.5
    assert np.abs(counts.sum(1) - 2000).max() < 4 * 42
    assert np.abs(counts.sum(0) - 800).max() < 4 * 28


def test_what_is_added_elsewhere_changes_nothing_here(tmp_path: Path) -> None:
    one = store(tmp_path / "one", "ONE", a=20, b=20)
    two = store(tmp_path / "two", "TWO", a=30)
    alone = drawn(one, percent=50.0)
    beside = drawn(two, one, percent=50.0)
    assert tiles_of(alone, "ONE") == tiles_of(beside, "ONE")
    assert len(tiles_of(beside, "TWO")) == 15
    # Left out by name, another dataset leaves no trace at all.
    assert drawn(two, one, percent=50.0, only=("one",)) == replace(
        alone, rule={**alone.rule, "only": ("one",)}
    )
    assert tiles_of(drawn(one, percent=50.0, seed=1), "ONE") != tiles_of(alone, "ONE")


def test_a_slide_added_puts_its_tiles_between_the_others(tmp_path: Path) -> None:
    before = drawn(store(tmp_path / "x", "D", a=20, b=20), percent=30.0, minimum=0)
    after = drawn(store(tmp_path / "y", "D", a=20, b=20, c=20), percent=30.0, minimum=0)
    every = [(s, 0.5, row) for s in ("a", "b", "c") for row in range(20)]
    old = by_hash(0, "D", every[:40])
    assert tiles_of(before, "D") == set(old[:12])
    assert tiles_of(after, "D") == set(by_hash(0, "D", every)[:18])
    kept = tiles_of(after, "D") - {(s, m, r) for s, m, r in every if s == "c"}
    assert kept == set(old[: len(kept)])


def test_a_larger_draw_holds_the_smaller(tmp_path: Path) -> None:
    path = store(tmp_path / "s", "D", a=40, b=60, c=3)
    sizes = [{"percent": p, "minimum": 0} for p in (1.0, 10.0, 50.0)] + [{"total": 80}]
    lists = [tiles_of(drawn(path, **size), "D") for size in sizes]
    assert [len(tiles) for tiles in lists] == [1, 10, 52, 80]
    assert lists[0] < lists[1] < lists[2] < lists[3]


def test_the_same_file_in_any_order_and_process(tmp_path: Path) -> None:
    paths = [store(tmp_path / n, n.upper(), a=9, b=30) for n in ("one", "two", "three")]
    folder = tmp_path / "pictures"
    (folder / "x").mkdir(parents=True)
    for i in range(12):
        (folder / "x" / f"é{i}.bmp").write_bytes(encoded(noise(8, 8, i), "BMP"))
    files = []
    for i, order in enumerate(([*paths, folder], [folder, *paths[::-1]])):
        out = tmp_path / f"{i}.jsonl"
        args = ["sample", *map(str, order), "--percent", "40", "--out", str(out)]
        done = subprocess.run(
            [sys.executable, "-m", "jaxhisto.cli", *args],
            env=os.environ | {"PYTHONHASHSEED": str(i + 1)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        files.append(out.read_bytes())
    assert files[0] == files[1]
    assert str(tmp_path) not in files[0].decode()


def test_a_small_list_is_the_same_on_every_machine(tmp_path: Path) -> None:
    """Bitmaps hold pixels as they are: these files, and so the list, depend on no encoder."""
    for name in ("glas", "other"):
        (tmp_path / name).mkdir()
        for i in range(6):
            pixels = np.full((4, 4, 3), 10 * i + len(name), np.uint8)
            (tmp_path / name / f"{i}.bmp").write_bytes(encoded(pixels, "BMP"))
    manifest = drawn(tmp_path / "glas", tmp_path / "other", percent=50.0, minimum=0, seed=3)
    for dataset in ("glas", "other"):
        texts = {f"{i}.bmp": f"jaxhisto-draw-1\0003\0{dataset}\0{i}.bmp\0\0" for i in range(6)}
        places = {hashlib.blake2b(t.encode(), digest_size=16).digest(): n for n, t in texts.items()}
        order = [places[place] for place in sorted(places)]
        assert {slide for slide, _, _ in tiles_of(manifest, dataset)} == set(order[:3])
    assert manifest.hash == GOLDEN


GOLDEN = "ff30edba7d18ca4f17ff85ccffb1c438bf4c630e80e5b694acbfee803754ff10"


def test_a_small_list_of_slides_is_the_same_on_every_machine() -> None:
    slides = [
        Slide("TCGA-BRCA", f"{s}.svs", mpp, s * 64, 30, 0) for s in "ab" for mpp in (0.25, 0.5)
    ]
    entries = draw(slides, 12, 7, 20)
    manifest = Manifest({"percent": 0.1}, 7, [], [], entries)
    every = [(s.slide, s.mpp or 0, row) for s in slides for row in range(30)]
    kept = [by_hash(7, "TCGA-BRCA", [t for t in every if t[0] == f"{s}.svs"])[:20] for s in "ab"]
    expected = by_hash(7, "TCGA-BRCA", kept[0] + kept[1])[:12]
    assert tiles_of(manifest, "TCGA-BRCA") == set(expected)
    assert manifest.hash == GOLDEN_SLIDES


GOLDEN_SLIDES = "8e7f8b0cb752e313f5da0874faa522689f2090c58a7693f019e0cfa5bb3bf0a8"


@pytest.mark.parametrize(
    ("rule", "total"),
    [
        ({"percent": 0.01}, 587),
        ({"percent": 0.1}, 2724),
        ({"percent": 1}, 25_461),
        ({"percent": 10}, 70_475),
        ({"percent": 10, "maximum": 0}, 253_175),
        ({"per_dataset": 10}, 560),
    ],
)
def test_the_papers_fractions_at_the_size_of_its_table(rule, total) -> None:
    """In whole numbers and apart from our code; the paper says 4, 40 and 400 thousand."""
    there = {r.name: r.count * (100 if r.kind == "slides" else 1) for r in read_catalog()}
    parts = round(10_000 / rule["percent"]) if "percent" in rule else 0
    top = rule.get("maximum", 2000) or 10**9
    by_hand = {
        name: min(max((2 * n * 100 + parts) // (2 * parts), 10), top, n) if parts else min(10, n)
        for name, n in there.items()
    }
    quotas = quotas_of(replace(OF, **rule), there)
    assert {name: quota.taken for name, quota in quotas.items()} == by_hand
    assert sum(by_hand.values()) == total


def test_organ_stain_and_resolution_select(tmp_path: Path) -> None:
    fine = store(tmp_path / "fine", "tcga_brca", 0.2525, a=20)
    mid = store(tmp_path / "mid", "tcga_brca", 0.5, a=20)
    lung = store(tmp_path / "lung", "TCGA-LUSC", 0.25, z=20)
    mine = store(tmp_path / "mine", "Mine", 0.25, m=20)
    table = tmp_path / "datasets.csv"
    table.write_text("dataset,organ,stain\nmine,breast,IHC\n")
    more = {"per_dataset": 5, "datasets": str(table)}
    all_of = (fine, mid, lung, mine)

    def names(**settings: object) -> list[str]:
        return [d["name"] for d in drawn(*all_of, **more, **settings).datasets]

    assert names(organ=("breast",)) == ["Mine", "tcga_brca"]
    assert names(organ=("breast",), stain=("H&E",)) == ["tcga_brca"]
    assert names(organ=("lung", "breast")) == ["Mine", "TCGA-LUSC", "tcga_brca"]
    assert names(mpp=(0.5,)) == ["tcga_brca"]
    quarter = drawn(*all_of, **more, mpp=(0.25,))
    assert {e.mpp for e in quarter.entries} == {0.2525, 0.25}
    assert (
        drawn(*all_of, **more, mpp=(0.25,), mpp_tolerance=0.0).datasets[-1]["name"] != "tcga_brca"
    )
    both = drawn(fine, mid, per_dataset=40, per_slide=0)
    assert len(both) == 40
    assert {e.mpp for e in both.entries} == {0.2525, 0.5}
    assert quarter.datasets[0] == {
        "name": "Mine", "organ": "breast", "stain": "IHC",
        "available": 20, "asked": 5, "taken": 5, "why": "as asked",
    }  # fmt: skip


def test_the_tolerance_ends_where_it_says(tmp_path: Path) -> None:
    path = store(tmp_path / "s", "D", 0.275, a=3)
    assert len(drawn(path, per_dataset=1, mpp=(0.25,))) == 1
    with pytest.raises(StoreError, match=r"um/px there: 0\.275"):
        drawn(path, per_dataset=1, mpp=(0.25,), mpp_tolerance=0.09)


def test_an_image_folders_resolution_comes_from_the_table(tmp_path: Path) -> None:
    folder = tmp_path / "idc_10x"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.bmp").write_bytes(encoded(noise(4, 4, i), "BMP"))
    with pytest.raises(StoreError, match="um/px there: not stated"):
        drawn(folder, per_dataset=1, mpp=(1.0,))
    table = tmp_path / "t.csv"
    table.write_text("dataset,mpp\nidc_10x,1\nten,1.0\n")
    stated = drawn(folder, per_dataset=2, mpp=(1.0,), datasets=str(table))
    assert {e.mpp for e in stated.entries} == {1.0}
    assert tiles_of(drawn(folder, per_dataset=2), "idc_10x") == {
        (slide, None, None) for slide, _, _ in tiles_of(stated, "idc_10x")
    }
    renamed = drawn(f"ten={folder}", per_dataset=2, mpp=(1.0,), datasets=str(table))
    assert {e.dataset for e in renamed.entries} == {"ten"}


def test_excluded_slides_and_unreadable_images_are_left_out(tmp_path: Path) -> None:
    path = store(tmp_path / "s", "D", a=4, b=4)
    folder = tmp_path / "F"
    folder.mkdir()
    (folder / "good.bmp").write_bytes(encoded(noise(4, 4), "BMP"))
    (folder / "bad.bmp").write_bytes(b"BM")
    with pytest.raises(
        StoreError, match=r"1 of 2 images cannot be used.* pass --failures-allowed 1"
    ):
        drawn(path, folder, percent=100.0)
    result = sample(
        SampleConfig(
            (str(path), str(folder)), "l", percent=100.0, exclude=("b",), failures_allowed=1
        )
    )
    assert {e.slide for e in result.manifest.entries} == {"a", "good.bmp"}
    assert any("bad.bmp" in line for line in result.summary())
    with pytest.raises(StoreError, match="exclude pattern 'x' matches nothing"):
        drawn(path, percent=1.0, exclude=("x",))


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        ([], 2, "no size is given; pass one of --percent, --per-dataset and --total"),
        (["--percent", 1, "--total", 5], 2, "--percent and --total are given"),
        (["--percent", 0], 2, "--percent 0.0: must lie in"),
        (["--percent", 101], 2, "--percent 101.0: must lie in"),
        (["--percent", 1, "--minimum", 50, "--maximum", 20], 2, "--minimum 50 is above"),
        (["--percent", 1, "--minimum", 0], 1, "takes no tile of 40"),
        (["--percent", 1, "--only", "tgca-brca"], 2, "(did you mean 'TCGA-BRCA'?)"),
        (["--percent", 1, "--organ", "brest"], 2, "did you mean 'breast'?"),
        (["--percent", 1, "--organ", "skin"], 1, "none of the 1 datasets given is of that organ"),
        (["--percent", 1, "--mpp", 0.1], 1, "no tile is at --mpp 0.1 within 10%"),
        (["--total", 50], 2, "only 40 can be taken"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, flags, code, said) -> None:
    path = store(tmp_path / "s", "TCGA-BRCA", a=40)
    out = tmp_path / "list.jsonl"
    assert main(["sample", str(path), "--out", str(out), *map(str, flags)]) == code
    err = capsys.readouterr().err.strip()
    assert said in err
    assert len(err.splitlines()) == 1
    assert not out.exists()


def test_an_unknown_dataset_of_which_the_organ_is_asked_is_named(tmp_path: Path) -> None:
    path = store(tmp_path / "s", "TCGA-BRAC", a=4)
    with pytest.raises(StoreError, match=r"TCGA-BRAC: its organ is not known \(did you mean 'TCGA"):
        drawn(path, percent=1.0, organ=("breast",))


def test_tiles_that_would_count_double_are_refused(tmp_path: Path) -> None:
    one = store(tmp_path / "one", "D", a=4, b=4)
    with pytest.raises(StoreError, match="is listed twice"):
        drawn(one, one, percent=1.0)
    with pytest.raises(StoreError, match="both hold b of dataset D"):
        drawn(one, store(tmp_path / "two", "D", b=5), percent=1.0)
    with pytest.raises(StoreError, match="differ in spelling alone"):
        drawn(one, store(tmp_path / "three", "d", c=5), percent=1.0)
    for name in ("x", "y"):
        (tmp_path / name / "images").mkdir(parents=True)
        (tmp_path / name / "images" / "i.bmp").write_bytes(encoded(noise(4, 4), "BMP"))
    with pytest.raises(StoreError, match="both would be dataset images; name one"):
        drawn(tmp_path / "x" / "images", tmp_path / "y" / "images", percent=1.0)
    with pytest.raises(StoreError, match="give it without E="):
        drawn(f"E={one}", percent=1.0)


def test_a_list_is_written_once_and_never_replaced(tmp_path: Path, capsys) -> None:
    path, out = store(tmp_path / "s", "D", a=20), tmp_path / "lists" / "l.jsonl"
    line = ["sample", str(path), "--out", str(out), "--per-dataset"]
    assert main([*line, "5"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith("next: jaxhisto pretrain --data.manifest ")
    assert "5 tiles of 1 datasets" in said[-2]
    before = out.read_bytes()
    assert main([*line, "5"]) == 0
    assert main([*line, "6"]) == 1
    assert "is not the list that this command draws" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert [p.name for p in out.parent.iterdir()] == ["l.jsonl"]
    assert read_manifest(out).hash == json.loads(before.splitlines()[0])["sha256"]


def test_a_misspelt_dataset_is_drawn_and_noted(tmp_path, capsys) -> None:
    path = store(tmp_path / "s", "TCGA-BRAC", a=40)
    assert main(["sample", str(path), "--per-dataset", "5", "--out", str(tmp_path / "l")]) == 0
    said = "note: TCGA-BRAC: is not in the catalogue; did you mean 'TCGA-BRCA'?"
    assert said in capsys.readouterr().out.splitlines()
