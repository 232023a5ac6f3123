"""The report of records made by hand, through the command line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from jaxhisto.bench.record import Record, Row, write_record
from jaxhisto.bench.report import write_report
from jaxhisto.bench.verdict import verdicts

ROOT = Path(__file__).resolve().parents[2]

AT = {"model": "resnet18", "tile_px": 64, "batch": 8, "precision": "f32", "devices": 1,
      "threads": 2, "data": "synthetic"}  # fmt: skip


def made(device="AMD EPYC"):
    machine = {
        "device": device, "devices": [device], "cores": 2, "platform": "cpu", "python": "3.11",
        "date": "2026-11-25T10:00:00Z", "versions": {"jax": "0.10"},
        "peaks": {"tflops": {"f32": 0.1, "bf16": 0.1}, "gb_per_s": 10.0},
    }  # fmt: skip
    rows = (
        Row("startup", "jaxhisto", {"line": "jaxhisto --help"}, (0.2, 0.21)),
        Row("compile", "jaxhisto", AT | {"from_cache_s": 1.5}, (30.0,)),
        Row("augment", "jaxhisto", {k: AT[k] for k in AT if k not in ("model", "precision")},
            (0.05, 0.05), 8),
        Row("step", "jaxhisto", AT, (2.0, 2.0, 2.0), 8, 1e11, 5e9, 2_000_000_000),
        Row("step", "pytorch", AT, (1.0, 1.0, 1.0), 8, 1e11),
        Row("step", "lightly", AT, why="not installed: pip install lightly"),
        Row("step", "jaxhisto", AT | {"batch": 16}, (4.0, 4.1), 16, 2e11, 1e10),
        Row("step", "jaxhisto", AT | {"batch": 1 << 20}, images=1 << 20, why="out of memory"),
        Row("pipeline", "jaxhisto", AT | {"cache": "none", "data": "made"}, (9.0, 9.9, 13.0), 8),
    )  # fmt: skip
    record = Record({"repeats": 3}, machine, rows)
    return Record({"repeats": 3}, machine, rows, verdicts(record))


def cells(text, *start):
    """The cells of the one table row that starts so."""
    found = [[c.strip() for c in line.strip()[1:-1].split("|")] for line in text.splitlines()
             if line.startswith("|")]  # fmt: skip
    (row,) = [row for row in found if tuple(row[: len(start)]) == start]
    return row


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    from jaxhisto import cli

    folder = tmp_path_factory.mktemp("report")
    write_record(folder / "r.json", made())
    code = cli.main(["bench", "--report", str(folder / "r.json"), "--out", str(folder / "b.md")])
    assert code == 0
    return folder


def test_the_tables_hold_the_rows(report):
    text = (report / "b.md").read_text()
    at8 = text.split("### resnet18, 64 px, batch 8,")[1].split("###")[0]
    head = cells(at8, "stage")
    ours = dict(zip(head, cells(at8, "step", "jaxhisto"), strict=True))
    assert ours["images/s"] == "4"
    assert ours["views/s"] == "8"
    assert ours["TFLOP/s"] == "0.05"
    assert ours["of peak"] == "50%"
    assert ours["of bandwidth"] == "25%"
    assert ours["peak memory, GB"] == "2"
    theirs = dict(zip(head, cells(at8, "step", "pytorch"), strict=True))
    assert theirs["ours / theirs"] == "0.50"
    assert cells(at8, "step", "lightly")[2] == "not installed: pip install lightly"
    assert cells(at8, "augment", "jaxhisto")[2] == "160"
    at_large = text.split(f"batch {1 << 20}")[1].split("###")[0]
    assert cells(at_large, "step", "jaxhisto")[2] == "out of memory"
    assert "augmentation alone is 2.5% of the step" in text
    assert "44%, inconclusive" in text  # the pipeline's spread
    assert cells(text, "the same, from the cache on disk")[2] == "1.5"


def test_what_no_record_covers_is_unmeasured(report, jaxhisto, tmp_path):
    text = (report / "b.md").read_text()
    assert cells(text, "NVIDIA H200")[1] == "unmeasured"
    assert cells(text, "NVIDIA H100")[1] == "unmeasured"
    write_record(tmp_path / "h.json", made("NVIDIA H200"))
    out = tmp_path / "b.md"
    assert (
        jaxhisto("bench", "--report", tmp_path / "h.json", report / "r.json", "--out", out)[0] == 0
    )
    text = out.read_text()
    assert cells(text, "NVIDIA H200, 2 cores")[1] == "measured"
    assert "| NVIDIA H200 | unmeasured" not in text
    assert "| NVIDIA H100 | unmeasured" in text


def test_a_picture_stands_beside_it(report):
    assert "](b.png)" in (report / "b.md").read_text()
    with Image.open(report / "b.png") as image:
        assert min(image.size) > 200
        assert len(image.convert("RGB").resize((200, 60)).getcolors(12_000)) > 20


def test_what_is_no_record_is_refused(jaxhisto, tmp_path):
    (tmp_path / "r.json").write_text("{}")
    code, _, err = jaxhisto("bench", "--report", tmp_path / "r.json", "--out", tmp_path / "b.md")
    assert code == 1
    assert "r.json: is no record of `jaxhisto bench`" in err
    assert not (tmp_path / "b.md").exists()
    write_record(tmp_path / "r.json", made())
    out = tmp_path / "absent" / "b.md"
    assert "no such folder" in jaxhisto("bench", "--report", tmp_path / "r.json", "--out", out)[2]


def test_the_docs_hold_what_the_records_give(tmp_path):
    doc = ROOT / "docs" / "benchmarks.md"
    text = doc.read_text(encoding="utf-8")
    names = re.findall(r"^Record `([\w.-]+)`", text, re.MULTILINE)
    records = [ROOT / "benchmarks" / "records" / name for name in names]
    assert text == write_report(records, tmp_path / doc.name).read_text(encoding="utf-8")
    pictures = re.findall(r"\]\(([\w.-]+\.png)\)", text)
    assert "benchmarks.png" in pictures
    assert all((doc.parent / name).is_file() for name in pictures)
