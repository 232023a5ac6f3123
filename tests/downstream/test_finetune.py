"""`jaxhisto finetune` and `classify`: against PyTorch, the folder, and refusals."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from finetuning import (
    BLUE,
    RED,
    STEP,
    config_of,
    fed,
    labelled,
    line,
    metrics_of,
    rows_of,
    stock,
)
from made_sets import SIDE, read_json, write_encoder, write_images
from refusals import refusal

from jaxhisto import cli, tensor_file
from jaxhisto.downstream import classifier
from jaxhisto.downstream.finetune import run_finetune
from jaxhisto.tasks.task import open_task


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set, an encoder, and a finished fine-tuning of it in `done`; read only."""
    place = tmp_path_factory.mktemp("finetune")
    labelled(place)
    write_encoder(place / "encoder.safetensors")
    assert cli.main([str(a) for a in line(place, place / "done", *STEP)]) == 0
    return place


def one_step_of_torch(
    network: torch.nn.Module, images: np.ndarray, wanted: torch.Tensor, freeze: str
) -> tuple[float, dict[str, np.ndarray]]:
    """Does a step of Adam; the loss before it, and what it went along: gradient and decay."""
    network.train(freeze == "none")
    trained = network.fc.parameters() if freeze == "encoder" else network.parameters()
    optimizer = torch.optim.Adam(trained, lr=1e-3, weight_decay=0.1)
    out = network(fed(images))
    if wanted.is_floating_point():
        loss = torch.nn.functional.mse_loss(out[:, 0], wanted)
    else:
        loss = torch.nn.functional.cross_entropy(out, wanted)
    loss.backward()
    along = {
        name: (p.grad + 0.1 * p.detach()).numpy().copy()
        for name, p in network.named_parameters()
        if freeze != "encoder" or name.startswith("fc.")
    }
    optimizer.step()
    return loss.item(), along


def assert_stepped_alike(
    name: str, ours: np.ndarray, theirs: np.ndarray, along: np.ndarray | None
) -> None:
    """Equal to 2e-5, but for weights that nothing pulled.

    The first step of Adam is as long for a gradient of 1e-9 as for one of 1, along its sign: where
    a ReLU or a sum lies at 0 but for rounding, that is chance, between two versions of PyTorch
    too. Seen: 0.26 % of a tensor, with gradients below 1.2 % of its largest; a wrong decay, rate
    or BatchNorm moves nearly all.
    """
    wrong = ~np.isclose(ours, theirs, rtol=2e-5, atol=2e-6)
    if along is None:
        assert not wrong.any(), name
        return
    assert wrong.sum() <= max(2, 0.005 * wrong.size), (name, wrong.sum(), wrong.size)
    size = np.abs(along)
    assert (size[wrong] < 0.02 * size.max()).all(), name
    assert np.abs(ours - theirs).max() <= 2.01e-3, name


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("freeze", "kind"),
    [
        ("none", "label"),
        pytest.param("bn", "label", marks=slow),
        pytest.param("encoder", "label", marks=slow),
        pytest.param("none", "target", marks=slow),
    ],
)
def test_one_step_is_pytorchs(place: Path, tmp_path: Path, freeze: str, kind: str) -> None:
    of = {"label": "label"} if kind == "label" else {"label": "", "target": "tint"}
    base = config_of(place, tmp_path / "out", freeze=freeze)
    config = replace(base, task=replace(base.task, **of))
    record = run_finetune(config)
    known = open_task(config.task)
    row = {name: i for i, name in enumerate(known.names)}
    split = read_json(tmp_path / "out" / "split.json")
    train, test = ([row[name] for name in split[part]] for part in ("train", "test"))
    outputs = len(known.classes) or 1
    network = stock(place, outputs)
    head = classifier.new_head(512, outputs, 0)
    with torch.no_grad():
        network.fc.weight.copy_(torch.tensor(head["kernel"].T.copy()))
        network.fc.bias.copy_(torch.tensor(head["bias"]))
    values = known.values[train]
    mean, deviation = (0.0, 1.0) if known.classes else (values.mean(), values.std())
    wanted = torch.tensor(values if known.classes else ((values - mean) / deviation))
    wanted = wanted.long() if known.classes else wanted.float()
    loss, along = one_step_of_torch(network, known.load(train, SIDE), wanted, freeze)
    assert metrics_of(tmp_path / "out")[0]["loss"] == pytest.approx(loss, rel=3e-6)
    assert record["steps"] == 1
    after = {k: v.numpy() for k, v in stock(tmp_path / "out", outputs).state_dict().items()}
    last, _ = tensor_file.read(tmp_path / "out" / "head.safetensors")
    # A regression's layer is written in the targets' unit.
    after["fc.weight"] = last["fc.weight"] / np.float32(deviation)
    after["fc.bias"] = (last["fc.bias"] - np.float32(mean)) / np.float32(deviation)
    for name, theirs in network.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert_stepped_alike(name, after[name], theirs.numpy(), along.get(name))
    # Predictions are those of the weights as we have them: where a slope is all but zero, Adam's
    # first step has the sign of its rounding, and that may be another one in PyTorch.
    network.load_state_dict({k: torch.tensor(v) for k, v in after.items()}, strict=True)
    network.eval()
    with torch.inference_mode():
        out = network(fed(known.load(test, SIDE)))
        theirs = out.softmax(1).numpy() if known.classes else out[:, 0].numpy() * deviation + mean
    found = {r["name"]: r for r in rows_of(tmp_path / "out" / "predictions.csv")}
    columns = [f"score_{c}" for c in known.classes] or ["predicted"]
    ours = np.array([[float(found[known.names[i]][c]) for c in columns] for i in test])
    np.testing.assert_allclose(ours, theirs.reshape(ours.shape), rtol=2e-5, atol=2e-5)


