"""Pictures of runs: what the network sees, how the loss went, and several over each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

GAP = 4


def view_sheet(
    tiles: Sequence[np.ndarray], views: np.ndarray, path: str | Path, side: int = 128
) -> Path:
    """Draws each tile with its views beside it, a row a tile.

    Args:
      tiles: n images (h, w, 3) uint8, of any size each.
      views: (n, k, S, S, 3) float, 0..1.
      path: the PNG to write.
      side: side of a cell in pixels.
    """
    rows = []
    for tile, row in zip(tiles, views, strict=True):
        seen = [np.round(np.clip(v, 0, 1) * 255).astype(np.uint8) for v in np.asarray(row)]
        rows.append([_cell(image, side) for image in [tile, *seen]])
    height, width = len(rows), len(rows[0])
    sheet = np.full((height * (side + GAP) + GAP, width * (side + GAP) + GAP, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, cell in enumerate(row):
            y, x = GAP + i * (side + GAP), GAP + j * (side + GAP)
            sheet[y : y + cell.shape[0], x : x + cell.shape[1]] = cell
    Image.fromarray(sheet).save(path)
    return Path(path)


def plain(name: str) -> str:
    """For matplotlib, to which $ means formulas and a leading _ that a line has no name."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def loss_curve(metrics: Sequence[Mapping[str, Any]], chance: float, path: str | Path) -> Path:
    """Draws loss, accuracy and similarities over the steps (needs the extra `plots`).

    Args:
      metrics: lines of metrics.jsonl.
      chance: NT-Xent of random z, log(2N - 1), drawn as the level to leave behind.
      path: the PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    step = _column(metrics, "step")
    loss = _column(metrics, "loss")
    left.plot(step, loss, color="0.8", linewidth=0.8, label="each step")
    left.plot(*_smooth(step, loss), color="C0", label="running mean")
    left.axhline(chance, color="0.4", linestyle=":", label="chance, log(2N - 1)")
    left.set(xlabel="step", ylabel="NT-Xent")
    for name, label in _CURVES.items():
        if name in metrics[0]:
            right.plot(*_smooth(step, _column(metrics, name)), label=label)
    right.set(xlabel="step", ylim=(-0.1, 1.05))
    for axes in (left, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    return Path(path)


@dataclass(frozen=True)
class Curves:
    """A run to draw: its name, lines of metrics.jsonl and monitor.jsonl, its loss at chance."""

    name: str
    metrics: Sequence[Mapping[str, Any]]
    monitor: Sequence[Mapping[str, Any]]
    chance: float


@dataclass(frozen=True)
class Panel:
    """One pair of axes: what is drawn (key, line style, label of the style) and between what."""

    title: str
    lines: tuple[tuple[str, str, str], ...]
    measured: bool = False
    from_zero: bool = False


def overlay(runs: Sequence[Curves], path: str | Path) -> Path:
    """Draws runs over each other (needs the extra `plots`): a colour a run, a panel a quantity.

    Metrics of steps are running means, measurements of the monitor are dots; a quantity that no
    run has gets no panel. Dotted: the loss at chance, log(2N - 1), in the run's colour where it
    differs.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [panel for panel in _PANELS if any(_has(run, panel) for run in runs)]
    columns = 3 if len(panels) > 4 else 2
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.3 * rows + 0.3 * len(runs)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    colours = _colours(len(runs))
    for axes, panel in zip(grid, panels, strict=False):
        _draw(axes, panel, runs, colours)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    _legend(figure, runs, colours)
    figure.savefig(path, dpi=120)
    return Path(path)


_PANELS = (
    Panel("NT-Xent", (("loss", "-", ""),)),
    Panel("positive ranked first", (("accuracy", "-", ""),), from_zero=True),
    Panel("cosine of views", (("pos_sim", "-", "positives"), ("neg_sim", "--", "negatives"))),
    Panel("images/s", (("images_per_s", "-", ""),), from_zero=True),
    Panel("probe, macro F1", (("knn_f1", "-", "kNN"), ("ridge_f1", "--", "ridge")), measured=True),
    Panel("probe, AUC", (("knn_auc", "-", "kNN"), ("ridge_auc", "--", "ridge")), measured=True),
    Panel(
        "effective rank",
        (("effective_rank", "-", "features"), ("effective_rank_z", "--", "z")),
        measured=True,
        from_zero=True,
    ),
    Panel("alignment", (("alignment", "-", ""),), measured=True),
    Panel("uniformity", (("uniformity", "-", ""),), measured=True),
)


def _has(run: Curves, panel: Panel) -> bool:
    lines = run.monitor if panel.measured else run.metrics
    return any(key in line for line in lines for key, _, _ in panel.lines)


def _draw(axes: Any, panel: Panel, runs: Sequence[Curves], colours: Sequence[Any]) -> None:
    from matplotlib.lines import Line2D

    for run, colour in zip(runs, colours, strict=True):
        for key, style, _ in panel.lines:
            lines = [m for m in (run.monitor if panel.measured else run.metrics) if key in m]
            if not lines:
                continue
            curve = _column(lines, "step"), _column(lines, key)
            if panel.measured:
                axes.plot(*curve, style, color=colour, marker="o", markersize=3, linewidth=1.2)
            else:
                axes.plot(*_smooth(*curve), style, color=colour, linewidth=1.2)
    if panel.lines[0][0] == "loss":
        levels = {run.chance: colour for run, colour in zip(runs, colours, strict=True)}
        for chance, colour in levels.items():
            axes.axhline(
                chance, color=colour if len(levels) > 1 else "0.4", linestyle=":", linewidth=1
            )
    sets = {m["set"] for run in runs for m in run.monitor if "set" in m}
    mixed = panel.title.startswith("probe") and len(sets) > 1
    axes.set(title=panel.title + (" (of different sets)" if mixed else ""), xlabel="step")
    if panel.from_zero and 0 < axes.dataLim.y1 < np.inf:
        axes.set_ylim(0, 1.05 * axes.dataLim.y1)
    styles: list[Any] = [
        Line2D([], [], color="0.3", ls=style, label=label)
        for _, style, label in panel.lines
        if label
    ]
    if styles:
        axes.legend(handles=styles, frameon=False, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Any, runs: Sequence[Curves], colours: Sequence[Any]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=c, label=plain(r.name)) for r, c in zip(runs, colours, strict=True)
    ]
    handles.append(Line2D([], [], color="0.4", linestyle=":", label="chance, log(2N - 1)"))
    figure.legend(handles=handles, loc="outside upper left", frameon=False)


def _colours(count: int) -> list[Any]:
    """As many colours as runs; ten that are told apart easily, or steps of a scale."""
    from matplotlib import colormaps

    if count <= 10:
        return [colormaps["tab10"](i) for i in range(count)]
    return [colormaps["turbo"](i / (count - 1)) for i in range(count)]


_CURVES = {
    "accuracy": "positive ranked first",
    "pos_sim": "cosine, positives",
    "neg_sim": "cosine, negatives",
}


def _column(metrics: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    return np.array([np.nan if m[name] is None else m[name] for m in metrics], float)


def _smooth(step: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    window = max(1, len(value) // 50)
    kernel = np.ones(window) / window
    return step[window - 1 :], np.convolve(value, kernel, "valid")


def _cell(image: np.ndarray, side: int) -> np.ndarray:
    """The image inside a square of `side`, aspect kept."""
    scale = side / max(image.shape[:2])
    height, width = (max(1, round(s * scale)) for s in image.shape[:2])
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized)
