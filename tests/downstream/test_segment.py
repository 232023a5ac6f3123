"""`jaxhisto segment` and `jaxhisto predict`, from the command line."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import segmentation_models_pytorch as smp
import tifffile
import torch
from made_sets import read_json, write_encoder
from PIL import Image
from sklearn.metrics import f1_score

from jaxhisto.cli import main
from jaxhisto.data.images import decode_image
from jaxhisto.distributed import make_mesh
from jaxhisto.downstream.tiled import predict_image, windows_of
from jaxhisto.downstream.unet_predict import make_predict, open_unet

ENCODER = "random:resnet10"
LONGER = ["--crops", "4", "--training.epochs", "8", "--training.rate", "1e-3"]


def discs(seed: int, height: int = 48, width: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Violet discs on pink, and where they are."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    mask = np.zeros((height, width), np.uint8)
    for _ in range(4):
        cy, cx, r = rng.integers(0, height), rng.integers(0, width), rng.integers(5, 11)
        mask |= ((y - cy) ** 2 + (x - cx) ** 2 < r * r).astype(np.uint8)
    image = np.where(mask[..., None] > 0, (110, 70, 150), (230, 180, 210))
    return np.clip(image + rng.normal(0, 12, image.shape), 0, 255).astype(np.uint8), mask


def write_set(folder: Path, count: int = 12) -> list[str]:
    """A set of discs, and the flags that name it."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for i in range(count):
        image, mask = discs(i)
        Image.fromarray(image).save(folder / "images" / f"i{i:02}.png")
        Image.fromarray(mask).save(folder / "masks" / f"i{i:02}.png")
    return flags(folder)


def flags(folder: Path) -> list[str]:
    return [
        *("--task.data", str(folder / "images"), "--task.masks", str(folder / "masks")),
        *("--task.classes", "ground", "disc", "--crop-px", "32", "--training.batch", "4"),
        *("--training.epochs", "4", "--training.rate", "3e-3", "--training.devices", "1"),
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_set(tmp_path / "set")
    return tmp_path / "set"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """(a finished run, its command line)."""
    folder = tmp_path_factory.mktemp("segment")
    # resnet18: smp has no resnet10.
    line = ["segment", "random:resnet18", "--out", str(folder / "run")]
    line += [*write_set(folder / "set"), *LONGER]
    assert main(line) == 0
    return folder / "run", line


def lines(run: Path) -> list[dict]:
    return [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]


def refused(capsys: pytest.CaptureFixture[str], line: list[str], code: int = 1) -> str:
    assert main(line) == code
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said[-1]) < 500
    return said[-1]


@pytest.mark.slow
def test_discs_are_learnt_and_the_score_is_scikit_learns(trained: tuple[Path, list[str]]) -> None:
    run, line = trained
    result = read_json(run / "result.json")
    assert result["test"]["macro_f1"]["value"] > 0.9
    split, unet = read_json(run / "split.json"), open_unet(run)
    network = make_predict(
        unet.arch, 2, unet.params, unet.batch_stats, unet.mean, unet.std, make_mesh(1)
    )
    truth, found = [], []
    images = Path(line[line.index("--task.data") + 1])
    for name in split["test"]:
        image = decode_image((images / name).read_bytes())
        found.append(predict_image(image, network, 2, windows_of(32)).ravel())
        truth.append(np.asarray(Image.open(images.parent / "masks" / name)).ravel())
    expected = f1_score(np.concatenate(truth), np.concatenate(found), average="macro")
    assert result["test"]["macro_f1"]["value"] == pytest.approx(expected, abs=1e-6)
    assert [line["epoch"] for line in lines(run)] == list(range(1, 9))
    with Image.open(run / "predictions.png") as picture:
        assert picture.width > 700


@pytest.mark.slow
def test_the_unet_is_exported_for_smp_and_gives_the_same(
    trained: tuple[Path, list[str]], tmp_path: Path
) -> None:
    run, _ = trained
    out = tmp_path / "smp.pth"
    assert (
        main(["export", str(run / "unet.safetensors"), "--layout", "smp", "--out", str(out)]) == 0
    )
    assert main(["verify", str(out)]) == 0
    golden = safetensors.numpy.load_file(run / "unet.safetensors.golden.safetensors")
    assert golden["logits"].shape == (8, 2, 32, 32)