def test_the_folder_says_what_was_done(place: Path) -> None:
    out, record = place / "done", read_json(place / "done" / "result.json")
    config = read_json(out / "config.json")
    assert config["training"]["flips"] is False
    assert record["training"]["jitter"] == config["training"]["jitter"] == "none"
    assert (record["training"]["weight_decay"], record["training"]["batch"]) == (0.1, 16)
    assert record["images"] == {"train": 16, "validation": 8, "test": 8}
    split = read_json(out / "split.json")
    assert split["trained_on"] == split["train"]
    assert len(metrics_of(out)) == record["epochs"] == record["steps"] == 4
    best = metrics_of(out)[record["epoch"] - 1]
    assert best["validation_macro_f1"] == max(m["validation_macro_f1"] for m in metrics_of(out))
    rows = rows_of(out / "predictions.csv")
    truth = {r["file"]: r["label"] for r in rows_of(place / "labels.csv")}
    assert [r["name"] for r in rows] == split["validation"] + split["test"]
    assert all(r["truth"] == truth[r["name"]] for r in rows)
    found = {c: np.array([float(r[f"score_{c}"]) for r in rows]) for c in (BLUE, RED)}
    np.testing.assert_allclose(found[BLUE] + found[RED], 1, atol=1e-8)
    assert all((r["predicted"] == RED) == (found[RED][i] > 0.5) for i, r in enumerate(rows))
    right = np.mean([r["predicted"] == r["truth"] for r in rows if r["part"] == "test"])
    assert record["test"]["accuracy"]["value"] == pytest.approx(right)


def test_classify_says_of_tiles_what_finetune_said(place, jaxhisto, tmp_path):
    out = tmp_path / "new" / "said.csv"
    said = ("classify", place / "done", place / "images", "--out", out, "--devices", 1)
    assert "32 tiles" in jaxhisto(*said)[1]
    known = {r["name"]: r for r in rows_of(place / "done" / "predictions.csv")}
    found = {r["name"]: r for r in rows_of(out)}
    assert len(found) == 32
    for name, row in known.items():
        for column in (f"score_{BLUE}", f"score_{RED}"):
            assert float(found[name][column]) == pytest.approx(float(row[column]), abs=2e-6)
    assert "exists; pass --force" in refusal(jaxhisto(*said))
    said = ("classify", place / "images", place / "images", "--out", tmp_path / "more.csv")
    assert "has no encoder.safetensors" in refusal(jaxhisto(*said))


