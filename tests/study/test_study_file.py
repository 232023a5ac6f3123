"""Study files: what is refused before the first cell, and those that come with the package."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from made_study import changed, make_place, rows, run

from jaxhisto.config import PretrainConfig, TileConfig
from jaxhisto.downstream_config import StudyConfig
from jaxhisto.file_config import SampleConfig
from jaxhisto.flags import parse
from jaxhisto.study import paper_tables
from jaxhisto.study import run as study
from jaxhisto.study import settings as study_settings
from jaxhisto.study.file import find_study, read_study, shipped_studies
from jaxhisto.study.plan import as_keys


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, numbers, encoders and the file; read only."""
    return make_place(tmp_path_factory.mktemp("study"))


REFUSED = [
    (("repeats", "repeat"), "unknown key repeat; did you mean repeats?"),
    (("side = 32\npaper", "sides = 32\npaper"), "unknown key tasks.shade.sides; did you mean"),
    (("epochs = 4", "epoch = 4"), "unknown key probe.epoch; did you mean probe.epochs?"),
    (("epochs = 4", 'epochs = "4"'), "probe.epochs '4': must be a whole number"),
    (("epochs = 4", "epochs = 0"), "probe.epochs 0: must lie in 1..100000"),
    (("[50, 100]", "[50, 120]"), "must lie in 1e-09..100"),
    (('["linear", "last_layer"]', '["linea"]'), "settings 'linea': must be one of last_layer"),
    (('["linear", "last_layer"]', '"linear"'), "settings 'linear': must be a list, in [ ]"),
    (('"b.safetensors"', '"a.safetensors"'), "encoders.trained names a file twice"),
    (('"b.safetensors"', '""'), "encoders.trained names no encoder"),
    (('= "handmade"', "= 3"), "encoders.hand-made is 3; write a name"),
    (('paper = "BACH"', 'paper = "CIFAR"'), "tasks.shade.paper 'CIFAR': is no column"),
    (
        ('"b.safetensors"', '"c.safetensors"'),
        "c.safetensors: does not exist; mend the name, or --root",
    ),
    (('"b.safetensors"', '"nowhere"'), "encoders.trained: nowhere: not a published"),
    (('labels = "numbers.csv"', 'labels = "none.csv"'), "tasks.brightness: "),
    (('["linear", "last_layer"]', '["segment"]'), "for which none of the settings segment is one"),
    (("[probe]", "[probe"), "not valid TOML"),
    (
        ('group = "patient"', 'group = "patient"\nsplit = "s.json"\ntest = ["p1"]'),
        "tasks.brightness: split and test both say what is tested on",
    ),
    (
        ('title = "Two sets"', 'paper = "D.1"'),
        "paper 'D.1': is no table of trained encoders; there is D.7",
    ),
    (
        ("epochs = 4", 'select = "groups"'),
        "fits on all validation images too, which makes more",
    ),
    (('title = "Two sets"', 'paper = "D.8"'), "D.8 stands beside last_layer by itself"),
]


@pytest.mark.parametrize(("edit", "sentence"), REFUSED, ids=[s[:30] for _, s in REFUSED])
def test_refused_before_the_first_cell(place, tmp_path, capsys, edit, sentence):
    file = changed(place, tmp_path / "bad.toml", edit)
    assert run(file, "--root", place, "--out", tmp_path / "out") in (1, 2)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("jaxhisto")]
    assert len(said) == 1
    assert sentence in said[0]
    assert not (tmp_path / "out" / "cells").exists()


def test_flags_of_other_verbs_are_told_as_keys_of_the_file():
    said = "f.pth: give --mean and --std, such as --mean 0.485 0.456 0.406 --std 0.229 0.2 0.225."
    assert as_keys(said) == (
        "f.pth: give mean and std, such as mean = [0.485, 0.456, 0.406] std = [0.229, 0.2, 0.225]."
    )
    assert as_keys("pass --task.validation-by-image, or --out") == (
        "pass validation_by_image, or --out"
    )


def test_a_folder_may_bear_the_name_of_a_study(monkeypatch, tmp_path):
    """`jaxhisto study study_paper --out study_paper`, started again."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study_paper").mkdir()
    assert find_study("study_paper") == shipped_studies()["study_paper"]


def test_the_same_weights_twice_in_a_row_are_no_two_seeds(place, tmp_path, capsys):
    shutil.copy(place / "a.safetensors", tmp_path / "c.safetensors")
    file = changed(place, tmp_path / "t.toml", ('"b.s', f'"{tmp_path}/c.s'))
    assert run(file, "--root", place, "--out", tmp_path / "out") == 2
    assert "holds the same weights as" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(shipped_studies()))
def test_shipped_studies_and_the_lines_that_make_their_runs_are_read(name, monkeypatch, tmp_path):
    """Each `jaxhisto` line of the comments parses, and each run of a row is made by one of them."""
    monkeypatch.chdir(tmp_path)
    path = shipped_studies()[name]
    found = read_study(path)
    configs = {"tile": TileConfig, "sample": SampleConfig, "pretrain": PretrainConfig}
    text = path.read_text().replace("\\\n# ", "")
    lines = [shlex.split(line) for line in re.findall(r"^#   (jaxhisto .*)$", text, re.MULTILINE)]
    outs = set()
    for _, verb, *flags in lines:
        if verb == "study":
            parsed = parse(StudyConfig, flags, "study", recipe=False)
            assert parsed.file == name
        else:
            outs.add(parse(configs[verb], flags, verb).out)
    runs = {file for row in found.encoders.values() for file in row.files if "runs/" in file}
    assert runs <= outs
    for row in found.encoders.values():
        table = found.paper or "D.7"
        assert not row.paper or row.paper in paper_tables.rows_of(table), row
    assert set(found.settings) <= set(study_settings.SETTINGS)
    # Readers of published sets have their numbers in the paper's unit, and refuse another scale.
    assert {t.target_scale for t in found.tasks.values() if t.layout != "auto"} <= {1}


def test_the_papers_tables_are_the_papers(shared_docs):
    """The file's rows against the lines of the text, which end in a point where a 0 is missing."""
    text = (
        (shared_docs / "paper.txt")
        .read_text()
        .replace("\N{MULTIPLICATION SIGN}", "x")
        .replace("Imagenet", "ImageNet")
    )
    lines = {" ".join(line.split()) for line in text.splitlines()}
    lines = {re.sub(r"(\d)\.(?= |$)", r"\1", line) for line in lines}
    of: dict[tuple[str, str], list[str]] = {}
    columns: dict[tuple[str, str], list[str]] = {}
    for row in rows(Path(study.__file__).with_name("paper_tables.csv")):
        of.setdefault((row["table"], row["row"]), []).append(row["value"])
        columns.setdefault((row["table"], row["row"]), []).append(row["column"])
    assert len(of) > 60
    for (table, name), values in of.items():
        end = " ".join(values)
        found = {line.removesuffix(end).strip() for line in lines if line.endswith(" " + end)}
        # A group's first line bears its name, the others do not.
        assert found & {name, name.partition(" ")[2]}, (table, name, end)
        if table in paper_tables.TABLES:  # the others have the kinds of tasks as columns
            header = " ".join(columns[table, name])
            for ours, printed in (("BACH segmentation", "BACH"), ("Segmentation av", "Av")):
                header = header.replace(ours, printed)
            assert any(line.endswith(header) for line in lines), (table, name, header)
