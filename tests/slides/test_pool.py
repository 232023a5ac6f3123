"""The pool with real processes that crash, hang and fail."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from jaxhisto.errors import SlideError
from jaxhisto.slides import pool


class Awkward(Exception):
    """An error that pickle cannot make again: it asks for two arguments and gives on one."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} at {where}")


def work(job: tuple[str, str]) -> str:
    """Does what the job says; `once` and `always` die as a crash in a C library would."""
    what, note = job
    if what == "fail":
        raise SlideError(note)
    if what == "awkward":
        raise Awkward("odd", note)
    if what == "local":

        class Local(Exception):
            pass

        raise Local(note)
    if what == "hang" or (what == "hang once" and not Path(note).exists()):
        with Path(note).open("a") as file:
            file.write("begun\n")
        time.sleep(60)
    if what == "always" or (what == "once" and not Path(note).exists()):
        Path(note).touch()
        os.kill(os.getpid(), signal.SIGSEGV)
    return f"{what} done"


def test_each_job_costs_only_itself(tmp_path):
    jobs = [
        ("plain", ""),
        ("fail", "x.svs: is bad; leave it out"),
        ("once", str(tmp_path / "once")),
        ("always", str(tmp_path / "always")),
        ("plain", ""),
    ]
    answers = sorted(pool.run(work, jobs, processes=2, timeout=60), key=lambda a: a.index)

    assert [a.value for a in answers] == ["plain done", None, "once done", None, "plain done"]
    assert isinstance(answers[1].error, SlideError)
    assert str(answers[1].error) == "x.svs: is bad; leave it out"
    assert isinstance(answers[3].error, pool.ProcessDied)
    assert "exit code -11" in str(answers[3].error)


def test_a_job_that_hangs_is_ended_and_tried_once_more_after_the_others(tmp_path):
    began = time.monotonic()
    jobs = [("hang", str(tmp_path / "a")), ("hang once", str(tmp_path / "b")), ("plain", "")]
    answers = list(pool.run(work, jobs, processes=1, timeout=2))

    assert [answer.index for answer in answers] == [2, 0, 1]
    assert [answer.value for answer in answers] == ["plain done", None, "hang once done"]
    assert isinstance(answers[1].error, pool.TooSlow)
    assert str(answers[1].error) == "took longer than 2 s"
    assert [(tmp_path / name).read_text() for name in "ab"] == ["begun\nbegun\n", "begun\n"]
    assert time.monotonic() - began < 30


def test_an_error_that_cannot_travel_sends_its_words():
    jobs = [("awkward", "3,4"), ("local", "here"), ("plain", "")]
    answers = sorted(pool.run(work, jobs, processes=1, timeout=60), key=lambda a: a.index)

    said = [str(answer.error) for answer in answers[:2]]
    assert said == ["Awkward: odd at 3,4", "Local: here"]
    assert answers[2].value == "plain done"
