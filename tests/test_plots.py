"""Pictures show what they are given: pixels in the right cell, curves at the right height."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from jaxhisto.plots import Curves, loss_curve, overlay, view_sheet


def test_each_tile_stands_beside_its_own_views(tmp_path):
    tiles = [np.full((50, 50, 3), c, np.uint8) for c in (10, 200)]
    views = np.stack([np.full((2, 32, 32, 3), c / 255, np.float32) for c in (60, 120)])
    sheet = np.asarray(Image.open(view_sheet(tiles, views, tmp_path / "v.png", side=64)))
    centres = [[sheet[36 + 68 * row, 36 + 68 * column, 0] for column in range(3)] for row in (0, 1)]
    assert centres == [[10, 60, 60], [200, 120, 120]]


def test_a_tile_that_is_not_square_keeps_its_shape(tmp_path):
    tiles = [np.zeros((20, 40, 3), np.uint8)]
    views = np.zeros((1, 2, 8, 8, 3), np.float32)
    sheet = np.asarray(Image.open(view_sheet(tiles, views, tmp_path / "v.png", side=64)))
    assert (sheet[4:36, 4:68] == 0).all()
    assert (sheet[37:67, 4:68] == 255).all()


def test_a_falling_loss_is_drawn_falling(tmp_path):
    metrics = [
        {"step": i, "loss": 5 - i / 50, "accuracy": i / 100, "pos_sim": 0.9, "neg_sim": 0.1}
        for i in range(1, 101)
    ]
    path = loss_curve(metrics, math.log(127), tmp_path / "loss.png")
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    blue = (abs(pixels - (31, 119, 180)).sum(-1) < 30)[:, : pixels.shape[1] // 2]
    rows = [np.flatnonzero(blue[:, x]).mean() for x in np.flatnonzero(blue.any(0))]
    assert len(rows) > 100
    assert rows[len(rows) // 4] < rows[-1]  # rows count from the top


def test_a_step_without_a_finite_loss_does_not_break_the_curve(tmp_path):
    metrics = [{"step": i, "loss": None if i == 5 else 1.0} for i in range(1, 9)]
    assert loss_curve(metrics, 2.0, tmp_path / "loss.png").exists()


BLUE, ORANGE = (31, 119, 180), (255, 127, 14)


def curves(name, level, monitor=()):
    metrics = [
        {"step": i, "loss": level, "accuracy": 0.5, "pos_sim": 0.9, "neg_sim": 0.1}
        | {"images_per_s": 10.0}
        for i in range(1, 101)
    ]
    return Curves(name, metrics, monitor, math.log(127))


def test_runs_are_drawn_over_each_other_each_in_its_colour(tmp_path):
    path = overlay([curves("low", 2.0), curves("high", 4.0)], tmp_path / "runs.png")
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    height, width = pixels.shape[:2]
    loss = pixels[height // 6 : height // 2, : width // 2]  # the first panel, below the legend
    low, high = (
        np.argwhere(abs(loss - colour).sum(-1) < 30)[:, 0].mean() for colour in (BLUE, ORANGE)
    )
    assert low > high + 50  # rows count from the top


def test_panels_are_those_of_which_some_run_knows_something(tmp_path):
    line = {"step": 0, "effective_rank": 3.0, "effective_rank_z": 2.0, "knn_f1": None}
    plain = overlay([curves("a", 2.0)], tmp_path / "plain.png")
    watched = overlay([curves("a", 2.0, [line]), curves("b", 3.0)], tmp_path / "watched.png")
    with Image.open(plain) as two_by_two, Image.open(watched) as two_by_three:
        assert two_by_two.size == (round(9.2 * 120), round(6.9 * 120))
        assert two_by_three.size == (round(13.8 * 120), round(7.2 * 120))


def test_a_place_without_a_panel_stays_empty_and_names_are_as_written(tmp_path, monkeypatch):
    """Five panels in a grid of six; $ and a leading _ mean something to matplotlib."""
    from matplotlib.figure import Figure

    held, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (held.append(self), save(self, *a, **k))
    )
    line = {"step": 0, "effective_rank": 3.0}
    overlay([curves("_a", 2.0, [line]), curves(r"$\\x$ of $5", 3.0)], tmp_path / "runs.png")
    (figure,) = held
    assert [axes.axison for axes in figure.axes] == [True] * 5 + [False]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [name.replace("\\$", "$").strip() for name in names[:2]] == ["_a", r"$\\x$ of $5"]
