"""`jaxhisto leakage LIST`: exactly the listed tiles, found where --stores says."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
from planted import save, tissue, write_store

from jaxhisto import settings
from jaxhisto.cli import main
from jaxhisto.config import DataConfig, PretrainConfig
from jaxhisto.data.manifest import is_manifest, read_manifest
from jaxhisto.data.sources import open_tiles
from jaxhisto.data.store import TileStore

LEAK = ("--no-parts", "--threads", "1")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A store of 2 slides x 4 tiles, a folder of 4 images, and a list of four of each."""
    root = tmp_path_factory.mktemp("drawn")
    slides = {s: [tissue(128, 128, 10 * n + i) for i in range(4)] for n, s in enumerate("ab")}
    write_store(root / "store", {f"{s}.svs": t for s, t in slides.items()})
    pictures = {f"TCGA-AA-000{i}/p{i}.png": tissue(128, 128, 50 + i) for i in range(6)}
    save(root / "TCGA-XX-9999" / "pictures", pictures)
    sources = [str(root / "store"), str(root / "TCGA-XX-9999" / "pictures")]
    out = root / "list.jsonl"
    assert main(["sample", *sources, "--per-dataset", "4", "--out", str(out)]) == 0
    return root, out, sources


@pytest.fixture(scope="module")
def tested(drawn, tmp_path_factory):
    """A labelled set with a copy of each tile and image, listed or not, under other names."""
    _, _, (store, pictures) = drawn
    folder = tmp_path_factory.mktemp("tested") / "set"
    tiles = open_tiles(DataConfig(stores=(store,)))
    copies = {f"t{i}.png": tiles.read(i) for i in range(len(tiles))}
    save(folder, copies)
    for i in range(6):
        shutil.copy(f"{pictures}/TCGA-AA-000{i}/p{i}.png", folder / f"q{i}.png")
    return folder


def rows(out):
    with (out / "pairs.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_exactly_the_listed_tiles_are_looked_at(drawn, tested, tmp_path, capsys):
    _, listed, sources = drawn
    flags = ["--stores", *sources, "--against", str(tested), "--out", str(tmp_path / "r"), *LEAK]
    assert main(["leakage", str(listed), *flags]) == 0

    manifest = read_manifest(listed)
    store = TileStore(sources[0])
    starts = {slide["id"]: 4 * n for n, slide in enumerate(store.manifest["slides"])}
    stored = {starts[e.slide] + row for e, row in manifest.tiles() if row is not None}
    images = {e.slide[-5] for e in manifest.entries if e.rows is None}
    assert (len(stored), len(images)) == (4, 4)
    # The same bytes are named so, and never as the same pixels.
    found = {(r["kind"], r["labelled"].rpartition("/")[2]) for r in rows(tmp_path / "r")}
    assert {f for f in found if f[0] in ("file", "pixels", "near")} == {
        *(("file", f"q{i}.png") for i in images),
        *(("pixels", f"t{i}.png") for i in stored),
    }
    assert "OVERLAP with set: 8 of 14 images" in capsys.readouterr().out
    record = json.loads((tmp_path / "r" / "leakage.json").read_text())["pretraining"]
    assert (record["names"], record["tiles"]) == (["list.jsonl"], 8)
    assert record["manifest"] == {"sha256": manifest.hash, "tiles": 8}
    data = DataConfig(stores=tuple(sources), manifest=str(listed))
    assert record["hash"] == open_tiles(data).hash


def test_labelled_sets_may_follow_a_list(drawn, tested, tmp_path, capsys):
    _, listed, sources = drawn
    flags = ["--stores", *sources, *LEAK]
    assert main(["leakage", str(listed), str(tested), *flags, "--out", str(tmp_path / "a")]) == 0
    flags += ["--against", str(tested), "--out", str(tmp_path / "b")]
    assert main(["leakage", str(listed), *flags]) == 0
    assert rows(tmp_path / "a") == rows(tmp_path / "b") != []
    # Two folders say nothing of which is which.
    assert main(["leakage", sources[1], str(tested), "--out", str(tmp_path / "c"), *LEAK]) == 2
    assert "--against: nothing is named" in capsys.readouterr().err


def test_patients_are_read_below_the_folder_alone(drawn, tmp_path):
    """The folder above says TCGA-XX-9999: it is no part of an image's name."""
    _, listed, sources = drawn
    save(tmp_path / "set", {"TCGA-XX-9999.png": tissue(96, 96, 90)})
    names = {e.slide.partition("/")[0] for e in read_manifest(listed).entries if e.rows is None}
    save(tmp_path / "set", {f"{min(names)}-x.png": tissue(96, 96, 91)})
    flags = ["--stores", *sources, "--against", str(tmp_path / "set"), "--out"]
    assert main(["leakage", str(listed), *flags, str(tmp_path / "r"), *LEAK]) == 0

    assert [r["shared_id"] for r in rows(tmp_path / "r")] == [min(names)]


def test_moved_and_renamed_stores_serve_and_missing_tiles_are_named(
    drawn, tested, tmp_path, capsys
):
    _, listed, sources = drawn
    moved = shutil.copytree(sources[0], tmp_path / "elsewhere")
    line = ["leakage", str(listed), "--against", str(tested), *LEAK, "--out", str(tmp_path / "r")]
    assert main([*line, "--stores", str(moved), sources[1]]) == 0
    capsys.readouterr()
    assert main([*line, "--force", "--stores", str(moved)]) == 1
    said = capsys.readouterr().err
    first = next(e for e in read_manifest(listed).entries if e.rows is None)
    assert f"{listed}: 4 of its 8 tiles are not in --stores" in said
    assert f"the first: {first.slide} (pictures)" in said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ([], "--stores: is needed, since LIST holds no tiles and no paths; name the stores and"),
        (["--stores", "S", "--exclude", "a*"], "--exclude: LIST says itself what is in it"),
    ],
)
def test_what_is_missing_or_too_much_is_said(drawn, tested, tmp_path, capsys, change, said):
    _, listed, (store, _) = drawn
    flags = [store if word == "S" else word for word in change]
    out = ["--out", str(tmp_path / "r")]
    assert main(["leakage", str(listed), *flags, "--against", str(tested), *out]) == 2
    error = capsys.readouterr().err
    assert said.replace("LIST", str(listed)) in error
    assert "made, pictures" in error or change
    assert not (tmp_path / "r").exists()


