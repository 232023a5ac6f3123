"""`jaxhisto embed`: what is in the file against PyTorch, devices, resumption, refusals."""

from __future__ import annotations

import hashlib
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
import torch
import torchvision
from made_sets import MEAN, SIDE, STD, tissue, write_encoder, write_images, write_store
from PIL import Image
from refusals import refusal

from jaxhisto import __version__, cli, tensor_file
from jaxhisto.data import features as features_module
from jaxhisto.data.features import FeatureWriter, read_features
from jaxhisto.data.store import TileStore
from jaxhisto.errors import StoreError

DATASETS = ("features", "names", "coords", "slides", "spans")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder, a store of two slides and a folder of unlike images; read only."""
    place = tmp_path_factory.mktemp("embed")
    write_encoder(place / "encoder.safetensors")
    write_store(place / "store", {"x/a.svs": tissue(6, 1), "b.tif": tissue(5, 2)})
    images = {f"{c}/{i}.png": tissue(1, 10 + i)[0] for c in "pq" for i in range(3)}
    wide = np.concatenate(tissue(2, 20), 1)
    write_images(place / "images", images | {"wide.png": wide})
    line = ["embed", place / "encoder.safetensors", place / "store", "--out", place / "store.h5"]
    assert cli.main([*map(str, line), "--batch", "2"]) == 0
    return place


@pytest.fixture(scope="module")
def network(place: Path) -> torch.nn.Module:
    """The encoder as PyTorch runs it: exported, and loaded into torchvision's ResNet."""
    out = place / "exported.pth"
    line = ["export", place / "encoder.safetensors", "--layout", "torchvision", "--out", out]
    assert cli.main([str(a) for a in line]) == 0
    block = torchvision.models.resnet.BasicBlock
    network = torchvision.models.resnet.ResNet(block, [1, 1, 1, 1])
    network.fc = torch.nn.Identity()
    network.load_state_dict(torch.load(out, weights_only=True))
    return network.eval()


def fed(images: np.ndarray) -> torch.Tensor:
    """(n, 3, S, S), normalised."""
    pixels = torch.tensor(images).permute(0, 3, 1, 2).double() / 255
    mean, std = (torch.tensor(v).double().reshape(1, 3, 1, 1) for v in (MEAN, STD))
    return ((pixels - mean) / std).float()


def held(path: Path) -> dict[str, np.ndarray]:
    """The datasets of a file."""
    with h5py.File(path) as file:
        return {name: file[name][:] for name in DATASETS}


def same(a: Path, b: Path) -> bool:
    """Whether all datasets are equal, byte for byte."""
    x, y = held(a), held(b)
    return all(np.array_equal(x[name], y[name]) for name in DATASETS)


def test_features_of_a_store_are_pytorchs(place, network):
    import io

    store = TileStore(place / "store")
    tiles = np.stack([np.asarray(Image.open(io.BytesIO(store[i]["image"]))) for i in range(11)])
    with torch.no_grad():
        theirs = network(fed(tiles)).numpy()
    ours = held(place / "store.h5")
    assert ours["features"].dtype == np.float32
    # Measured: 4.4e-7 of the largest feature.
    assert np.abs(ours["features"] - theirs).max() < 2e-6 * np.abs(theirs).max()
    slides = store.slides()
    assert sorted(slides) == ["b.tif"] * 5 + ["x/a.svs"] * 6
    assert [s.decode() for s in ours["slides"]] == slides
    at = dict.fromkeys(slides, 0)
    for row, slide in enumerate(slides):
        assert ours["coords"][row].tolist() == [64 * at[slide], 128]
        assert ours["names"][row].decode() == f"{slide}@128,{64 * at[slide]}"
        at[slide] += 1
    assert (ours["spans"] == 2 * SIDE).all()


