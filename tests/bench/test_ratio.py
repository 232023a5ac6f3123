"""The last line of the scripts in benchmarks/: what it says where there is no ratio to say."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import jax
import pytest

from jaxhisto.bench import ours, peers, ratio
from jaxhisto.bench.record import Row
from jaxhisto.bench.runner import Runner

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("ours", "pytorch")


def row(*seconds, why="", cpu=()):
    return Row("step", "a", {}, seconds, 8, why=why, cpu_seconds=cpu)


def test_a_ratio_by_hand():
    said = ratio.compared(row(1.0, 2.0, 2.0), row(4.0, 4.0, 4.0), NAMES)
    assert said == "2.00 = ours 4.0 / pytorch 2.0 images/s, inconclusive: ours spreads by 100%"
    sure = ratio.compared(row(2.0, 2.0, 2.0), row(4.0, 4.0, 4.4), NAMES, where=" here", value=3.0)
    assert ratio.line([sure, sure], "x") == f"ratio {sure}; {sure} (x)"
    assert sure == "3.00 here = ours 4.0 / pytorch 2.0 images/s"
    few = ratio.compared(row(1.0), row(1.0, 1.0, 1.0), NAMES)
    assert few.endswith("inconclusive: ours has 1 of the 3 turns that a spread needs")


def test_by_the_cores_work_the_clock_stands_against_nothing():
    busy = row(1.0, 9.0, 2.0, cpu=(1.0, 1.1, 1.0))
    assert "inconclusive" not in ratio.compared(busy, busy, NAMES, ratio.BY_CORE)


@pytest.mark.parametrize("swapped", [False, True])
def test_without_a_figure_the_reason_is_the_last_line(swapped):
    pair = (row(why="out of memory"), row(1.0, 1.0, 1.0))
    who = NAMES[swapped]
    with pytest.raises(SystemExit, match=f"no ratio: {who}: out of memory"):
        ratio.compared(*(pair[::-1] if swapped else pair), NAMES)


@pytest.fixture
def step(monkeypatch):
    """benchmarks/step.py on stubs; gives (its main, what the peer was asked for)."""
    spec = importlib.util.spec_from_file_location("step", ROOT / "benchmarks" / "step.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    asked = {}

    class Setup:
        def __init__(self, point, calls):
            self.settings = {"batch": point.batch, "precision": point.precision, "calls": calls}

        def runner(self, stage):
            if asked.get("full"):
                raise MemoryError
            return Runner("step", "jaxhisto", lambda: 0.5, 8, self.settings)

    def prepare_peer(stage, settings, who):
        asked.update(settings)
        return Runner(stage, who, lambda: 1.0, 8, settings)

    monkeypatch.setattr(ours, "Setup", Setup)
    monkeypatch.setattr(peers, "prepare_peer", prepare_peer)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: None)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setattr(sys, "argv", ["step.py", "--repeats", "3"])
    return module.main, asked


@pytest.mark.parametrize(
    ("platform", "batch", "precision"), [("cpu", 32, "f32"), ("gpu", 512, "bf16")]
)
def test_the_peer_runs_where_ours_does(step, monkeypatch, capsys, platform, batch, precision):
    main, asked = step
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    main()
    assert (asked["platform"], asked["augment"]) == (platform, False)
    assert (asked["batch"], asked["precision"]) == (batch, precision)
    assert asked["calls"] == (1 if platform == "cpu" else 20)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("ratio 2.00 = ours 16.0 / pytorch 8.0 images/s (resnet18, 224 px, batch")


def test_where_ours_does_not_fit_the_script_says_so(step):
    main, asked = step
    asked["full"] = True
    with pytest.raises(SystemExit, match="no ratio: ours: out of memory"):
        main()
