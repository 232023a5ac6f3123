"""`jaxhisto probe` as a user calls it: the table, the record, refusals."""

from __future__ import annotations

import csv
import hashlib
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from made_sets import read_json, tissue, write_encoder, write_images
from refusals import refusal
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import mean_absolute_error, roc_auc_score
from sklearn.preprocessing import StandardScaler

from jaxhisto import cli
from jaxhisto.data.features import read_features

FEW = ("--draws", 20, "--epochs", 5)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two classes by folder, numbers in a CSV file, hand-made features; read only."""
    place = tmp_path_factory.mktemp("probe")
    light, dark = tissue(20, 1, 190), tissue(20, 2, 150)
    images = {f"light/{i:02d}.png": x for i, x in enumerate(light)}
    images |= {f"dark/{i:02d}.png": x for i, x in enumerate(dark)}
    write_images(place / "images", images)
    with (place / "numbers.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "mean", "patient"])
        for i, (name, x) in enumerate(images.items()):
            writer.writerow([name, float(x.mean()), f"p{i % 8}"])
    line = ["embed", "handmade", place / "images", "--tile-px", 32, "--out", place / "f.h5"]
    assert cli.main([str(a) for a in line]) == 0
    return place


def rows_of(place: Path, split: dict, part: str) -> tuple[np.ndarray, list[str]]:
    """Features of a part of the split, in the order of names."""
    with read_features(place / "f.h5") as found:
        row = {name: i for i, name in enumerate(found.names)}
        names = sorted(split[part])
        return found.all()[[row[n] for n in names]].astype(float), names


def test_the_record_is_scikit_learns(place, jaxhisto, tmp_path):
    out = tmp_path / "probe.json"
    line = ("probe", place / "f.h5", "--task.data", place / "images", "--out", out, *FEW)
    code, said, err = jaxhisto(*line, "--encoder", "handmade")
    assert code == 0, err
    assert "20 training images are fewer than a batch of 128" in said
    assert "macro f1" in said
    record, split = read_json(out), read_json(tmp_path / "split-probe.json")
    with read_features(place / "f.h5") as found:
        assert record["features"]["encoder_sha256"] == found.encoder_sha256
        assert record["features"]["data_hash"] == found.data_hash
    assert record["split_sha256"] == split["sha256"]
    assert record["images"] == {p: len(split[p]) for p in ("train", "validation", "test")}
    linear = next(p for p in record["probes"] if p["name"] == "linear")
    x, names = rows_of(place, split, "train")
    held_out, tested = rows_of(place, split, "test")
    scaler = StandardScaler().fit(x)
    c = 2 / (len(x) * linear["chosen"]["strength"])
    theirs = LogisticRegression(C=c, tol=1e-10, max_iter=10000)
    theirs.fit(scaler.transform(x), [n.startswith("light") for n in names])
    expected = roc_auc_score(
        [n.startswith("light") for n in tested],
        theirs.decision_function(scaler.transform(held_out)),
    )
    score = linear["test"]["auc"]
    assert score["value"] == pytest.approx(expected)
    assert score["low"] <= score["value"] <= score["high"]
    before = out.read_bytes().split(b'"environment"')[0]
    assert jaxhisto(*line, "--encoder", "handmade")[0] == 0
    assert out.read_bytes().split(b'"environment"')[0] == before


def test_numbers_by_patient(place, jaxhisto, tmp_path):
    out = tmp_path / "probe.json"
    task = ("--task.data", place / "images", "--task.labels", place / "numbers.csv")
    task += ("--task.target", "mean", "--task.group", "patient")
    line = ("probe", place / "f.h5", *task, "--out", out, "--probes", "linear", "knn", *FEW)
    code, said, err = jaxhisto(*line)
    assert code == 0, err
    record, split = read_json(out), read_json(tmp_path / "split-probe.json")
    assert (record["kind"], record["bootstrap_by"]) == ("regression", "group")
    assert "drawn by" in said
    with (place / "numbers.csv").open() as file:
        number = {row["file"]: float(row["mean"]) for row in csv.DictReader(file)}
    x, names = rows_of(place, split, "train")
    held_out, tested = rows_of(place, split, "test")
    scaler = StandardScaler().fit(x)
    linear = record["probes"][0]
    theirs = Ridge(alpha=len(x) * linear["chosen"]["strength"])
    theirs.fit(scaler.transform(x), [number[n] for n in names])
    guess = theirs.predict(scaler.transform(held_out))
    expected = mean_absolute_error([number[n] for n in tested], guess)
    assert linear["test"]["mae"]["value"] == pytest.approx(expected, rel=1e-4)
    assert linear["test"]["pearson"]["value"] > 0.9


def test_an_encoder_gives_what_its_cached_features_give(place, jaxhisto, tmp_path):
    encoder = write_encoder(tmp_path / "encoder.safetensors")
    task = ("--task.data", place / "images", "--task.side", 32)
    common = (*task, *FEW, "--probes", "knn")
    line = ("embed", encoder, place / "images", "--out", tmp_path / "f.h5", "--batch", 4)
    assert jaxhisto(*line)[0] == 0
    cached = ("probe", tmp_path / "f.h5", *common, "--out", tmp_path / "a.json")
    assert jaxhisto(*cached, "--encoder", encoder)[0] == 0
    assert jaxhisto(
        "probe", encoder, *common, "--out", tmp_path / "b.json", "--embed-batch", 4
    )[0] == 0  # fmt: skip
    a, b = read_json(tmp_path / "a.json"), read_json(tmp_path / "b.json")
    assert a["probes"] == b["probes"]
    assert a["features"]["encoder_sha256"] == b["features"]["encoder_sha256"]
    said = refusal(jaxhisto(*cached, "--encoder", "handmade"))
    assert "holds features of another encoder" in said
    assert "embed the images with this one" in said


def test_fewer_labels_are_fewer_training_images(place, jaxhisto, tmp_path):
    line = ("probe", place / "f.h5", "--task.data", place / "images", *FEW, "--probes", "knn")
    assert jaxhisto(*line, "--percent", 50, "--out", tmp_path / "half.json")[0] == 0
    record = read_json(tmp_path / "half.json")
    assert (record["percent"], record["images"]["train"]) == (50.0, 10)


def test_features_that_are_no_numbers_or_not_there(place, jaxhisto, tmp_path):
    task = ("--task.data", place / "images", "--out", tmp_path / "p.json")
    broken = Path(shutil.copy(place / "f.h5", tmp_path / "broken.h5"))
    with h5py.File(broken, "r+") as file:
        file["features"][3, 5] = np.nan
        name = file["names"].asstr()[3]
    said = refusal(jaxhisto("probe", broken, *task))
    assert said.startswith(f"jaxhisto probe: {name}: ")
    assert "not finite" in said
    numbers = tmp_path / "numbers.csv"
    numbers.write_text("file,n\n" + "".join(f"{i:02d}.png,{i}\n" for i in range(20)))
    light = ("--task.data", place / "images" / "light", "--task.labels", numbers)
    light = (*light, "--task.target", "n", *task[2:])
    with h5py.File(broken, "r+") as file:  # as of two folders of one name
        file["features"][3, 5] = 0
        file["names"][:] = [n.removeprefix("light/") for n in file["names"].asstr()[:]]
        file["names"][0] = "05.png"
    said = refusal(jaxhisto("probe", broken, *light))
    assert "has 1 names twice (the first, 05.png)" in said
    broken.write_bytes(broken.read_bytes()[:3000])
    assert "is no whole file of features" in refusal(jaxhisto("probe", broken, *task))
    absent = tmp_path / "absent.h5"
    assert "write it with `jaxhisto embed`" in refusal(jaxhisto("probe", absent, *task))
    more = Path(shutil.copytree(place / "images", tmp_path / "more"))
    shutil.copy(more / "dark/00.png", more / "dark/99.png")
    said = refusal(jaxhisto("probe", place / "f.h5", "--task.data", more, *task[2:]))
    assert "lacks 1 of 41 images" in said
    assert "dark/99.png" in said
    assert not (tmp_path / "p.json").exists()


def test_features_of_images_that_were_edited_since(place, jaxhisto, tmp_path):
    """By their content: copies with another date are the same images."""
    line = ("--probes", "knn", *FEW, "--out", tmp_path / "p.json")
    same = Path(shutil.copytree(place / "images", tmp_path / "same", copy_function=shutil.copyfile))
    assert jaxhisto("probe", place / "f.h5", "--task.data", same, *line)[0] == 0
    (tmp_path / "p.json").unlink()
    for name in ("dark/03.png", "light/07.png"):
        shutil.copy(same / "dark/00.png", same / name)
    said = refusal(jaxhisto("probe", place / "f.h5", "--task.data", same, *line))
    assert "2 of 40 differ (dark/03.png, light/07.png); embed them again" in said
    assert not (tmp_path / "p.json").exists()
    before = Path(shutil.copy(place / "f.h5", tmp_path / "before.h5"))
    with h5py.File(before, "r+") as file:  # as an earlier version wrote them
        digests = [hashlib.sha256((place / "images" / n).read_bytes()).digest()
                   for n in file["names"].asstr()[:]]  # fmt: skip
        assert file["contents"][:].tobytes() == b"".join(digests)
        del file["contents"]
    assert jaxhisto("probe", before, "--task.data", same, *line)[0] == 0


def test_what_would_be_ignored_or_lost_is_refused_at_once(place, jaxhisto, tmp_path):
    task = ("--task.data", place / "images")
    feeding = ("--mean", 0, 0, 0, "--std", 1, 1, 1)
    said = refusal(jaxhisto("probe", place / "f.h5", *task, "--out", tmp_path / "p", *feeding), 2)
    assert "holds features; leave them out" in said
    line = ("probe", tmp_path / "gone" / "encoder.pth", *task, "--out", tmp_path / "p.json")
    assert "encoder.pth: does not exist; check the path" in refusal(jaxhisto(*line))
    said = refusal(jaxhisto("probe", place / "f.h5", *task, "--out", tmp_path / "p", "--probes"), 2)
    assert "--probes names none; name one of them" in said
    said = refusal(jaxhisto("probe", place / "f.h5", *task, "--out", tmp_path / "p",
                            "--task.side", 96), 2)  # fmt: skip
    assert "holds features of images fed at 32 px; leave it out, or embed with --tile-px" in said
    few = ("--select", "groups", "--percent", 5)
    said = refusal(jaxhisto("probe", place / "f.h5", *task, "--out", tmp_path / "p", *few), 2)
    assert "fits on all validation images too, which makes more of --percent 5 than" in said
    code, said, err = jaxhisto("probe", place / "f.h5", *task, "--out", tmp_path)
    assert (code, said) == (1, "")
    assert "is a folder; give --out a file" in err
    line = ("embed", "handmade", place / "images", "--out", tmp_path / "f.h5", "--layer", 2)
    assert "handmade has no layers; leave it out" in refusal(jaxhisto(*line), 2)


def test_nothing_of_the_users_is_written_over(place, jaxhisto, tmp_path):
    line = ("probe", place / "f.h5", "--task.data", place / "images", "--probes", "knn", *FEW)
    table = Path(shutil.copy(place / "numbers.csv", tmp_path / "labels.csv"))
    image = Path(shutil.copy(place / "images/dark/00.png", tmp_path / "a.png"))
    other = tmp_path / "other.json"
    other.write_text('{"format": "theirs"}')
    mine = tmp_path / "split-mine.json"
    mine.write_text('["a list of mine"]')
    before = {path: path.read_bytes() for path in (table, image, other, mine)}
    for path in (table, image, other, tmp_path / "mine.json"):
        code, said, err = jaxhisto(*line, "--out", path)
        assert (code, said) == (1, "")
        assert "exists and is nothing that `jaxhisto probe` wrote; give another --out" in err
    assert {path: path.read_bytes() for path in before} == before
    code, said, err = jaxhisto(*line, "--out", table / "p.json")  # before the work, not after it
    assert (code, said) == (1, "")
    assert "is no folder to write in" in err
    for _ in range(2):  # its own record it replaces
        assert jaxhisto(*line, "--out", tmp_path / "new" / "p.json")[0] == 0


def test_a_test_image_that_is_trained_on_is_told(place, jaxhisto, tmp_path):
    images = Path(shutil.copytree(place / "images", tmp_path / "images"))
    line = ("probe", "handmade", "--task.data", images, "--task.side", 32, "--probes", "knn", *FEW)
    code, _, err = jaxhisto(*line, "--out", tmp_path / "p.json")
    assert (code, "copy of" in err) == (0, False)
    split = read_json(tmp_path / "split-p.json")
    shutil.copy(images / split["train"][0], images / split["test"][0])
    code, _, err = jaxhisto(*line, "--out", tmp_path / "p.json")
    assert code == 0
    assert "1 test image of 10 is a copy of what is trained or chosen on" in err
    assert f"({split['test'][0]} = {split['train'][0]})" in err


def test_sets_that_cannot_be_probed(place, jaxhisto, tmp_path):
    out = ("--out", tmp_path / "p.json")
    one = Path(shutil.copytree(place / "images" / "dark", tmp_path / "one" / "dark"))
    assert "class" in refusal(jaxhisto("probe", place / "f.h5", "--task.data", one.parent, *out))
    areas = {f"{i:02d}.png": np.tile(np.arange(32, dtype=np.uint8) % 2, (32, 1)) for i in range(20)}
    write_images(tmp_path / "areas", areas)
    masks = ("--task.data", place / "images" / "dark", "--task.masks", tmp_path / "areas")
    said = refusal(jaxhisto("probe", place / "f.h5", *masks, *out), 2)
    assert "is a segmentation task" in said
