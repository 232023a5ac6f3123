"""Pictures of a run: what the network sees, and how the loss went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