def test_the_file_says_what_it_holds(place):
    with read_features(place / "store.h5") as found:
        said = found.attributes
        digest = hashlib.sha256((place / "encoder.safetensors").read_bytes()).hexdigest()
        assert said["encoder_sha256"] == found.encoder_sha256 == digest
        assert (said["mean"], said["std"]) == (list(MEAN), list(STD))
        assert (said["side"], said["arch"], said["depth"], said["layer"]) == (
            SIDE,
            "resnet10",
            10,
            4,
        )
        assert said["code_version"] == __version__
        assert len(said["data_hash"]) == 64
        assert (len(found), found.width) == (11, 512)
        whole = found.all()
        assert np.array_equal(np.concatenate(list(found.blocks(3))), whole)
    with h5py.File(place / "store.h5") as file:
        assert file["coords"].attrs["patch_size_level0"] == 2 * SIDE
        assert np.array_equal(file["features"][:], whole)


def test_one_device_gives_the_bits_of_four(place, jaxhisto, tmp_path):
    line = ("embed", place / "encoder.safetensors", place / "store", "--batch", 2)
    assert jaxhisto(*line, "--devices", 1, "--out", tmp_path / "one.h5")[0] == 0
    assert same(tmp_path / "one.h5", place / "store.h5")


def test_a_folder_by_a_lower_stage(place, network, jaxhisto, tmp_path):
    out = tmp_path / "f.h5"
    line = ("embed", place / "encoder.safetensors", place / "images", "--out", out, "--layer", 2)
    code, said, _ = jaxhisto(*line, "--batch", 2)
    assert code == 0
    assert said.splitlines()[-1].startswith(f"next: jaxhisto probe {out}")
    ours = held(out)
    names = [n.decode() for n in ours["names"]]
    assert names == ["p/0.png", "p/1.png", "p/2.png", "q/0.png", "q/1.png", "q/2.png", "wide.png"]
    images = [np.asarray(Image.open(place / "images" / n)) for n in names]
    images[-1] = images[-1][:, 16:48]  # the middle square
    x = fed(np.stack(images))
    with torch.no_grad():
        stem = network.maxpool(network.relu(network.bn1(network.conv1(x))))
        theirs = network.layer2(network.layer1(stem)).mean((2, 3)).numpy()
    assert ours["features"].shape == (7, 128)
    assert np.abs(ours["features"] - theirs).max() < 2e-6 * np.abs(theirs).max()
    assert ours["spans"].tolist() == [32.0] * 6 + [64.0]


