"""The figure of a study: what is drawn where, and that no name lies over another."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from jaxhisto.study import report
from jaxhisto.study.results import Part
from jaxhisto.study.stats import Summary

NAN = float("nan")
LONG = (
    "ResNet18 self-supervised, 1 % of all images, 200 epochs", "ResNet18 ImageNet",
    "hand-made colour and texture features", "_mine for $5 and $6",
)  # fmt: skip


def part(rows, percents, tasks=("A set of a rather long name, by section, C5 tested", "B")):
    """Means that grow, deviations of 2, none at 100 %."""
    of = {
        (task, row, percent): Summary(50 + 5 * i + x, NAN if percent == 100 else 2.0, NAN,
                                      40 + 5 * i + x, 58 + 5 * i + x, 5)
        for task in tasks for i, row in enumerate(rows) for x, percent in enumerate(percents)
    }  # fmt: skip
    kinds = [SimpleNamespace(name=t, task=SimpleNamespace(kind="regression")) for t in tasks]
    return Part("linear", "paper", tuple(rows), tuple(kinds), tuple(percents), of)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws a part; gives the figure."""
    from matplotlib.figure import Figure

    held, save = [], Figure.savefig

    def kept(self, *args, **kwargs):
        held.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", kept)

    def draw(part):
        report.label_curves(part, tmp_path / "f.png")
        held[-1].set_dpi(120)  # as it was drawn: names are measured in its pixels
        return held[-1]

    return draw


def boxes(figure):
    """Of the legend's names, titles and labels of axes, px."""
    texts = [*figure.legends[0].get_texts()]
    for axes in figure.axes:
        if axes.axison:
            texts += [axes.title, axes.xaxis.label, axes.yaxis.label]
    return [(t.get_text(), t.get_window_extent()) for t in texts if t.get_text()]


@pytest.mark.parametrize("rows", [LONG[:1], LONG, [f"ResNet18 number {i}" for i in range(15)]])
@pytest.mark.parametrize("tasks", [("A",), ("Epithelial cells of HER2ST by section, C5", "B")])
def test_names_lie_inside_and_beside_each_other(drawn, rows, tasks):
    figure = drawn(part(rows, (5, 100), tasks))
    found = boxes(figure)
    assert len(found) == len(rows) + 3 * len(tasks)
    for text, box in found:
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= figure.bbox.x1, text
        assert box.y1 <= figure.bbox.y1, text
    for (a, first), (b, second) in itertools.combinations(found, 2):
        assert not first.overlaps(second), (a, b)


def test_bands_end_where_no_deviation_is_known_and_bars_are_the_intervals(drawn):
    figure = drawn(part(("a", "b"), (5, 20, 100), ("T",)))
    (axes,) = figure.axes
    bands = [c for c in axes.collections if type(c).__name__ != "LineCollection"]
    bars = [c for c in axes.collections if type(c).__name__ == "LineCollection"]
    for i, (band, bar, line) in enumerate(zip(bands, bars, axes.lines, strict=True)):
        assert len({round(float(x)) for x, _ in np.concatenate([p.vertices for p in
                    band.get_paths()])}) == 2  # 5 and 20 %, not a point at 100 %  # fmt: skip
        ends = [sorted(y for _, y in segment) for segment in bar.get_segments()]
        assert ends == [[40 + 5 * i + x, 58 + 5 * i + x] for x in range(3)]
        np.testing.assert_allclose(line.get_ydata(), [50 + 5 * i + x for x in range(3)])
    assert "95 % intervals" in report.caption(part(("a",), (5,)))


def test_of_many_encoders_no_bars_are_drawn(drawn):
    many = part([str(i) for i in range(report.BARS + 1)], (5, 20), ("T",))
    (axes,) = drawn(many).axes
    assert not [c for c in axes.collections if type(c).__name__ == "LineCollection"]
    assert "interval" not in report.caption(many)


def test_the_same_part_gives_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        report.label_curves(part(LONG, (5, 100)), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert not image.info.get("Software")
