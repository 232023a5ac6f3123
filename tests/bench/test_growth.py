"""Exponents: of planted powers, and of the loss's memory, whose powers are known."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest

from jaxhisto.bench import flops, growth, growth_child, growth_report
from jaxhisto.bench.child import OutOfMemory
from jaxhisto.bench.record import Record, read_record, write_record
from jaxhisto.bench.report import write_report
from jaxhisto.errors import RunError

ROOT = Path(__file__).resolve().parents[2]
POINT = {"model": "resnet10", "tile_px": 32, "batch": 4, "precision": "f32", "devices": 1}


@pytest.mark.parametrize("exponent", [-0.5, 0.0, 1.0, 1.7, 2.0])
def test_a_planted_power_is_found(exponent):
    x = growth.BATCHES
    found = growth.fit(x, [3e-5 * n**exponent for n in x])
    assert found.exponent == pytest.approx(exponent, abs=1e-9)
    assert found.end == pytest.approx(exponent, abs=1e-9)
    assert (found.first, found.last, found.count) == (64, 16384, 9)
    assert found.high - found.low < 1e-9


def test_the_interval_holds_the_power_as_often_as_it_says():
    """2,000 noisy draws: 95 % of the intervals hold the exponent (SE of the share: 0.5 %)."""
    rng, x = np.random.default_rng(0), np.array(growth.BATCHES, float)
    held = 0
    for _ in range(2000):
        found = growth.fit(x, 2e-3 * x**1.3 * np.exp(rng.normal(0, 0.2, x.size)))
        held += found.low <= 1.3 <= found.high
    assert held / 2000 == pytest.approx(0.95, abs=0.02)


def test_two_sizes_are_no_fit():
    assert growth.fit([1, 2], [1, 2]) is None
    assert growth.fit([1, 2, 3], [1, 2, 0]) is None
    assert growth.fit([2, 2, 3], [1, 2, 3]) is None


def test_memory_of_the_loss():
    """(2N)^2 similarities, or N times a constant number of columns."""
    for what, expected in (("loss, dense", 2), ("loss, chunked", 1)):
        series = {"what": what, "axis": "batch", "point": POINT}
        # Chunks are of 1,024 columns: linear where there are many of them.
        small, large = (growth_child.program_of(series, n).planned_bytes for n in (4096, 8192))
        assert math.log2(large / small) == pytest.approx(expected, abs=0.1), what


def test_a_series_is_measured_where_it_fits(monkeypatch):
    monkeypatch.setattr(growth_child, "free_bytes", lambda device: 40e6)
    series = {"what": "loss, dense", "axis": "batch", "sizes": [16, 32, 2048], "point": POINT}
    *small, large = growth_child.entries({"series": series, "repeats": 2, "limit_s": 60.0})
    assert [len(entry["seconds"]) for entry in small] == [2, 2]
    assert all(0 < s < 5 for entry in small for s in entry["seconds"])
    assert large["why"] == (
        f"not run: needs {large['planned_bytes'] / 1e9:.1f} GB, 80% of the 0.0 GB free are less"
    )
    assert large["planned_bytes"] > 4 * 4096**2  # one float32 matrix of all similarities
    slow = {"series": series | {"sizes": [16, 64]}, "repeats": 1, "limit_s": 0.1}
    first, second = growth_child.entries(slow)
    assert "seconds" in first
    assert second["why"] == "not run: 1 s expected, the limit is 0.1 s"  # 0.05 s x (64 / 16)^2


def test_a_process_that_runs_out_of_memory_leaves_the_sizes(monkeypatch):
    def dying(job, env):
        yield {"entry": {"size": 64, "x": 64.0, "planned_bytes": 10, "seconds": [1.0]}}
        raise OutOfMemory

    monkeypatch.setattr(growth, "ask", dying)
    series = growth.Series("step", "batch", (64, 128, 256), POINT)
    entries = list(growth.measured(series, 1, 1.0))
    assert [entry.get("why") for entry in entries] == [
        None,
        "out of memory",
        "not run: out of memory at 128",
    ]
    assert growth.fits_of(entries) == {"seconds": None, "planned_bytes": None}


def test_an_error_costs_its_size_alone(monkeypatch):
    def program_of(series, size):
        raise RuntimeError(f"INTERNAL: {size}" if size == 32 else "CUDNN_STATUS_ALLOC_FAILED")

    monkeypatch.setattr(growth_child, "program_of", program_of)
    series = {"what": "loss, dense", "axis": "batch", "sizes": [16, 32], "point": POINT}
    found = list(growth_child.entries({"series": series, "repeats": 1, "limit_s": 1.0}))
    assert [entry["why"] for entry in found] == [
        "out of memory",
        "failed: RuntimeError: INTERNAL: 32",
    ]


def test_a_process_that_fails_costs_its_series_and_what_was_measured_is_written(monkeypatch):
    def ask(job, env):
        yield {"entry": {"size": 64, "x": 64.0, "planned_bytes": 10, "seconds": [1.0]}}
        if job["series"]["axis"] == "tile_px":
            raise RunError("the process that measures ended with code 1 (ValueError: x)")

    monkeypatch.setattr(growth, "ask", ask)
    two = [growth.Series("step", axis, (64, 128), POINT) for axis in ("tile_px", "batch")]
    written = []
    found = growth.measure_growth(two, 1, 1.0, None, lambda g: written.append(len(g["series"])))
    assert written == [1, 2]
    failed = found["series"][0]["sizes"][1]
    assert failed["why"].startswith("failed: the process that measures ended with code 1")


def test_what_cannot_fit_is_not_compiled(monkeypatch):
    """16,384 images of 224 px in bf16: more than 200 GB of maps alone."""
    device = type("Device", (), {"platform": "gpu"})()
    mesh = type("Mesh", (), {"local_devices": [device], "size": 1})()
    monkeypatch.setattr(growth_child, "make_mesh", lambda devices: mesh)
    monkeypatch.setattr(growth_child, "free_bytes", lambda device: 80e9)
    monkeypatch.setattr(growth_child, "program_of", lambda *a: pytest.fail("it was compiled"))
    at = POINT | {"model": "resnet18", "tile_px": 224, "precision": "bf16"}
    series = {"what": "step", "axis": "batch", "sizes": [16384], "point": at}
    (found,) = growth_child.entries({"series": series, "repeats": 1, "limit_s": 1.0})
    assert re.fullmatch(r"not run: needs at least 1\d\d GB, 80 GB are free", found["why"]), found
    assert growth_child.hopeless(series, 64) == ""


def test_what_a_step_must_keep_is_less_than_what_the_compiler_plans():
    """Of the committed record, at every size; where maps are most of it, at least a tenth."""
    record = read_record(
        ROOT / "benchmarks" / "records" / "bench-growth-resnet10-cpu-2026-11-25.json"
    )
    checked = 0
    for series in record.more["growth"]["series"]:
        for entry in series["sizes"]:
            if series["what"] != "step" or "planned_bytes" not in entry:
                continue
            moving = {"depth": "model"}.get(series["axis"], series["axis"])
            at = series["point"] | {moving: entry["size"]}
            kept = flops.kept_bytes(at["model"], at["tile_px"], at["batch"], at["precision"])
            assert kept < entry["planned_bytes"], at
            assert kept > 0.1 * entry["planned_bytes"] or at["batch"] * at["tile_px"] ** 2 < 1e6, at
            checked += 1
    assert checked > 8


def test_what_stays_the_same_along_a_series():
    loss, _, batch, side, depth = growth.series_of(POINT)
    assert growth.others(loss) == {"devices": 1}
    assert "batch" not in growth.others(batch)
    assert "tile_px" not in growth.others(side)
    assert "model" not in growth.others(depth)
    assert growth.place("depth", "resnet50") == 50


@pytest.fixture
def grown():
    """Series of planted powers, as `measure_growth` gives them."""

    def entry(size, x, seconds, bytes_):
        return {"size": size, "x": x, "seconds": [seconds] * 3, "planned_bytes": bytes_}

    found = []
    for one, power in zip(growth.series_of(POINT), (2, 2, 1, 2, 0.5), strict=True):
        entries = []
        for size in one.sizes:
            x = growth.place(one.axis, size)
            entries.append(entry(size, x, 1e-4 * x**power, int(1e4 * x)))
        if one.axis == "batch":
            del entries[-1]["seconds"]
            entries[-1]["why"] = "not run: 90 s expected, the limit is 30 s"
        part = {"what": one.what, "axis": one.axis, "point": growth.others(one), "sizes": entries}
        found.append(part | {"fits": growth.fits_of(entries)})
    return {"limit_s": 30.0, "repeats": 3, "series": found}


def test_the_report_has_the_exponents(grown, tmp_path):
    text = growth_report.section(grown)
    assert "| step | batch | time | 1.00 | 1.00 to 1.00 | 64 to 8,192 | 1.00 |" in text
    assert "| step | batch | memory | 1.00 | 1.00 to 1.00 | 64 to 16,384 | 1.00 |" in text
    assert "| step | depth | time | 0.50 |" in text
    assert "16,384: not run: 90 s expected, the limit is 30 s" in text
    source = tmp_path / "growth.json"
    write_record(source, Record({}, {"device": "made"}, more={"growth": grown}))
    page = write_report([source], tmp_path / "page.md").read_text()
    assert "](page-growth-0.png)" in page
    assert (tmp_path / "page-growth-0.png").stat().st_size > 10_000