def test_classify_takes_images_whole_and_leaves_out_what_it_may(place, jaxhisto, tmp_path):
    """As finetune took them: one of 576 px is the same image of 32 px, each pixel 18 by 18."""
    small = tmp_path / "small" / "a.png"
    large = tmp_path / "large" / "a.png"
    pixels = open_task(config_of(place, tmp_path).task).images.read(0)
    write_images(small.parent, {"a.png": pixels})
    write_images(large.parent, {"a.png": pixels.repeat(18, 0).repeat(18, 1)})
    rows = []
    for folder in (small.parent, large.parent):
        line = ("classify", place / "done", folder, "--out", tmp_path / "o.csv", "--devices", 1)
        assert jaxhisto(*line, "--force")[0] == 0
        rows += rows_of(tmp_path / "o.csv")
    assert rows[0] == rows[1]
    (small.parent / "b.png").write_bytes(small.read_bytes()[:99])
    line = ("classify", place / "done", small.parent, "--out", tmp_path / "o.csv", "--force")
    assert refusal(jaxhisto(*line)).endswith("or pass --failures-allowed 1 to go on without.")
    code, said, _ = jaxhisto(*line, "--failures-allowed", 1, "--devices", 1)
    assert code == 0
    assert f"dropped {small.parent / 'b.png'}: " in said
    assert rows_of(tmp_path / "o.csv") == rows[:1]


def test_the_export_is_a_stock_classifier(place, jaxhisto, tmp_path):
    """torchvision's ResNet with `fc`, strictly loaded, gives the predictions that were written."""
    out = tmp_path / "model.pth"
    made = ("export", place / "done", "--layout", "torchvision", "--out", out)
    assert jaxhisto(*made, "--fc", "trained")[0] == 0
    code, said, _ = jaxhisto("verify", out)
    assert code == 0, said
    block = torchvision.models.resnet.BasicBlock
    network = torchvision.models.resnet.ResNet(block, [1, 1, 1, 1], num_classes=2)
    network.load_state_dict(torch.load(out, weights_only=True))
    about = read_json(tmp_path / "model.pth.json")
    assert (about["classes"], about["class_names"]) == (2, [BLUE, RED])
    rows = rows_of(place / "done" / "predictions.csv")
    known = open_task(config_of(place, out).task)
    images = known.load([known.names.index(r["name"]) for r in rows], SIDE)
    with torch.inference_mode():
        theirs = network.eval()(fed(images)).softmax(1).numpy()
    ours = [[float(r[f"score_{c}"]) for c in about["class_names"]] for r in rows]
    np.testing.assert_allclose(ours, theirs, atol=2e-6)
    plain = ("export", place / "encoder.safetensors", *made[2:4], "--fc", "trained")
    assert "head.safetensors: is not there" in refusal(
        jaxhisto(*plain, "--out", tmp_path / "p.pth")
    )
    wrong = (
        "export",
        place / "done",
        "--layout",
        "timm",
        "--fc",
        "trained",
        "--out",
        tmp_path / "t",
    )
    assert "has no trained fc" in refusal(jaxhisto(*wrong))


def test_a_layer_of_another_encoder_is_refused(place, jaxhisto, tmp_path):
    write_encoder(tmp_path / "encoder.safetensors", seed=6)
    out = ("--out", tmp_path / "said.csv")
    assert "has no head.safetensors" in refusal(
        jaxhisto("classify", tmp_path, place / "images", *out)
    )
    (tmp_path / "head.safetensors").write_bytes((place / "done/head.safetensors").read_bytes())
    said = refusal(jaxhisto("classify", tmp_path, place / "images", *out))
    assert "belongs to another encoder" in said


def test_a_finished_folder_is_read_and_others_are_refused(place, jaxhisto, tmp_path):
    out = place / "done"
    before = (out / "result.json").stat().st_mtime_ns
    (out / "checkpoints").mkdir()  # left by a kill
    code, said, _ = jaxhisto(*line(place, out, *STEP))
    assert code == 0
    assert "is finished" in said
    assert not (out / "checkpoints").exists()
    score = json.loads((out / "result.json").read_text())["test"]["accuracy"]
    assert f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]" in said
    said = refusal(jaxhisto(*line(place, out, *STEP, "--freeze", "bn", "--training.seed", 3)))
    assert "training.seed: 0 -> 3" in said
    assert "freeze: none -> bn" in said
    write_encoder(tmp_path / "encoder.safetensors", seed=6)
    other = ["finetune", tmp_path / "encoder.safetensors", *line(place, out, *STEP)[2:]]
    assert "encoder: " in refusal(jaxhisto(*other))
    said = refusal(jaxhisto(*line(place, out, *STEP, "--task.split-seed", 2)))
    assert "task.split_seed: 0 -> 2; split: " in said
    assert "is no run folder" in refusal(jaxhisto(*line(place, place, *STEP)))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"steps": 3}')
    said = refusal(jaxhisto(*line(place, tmp_path / "other", *STEP)))
    assert "holds a run of another verb or version (config.json: unknown key steps" in said
    assert (out / "result.json").stat().st_mtime_ns == before


