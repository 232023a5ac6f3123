"""A save that fails is said once, tried again by the rule, and fatal at the end alone."""

from __future__ import annotations

import pytest

from jaxhisto.checkpoints import SaveError
from jaxhisto.errors import RunError
from jaxhisto.pretrain.saving import Saving


class Disk:
    """Checkpoints on a disk that is full between two steps; a write takes `slow` looks."""

    def __init__(self, full: range, slow: int = 0) -> None:
        self.full, self.slow = full, slow
        self.kept: list[int] = []
        self.tried: list[int] = []
        self._writing: int | None = None
        self._left = 0
        self._failure: SaveError | None = None

    @property
    def latest_step(self) -> int | None:
        return self.kept[-1] if self.kept else None

    def save_async(self, step, state, metadata) -> None:
        self.settle()
        self._failure, self._writing, self._left = None, step, self.slow
        self.tried.append(step)

    def failure(self) -> SaveError | None:
        self._left -= 1
        if self._left < 0:
            self.settle()
        return self._failure

    def settle(self) -> None:
        step, self._writing = self._writing, None
        if step is not None and step in self.full:
            self._failure = SaveError(f"checkpoint {step} could not be written (the disk is full)")
        elif step is not None:
            self.kept.append(step)

    def wait(self) -> None:
        self.settle()
        if self._failure is not None:
            raise self._failure


def train(disk: Disk, steps: int, every: int) -> None:
    saving = Saving(disk, every, {})
    for step in range(1, steps + 1):
        if saving.due(step, now=step == steps):
            saving.start(step, None)
    saving.finish()


def test_it_saves_every_kth_step_and_the_last(capfd):
    disk = Disk(full=range(0))
    train(disk, 35, every=10)
    assert disk.kept == [10, 20, 30, 35]
    assert capfd.readouterr().err == ""


def test_a_failed_save_is_tried_again_a_tenth_later_until_there_is_room(capfd):
    disk = Disk(full=range(150, 231))
    train(disk, 400, every=100)
    # 200 fails, seen at 201: again at 211 and 222 (each seen a step later), 233 has room
    assert disk.tried == [100, 200, 211, 222, 233, 300, 400]
    assert disk.kept == [100, 233, 300, 400]
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 4
    assert said[0] == (
        "checkpoint 200 could not be written (the disk is full); training goes on and tries again "
        "at step 211: make room (or lower --keep) or mend permissions"
    )
    assert said[3] == "checkpoint 233 is written, saving works again"


@pytest.mark.parametrize("slow", [0, 1, 3, 50])
def test_each_failure_is_said_once_however_slow_the_disk_and_often_the_saves(slow, capfd):
    disk = Disk(full=range(3, 6), slow=slow)
    train(disk, 12, every=1)
    assert disk.tried == list(range(1, 13))
    said = capfd.readouterr().err
    assert [said.count(f"checkpoint {step} could not") for step in (3, 4, 5)] == [1, 1, 1]
    assert disk.kept == [1, 2, 6, 7, 8, 9, 10, 11, 12]


def test_the_last_save_must_succeed():
    disk = Disk(full=range(30, 99))
    with pytest.raises(RunError, match=r"checkpoint 40 .* goes on from checkpoint 20\.$"):
        train(disk, 40, every=10)
    assert disk.tried == [10, 20, 30, 32, 34, 36, 38, 40]
