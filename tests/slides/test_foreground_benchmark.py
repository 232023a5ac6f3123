"""docs/foreground.md holds the committed record, and the benchmark's own arithmetic."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest
from skimage.color import rgb2hed

ROOT = Path(__file__).resolve().parents[2]
DOC = ROOT / "docs" / "foreground.md"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location(
        "foreground_benchmark", ROOT / "benchmarks" / "foreground.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def record():
    """The one that the doc names."""
    (name,) = set(re.findall(r"benchmarks/records/(foreground-[\d-]+\.json)", DOC.read_text()))
    return json.loads((ROOT / "benchmarks" / "records" / name).read_text())


def test_the_doc_holds_the_record(benchmark, record):
    text = DOC.read_text(encoding="utf-8")

    assert benchmark.tables(record) in text
    tissue = [s for s in record["sets"] if s["want"] == "tissue"]
    real, made = (
        sum(s["n"] for s in tissue if s["set"].startswith("made") == m) for m in (False, True)
    )
    assert f"0 of {real:,} real ones (0 of {made:,}\nmade brown)" in text
    assert {s["pen"][guard] for s in tissue for guard in ("green_blue", "all")} == {0}


def test_the_detectors_still_do_what_the_record_says(benchmark, record, shared_data):
    """To a cell in fifty, for what another decoder rounds otherwise."""
    stated = {s["set"]: s for s in record["sets"]}
    for made in benchmark.qc_sets(shared_data / "tissue_qc"):
        now, then = benchmark.counted(made), stated[made.name]
        assert (now["n"], now["want"]) == (then["n"], then["want"])
        for what in ("kept", "pen"):
            assert now[what] == pytest.approx(then[what], abs=max(1, now["n"] / 50)), made.name


@pytest.mark.parametrize(("k", "n"), [(0, 20), (1, 2), (45, 45), (17, 60)])
def test_the_intervals_are_wilsons(benchmark, k, n):
    low, high = (100 * p for p in binomtest(k, n).proportion_ci(0.95, "wilson"))

    assert benchmark.percent(k, n) == f"{100 * k / n:.0f} ({abs(low):.0f}..{high:.0f})"


def test_made_dab_is_haematoxylin_as_it_was_and_dab_where_eosin_was(benchmark):
    """Against scikit-image's separation, away from what eight bits round."""
    rgb = np.random.default_rng(0).integers((120, 60, 120), (200, 130, 200), (20, 20, 3))
    before = rgb2hed(rgb.astype(np.uint8))
    after = rgb2hed(benchmark.as_dab(rgb.astype(np.uint8)))

    assert before[..., 1].mean() > 0.01
    np.testing.assert_allclose(after[..., 0], before[..., 0], atol=2e-3)
    np.testing.assert_allclose(after[..., 2], before[..., 1], atol=2e-3)
    np.testing.assert_allclose(after[..., 1], 0, atol=2e-3)


def test_cells_lie_inside_their_area(benchmark):
    cells = benchmark.inside((10, 20, 64, 64), benchmark.box(0, 0, 0.5, 1), 8.0)

    assert len(cells) == 4 * 8
    assert max(x + w for x, _, w, _ in cells) == 10 + 32
