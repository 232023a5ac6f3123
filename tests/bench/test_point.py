"""A stage's turns where memory is out beside the others, and the step on given views."""

from __future__ import annotations

import pytest

from jaxhisto.bench import peers, point
from jaxhisto.bench.child import room
from jaxhisto.bench.memory import OUT
from jaxhisto.bench.record import GIVEN, Record, Row
from jaxhisto.bench.report import against, one_by_one, ours_of, stages
from jaxhisto.bench.runner import Runner

AT = {"model": "resnet18", "tile_px": 64, "batch": 8, "precision": "bf16", "devices": 1,
      "threads": 1, "data": "synthetic"}  # fmt: skip
JOB = {"repeats": 3, "steps": 2, "peers": ["pytorch"], "cache": []}


class Setup:
    """What fits alone, or not at all, or always."""

    settings = AT

    def __init__(self, fits, held):
        self.fits, self.held = fits, held

    def runner(self, stage):
        def run():
            if self.fits == "never" or (self.fits == "alone" and self.held):
                raise MemoryError
            return 1.0

        return Runner("step", "jaxhisto", run, 8, AT, peak=lambda: 40_000_000_000)

    def drop_views(self):
        pass


def turns(monkeypatch, fits, peer_runs=lambda: 2.0):
    held = ["pytorch"]
    runner = Runner("step", "pytorch", peer_runs, 8, AT, close=held.clear, child=True,
                    peak=lambda: 31_000_000_000)  # fmt: skip
    monkeypatch.setattr(point, "peers_of", lambda *a: [runner])
    said = []
    rows = list(point.measured("step", Setup(fits, held), None, JOB, said.append))
    assert not held
    return rows, said


def test_what_does_not_fit_beside_a_peer_is_measured_alone(monkeypatch):
    (ours, theirs), said = turns(monkeypatch, "alone")
    assert (ours.seconds, ours.settings["alone"]) == ((1.0,) * 3, True)
    assert theirs.seconds == (2.0,) * 3
    assert "step: out of memory beside pytorch (holding 31 GB); alone ..." in said


def test_what_does_not_fit_alone_is_out_of_memory(monkeypatch):
    (ours, _), _ = turns(monkeypatch, "never")
    assert (ours.why, ours.settings["alone"]) == (OUT, True)


def test_a_peers_row_says_what_was_held_beside_it(monkeypatch):
    def full():
        raise MemoryError

    (ours, theirs), _ = turns(monkeypatch, "always", full)
    assert (len(ours.seconds), "alone" in ours.settings) == (3, False)
    assert theirs.why == "out of memory, beside jaxhisto (holding 40 GB)"


def test_a_gpu_is_there_for_all_but_a_little():
    assert room({}) == {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_CLIENT_MEM_FRACTION": "0.92",
    }
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        assert set(room({name: "0.5"})) == {"XLA_PYTHON_CLIENT_PREALLOCATE"}


def test_the_step_on_given_views_has_its_turns_where_a_peer_takes_them():
    assert point.parts_of(["forward", "step", "compile"], ["pytorch"]) == [
        "forward", "step", GIVEN, "compile"
    ]  # fmt: skip
    assert point.parts_of(["step"], ["kornia"]) == ["step"]
    assert point.parts_of(["forward"], ["pytorch"]) == ["forward"]


def test_a_peer_is_asked_for_the_step_on_given_views(monkeypatch):
    asked = []

    def prepare_peer(stage, settings, who, pythons):
        asked.append((stage, who, settings["augment"]))
        return Row(stage, who, settings, why="not installed")

    monkeypatch.setattr(peers, "prepare_peer", prepare_peer)
    rows = point.prepared(GIVEN, point.ours_of(GIVEN, Setup("always", []), None, JOB), None, JOB)
    assert asked == [("step", "pytorch", False)]
    assert [row.stage for row in rows] == ["step", "step"]


@pytest.mark.parametrize(
    ("form", "platform", "told"),
    [
        ("torchvision v2, float32 before blur", "gpu", True),
        ("kornia, by slice", "gpu", False),
        ("torchvision v2, float32 before blur", "cpu", False),
    ],
)
def test_a_ratio_of_views_made_image_by_image_says_so(form, platform, told):
    peer = {"peer": {"augmentation": {"form": form}}, "platform": platform}
    ours, given = (Row("step", "jaxhisto", AT | more, (1.0,) * 3, 8) for more in (
        {}, {"beside": GIVEN}))  # fmt: skip
    theirs = Row("step", "pytorch", AT | peer, (2.0,) * 3, 8)
    their_given = Row("step", "pytorch", AT | {"beside": GIVEN}, (4.0,) * 3, 8)
    record = Record({}, {"platform": "gpu"}, (ours, given, theirs, their_given))
    assert ours_of(theirs, record) is ours
    assert ours_of(their_given, record) is given
    ending = ", its views image by image (kornia missing or slower)" if told else ""
    assert one_by_one(theirs) == ending
    assert against(theirs, ours) == f"2.00{ending}"
    alone = Row("augment", "torchvision", AT | {"peer": {"form": form}, "platform": platform})
    assert one_by_one(alone) == ending
    table = stages(record)
    assert "| step, given views | pytorch | 2 | 4 | 4 | 0% | 4.00" in table.replace("  ", " ")