def test_a_list_is_named_alone_and_stores_go_with_a_list_or_run(drawn, tested, tmp_path, capsys):
    _, listed, (store, _) = drawn
    rest = ["--against", str(tested), "--out", str(tmp_path / "r")]
    assert main(["leakage", str(listed), store, *rest]) == 2
    assert "is a list of tiles; name it alone, and where they lie" in capsys.readouterr().err
    assert main(["leakage", store, "--stores", store, *rest]) == 2
    assert "--stores: is for a list of tiles or a run" in capsys.readouterr().err


def test_an_edited_list_is_refused(drawn, tested, tmp_path, capsys):
    _, listed, sources = drawn
    edited = tmp_path / "edited.jsonl"
    edited.write_text(listed.read_text().replace('"seed": 0', '"seed": 1', 1))
    rest = ["--stores", *sources, "--against", str(tested), "--out", str(tmp_path / "r")]
    assert main(["leakage", str(edited), *rest]) == 1
    assert "does not match its own sha256" in capsys.readouterr().err


def test_what_a_list_is(drawn, tmp_path):
    root, listed, _ = drawn
    assert is_manifest(listed)
    again = json.loads(listed.read_text().partition("\n")[0])
    (tmp_path / "sorted.jsonl").write_text(json.dumps(again, sort_keys=True) + "\n")
    assert is_manifest(tmp_path / "sorted.jsonl")
    (tmp_path / "other.json").write_text('{"format": "other"}\n')
    (tmp_path / "list.json").write_text("[1]\n")
    (tmp_path / "binary").write_bytes(b"{\xff\x00")
    for path in (root, root / "store", tmp_path / "absent", *tmp_path.glob("[!s]*")):
        assert not is_manifest(path)


def test_a_run_on_a_list_names_equal_files_and_its_moved_data_is_found(
    drawn, tested, tmp_path, capsys
):
    _, listed, sources = drawn
    moved = [str(shutil.copytree(s, tmp_path / str(n))) for n, s in enumerate(sources)]
    data = DataConfig(stores=tuple(moved), manifest=str(listed))
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(settings.to_json(PretrainConfig(out="run", data=data)))
    (run / "data.json").write_text(json.dumps({"hash": open_tiles(data).hash}))
    shutil.rmtree(moved[0])
    line = ["leakage", str(run), "--against", str(tested), *LEAK]
    assert main(line) == 1
    assert "say with --stores where it lies now" in capsys.readouterr().err
    assert main([*line, "--stores", *sources]) == 0
    counts = json.loads((run / "leakage-set.json").read_text())["against"][0]["counts"]
    assert (counts["file"]["images"], counts["pixels"]["images"]) == (4, 4)
    other = save(tmp_path / "other", {"x.png": np.zeros((64, 64, 3), np.uint8)})
    assert main([*line, "--force", "--stores", str(other)]) == 1