def killed_after(monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
    """The next `embed` is interrupted when it has appended so many blocks."""
    append, done = FeatureWriter.append, []

    def interrupted(self, *args):
        if len(done) == blocks:
            raise KeyboardInterrupt
        append(self, *args)
        done.append(1)

    monkeypatch.setattr(FeatureWriter, "append", interrupted)


def test_an_interrupted_line_goes_on_on_other_devices(place, jaxhisto, tmp_path, monkeypatch):
    out, partial = tmp_path / "f.h5", tmp_path / "f.h5.partial"
    line = ("embed", place / "encoder.safetensors", place / "store", "--batch", 2, "--out", out)
    with monkeypatch.context() as patched:
        killed_after(patched, 2)
        assert jaxhisto(*line, "--devices", 1)[0] == 130
    assert not out.exists()
    # A write that the kill tore: of the third block half a row too much is there.
    with (partial / "rows").open("ab") as file:
        file.write(b"\1" * 3000)
    code, said, _ = jaxhisto(*line)
    assert code == 0
    assert "4 of 11 rows are there, going on" in said
    assert "11 x 512 features, 4 of them from an earlier start" in said
    assert said.splitlines()[-1] == f"next: jaxhisto cluster {out} --out CLUSTERS"
    assert same(out, place / "store.h5")
    assert not partial.exists()


def test_rows_of_another_encoder_are_not_gone_on_with(place, jaxhisto, tmp_path, monkeypatch):
    out = tmp_path / "f.h5"
    line = ("embed", place / "encoder.safetensors", place / "store", "--out", out, "--batch", 2)
    with monkeypatch.context() as patched:
        killed_after(patched, 1)
        assert jaxhisto(*line)[0] == 130
    said = refusal(jaxhisto("embed", "random:resnet10", *line[2:]))
    assert "was begun with another encoder_sha256" in said
    assert "--force" in said
    with pytest.raises(StoreError, match=r"holds a part of it.*goes on"):
        read_features(out)


def test_what_is_there_is_kept_and_other_features_are_refused(place, jaxhisto, tmp_path):
    line = ["embed", place / "encoder.safetensors", place / "store", "--out", place / "store.h5"]
    before = (place / "store.h5").stat().st_mtime_ns
    code, said, _ = jaxhisto(*line, "--batch", 2, "--per-slide", tmp_path / "each")
    assert code == 0
    assert "11 of them from an earlier start" in said
    said = refusal(jaxhisto(*line, "--batch", 2, "--layer", 1))
    assert "layer 4 there, 1 here" in said
    assert (place / "store.h5").stat().st_mtime_ns == before
    whole = held(place / "store.h5")
    for name, slide in (("x/a.h5", b"x/a.svs"), ("b.h5", b"b.tif")):
        part, rows = held(tmp_path / "each" / name), whole["slides"] == slide
        assert all(np.array_equal(part[key], whole[key][rows]) for key in DATASETS)


def test_an_encoder_that_does_not_say_its_feeding(place, jaxhisto, tmp_path):
    silent = write_encoder(tmp_path / "silent" / "encoder.safetensors", without=("mean", "std"))
    line = ("embed", silent, place / "store", "--out", tmp_path / "f.h5", "--batch", 2)
    said = refusal(jaxhisto(*line))
    assert "does not say how it wants to be fed" in said
    assert "--mean" in said
    assert refusal(jaxhisto(*line, "--mean", *MEAN), 2).endswith("give both, or none of them.")
    assert jaxhisto(*line, "--mean", *MEAN, "--std", *STD)[0] == 0
    assert np.array_equal(held(tmp_path / "f.h5")["features"], held(place / "store.h5")["features"])
    told = ("embed", place / "encoder.safetensors", *line[2:], "--mean", 0, 0, 0, "--std", 1, 1, 1)
    assert "leave them out" in refusal(jaxhisto(*told), 2)


@pytest.mark.slow
def test_another_projects_file_is_imported_on_the_way(place, network, jaxhisto, tmp_path):
    foreign, out = tmp_path / "theirs.pth", tmp_path / "f.h5"
    torch.save(network.state_dict(), foreign)
    line = ("embed", foreign, place / "store", "--out", out, "--batch", 2, "--tile-px", SIDE)
    assert "give --mean and --std" in refusal(jaxhisto(*line))
    code, said, _ = jaxhisto(*line, "--mean", *MEAN, "--std", *STD)
    assert code == 0
    assert "wrote" not in said
    assert np.array_equal(held(out)["features"], held(place / "store.h5")["features"])
    with read_features(out) as found:
        assert found.encoder_sha256 == hashlib.sha256(foreign.read_bytes()).hexdigest()


def test_features_that_are_no_numbers_are_refused_with_the_tile(place, jaxhisto, tmp_path):
    tensors, metadata = tensor_file.read(place / "encoder.safetensors")
    tensors["layer4.0.bn2.weight"] = tensors["layer4.0.bn2.weight"].copy()
    tensors["layer4.0.bn2.weight"][3] = np.nan
    broken = tmp_path / "encoder.safetensors"
    tensor_file.write(broken, tensors, metadata)
    line = ("embed", broken, place / "images", "--out", tmp_path / "f.h5", "--batch", 2)
    said = refusal(jaxhisto(*line))
    assert f"{place}/images/p/0.png: the encoder gives features that are not finite" in said
    assert not (tmp_path / "f.h5").exists()


def test_refusals_name_this_verbs_flags(place, jaxhisto, tmp_path):
    write_images(tmp_path / "images", {"a.png": np.zeros((32, 32, 3), np.uint8)})
    (tmp_path / "images" / "b.png").write_bytes(b"no image")
    line = ("embed", place / "encoder.safetensors", tmp_path / "images")
    to = ("--out", tmp_path / "f.h5")
    said = refusal(jaxhisto(*line, *to))
    assert said.endswith("or pass --failures-allowed 1 to go on without.")
    said = refusal(jaxhisto(*line, tmp_path / "images", *to))
    assert said.endswith("is listed twice in the tiles given; remove one of them.")
    said = refusal(jaxhisto(*line, "--exclude", "*.png", *to))
    assert said.endswith("take the folder out of the tiles given or change --exclude.")
    slides = ("--exclude", "b.png", "--per-slide", tmp_path / "each")
    said = refusal(jaxhisto(*line, *slides, *to), 2)  # before the work
    assert said.endswith("images holds tiles of no slide; leave it out.")
    assert not (tmp_path / "f.h5").exists()


def test_a_stain_that_the_rule_does_not_fit_is_told_once_a_slide(jaxhisto, tmp_path):
    """As `jaxhisto tile` tells it, with the flags of this verb."""
    pixels = np.full((512, 1024, 3), 242, np.uint8)
    noise = np.random.default_rng(0).integers(-6, 7, (400, 400, 3))
    pixels[56:456, 56:456] = np.array([225, 150, 195]) + noise
    pixels[56:456, 568:968] = np.array([95, 110, 165]) + noise
    for name in ("a.tif", "b.tif"):
        tifffile.imwrite(
            tmp_path / name, pixels, tile=(64, 64), photometric="rgb", metadata=None,
            resolution=(2e4, 2e4), resolutionunit="CENTIMETER",
        )  # fmt: skip
    line = ("embed", "handmade", tmp_path, "--kind", "slides", "--out", tmp_path / "f.h5")
    code, _, said = jaxhisto(*line, "--cut.max-tiles", 3, "--tile-px", 64)
    assert code == 0, said
    notes = [text for text in said.splitlines() if "note: " in text]
    assert [text[:34] for text in notes] == [f"{n}.tif: note: ciga2022 keeps 50% of" for n in "ab"]
    assert all(text.endswith("try --cut.foreground od") for text in notes)


def test_a_whole_slide_is_cut_where_it_is_tissue(place, jaxhisto, tmp_path):
    rng = np.random.default_rng(0)
    pixels = np.full((96, 192, 3), 242, np.uint8)
    pixels[:, :96] = np.array([180, 100, 170]) + rng.integers(-6, 7, (96, 96, 3))
    slide, out = tmp_path / "one.tif", tmp_path / "f.h5"
    tifffile.imwrite(
        slide, pixels, tile=(96, 96), photometric="rgb", metadata=None, compression="zlib",
        resolution=(2e4, 2e4), resolutionunit="CENTIMETER",
    )  # fmt: skip
    line = ("embed", place / "encoder.safetensors", slide, "--out", out, "--batch", 2)
    code, said, _ = jaxhisto(*line, "--cut.close-um", 0)
    assert code == 0, said
    found = held(out)
    corners = [[x, y] for y in (0, 32, 64) for x in (0, 32, 64)]
    assert found["coords"].tolist() == corners
    assert {s.decode() for s in found["slides"]} == {"one.tif"}
    cut = write_images(
        tmp_path / "cut",
        {f"{i}.png": pixels[y : y + 32, x : x + 32] for i, (x, y) in enumerate(corners)},
    )
    images = ("embed", line[1], cut, "--out", tmp_path / "cut.h5", "--batch", 2)
    assert jaxhisto(*images)[0] == 0
    assert np.array_equal(held(tmp_path / "cut.h5")["features"], found["features"])
    said = refusal(jaxhisto(*line[:3], cut, "--out", tmp_path / "g.h5"), 2)
    assert "embed them into two files" in said

    # One that is all glass, and one without a pixel size, beside it.
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "one.tif").write_bytes(slide.read_bytes())
    glass = np.full((96, 96, 3), 242, np.uint8)
    tifffile.imwrite(tmp_path / "slides" / "none.tif", glass, photometric="rgb", metadata=None)
    line = (*line[:2], tmp_path / "slides", *line[3:], "--kind", "slides", "--cut.close-um", 0)
    line = ("--force", *line[1:])
    said = refusal(jaxhisto("embed", *line))
    assert "none.tif: " in said
    assert said.endswith("pass --failures-allowed 1 to go on without")
    code, said, _ = jaxhisto("embed", *line, "--failures-allowed", 1)
    assert code == 0
    assert "dropped none.tif: the file has no usable pixel size" in said
    assert held(out)["coords"].tolist() == corners


