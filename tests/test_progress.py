"""How far a long piece of work is: plain lines, and a bar on a terminal."""

from __future__ import annotations

import io
import sys

import pytest

from jaxhisto import progress
from jaxhisto.progress import Progress
from jaxhisto.slides.progress import SlideProgress


class Clock:
    """Seconds that go by as a test says."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "perf_counter", clock)
    return clock


def test_plain_lines_every_few_steps(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """The first step compiles: it says nothing of the others, which take 3 s each."""
    with Progress("pretraining", total=10, every=4) as shown:
        for step in range(1, 11):
            clock.now += 60.0 if step == 1 else 3.0
            shown.update(step, "loss 1")
    assert capsys.readouterr().err.splitlines() == [
        "pretraining 1/10  loss 1  ETA ?",
        "pretraining 4/10  loss 1  ETA 0:00:18",
        "pretraining 8/10  loss 1  ETA 0:00:06",
        "pretraining 10/10  loss 1  ETA 0:00:00",
    ]


def test_a_line_in_ten_seconds_with_the_rate(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """After an earlier start that did 1,000; short work says nothing."""
    with Progress("embed", 100_000, 1000) as shown:
        for _ in range(8):
            clock.now += 4.0
            shown.advance(100)
    assert capsys.readouterr().err.splitlines() == [
        "embed 1,300/100,000  25 tiles/s  ETA 1:05:48",
        "embed 1,600/100,000  25 tiles/s  ETA 1:05:36",
    ]
    with Progress("study", 4, unit="cells") as shown:
        for _ in range(4):
            clock.now += 120.0
            shown.advance()
    assert capsys.readouterr().err.splitlines()[-1] == "study 4/4  0.5 cells/min  ETA 0:00:00"
    with Progress("embed", 4) as shown:
        shown.advance(4)
    assert capsys.readouterr().err == ""


def test_a_line_a_slide_and_failures_above_the_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut() -> None:
        with SlideProgress(2) as shown:
            shown.done("a.svs", "1,200 tiles", 1200)
            shown.failed("b [1].svs: is no slide")

    cut()
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("tile 1/2  a.svs: 1,200 tiles")
    assert second.startswith("tile 2/2  failed: b [1].svs: is no slide")
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    cut()
    said = terminal.getvalue()
    assert "failed: b [1].svs: is no slide" in said
    assert "1,200 tiles" in said
    assert said.endswith("\x1b[?25h")  # the cursor is there again
