"""A run on a list of tiles: begun, resumed from elsewhere, exported; its hash all the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from lives import FLAGS, checkpoints, losses, write_images, write_store
from safetensors import safe_open

from jaxhisto.cli import main
from jaxhisto.data.manifest import read_manifest

STEPS = ("--steps", "4", "--checkpoint-every", "2")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    (folder / "pictures").mkdir()
    return {
        "store": write_store(folder / "store", 0),
        "pictures": write_images(folder / "pictures", 12),
    }


@pytest.fixture(scope="module")
def listed(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("list") / "list.jsonl"
    sources = [str(path) for path in data.values()]
    assert main(["sample", *sources, "--per-dataset", "8", "--out", str(out)]) == 0
    return out


def pretrain(run: Path, manifest: Path, *stores: Path) -> int:
    places = ["--data.manifest", str(manifest), "--data.stores", *map(str, stores)]
    return main(["pretrain", *FLAGS, *STEPS, "--out", str(run), *places])


@pytest.fixture(scope="module")
def run(data, listed, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert pretrain(out, listed, *data.values()) == 0
    return out


def test_the_hash_is_in_the_record_and_in_each_checkpoint(run: Path, listed: Path) -> None:
    digest = read_manifest(listed).hash
    data = json.loads((run / "data.json").read_text())
    assert data["manifest"] == {"sha256": digest, "tiles": 16}
    assert data["tiles"] == 16
    for step in checkpoints(run):
        contents = json.loads((run / "checkpoints" / step / "contents.json").read_text())
        assert contents["metadata"] == {"data_hash": data["hash"], "manifest": digest}


def test_it_resumes_with_list_and_data_moved_and_learns_the_same(
    run: Path, data, listed: Path, tmp_path: Path, capsys
) -> None:
    again = shutil.copytree(run, tmp_path / "run")
    before = losses(again)
    shutil.rmtree(again / "checkpoints" / "4")
    moved = shutil.copy(listed, tmp_path / "other.jsonl")
    copies = [shutil.copytree(path, tmp_path / name) for name, path in data.items()]
    assert pretrain(again, moved, *reversed(copies)) == 0
    assert "resuming at step 2" in capsys.readouterr().out
    assert losses(again) == before
    assert (again / "data.json").read_text().count(read_manifest(listed).hash) == 1


def test_another_list_is_other_data(run: Path, data, tmp_path: Path, capsys) -> None:
    other = tmp_path / "other.jsonl"
    sources = [str(path) for path in data.values()]
    flags = ["--per-dataset", "8", "--seed", "1", "--out", str(other)]
    assert main(["sample", *sources, *flags]) == 0
    assert pretrain(run, other, *data.values()) == 1
    assert "was trained on other data" in capsys.readouterr().err
    assert main(["pretrain", *FLAGS, *STEPS, "--out", str(run), "--data.stores", *sources]) == 1
    assert "was trained on other data" in capsys.readouterr().err


def test_a_list_of_which_tiles_are_missing_starts_nothing(
    data, listed: Path, tmp_path: Path, capsys
) -> None:
    assert pretrain(tmp_path / "run", listed, data["store"]) == 1
    said = capsys.readouterr().err.strip()
    assert "8 of its 16 tiles are not in --data.stores" in said
    assert "tile_0" in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_exported_file_says_by_which_list(run: Path, listed: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "encoder.ckpt"
    flags = ["--layout", "published", "--card", "--out", str(out)]
    assert main(["export", str(run), *flags]) == 0
    digest = read_manifest(listed).hash
    with safe_open(run / "encoder.safetensors", "numpy") as file:
        stated = file.metadata()
    assert stated["manifest"] == digest
    assert stated["data_hash"] == json.loads((run / "data.json").read_text())["hash"]
    # The list's name goes along, the user's folders do not.
    assert json.loads(stated["config"])["data"]["manifest"] == "list.jsonl"
    assert str(listed.parent) not in "".join(stated.values())
    assert f"drawn by the manifest with SHA-256 `{digest}`" in (tmp_path / "README.md").read_text()
    assert main(["verify", str(out)]) == 0
