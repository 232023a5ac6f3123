"""docs/input-speed.md holds the committed record, and the benchmark's own arithmetic."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "benchmarks" / "loader.py"
DOC = ROOT / "docs" / "input-speed.md"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("loader_benchmark", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def turns(*speeds: float) -> dict:
    return {"turns": [{"images_per_s": v, "images_per_cpu_s": v / 2} for v in speeds]}


def test_the_doc_holds_the_record(benchmark):
    text = DOC.read_text(encoding="utf-8")
    (name,) = set(re.findall(r"benchmarks/records/(loader-[\w-]+\.json)", text))
    record = json.loads((ROOT / "benchmarks" / "records" / name).read_text())

    assert benchmark.tables(record) in text
    assert record["ratio"] in text
    assert benchmark.ratio_line(record) == record["ratio"]
    assert all(len(row["turns"]) >= 5 for rows in record["cores"].values() for row in rows.values())


def test_the_ratio_is_of_pairs_and_to_the_best_peer(benchmark):
    rows = {
        "jaxhisto": turns(200, 300, 100),
        "files+torchvision/0": turns(100, 100, 100),
        "files+torchvision/1": turns(100, 100, 200),
        "files+pillow/1": turns(110, 100, 110),
        "files+simplejpeg/0": turns(400, 400, 400),
    }
    what = {"side": 224, "kb": 28.4, "batch": 8, "repeats": 3}
    line = benchmark.ratio_line({"cores": {"1": rows}, "what": what})

    assert line.startswith(
        "ratio 1.82 on 1 core = jaxhisto 200 / files+pillow/1 110 images/s; "
        "1.82 on 1 core = jaxhisto 100 / files+pillow/1 55 images/CPU s; "
        "0.50 on 1 core = jaxhisto 200 / files+simplejpeg/0 400 images/s"
    )
    assert "inconclusive" in benchmark.line("jaxhisto", rows["jaxhisto"])
    assert "inconclusive" not in benchmark.line("files+pillow/1", rows["files+pillow/1"])


@pytest.mark.parametrize(
    ("loader", "step", "said"),
    [(1000, 2500, "input-bound: .* 2.5 x the cores"), (3000, 1000, "compute-bound: .* 3.0 x as")],
)
def test_the_verdict_names_what_is_waited_for(benchmark, loader, step, said):
    assert re.match(said, benchmark.verdict(loader, step))


@pytest.mark.slow
def test_a_stranger_can_run_it(tmp_path):
    out = tmp_path / "record.json"
    done = subprocess.run(
        [sys.executable, str(FILE), "--images", "64", "--batch", "16", "--repeats", "1",
         "--cores", "1", "--peers", "files+torchvision", "store+tfds", "--step", "1e9",
         "--json", str(out)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *_, verdict, ratio = done.stdout.splitlines()
    record = json.loads(out.read_text())
    assert (record["verdict"], record["ratio"]) == (verdict, ratio)
    assert verdict.startswith("input-bound")
    assert set(record["cores"]["1"]) == {
        "jaxhisto", "files+torchvision/0", "files+torchvision/1", "store+tfds/0", "store+tfds/1"
    }  # fmt: skip
    assert record["what"]["tiles"] == 512
