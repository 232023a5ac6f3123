"""What bounds training, of records made by hand: a planted slow stage turns the verdict."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from jaxhisto.bench.inputs import drained
from jaxhisto.bench.record import Record, Row
from jaxhisto.bench.verdict import verdicts

AT = {"model": "resnet18", "tile_px": 64, "batch": 8, "precision": "bf16", "devices": 1,
      "threads": 1, "data": "synthetic"}  # fmt: skip
DATA = {k: v for k, v in AT.items() if k not in ("model", "precision")}
PEAKS = {"tflops": {"f32": 1.0, "bf16": 10.0}, "gb_per_s": 100.0}
STEP = Row("step", "jaxhisto", AT, (1.0, 1.0), 8, flops=6e12, bytes=20e9)


def record(*rows, platform="gpu"):
    return Record({}, {"peaks": PEAKS, "platform": platform}, rows)


def of(found, stage="step"):
    return next(v for v in found["of"] if ("cache" in v["settings"]) == (stage == "pipeline"))


def pipeline(seconds, cache="none"):
    return Row("pipeline", "jaxhisto", AT | {"cache": cache, "data": "store"}, seconds, 8)


def test_products_that_take_most_of_the_step():
    verdict = of(verdicts(record(STEP)))
    assert verdict["bound"] == "compute"
    assert verdict["shares"] == pytest.approx({"compute": 0.6, "memory": 0.2})
    assert "60% of the step" in verdict["says"]
    assert "kernels" not in verdict["says"]
    slow = of(verdicts(record(replace(STEP, seconds=(2.0,)))))
    assert "30% of the step" in slow["says"]
    assert "lost to kernels that stay below" in slow["says"]


def test_traffic_that_takes_most_of_the_step():
    verdict = of(verdicts(record(replace(STEP, bytes=70e9))))
    assert verdict["bound"] == "memory"
    assert "traffic at its bandwidth 70%" in verdict["says"]


def test_a_slow_exchange_turns_the_verdict():
    sent = Row("communication", "jaxhisto", AT, (0.1,), 8)
    assert of(verdicts(record(STEP, sent)))["bound"] == "compute"
    slow = of(verdicts(record(STEP, replace(sent, seconds=(0.8,)))))
    assert slow["bound"] == "communication"
    assert "80%" in slow["says"]


def test_two_gpus_have_two_peaks_and_two_devices_of_a_cpu_one():
    two = replace(STEP, settings=AT | {"devices": 2})
    assert of(verdicts(record(two)))["shares"]["compute"] == pytest.approx(0.3)
    assert of(verdicts(record(two, platform="cpu")))["shares"]["compute"] == pytest.approx(0.6)


def test_on_a_busy_cpu_the_work_of_its_cores_is_told_too():
    """One second by the clock, 0.6 products at the peak; two cores worked 1.5 s, 0.75 each."""
    busy = replace(STEP, settings=AT | {"threads": 2}, cpu_seconds=(1.5,))
    said = of(verdicts(record(busy, platform="cpu")))["says"]
    assert "60% of the step" in said
    assert "80% of the time that its cores worked" in said


def test_a_slow_reader_turns_the_verdict():
    """Planted for real: a feed that sleeps, timed as the pipeline is."""

    def feed(seconds):
        while True:
            time.sleep(seconds)
            yield 0

    def took(delay):
        trained = [drained(feed(delay), 1, 3, lambda item: time.sleep(0.02))[0] for _ in range(3)]
        return min(trained) / 3  # the least disturbed

    step = replace(STEP, seconds=(took(0.0),), flops=0.12e12, bytes=0.4e9)
    assert of(verdicts(record(step, pipeline(step.seconds))), "pipeline")["bound"] == "compute"
    found = of(verdicts(record(step, pipeline((took(0.1),)))), "pipeline")
    assert found["bound"] == "input"
    assert found["share"] < 0.5


def test_the_step_beside_the_pipeline_is_what_it_is_held_against():
    beside = replace(STEP, settings=AT | {"beside": "pipeline"}, seconds=(2.0,))
    found = verdicts(record(STEP, beside, pipeline((2.1,))))
    assert len(found["of"]) == 2
    assert of(found, "pipeline")["bound"] == "compute"
    assert of(found, "pipeline")["share"] == pytest.approx(2.0 / 2.1)


def test_turns_that_differ_too_much_make_it_inconclusive():
    noisy = of(verdicts(record(replace(STEP, seconds=(1.0, 1.0, 1.5)))))
    assert noisy["says"].startswith("inconclusive (step spreads by 50%)")


def test_the_share_of_augmentation_and_the_floor():
    augment = Row("augment", "jaxhisto", DATA, (0.08,), 8)
    verdict = of(verdicts(record(STEP, augment)))
    assert verdict["augment_share"] == pytest.approx(0.08)
    assert verdict["floor_s"] == pytest.approx(0.6)  # 6e12 / 10e12: far longer than its bytes
    assert verdict["floor_share"] == pytest.approx(0.6)


def test_many_calls_of_a_turn_change_no_share_and_no_floor():
    """As on an accelerator, where a turn is many calls with one wait."""
    augment = Row("augment", "jaxhisto", DATA, (0.08,) * 3, 8)
    one = replace(STEP, seconds=(1.0,) * 3)
    ten = replace(one, images=80, seconds=(10.0,) * 3, flops=60e12, bytes=200e9)
    longer = replace(augment, images=80, seconds=(0.8,) * 3)
    found, again = (of(verdicts(record(*rows))) for rows in ((one, augment), (ten, longer)))
    for key in ("floor_s", "floor_share", "augment_share"):
        assert again[key] == pytest.approx(found[key]), key
    assert again["says"] == found["says"]


def test_without_figures_there_is_no_verdict():
    assert verdicts(record(replace(STEP, seconds=(), why="out of memory")))["of"] == []
    assert "no verdict" in of(verdicts(record(pipeline((1.0,)))), "pipeline")["says"]
    bare = Record({}, {"platform": "cpu", "peaks": {}}, (STEP,))
    assert of(verdicts(bare))["bound"] == ""
