"""Copies of one image on both sides of a split, which names and groups do not show."""

from __future__ import annotations

import numpy as np
from made_tasks import made_task

from jaxhisto.tasks.copies import copies_across
from jaxhisto.tasks.splits import checked_split


def test_test_images_that_are_learnt_from_are_told():
    task = made_task([0, 1] * 6)
    split = checked_split(task, np.arange(6), np.arange(6, 8), np.arange(8, 12))
    own = {name: name for name in task.names}
    assert copies_across(task, split, own) == ""
    within = own | {"i000001": "x", "i000003": "x", "i000009": "y", "i000011": "y"}
    assert copies_across(task, split, within) == ""  # copies of one side tell nothing too much
    said = copies_across(task, split, own | {"i000009": "i000002"})
    assert "made: 1 test image of 4 is a copy of what is trained or chosen on" in said
    assert "(i000009 = i000002)" in said
    said = copies_across(task, split, own | {"i000008": "i000002", "i000011": "i000007"})
    assert "2 test images of 4 are copies" in said
    assert "(i000008 = i000002, i000011 = i000007)" in said
    few = dict.fromkeys(("i000000", "i000008", "i000009", "i000010", "i000011"), "same")
    assert "4 test images of 4" in copies_across(task, split, few)  # of few labels some are used
