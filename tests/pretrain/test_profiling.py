"""The profiler runs from the first to the last step asked for, and is never left running."""

from __future__ import annotations

import jax
import pytest

from jaxhisto.config import PretrainConfig
from jaxhisto.errors import ConfigError, RunError
from jaxhisto.pretrain.profiling import check_profile, profiled
from jaxhisto.settings import check


@pytest.fixture
def events(monkeypatch):
    seen: list[object] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: seen.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append("stop"))
    return seen


def steps(span, start, count, events, out):
    said: list[str] = []

    def train_step(state, batch):
        events.append(batch)
        return state, {}

    with profiled(span, out, start, train_step, said.append) as step:
        for k in range(start + 1, start + count + 1):
            step(0, k)
    return said


def test_the_trace_holds_the_steps_asked_for(events, tmp_path):
    said = steps((2, 3), 0, 4, events, tmp_path)
    assert events == [1, "start", 2, 3, "stop", 4]
    assert said[0].startswith(f"{tmp_path}/profile: trace of steps 2 to 3; open ")


def test_after_a_resume_what_is_left_of_them_is_traced(events, tmp_path):
    said = steps((2, 6), 4, 3, events, tmp_path)
    assert events == ["start", 5, 6, "stop", 7]
    assert "steps 5 to 6" in said[0]


def test_steps_done_already_are_said_and_not_traced(events, tmp_path):
    said = steps((2, 3), 3, 2, events, tmp_path)
    assert events == [4, 5]
    assert said == ["--profile 2 3: these steps are done already, nothing is traced"]


def test_a_run_that_ends_inside_the_span_closes_the_trace(events, tmp_path):
    def broken(state, batch):
        raise RunError("the loss is nan")

    with pytest.raises(RunError), profiled((1, 2), tmp_path, 0, broken, print) as step:
        step(0, 1)
    assert events == ["start", "stop"]


def test_without_a_span_the_step_is_the_step(tmp_path):
    with profiled(None, tmp_path, 0, steps, print) as step:
        assert step is steps


def test_spans_that_cannot_be_are_refused():
    check_profile(None, 5)
    check_profile((5, 5), 5)
    with pytest.raises(RunError, match="--profile 3 6: the run has 5 steps"):
        check_profile((3, 6), 5)
    for span in ((3, 2), (0, 2)):
        with pytest.raises(ConfigError, match="--profile"):
            check(PretrainConfig(out="run", profile=span))
