"""Turns: their order, what counts, and what happens to a runner that cannot go on."""

from __future__ import annotations

import time

import numpy as np
import pytest

from jaxhisto.bench import memory
from jaxhisto.bench.record import Row
from jaxhisto.bench.runner import Runner, attempt, measure


def runner(who, run, **more):
    return Runner("step", who, run, 4, {"batch": 4}, **more)


def test_runners_take_turns_and_the_first_turn_does_not_count():
    order = []

    def run(who):
        order.append(who)
        return float(len(order))

    rows = measure([runner("a", lambda: run("a")), runner("b", lambda: run("b"))], 2)
    assert "".join(order) == "ababab"
    assert [row.seconds for row in rows] == [(3.0, 5.0), (4.0, 6.0)]


def test_the_clock_counts_where_a_runner_says_nothing():
    rows = measure([runner("a", lambda: time.sleep(0.02))], 3)
    assert len(rows[0].seconds) == 3
    assert min(rows[0].seconds) >= 0.02
    assert max(rows[0].cpu_seconds) < 0.02  # asleep, it works nothing


def test_known_times_spread_too_much_to_conclude():
    times = iter([9.0, 1.0, 1.1, 1.4])
    (row,) = measure([runner("a", lambda: next(times))], 3)
    assert row.spread == pytest.approx(0.4)
    assert not row.conclusive


def test_an_allocation_that_cannot_succeed_ends_one_row_and_no_other():
    closed, said = [], []

    def too_much():
        np.ones(1 << 60, np.uint8)  # 1 EB: no machine has it

    rows = measure(
        [runner("a", too_much, close=lambda: closed.append(1)), runner("b", lambda: 1.0)],
        2,
        said.append,
    )
    assert (rows[0].why, rows[0].seconds) == (memory.OUT, ())
    assert rows[1].seconds == (1.0, 1.0)
    assert closed == [1]
    assert said == ["step, a: out of memory"]


def test_an_error_ends_one_row_and_shows_where(capsys):
    def broken():
        raise ValueError("/somewhere/of/ours/tile.jpg is odd\nand more")

    made = attempt(broken, "read", "a", {})
    assert made.why == "failed: ValueError: tile.jpg is odd"
    rows = measure([runner("a", broken), made, runner("b", lambda: 1.0)], 1)
    assert [row.why for row in rows] == [made.why, made.why, ""]
    assert rows[2].seconds == (1.0,)
    said = capsys.readouterr().err
    assert said.count("Traceback") == 2
    assert "in broken" in said


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("INTERNAL: CUDNN_STATUS_ALLOC_FAILED in cuda_dnn.cc", memory.OUT),
        ("INTERNAL: CUBLAS_STATUS_ALLOC_FAILED", memory.OUT),
        ("failed to create cublas handle: CUBLAS_STATUS_NOT_INITIALIZED", memory.OUT),
        ("stream_executor: CUDA_ERROR_OUT_OF_MEMORY", memory.OUT),
        ("CUDNN_BACKEND_API_FAILED ... DEVICE_ALLOCATION_FAILED", memory.OUT),
        (
            "NOT_FOUND: Failed to determine best cudnn convolution algorithm for: %c",
            memory.NO_ALGORITHM,
        ),
        (
            "Failed to determine best cudnn convolution algorithm: RESOURCE_EXHAUSTED: 16 MB",
            memory.OUT,
        ),
        ("INVALID_ARGUMENT: shapes differ", ""),
    ],
)
def test_what_a_gpu_says_when_memory_is_out(said, why):
    assert memory.why(RuntimeError(said)) == why
    row = attempt(lambda: (_ for _ in ()).throw(RuntimeError(said)), "step", "a", {})
    assert row.why == (why or f"failed: RuntimeError: {said}")


def test_what_is_not_installed_says_what_to_install():
    def make():
        import no_such_package_as_this.part  # noqa: F401

    row = attempt(make, "step", "peer", {})
    assert row == Row("step", "peer", {}, why="not installed: pip install no_such_package_as_this")
    assert measure([row, runner("b", lambda: 1.0)], 1)[0] is row


def test_the_peak_is_that_of_the_turn():
    size = 200 << 20
    (large,) = measure([runner("a", lambda: np.ones(size, np.uint8).nbytes and None)], 1)
    (small,) = measure([runner("a", lambda: None)], 1)
    assert large.peak_bytes - small.peak_bytes > size // 2