@pytest.mark.parametrize(
    ("name", "said"),
    [("random:resnet99", "write random:ARCH"), ("random:resnet10:x", "write random:ARCH")],
)
def test_an_encoder_that_there_is_not(place, jaxhisto, tmp_path, name, said):
    line = ("embed", name, place / "images", "--out", tmp_path / "f.h5")
    assert said in refusal(jaxhisto(*line))


def test_without_h5py_the_extra_is_named(place, jaxhisto, tmp_path, monkeypatch):
    def absent(name: str):
        raise ImportError(name)

    patched = type("importlib", (), {"import_module": staticmethod(absent)})
    monkeypatch.setattr(features_module, "importlib", patched)
    line = ("embed", "handmade", place / "images", "--out", tmp_path / "f.h5", "--tile-px", 32)
    assert "pip install 'jaxhisto[hdf5]'" in refusal(jaxhisto(*line))
    assert importlib.import_module("h5py") is h5py


@pytest.mark.slow
def test_a_killed_process_goes_on_where_it_was(place, tmp_path):
    images = {f"{i:04d}.png": x for i, x in enumerate(tissue(2000, 3))}
    folder, out = write_images(tmp_path / "many", images), tmp_path / "f.h5"
    line = [sys.executable, "-m", "jaxhisto.cli", "embed", str(place / "encoder.safetensors")]
    line += [str(folder), "--batch", "4", "--out"]
    subprocess.run([*line, str(tmp_path / "whole.h5")], check=True)
    rows = tmp_path / "f.h5.partial" / "rows"
    kills = 0
    for _ in range(3):
        process = subprocess.Popen([*line, str(out)])
        start = rows.stat().st_size if rows.exists() else 0
        while process.poll() is None and (
            not rows.exists() or rows.stat().st_size < start + 300_000
        ):
            time.sleep(0.002)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        if out.exists():
            break
        assert not list(tmp_path.glob("*.h5.partial/finished.h5"))
    assert kills
    said = subprocess.run([*line, str(out)], check=True, capture_output=True, text=True).stdout
    assert "rows are there, going on" in said
    assert same(out, tmp_path / "whole.h5")


