"""docs/input-speed.md holds the committed record, and the benchmark's own arithmetic."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

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

    noisy = ", inconclusive: jaxhisto spreads by 200%"
    assert line.startswith(
        f"ratio 1.82 on 1 core = jaxhisto 200 / files+pillow/1 110 images/s{noisy}; "
        f"1.82 on 1 core = jaxhisto 100 / files+pillow/1 55 images/CPU s{noisy}; "
        f"0.50 on 1 core = jaxhisto 200 / files+simplejpeg/0 400 images/s{noisy}"
    )
    assert "inconclusive" in benchmark.line("jaxhisto", rows["jaxhisto"])
    assert "inconclusive" not in benchmark.line("files+pillow/1", rows["files+pillow/1"])


def test_a_peer_that_is_not_installed_is_left_out_and_named(benchmark, monkeypatch, tmp_path):
    """Only those asked for are built; what cannot be imported ends none of the others."""
    spec = importlib.util.spec_from_file_location("loader_peers", FILE.with_name("loader_peers.py"))
    peers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peers)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in ("simplejpeg", "tensorflow_datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    jpeg = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 90, 140)).save(jpeg, "JPEG", quality=95, subsampling=0)
    monkeypatch.setattr("jaxhisto.data.store.TileStore", lambda path, verify: Tiles(jpeg))
    asked = ["files+pillow", "files+simplejpeg", "store+tfds"]
    job = {"store": "", "files": str(tmp_path), "peers": asked, "batch": 2}
    made = peers.Torch(job)
    assert list(made.datasets) == ["files+pillow"]
    assert made.missing == {
        "files+simplejpeg": "not installed: pip install simplejpeg",
        "store+tfds": "not installed: pip install tensorflow-datasets",
    }
    digests = made.pixels()["pixels"]
    assert digests["store+tfds"] == digests["files+simplejpeg"] == ""
    assert len(digests["files+pillow"]) == 64
    none = {"side": 16, "kb": 1.0, "batch": 2, "repeats": 3, "missing": made.missing}
    with pytest.raises(SystemExit, match=r"no ratio: files\+simplejpeg not installed: pip install"):
        benchmark.ratio_line({"cores": {"1": {"jaxhisto": turns(1, 1, 1)}}, "what": none})


class Tiles:
    """A store of one tile."""

    def __init__(self, jpeg):
        self.jpeg = jpeg.getvalue()

    def __len__(self):
        return 1

    def image(self, i):
        return self.jpeg


def test_decoders_that_are_not_installed_are_left_out(monkeypatch):
    from jaxhisto.bench import peers_read

    there = {"cv2", "PIL"}
    monkeypatch.setattr(peers_read, "find_spec", lambda name: name in there or None)
    jpeg = io.BytesIO()
    Image.new("RGB", (16, 16)).save(jpeg, "JPEG")
    assert set(peers_read.decoders([jpeg.getvalue()], 1)) == {"jaxhisto", "opencv", "pillow"}


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
