"""`jaxhisto study` as a user calls it: tables, going on after a stop, failures, refusals."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from made_sets import read_json, tissue, write_images
from made_study import CELLS, FEW, FEWER, TRAINED, changed, make_place, rows, run

from jaxhisto import cli
from jaxhisto.data.features import read_features
from jaxhisto.downstream_config import StudyConfig
from jaxhisto.errors import StoreError
from jaxhisto.flags import parse
from jaxhisto.study import cells as study_cells
from jaxhisto.study import plan as study_plan
from jaxhisto.study import run as study
from jaxhisto.study import settings as study_settings


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two classes, their mean in a CSV file, encoders, a finished study; read only."""
    place = make_place(tmp_path_factory.mktemp("study"))
    assert run(place / "two.toml", "--root", place, "--out", place / "whole") == 0
    return place


@pytest.fixture(scope="module")
def small(place: Path) -> Path:
    """The same with hand-made features alone, in the folder `small` of the place; read only."""
    file = changed(place, place / "small.toml", FEWER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "label_curves", no_picture)
        assert run(file, "--root", place, "--out", place / "small") == 0
    return file


@pytest.fixture
def no_figures(monkeypatch) -> None:
    """Figures are drawn in the study of `place` alone: they take most of a small study's time."""
    monkeypatch.setattr(study, "label_curves", no_picture)


