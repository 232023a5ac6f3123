"""Rows and records: figures by hand, what is written is read again, what is none is refused."""

from __future__ import annotations

import json
import math

import pytest

from jaxhisto.bench.record import Record, Row, find, read_record, write_record
from jaxhisto.errors import RunError

ROW = Row("step", "jaxhisto", {"model": "resnet18", "batch": 8}, (2.0, 1.0, 1.2), 8, 1e9, 2e9, 3)


def test_figures_by_hand():
    assert ROW.median == 1.2
    assert ROW.images_per_s == pytest.approx(8 / 1.2)
    assert ROW.views_per_s == pytest.approx(16 / 1.2)
    assert ROW.spread == pytest.approx(1.0)  # 2.0 / 1.0 - 1
    worked = Row("augment", "jaxhisto", {}, (3.0,), 8, cpu_seconds=(2.0,))
    assert worked.images_per_cpu_s == 4.0


def test_a_known_spread_is_inconclusive_above_a_quarter():
    assert Row("step", "a", {}, (1.0, 1.1, 1.25)).conclusive
    noisy = Row("step", "a", {}, (1.0, 1.1, 1.26))
    assert (noisy.conclusive, noisy.doubt) == (False, "spreads by 26%")
    none = Row("step", "a", {}, why="out of memory")
    assert (none.conclusive, none.doubt) == (False, "")


def test_few_turns_and_turns_that_took_no_time_conclude_nothing():
    two = Row("step", "a", {}, (1.0, 1.0))
    assert (two.conclusive, two.doubt) == (False, "has 2 of the 3 turns that a spread needs")
    clamped = Row("backward", "a", {}, (0.0, 0.1, 0.1))
    assert (clamped.conclusive, clamped.doubt) == (False, "has a turn that took no time")
    assert math.isinf(clamped.spread)


def test_no_figure_and_no_time_are_no_speed():
    assert math.isnan(Row("step", "a", {}, images=8, why="out of memory").images_per_s)
    none = Row("communication", "a", {}, (0.0, 0.0), 8)
    assert math.isnan(none.images_per_s)
    assert (none.spread, none.conclusive) == (0.0, False)


def test_a_record_is_read_as_it_was_written(tmp_path):
    record = Record({"repeats": 3}, {"device": "x"}, (ROW,), {"of": []}, {"growth": {"batch": 1.0}})
    write_record(tmp_path / "r.json", record)
    assert read_record(tmp_path / "r.json") == record
    assert json.loads((tmp_path / "r.json").read_text())["rows"][0]["seconds"] == [2.0, 1.0, 1.2]


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": []}', '{"format": "jaxhisto bench 1"}'])
def test_what_is_no_record_is_refused(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(RunError, match=r"r\.json: is no record of `jaxhisto bench`"):
        read_record(tmp_path / "r.json")
    with pytest.raises(RunError, match="no such file"):
        read_record(tmp_path / "absent.json")


def test_rows_are_found_by_their_settings():
    other = Row("step", "pytorch", {"model": "resnet18", "batch": 8}, (1.0,))
    assert find((other, ROW), "step", batch=8) is ROW
    assert find((other, ROW), "step", "pytorch") is other
    assert find((ROW,), "step", batch=16) is None
