"""Settings of a study that train a network, and the number of devices."""

from __future__ import annotations

import numpy as np
import pytest
from made_sets import read_json, tissue, write_images
from made_study import changed, rows, run, written

from jaxhisto import cli
from jaxhisto.data.features import read_features
from jaxhisto.study import cells as study_cells
from jaxhisto.study import settings as study_settings


@pytest.mark.slow
def test_one_device_gives_what_four_give(place, tmp_path):
    line = (place / "two.toml", "--root", place, "--out", tmp_path / "one", "--devices", 1)
    assert run(*line) == 0
    assert written(tmp_path / "one") == written(place / "whole")
    file = next((place / "whole" / "features").glob("*.h5"))
    with read_features(file) as four, read_features(tmp_path / "one/features" / file.name) as one:
        assert (four.all() == one.all()).all()


@pytest.mark.slow
def test_all_layers_are_trained_as_finetune_trains_them(place, tmp_path):
    """The scores of a cell are those of the same `jaxhisto finetune` line."""
    file = changed(
        place,
        tmp_path / "f.toml",
        ('["linear", "last_layer"]', '["finetune"]'),
        ('trained = ["a.safetensors", "b.safetensors"]', 'trained = "a.safetensors"'),
        ("[50, 100]", "[50]"),
        ("[tasks.shade]", "[finetune]\ntraining = {epochs = 2, batch = 8}\n\n[tasks.shade]"),
    )
    out = tmp_path / "out"
    assert run(file, "--root", place, "--out", out, "--only", "shade/*") == 0
    cells = rows(out / "tables" / "scores.csv")
    assert [(c["setting"], c["encoder"], c["repeat"]) for c in cells] == [
        ("finetune", "trained", "0"), ("finetune", "trained", "1")]  # fmt: skip
    assert not list(out.glob("runs/*"))
    line = ("finetune", place / "a.safetensors", "--task.data", place / "images", "--task.side", 32,
            "--training.epochs", 2, "--training.batch", 8, "--training.seed", 1, "--percent", 50,
            "--repeat", 1, "--out", tmp_path / "run")  # fmt: skip
    assert cli.main([str(a) for a in line]) == 0
    theirs = read_json(tmp_path / "run" / "result.json")["test"]
    for name, score in theirs.items():
        assert float(cells[1][name]) == pytest.approx(score["value"])
    numbers = rows(out / "tables" / "numbers-fine-tuned-paper.csv")
    mean = np.mean([100 * float(c["macro_f1"]) for c in cells])
    assert float(numbers[0]["mean"]) == pytest.approx(mean)


@pytest.mark.slow
def test_a_unet_is_trained_as_segment_trains_it(tmp_path):
    """The scores of a cell are those of the same `jaxhisto segment` line, and of its pixels."""
    rng = np.random.default_rng(0)
    write_images(tmp_path / "images", {f"{i}.png": x for i, x in enumerate(tissue(12, 3))})
    masks = {f"{i}.png": rng.integers(0, 2, (32, 32)).astype(np.uint8) for i in range(12)}
    write_images(tmp_path / "masks", masks)
    (tmp_path / "s.toml").write_text(
        'percents = [50]\nrepeats = 1\ndraws = 100\nsettings = ["segment"]\n'
        '[encoders]\nnone = "random:resnet10"\n'
        "[segment]\ncrop_px = 32\ntraining = {epochs = 1, batch = 4}\n"
        '[tasks.cells]\ndata = "images"\nmasks = "masks"\nside = 32\n'
    )
    out = tmp_path / "out"
    assert run(tmp_path / "s.toml", "--root", tmp_path, "--out", out) == 0
    line = ("segment", "random:resnet10", "--task.data", tmp_path / "images", "--task.masks",
            tmp_path / "masks", "--crop-px", 32, "--training.epochs", 1, "--training.batch", 4,
            "--percent", 50, "--out", tmp_path / "run")  # fmt: skip
    assert cli.main([str(a) for a in line]) == 0
    theirs = read_json(tmp_path / "run" / "result.json")["test"]
    (cell,) = rows(out / "tables" / "scores.csv")
    for name, score in theirs.items():
        assert float(cell[name]) == pytest.approx(score["value"])
    (mean,) = rows(out / "tables" / "numbers-fine-tuned-paper.csv")
    assert float(mean["mean"]) == pytest.approx(100 * theirs["macro_f1"]["value"])


@pytest.mark.usefixtures("no_figures")
def test_a_task_with_masks_is_scored_by_pixels(tmp_path, monkeypatch):
    """The part of the report for UNets, from confusion matrices that a setting gives."""
    rng = np.random.default_rng(0)
    write_images(tmp_path / "images", {f"{i}.png": x for i, x in enumerate(tissue(12, 3))})
    masks = {f"{i}.png": rng.integers(0, 2, (32, 32)).astype(np.uint8) for i in range(12)}
    write_images(tmp_path / "masks", masks)
    (tmp_path / "s.toml").write_text(
        'percents = [100]\nrepeats = 2\ndraws = 100\nsettings = ["segment"]\n'
        '[encoders]\n"at random" = "random:resnet10"\n'
        '[tasks.cells]\ndata = "images"\nmasks = "masks"\nside = 32\n'
    )

    def made(cell):
        seed = np.random.default_rng(cell.repeat)
        confusion = seed.integers(1, 100, (len(cell.ready.split.test), 2, 2))
        return study_cells.Outcome({"epoch": 1.0}, {}, {"macro_f1": 0.5}, confusion)

    monkeypatch.setitem(study_settings.SETTINGS, "segment", made)
    monkeypatch.setattr(study_cells, "FROZEN", (*study_cells.FROZEN, "segment"))
    assert run(tmp_path / "s.toml", "--root", tmp_path, "--out", tmp_path / "out") == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "trained on crops of 256 px; intervals draw 3 test images" in text
    assert "## All layers trained: macro F1\n" in text
    (row,) = rows(tmp_path / "out" / "tables" / "numbers-fine-tuned-paper.csv")
    scores = []
    for repeat in range(2):
        (a, b), (c, d) = np.random.default_rng(repeat).integers(1, 100, (3, 2, 2)).sum(0)
        scores.append(100 * (2 * a / (2 * a + b + c) + 2 * d / (2 * d + b + c)) / 2)
    assert float(row["mean"]) == pytest.approx(np.mean(scores))