@pytest.mark.slow
@pytest.mark.parametrize("depth", [18, 50, 101])
def test_depths_are_torchvisions(depth, tmp_path, jaxhisto):
    torch.manual_seed(depth)
    network = getattr(torchvision.models, f"resnet{depth}")()
    network.train()
    images = np.concatenate([tissue(8, 1, c) for c in (60, 200)])
    with torch.no_grad():
        network(fed(images))  # for running statistics that are no 0 and 1
    torch.save(network.state_dict(), tmp_path / "theirs.pth")
    write_images(tmp_path / "images", {f"{i:02d}.png": x for i, x in enumerate(images[:6])})
    line = ("embed", tmp_path / "theirs.pth", tmp_path / "images", "--out", tmp_path / "f.h5")
    line += ("--tile-px", SIDE, "--mean", *MEAN, "--std", *STD, "--batch", 2, "--devices", 1)
    assert jaxhisto(*line)[0] == 0
    network.eval().fc = torch.nn.Identity()
    with torch.no_grad():
        theirs = network(fed(images[:6])).numpy()
    ours = held(tmp_path / "f.h5")["features"]
    assert ours.shape == (6, 2048 if depth >= 50 else 512)
    # Measured: 1.6e-6, 1.2e-6 (of a ResNet34), 2.9e-6 and 3.6e-6.
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()
    if depth > 18:
        return
    assert jaxhisto(*line[:4], tmp_path / "half.h5", *line[5:], "--precision", "bf16")[0] == 0
    half = held(tmp_path / "half.h5")["features"]
    assert 0 < np.abs(half - theirs).max() < 0.1 * np.abs(theirs).max()
