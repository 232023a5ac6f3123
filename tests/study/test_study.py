"""`jaxhisto study` as a user calls it: its tables, report and records."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from made_sets import read_json
from made_study import CELLS, TRAINED, changed, rows, run
from sklearn.metrics import f1_score

from jaxhisto import cli
from jaxhisto.study import run as study


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
def test_the_papers_numbers_stand_beside_ours(place, tmp_path):
    edits = (
        (TRAINED, ""),
        ('title = "Two sets"', 'title = "Two sets"\npaper = "D.10"'),  # of trained networks
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


def test_predictions_are_kept_with_the_names_of_their_images(place):
    """With them and the folders of the classes alone scikit-learn finds the cell's score."""
    file = next(
        f for f in (place / "whole" / "cells").glob("*.json") if read_json(f)["task"] == "shade"
    )
    with np.load(file.with_suffix(".npz")) as held:
        names, scores = held["names"].tolist(), held["predictions"]
    split = read_json(place / "whole" / "splits" / "shade.json")
    assert sorted(names) == split["test"]
    truth = [("dark", "light").index(name.partition("/")[0]) for name in names]
    expected = f1_score(truth, scores.argmax(1), average="macro")
    assert read_json(file)["test"]["macro_f1"] == pytest.approx(expected)


@pytest.mark.usefixtures("no_figures")
def test_means_of_which_cells_are_missing_are_marked(place, small, tmp_path):
    out = Path(shutil.copytree(place / "small", tmp_path / "out"))
    lost = next(
        f for f in out.glob("cells/last_layer-*.json")
        if (read_json(f)["task"], read_json(f)["percent"]) == ("shade", 50)
    )  # fmt: skip
    lost.unlink()
    assert run(small, "--root", place, "--out", out, "--only", "*/linear") == 0
    shares = (out / "tables" / "labels-last-layer-paper.md").read_text()
    assert re.search(r"shade \S+ \S+ +\| hand-made \| +\d+\.\d\*", shares)
    assert shares.count("*") == 2  # the mean, and what it means
    assert "*: of the cells that are there; some are missing" in shares
    # At 100 % nothing is missing, and nothing says so.
    assert "*" not in (out / "tables" / "detail-last-layer-paper.md").read_text()
    lost = next(f for f in out.glob("cells/last_layer-*.json") if read_json(f)["percent"] == 100)
    lost.unlink()
    assert run(small, "--root", place, "--out", out, "--only", "*/linear") == 0
    assert "*" in (out / "tables" / "summary-last-layer-paper.md").read_text()


def test_a_folder_of_something_else_is_no_studys(place, small, tmp_path, capsys):
    (tmp_path / "report.html").write_text("mine")
    line = (small, "--root", place, "--out", tmp_path, "--plan")
    assert run(*line) == 1
    assert "holds report.html, which no study wrote; give --out an empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    (tmp_path / "report.html").rename(tmp_path / "mine.toml")  # its own file may lie there
    for _ in range(2):
        assert run(*line) == 0