def no_picture(part, path: Path) -> Path:
    """Instead of a figure."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(part.name.encode())
    return path


def written(out: Path) -> dict[str, bytes]:
    """All that a person reads."""
    files = [*out.glob("tables/*"), *out.glob("figures/*"), *out.glob("report.*")]
    assert len(files) > 20
    assert "report.html" in {f.name for f in files}
    return {str(f.relative_to(out)): f.read_bytes() for f in files}


def test_every_cell_is_there_with_the_scores_that_probe_gives(place, tmp_path, capsys):
    found = rows(place / "whole" / "tables" / "scores.csv")
    assert len(found) == CELLS
    for task, flags, score in (
        ("shade", (), "auc"),
        ("brightness", ("--task.labels", place / "numbers.csv", "--task.target", "mean",
                        "--task.group", "patient"), "pearson"),
    ):  # fmt: skip
        line = ("probe", place / "a.safetensors", "--task.data", place / "images", *flags,
                "--task.side", 32, "--embed-batch", 4, "--epochs", 4, "--draws", 1, "--percent", 50,
                "--probes", "linear", "last_layer", "--out", tmp_path / "p.json")  # fmt: skip
        assert cli.main([str(a) for a in line]) == 0
        probed = {p["name"]: p["test"] for p in read_json(tmp_path / "p.json")["probes"]}
        for setting, scores in probed.items():
            row = next(
                r for r in found
                if (r["task"], r["encoder"], r["seed"], r["setting"], r["percent"], r["repeat"])
                == (task, "trained", "0", setting, "50", "0")
            )  # fmt: skip
            assert float(row[score]) == pytest.approx(scores[score]["value"], rel=1e-6)
    capsys.readouterr()


def test_means_and_deviations_are_those_of_the_cells(place):
    cells = rows(place / "whole" / "tables" / "scores.csv")
    for name, score, scale in (("paper", "macro_f1", 100), ("ranks", "auc", 1)):
        of = rows(place / "whole" / "tables" / f"numbers-last-layer-{name}.csv")
        row = next(r for r in of if (r["task"], r["encoder"], r["percent"]) ==
                   ("shade", "trained", "50"))  # fmt: skip
        runs = [
            scale * float(c[score]) for c in cells
            if (c["task"], c["encoder"], c["percent"], c["setting"])
            == ("shade", "trained", "50", "last_layer")
        ]  # fmt: skip
        assert row["runs"] == "4"
        assert float(row["mean"]) == pytest.approx(np.mean(runs))
        assert float(row["sd"]) == pytest.approx(np.std(runs, ddof=1))
        of_seeds = [np.mean(runs[:2]), np.mean(runs[2:])]
        assert float(row["sd_seeds"]) == pytest.approx(np.std(of_seeds, ddof=1))
        assert float(row["low"]) <= float(row["mean"]) <= float(row["high"])
    pairs = rows(place / "whole" / "tables" / "pairs-linear-paper.csv")
    assert {(p["Encoder"], p["less"]) for p in pairs} == {("trained", "hand-made")}
    assert all(p["p labels"] == "-" for p in pairs if p["Labels"] == "100 %")
    assert any(p["p labels"] != "-" for p in pairs if p["Labels"] == "50 %")


def test_a_report_loads_nothing_and_says_how_sure_it_is(place):
    page = (place / "whole" / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "<script" not in page
    assert page.count("data:image/png;base64,") == 4
    assert "intervals draw 8 test images" in page
    assert re.search(r"brightness: regression.* intervals draw \d test groups of 8 images", page)
    text = (place / "whole" / "report.md").read_text()
    for figure in re.findall(r"\]\((figures/.*?)\)", text):
        assert (place / "whole" / figure).stat().st_size > 5000


@pytest.mark.usefixtures("no_figures")
def test_the_same_line_again_computes_nothing(place, small, monkeypatch, capsys):
    def never(cell):
        raise AssertionError(cell.words)

    monkeypatch.setattr(study, "_outcome", never)
    before = written(place / "small")
    assert run(small, "--root", place, "--out", place / "small") == 0
    assert f"{FEW} cells, {FEW} of them finished" in capsys.readouterr().out
    assert written(place / "small") == before


@pytest.mark.usefixtures("no_figures")
def test_stopped_at_any_cell_it_goes_on_to_the_same_bytes(place, small, tmp_path, monkeypatch):
    out, calls = tmp_path / "out", []
    line = (small, "--root", place, "--out", out)
    write = study.write_cell

    def stopping(cell, outcome):
        calls.append(cell.hash)
        if len(calls) in (1, 6, 13):
            raise KeyboardInterrupt
        write(cell, outcome)

    monkeypatch.setattr(study, "write_cell", stopping)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            study.run_study(config_of(*line))
    assert run(*line) == 0
    assert len(calls) == FEW + 3  # those three were not written, and no other one is done twice
    assert len(set(calls)) == FEW
    assert written(out) == written(place / "small")


def config_of(file, *flags):
    """What the verb parses."""
    return parse(StudyConfig, [str(a) for a in (file, *flags)], "study", recipe=False)


@pytest.mark.slow
def test_killed_it_goes_on_to_the_same_bytes(place, tmp_path):
    out = tmp_path / "out"
    line = [sys.executable, "-m", "jaxhisto.cli", "study", str(place / "two.toml")]
    line += ["--root", str(place), "--out", str(out)]
    quiet = subprocess.DEVNULL
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    kills = 0
    while kills < 3:
        process = subprocess.Popen(line, stdout=quiet, stderr=quiet, env=environment)
        before = len(list(out.glob("cells/*.json")))
        while process.poll() is None:
            there = len(list(out.glob("cells/*.json")))
            if there >= before + 5:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        if process.wait() == 0:
            break
        kills += 1
        written_at = {p: p.stat().st_mtime_ns for p in out.glob("cells/*.json")}
    assert kills == 3
    assert run(*line[4:]) == 0
    assert all(p.stat().st_mtime_ns == at for p, at in written_at.items())
    assert written(out) == written(place / "whole")


@pytest.mark.usefixtures("no_figures")
def test_a_cut_off_cell_is_computed_again(place, small, tmp_path):
    out = Path(shutil.copytree(place / "small", tmp_path / "out"))
    for i, cell in enumerate(sorted(out.glob("cells/*"))[:4]):
        cell.write_bytes(cell.read_bytes()[: 10 * i])
    assert run(small, "--root", place, "--out", out) == 0
    assert written(out) == written(place / "small")


def test_what_is_changed_is_computed_again_and_nothing_else(place, small, tmp_path, capsys):
    out = Path(shutil.copytree(place / "small", tmp_path / "out"))

    def earlier(file: Path) -> int:
        assert run(file, "--root", place, "--out", out, "--plan") == 0
        return int(re.search(r"cells, (\d+) of them", capsys.readouterr().out)[1])

    renamed = changed(place, tmp_path / "a.toml", FEWER, ("hand-made", "colour"), ("Two", "Some"))
    assert earlier(renamed) == FEW
    rate = changed(place, tmp_path / "b.toml", FEWER, ("epochs = 4", "epochs = 4\nrate = 0.1"))
    assert earlier(rate) == 0
    larger = changed(place, tmp_path / "c.toml", FEWER, ("side = 32\npaper", "side = 40\npaper"))
    assert earlier(larger) == FEW / 2
    more = changed(place, tmp_path / "d.toml", FEWER, ("repeats = 2", "repeats = 3"))
    assert earlier(more) == FEW
    moved = tmp_path / "moved"
    shutil.copytree(place / "images", moved / "images")
    shutil.copy(place / "numbers.csv", moved)
    assert run(small, "--root", moved, "--out", out, "--plan") == 0
    assert f", {FEW} of them" in capsys.readouterr().out
    image = moved / "images" / "dark" / "03.png"
    write_images(image.parent, {image.name: tissue(1, 9)[0]})
    assert run(small, "--root", moved, "--out", out, "--plan") == 0
    assert ", 0 of them" in capsys.readouterr().out


@pytest.mark.usefixtures("no_figures")
def test_a_failing_cell_is_told_and_tried_again(place, small, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    whole = study_settings.SETTINGS["linear"]

    def failing(cell):
        if (cell.entry.row, cell.ready.name, cell.percent) == ("hand-made", "shade", 50):
            raise (StoreError("x.png: is damaged; restore it.") if cell.repeat else
                   np.linalg.LinAlgError("SVD did not\nconverge"))  # fmt: skip
        return whole(cell)

    monkeypatch.setitem(study_settings.SETTINGS, "linear", failing)
    line = (small, "--root", place, "--out", out)
    assert run(*line) == 1
    said = capsys.readouterr().err
    assert "2 cells failed" in said
    assert read_json(out / "failures.json") == [
        {"cell": "linear, hand-made (file 1), shade, 50 %, repeat 0",
         "error": "LinAlgError: SVD did not converge"},
        {"cell": "linear, hand-made (file 1), shade, 50 %, repeat 1",
         "error": "x.png: is damaged; restore it."},
    ]  # fmt: skip
    assert "2 cells failed" in (out / "report.html").read_text()
    labels = rows(out / "tables" / "labels-linear-paper.csv")
    assert next(r for r in labels if r["Encoder"] == "hand-made")["50 %"] == "-"
    monkeypatch.setitem(study_settings.SETTINGS, "linear", whole)
    assert run(*line) == 0
    assert not (out / "failures.json").exists()
    assert written(out) == written(place / "small")


@pytest.mark.usefixtures("no_figures")
def test_features_of_a_broken_image_fail_their_cells_alone(place, small, tmp_path, capsys):
    root = tmp_path
    shutil.copytree(place / "images", root / "images")
    shutil.copy(place / "numbers.csv", root)
    (root / "images" / "dark" / "03.png").write_bytes(b"no image")
    assert run(small, "--root", root, "--out", tmp_path / "out") == 1
    failures = read_json(tmp_path / "out" / "failures.json")
    assert len(failures) == FEW
    assert all("dark/03.png" in failure["error"] for failure in failures)
    assert capsys.readouterr().err.count("dark/03.png") == 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("dark/03.png") == 1
    assert f"and {FEW - 1} more" in page


@pytest.mark.slow
def test_one_device_gives_what_four_give(place, tmp_path):
    line = (place / "two.toml", "--root", place, "--out", tmp_path / "one", "--devices", 1)
    assert run(*line) == 0
    assert written(tmp_path / "one") == written(place / "whole")
    file = next((place / "whole" / "features").glob("*.h5"))
    with read_features(file) as four, read_features(tmp_path / "one/features" / file.name) as one:
        assert (four.all() == one.all()).all()


@pytest.mark.usefixtures("no_figures")
def test_the_papers_numbers_stand_beside_ours(place, tmp_path):
    edits = (
        (TRAINED, ""),
        ('"hand-made" = "handmade"',
         '[encoders."hand-made"]\nfiles = "handmade"\npaper = "18 Self supervised"'),
    )  # fmt: skip
    file = changed(place, tmp_path / "p.toml", *edits)
    assert run(file, "--root", place, "--out", tmp_path / "out", "--only", "shade/*/last*") == 0
    column = "shade (macro F1)"
    ours, paper, less = rows(tmp_path / "out" / "tables" / "detail-last-layer-paper.csv")
    assert (ours["Encoder"], paper["Encoder"], less["Encoder"]) == (
        "hand-made", "  paper", "  difference")  # fmt: skip
    assert paper[column] == "64.5"  # Table D.8, BACH
    assert float(less[column]) == pytest.approx(float(ours[column].split()[0]) - 64.5, abs=0.11)
    # One set of five is no average to compare with the paper's.
    assert len(rows(tmp_path / "out" / "tables" / "summary-last-layer-paper.csv")) == 1


def test_two_at_work_in_one_folder_and_patterns_of_nothing(place, small, tmp_path, capsys):
    line = (small, "--root", place, "--out", tmp_path / "out")
    with study._locked(tmp_path / "out"):
        assert run(*line) == 1
    assert "another `jaxhisto study` is at work there" in capsys.readouterr().err
    assert run(*line, "--only", "nothing/*") == 2
    assert "matches no cell; write TASK/ENCODER/SETTING, such as shade/" in capsys.readouterr().err


def test_an_image_is_hashed_again_only_where_its_file_changed(place, tmp_path, monkeypatch):
    from jaxhisto.task_config import TaskConfig
    from jaxhisto.tasks.task import open_task

    task = open_task(TaskConfig(data=str(place / "images")))
    first = study_plan.image_hash(task, tmp_path / "m.json")
    monkeypatch.setattr(study_plan, "read_bytes", lambda path: pytest.fail(str(path)))
    assert study_plan.image_hash(task, tmp_path / "m.json") == first


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
    (row,) = rows(tmp_path / "out" / "tables" / "numbers-fine-tuned-paper.csv")
    scores = []
    for repeat in range(2):
        (a, b), (c, d) = np.random.default_rng(repeat).integers(1, 100, (3, 2, 2)).sum(0)
        scores.append(100 * (2 * a / (2 * a + b + c) + 2 * d / (2 * d + b + c)) / 2)
    assert float(row["mean"]) == pytest.approx(np.mean(scores))


def test_records_of_a_study(place):
    facts = read_json(place / "whole" / "study.json")
    assert facts["study"]["repeats"] == 2
    assert [e["row"] for e in facts["encoders"]] == ["trained", "trained", "hand-made"]
    split = read_json(place / "whole" / "splits" / "shade.json")
    assert split["sha256"] == facts["tasks"]["shade"]["split_sha256"]
    cell = json.loads(next((place / "whole" / "cells").glob("linear-*.json")).read_text())
    assert cell["images"]["test"] == 8
    assert set(cell["test"]) in (
        {"macro_f1", "auc", "balanced_accuracy", "accuracy"},
        {"mae", "r2", "pearson", "spearman"},
    )
