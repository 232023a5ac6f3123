"""Images of which a copy is learnt from and another one tested on: no split by name keeps them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from jaxhisto.console import counted
from jaxhisto.data.label_table import few
from jaxhisto.tasks.task import Split, Task


def copies_across(task: Task, split: Split, digests: Mapping[str, Hashable]) -> str:
    """What is to be said of test images that are trained or chosen on too; empty without any.

    Copies of the same bytes alone are found; `jaxhisto leakage` finds re-encoded ones too.

    Args:
      digests: of the file of each image that is used, by its name; with few per cent of the labels
        not all of the split's training part are.
    """
    learnt_on = [task.names[i] for part in (split.validation, split.train) for i in part]
    learnt = {digests[name]: name for name in learnt_on if name in digests}
    tested = [task.names[i] for i in split.test]
    twice = [f"{name} = {learnt[digests[name]]}" for name in tested if digests[name] in learnt]
    if not twice:
        return ""
    return (
        f"warning: {task.name}: {counted(len(twice), 'test image')} of {len(tested):,} "
        f"{'is a copy' if len(twice) == 1 else 'are copies'} of what is trained or chosen on "
        f"({few(twice)}); scores are too good: keep one of each, or name a group that holds both"
    )