def test_other_labels_of_the_same_images_are_refused(place, jaxhisto, tmp_path):
    text = (place / "labels.csv").read_text()
    (tmp_path / "labels.csv").write_text(text.replace("00.png,blue", "00.png,red"))
    flags = line(place, place / "done", *STEP, "--task.labels", tmp_path / "labels.csv")
    flags += ["--task.split", place / "done" / "split.json"]
    assert "labels: " in refusal(jaxhisto(*flags))


def test_images_that_are_damaged_or_were_edited(place, jaxhisto, tmp_path):
    """Found before training, those to test on too; a folder is of its images."""
    images = Path(shutil.copytree(place / "images", tmp_path / "images"))
    tested = read_json(place / "done" / "split.json")["test"][0]
    flags = ("--task.data", images)
    (images / tested).write_bytes((images / tested).read_bytes()[:99])
    said = refusal(jaxhisto(*line(place, tmp_path / "out", *STEP, *flags)))
    assert said.startswith(f"jaxhisto finetune: {images / tested}: ")
    assert not (tmp_path / "out").exists()
    shutil.copyfile(place / "images" / tested, images / tested)
    assert jaxhisto(*line(place, place / "done", *STEP, *flags))[0] == 0  # of another date
    other = next(p for p in images.iterdir() if p.name != tested)
    shutil.copyfile(other, images / tested)
    said = refusal(jaxhisto(*line(place, place / "done", *STEP, *flags)))
    assert "other settings or data (images: " in said


def test_an_encoder_that_cannot_be_trained(place, jaxhisto, tmp_path):
    out = line(place, tmp_path / "out", *STEP)
    silent = write_encoder(tmp_path / "silent" / "encoder.safetensors", without=("mean", "std"))
    assert "does not say how it wants to be fed" in refusal(jaxhisto(out[0], silent, *out[2:]))
    assert "has no weights to train" in refusal(jaxhisto(out[0], "handmade", *out[2:]), 2)
    assert not (tmp_path / "out").exists()


def test_a_task_that_cannot_be_learnt(place, jaxhisto, tmp_path):
    out = line(place, tmp_path / "out", *STEP)
    said = refusal(jaxhisto(*out, "--task.classes", RED, RED), 2)
    assert f"names {RED} twice" in said
    one = tmp_path / "one.csv"
    one.write_text("file,label\n" + "".join(f"{i:02d}.png,red\n" for i in range(8)))
    said = refusal(jaxhisto(*out, "--task.labels", one))
    assert "class" in said
    split = {k: v for k, v in read_json(place / "done" / "split.json").items() if k != "sha256"}
    blue = {r["file"] for r in rows_of(place / "labels.csv") if r["label"] == BLUE}
    split["train"] = [name for name in split["train"] if name not in blue]
    (tmp_path / "split.json").write_text(json.dumps(split))
    said = refusal(jaxhisto(*out, "--task.split", tmp_path / "split.json"))
    assert "the train part has no image of blue" in said
    write_images(
        tmp_path / "masks", {f"{i:02d}.png": np.eye(SIDE, dtype=np.uint8) for i in range(32)}
    )
    flags = [*line(place, tmp_path / "out"), "--task.label", "", "--task.labels", ""]
    said = refusal(jaxhisto(*flags, "--task.masks", tmp_path / "masks"), 2)
    assert "`jaxhisto segment` trains" in said


def test_weights_that_are_no_numbers_name_epoch_and_images(place, jaxhisto, tmp_path):
    tensors, about = tensor_file.read(place / "encoder.safetensors")
    tensors["layer4.0.conv2.weight"] = np.full_like(tensors["layer4.0.conv2.weight"], np.nan)
    tensor_file.write(tmp_path / "encoder.safetensors", tensors, about)
    out = line(place, tmp_path / "out", *STEP)
    said = refusal(jaxhisto(out[0], tmp_path / "encoder.safetensors", *out[2:]))
    assert "the loss is nan in epoch 1, batch 1, of " in said
    names = said.split(" of ")[1].split(" and ")[0].split(", ")
    assert set(names) <= set(read_json(place / "done" / "split.json")["train"])
    assert not (tmp_path / "out" / "result.json").exists()
