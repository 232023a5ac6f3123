"""A step's time is the device's, however late the host comes to look."""

from __future__ import annotations

import time
from contextlib import suppress

import jax
import jax.numpy as jnp
import pytest

from jaxhisto.pretrain import timing
from jaxhisto.pretrain.timing import StepClock


@jax.jit
def slow(x: jax.Array) -> jax.Array:
    def wait(x):
        time.sleep(0.3)
        return x

    return jax.pure_callback(wait, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


@pytest.fixture(scope="module")
def warm() -> jax.Array:
    return jax.block_until_ready(slow(jnp.ones(())))


def feed_of(waits):
    for step, wait in enumerate(waits):
        time.sleep(wait)
        yield step, "batch"


def test_waiting_for_data_is_not_the_steps_time(warm):
    clock, found = StepClock(), []
    held = None
    for _, batch, wait_s in clock.timed(feed_of([0.0, 2.0, 0.0])):
        assert batch == "batch"
        times = clock.handed_over(slow(warm))
        if held is not None:
            found.append((held[0](), held[1]))  # one step late, as the loop does
        held = times, wait_s
    found.append((held[0](), held[1]))
    assert [wait > 1.9 for _, wait in found] == [False, True, False]
    # Each took 0.3 s; the first was read after the second's data had come, 2 s later, and the
    # third stood behind the second.
    for times, _ in found:
        assert 0.25 < times["step_s"] < 1.5


def test_the_loop_held_up_is_in_the_next_steps_times(warm):
    clock = StepClock()
    before = clock.handed_over(warm)
    with clock.holding("checkpoint_s"):
        time.sleep(0.2)
    with suppress(OSError), clock.holding("checkpoint_s"):
        time.sleep(0.1)
        raise OSError("full")
    after, then = clock.handed_over(warm), clock.handed_over(warm)
    assert before()["checkpoint_s"] == 0
    assert 0.3 <= after()["checkpoint_s"] < 1.5
    assert then()["checkpoint_s"] == 0


def test_memory_is_that_of_the_fullest_device_and_absent_where_none_says(monkeypatch):
    assert timing.memory() == {}  # CPU

    class Device:
        def __init__(self, used, peak):
            self.stats = {"bytes_in_use": used, "peak_bytes_in_use": peak}

        def memory_stats(self):
            return self.stats

    monkeypatch.setattr(timing.jax, "local_devices", lambda: [Device(3, 9), Device(5, 7)])
    assert timing.memory() == {"memory_bytes": 5.0, "memory_peak_bytes": 9.0}
