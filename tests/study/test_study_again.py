"""A study that is started again: after a stop, a kill, a failure, and with other words."""

from __future__ import annotations

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
from made_study import FEW, FEWER, changed, config_of, rows, run, written

from jaxhisto.errors import StoreError
from jaxhisto.study import run as study
from jaxhisto.study import settings as study_settings


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
    (out / "cells" / ".linear-0123.4711").write_bytes(b"what a kill left of a cell")
    for i, cell in enumerate(sorted(out.glob("cells/[!.]*"))[:4]):
        cell.write_bytes(cell.read_bytes()[: 10 * i])
    assert run(small, "--root", place, "--out", out) == 0
    assert not list(out.glob("cells/.*"))
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


@pytest.mark.usefixtures("no_figures", "small")
def test_tables_of_what_the_study_has_no_more_are_removed(place, tmp_path):
    out = Path(shutil.copytree(place / "small", tmp_path / "out"))
    (out / "tables" / "mine.md").write_text("a reader's own")
    fewer = changed(place, tmp_path / "f.toml", FEWER, ('["linear", "last_layer"]', '["linear"]'))
    assert run(fewer, "--root", place, "--out", out) == 0
    left = {f.name for f in [*out.glob("tables/*"), *out.glob("figures/*")]}
    assert not [name for name in left if "last-layer" in name]
    assert {"mine.md", "scores.csv", "numbers-linear-paper.csv", "labels-linear-ranks.png"} <= left


@pytest.mark.usefixtures("no_figures")
def test_damaged_features_are_computed_again(place, small, tmp_path, capsys):
    out = Path(shutil.copytree(place / "small", tmp_path / "out"))
    shutil.rmtree(out / "cells")
    file = next(out.glob("features/*.h5"))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert run(small, "--root", place, "--out", out) == 0
    assert "is no whole file of features; they are computed again" in capsys.readouterr().err
    assert written(out) == written(place / "small")


@pytest.mark.usefixtures("no_figures")
def test_weights_that_changed_while_the_study_ran_give_no_cell(place, tmp_path, monkeypatch):
    """The cell's name is a hash of the weights that were there when the study was started."""
    other = {"encoder": {"sha256": "0" * 64}}
    monkeypatch.setattr(study_settings, "run_finetune", lambda config: other)
    file = changed(
        place, tmp_path / "f.toml", ('["linear", "last_layer"]', '["finetune"]'),
        ('"b.safetensors"', ""),
    )  # fmt: skip
    assert run(file, "--root", place, "--out", tmp_path / "out", "--only", "shade/trained/*") == 1
    failures = read_json(tmp_path / "out" / "failures.json")
    assert len(failures) == 4
    assert all("a.safetensors: has changed since" in failure["error"] for failure in failures)
    assert not list(tmp_path.glob("out/cells/*"))