@pytest.mark.slow
def test_predicting_images_and_a_slide(
    trained: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = trained
    inputs = tmp_path / "in"
    (inputs / "deep").mkdir(parents=True)
    image, mask = discs(100, 75, 131)
    Image.fromarray(image).save(inputs / "deep" / "a.png")
    Image.fromarray(image[:20, :20]).save(inputs / "b.png")
    line = ["predict", str(inputs), "--unet", str(run), "--out", str(tmp_path / "out")]
    assert main([*line, "--devices", "4", "--batch", "4"]) == 0
    found = np.asarray(Image.open(tmp_path / "out" / "deep" / "a.mask.png"))
    assert f1_score(mask.ravel(), found.ravel(), average="macro") > 0.9
    assert np.asarray(Image.open(tmp_path / "out" / "b.mask.png")).shape == (20, 20)
    assert (tmp_path / "out" / "deep" / "a.overlay.png").is_file()
    record = read_json(tmp_path / "out" / "predictions.json")
    assert [one["name"] for one in record["inputs"]] == ["b", "deep/a"]
    assert record["inputs"][1]["pixels"]["disc"] == int(found.sum())
    capsys.readouterr()
    assert main(line) == 0
    assert "2 of 2 masks are there" in capsys.readouterr().out
    assert "made otherwise (overlay: " in refused(capsys, [*line, "--no-overlay"])
    assert main([*line, "--force", "--no-overlay"]) == 0

    slide = tmp_path / "slide.tif"
    tifffile.imwrite(
        slide, image.repeat(2, 0).repeat(2, 1), tile=(64, 64), photometric="rgb",
        resolution=(40000, 40000), resolutionunit="CENTIMETER",
    )  # fmt: skip
    pages = tmp_path / "pages.tif"
    tifffile.imwrite(pages, np.stack([image, image]), photometric="rgb")
    line = ["predict", str(pages), "--unet", str(run), "--out", str(tmp_path / "p")]
    assert "pass --kind slides" in refused(capsys, line)
    line = ["predict", str(slide), "--unet", str(run), "--out", str(tmp_path / "s"), "--kind"]
    assert main([*line, "slides"]) == 2  # the UNet does not say at how many um/px it was trained
    assert main([*line, "slides", "--tile-mpp", "0.5"]) == 0  # the slide has 0.25
    shrunk = np.asarray(Image.open(tmp_path / "s" / "slide.mask.png"))
    assert shrunk.shape == found.shape
    assert (shrunk == found).mean() > 0.97


@pytest.mark.slow
def test_again_is_no_training_and_other_settings_are_refused(
    trained: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    run, line = trained
    names = {path.name for path in run.iterdir()}
    assert "checkpoints" not in names
    before = (run / "unet.safetensors").stat().st_mtime_ns
    assert main(line) == 0
    assert "is done" in capsys.readouterr().out
    assert (run / "unet.safetensors").stat().st_mtime_ns == before
    assert {path.name for path in run.iterdir()} == names
    said = refused(capsys, [*line, "--training.epochs", "9"])
    assert "training.epochs: 8 -> 9" in said


@pytest.mark.slow
def test_one_device_and_four(folder: Path, tmp_path: Path) -> None:
    """The order of sums alone differs: measured 3e-7 of the loss in the first epoch, and 7e-5 in
    the second, since Adam's first steps are the signs of gradients, of small ones too."""
    for devices in ("1", "4"):
        line = ["segment", ENCODER, "--out", str(tmp_path / devices), *flags(folder)]
        line += ["--training.rate", "1e-4", "--training.epochs", "2"]
        assert main([*line, "--training.devices", devices]) == 0
    one, four = (lines(tmp_path / devices) for devices in ("1", "4"))
    assert one[0]["loss"] == pytest.approx(four[0]["loss"], rel=5e-6)
    assert one[1]["loss"] == pytest.approx(four[1]["loss"], rel=5e-4)


def ended_after(line: list[str], said: str, number: int) -> int:
    """Starts the line, sends it the signal once it has said something; its exit code."""
    command = [sys.executable, "-m", "jaxhisto.cli", *line]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(said in text for text in process.stdout)
        process.send_signal(number)
        process.stdout.read()
        return process.wait()


@pytest.mark.slow
def test_killed_and_stopped_it_ends_in_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    def line(out: str) -> list[str]:
        return ["segment", ENCODER, "--out", str(tmp_path / out), *flags(folder), "--crops", "3"]

    assert main(line("whole")) == 0
    assert ended_after(line("ended"), "epoch 2:", signal.SIGKILL) == -signal.SIGKILL
    assert ended_after(line("ended"), "epoch 3:", signal.SIGTERM) == 75
    assert main(line("ended")) == 0
    for name in ("unet.safetensors", "unet.safetensors.golden.safetensors"):
        whole, ended = ((tmp_path / out / name).read_bytes() for out in ("whole", "ended"))
        assert whole == ended
    assert [one["loss"] for one in lines(tmp_path / "whole")] == [
        one["loss"] for one in lines(tmp_path / "ended")
    ]


@pytest.mark.slow
def test_frozen_leaves_the_encoder_as_it_was(folder: Path, tmp_path: Path) -> None:
    encoder = write_encoder(tmp_path / "encoder.safetensors")
    out = tmp_path / "run"
    line = ["segment", str(encoder), "--out", str(out), *flags(folder), "--freeze"]
    assert main([*line, "--training.epochs", "1"]) == 0
    before = safetensors.numpy.load_file(encoder)
    after = safetensors.numpy.load_file(out / "unet.safetensors")
    for name, tensor in before.items():
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(after[f"encoder.{name}"], tensor)
    model = smp.Unet("resnet18", encoder_weights=None, classes=2)
    assert set(after) < set(model.state_dict())  # resnet10 has a part of resnet18's names
    assert torch.tensor(after["decoder.blocks.0.conv1.1.running_mean"]).abs().sum() > 0


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["segment", ENCODER, "--out", str(tmp_path / "run"), *flags(folder)]
    encoder = write_encoder(tmp_path / "bad" / "encoder.safetensors")
    tensors = safetensors.numpy.load_file(encoder)
    from jaxhisto import tensor_file

    _, metadata = tensor_file.read(encoder)
    tensors["conv1.weight"] = tensors["conv1.weight"] * np.float32(np.nan)
    tensor_file.write(encoder, tensors, metadata)
    line[1] = str(encoder)
    said = refused(capsys, line)
    assert "the loss is nan in epoch 1, batch 1, of i" in said
    assert not (tmp_path / "run" / "unet.safetensors").exists()


@pytest.mark.slow
def test_predict_that_is_asked_to_stop_says_so_and_goes_on(
    trained: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = trained
    for i in range(20):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(discs(i, 96, 96)[0]).save(tmp_path / "in" / f"{i:02}.png")

    def line(out: str) -> list[str]:
        return ["predict", str(tmp_path / "in"), "--unet", str(run), "--out", str(tmp_path / out)]

    assert ended_after(line("ended"), "00.mask.png:", signal.SIGTERM) == 75
    done = read_json(tmp_path / "ended" / "predictions.json")["inputs"]
    assert 0 < len(done) < 20
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "ended").glob("*.mask.png")}
    capsys.readouterr()
    assert main(line("ended")) == 0
    assert f"{len(done)} of 20 masks are there, going on" in capsys.readouterr().out
    kept = [p for p, at in before.items() if p.stat().st_mtime_ns == at]
    assert len(kept) == len(done)
    assert main(line("whole")) == 0
    names = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert sorted(p.name for p in (tmp_path / "ended").iterdir()) == names
    for name in (name for name in names if name.endswith(".png")):
        pair = [tmp_path / out / name for out in ("whole", "ended")]
        assert pair[0].read_bytes() == pair[1].read_bytes()


def test_a_mask_of_another_size(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(discs(3)[1][:40]).save(folder / "masks" / "i03.png")
    said = refused(capsys, ["segment", ENCODER, "--out", str(tmp_path / "r"), *flags(folder)])
    assert "i03.png: is 64 x 40 px, but its image is 64 x 48" in said
    assert not (tmp_path / "r").exists()


def test_class_ids_out_of_range_and_rgb_masks(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["segment", ENCODER, "--out", str(tmp_path / "r"), *flags(folder)]
    mask = discs(3)[1]
    mask[0, 0] = 5
    Image.fromarray(mask).save(folder / "masks" / "i03.png")
    assert "has class id 5, but there are 2 classes" in refused(capsys, line)
    Image.fromarray(discs(3)[0]).save(folder / "masks" / "i03.png")
    assert "is a colour picture" in refused(capsys, line)


def test_one_class_alone_and_one_that_a_part_lacks(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from jaxhisto.downstream.segment import prepare
    from jaxhisto.task_config import TaskConfig
    from jaxhisto.training_config import SegmentConfig

    split = {
        "train": [f"i{i:02}.png" for i in range(6)],
        "validation": ["i06.png", "i07.png"],
        "test": ["i08.png", "i09.png"],
    }
    (tmp_path / "split.json").write_text(json.dumps({"format": 1, "task": "set masks", **split}))
    line = ["segment", ENCODER, "--out", str(tmp_path / "r"), *flags(folder)]
    line += ["--task.split", str(tmp_path / "split.json")]
    for name in split["test"]:
        Image.fromarray(np.zeros((48, 64), np.uint8)).save(folder / "masks" / name)
    task = TaskConfig(
        str(folder / "images"), masks=str(folder / "masks"), classes=("ground", "disc"),
        split=str(tmp_path / "split.json"),
    )  # fmt: skip
    prepare(SegmentConfig(ENCODER, "r", task))
    assert "no test pixel is disc; it counts where it is predicted alone" in capsys.readouterr().err
    for name in split["train"]:
        Image.fromarray(np.zeros((48, 64), np.uint8)).save(folder / "masks" / name)
    assert "all training pixels are ground" in refused(capsys, line)


def test_the_record_counts_the_images_trained_on_and_says_what_intervals_are_over(
    folder: Path,
) -> None:
    from jaxhisto.downstream.segment import prepare, result_of, table
    from jaxhisto.downstream.training import Fitted
    from jaxhisto.task_config import TaskConfig
    from jaxhisto.training_config import SegmentConfig

    task = TaskConfig(
        str(folder / "images"), masks=str(folder / "masks"), classes=("ground", "disc"),
        group_pattern="([ik])", validation_by_image=True,
    )  # fmt: skip
    for i in range(6):  # two groups, of which one is tested on
        for kind in ("images", "masks"):
            (folder / kind / f"i{i:02}.png").rename(folder / kind / f"k{i:02}.png")
    config = SegmentConfig(ENCODER, "r", task, percent=50)
    ready = prepare(config)
    parts = {part: len(ready.split.part(part)) for part in ("train", "validation", "test")}
    assert parts == {"train": 4, "validation": 2, "test": 6}
    fitted = Fitted({}, {}, 1, {"macro_f1": 0.5}, 1, 1, 4)
    record = result_of(config, ready, fitted, np.tile(np.eye(2, dtype=np.int64), (6, 1, 1)))
    assert record["images"] == {"train": 2, "validation": 2, "test": 6}
    assert record["test"]["macro_f1"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert "6 test images, all of one group: it says nothing" in table(record)


def test_what_cannot_be_a_unet_or_its_task(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["segment", ENCODER, "--out", str(tmp_path / "r"), *flags(folder)]
    assert "take a multiple of 32" in refused(capsys, [*line, "--crop-px", "100"], 2)
    assert "do not cover" in refused(capsys, [*line, "--margin-px", "30"], 2)
    assert "is no network" in refused(capsys, ["segment", "handmade", *line[2:]], 2)
    mute = write_encoder(tmp_path / "mute.safetensors", without=("mean", "std"))
    said = refused(capsys, ["segment", str(mute), *line[2:]])
    assert "does not say how it wants to be fed" in said
    shutil.rmtree(folder / "masks")
    (folder / "images" / "b").mkdir()
    for i in range(6):
        (folder / "images" / f"i{i:02}.png").rename(folder / "images" / "b" / f"i{i:02}.png")
    (folder / "images" / "a").mkdir()
    for i in range(6, 12):
        (folder / "images" / f"i{i:02}.png").rename(folder / "images" / "a" / f"i{i:02}.png")
    line = ["segment", ENCODER, "--out", str(tmp_path / "r"), "--task.data", str(folder / "images")]
    assert "is a classification task" in refused(capsys, line, 2)


def test_predicting_with_what_is_no_unet(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["predict", str(folder / "images"), "--out", str(tmp_path / "o"), "--unet"]
    assert "let `jaxhisto segment` end its run" in refused(capsys, [*line, str(tmp_path)])
    encoder = write_encoder(tmp_path / "encoder.safetensors")
    assert "give a unet.safetensors" in refused(capsys, [*line, str(encoder)])
