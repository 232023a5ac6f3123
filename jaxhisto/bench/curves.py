"""Loss curves of two forms of the same step, and whether they lie on each other.

Two forms that differ by rounding drift apart as any two runs of a network do. How far that is
lawful is measured in the same run: by a third curve, the plain form from weights that are moved
by about one rounding of float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxhisto.config import PretrainConfig

ROUNDING = 2.0**-24
"""Half the distance from 1 to the next float32."""
SEED, TILES, SPOT = 0, 512, 4
FIRST = 5
CONTROL = "plain, weights rounded otherwise"

Form = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Agreement:
    """How far a curve is from the plain one, beside the control.

    Attributes:
      first, control_first: largest difference in the first FIRST steps: rounding has not grown yet.
      last, control_last: root mean square difference in the last quarter.
      mean, control_mean: difference of the means of the last quarter: above or below altogether.
      size: of the loss, the plain curve's mean in the last quarter.
    """

    first: float
    control_first: float
    last: float
    control_last: float
    mean: float
    control_mean: float
    size: float


def loss_curves(
    config: PretrainConfig, steps: int, forms: Mapping[str, Form], tile_px: int = 0
) -> dict[str, np.ndarray]:
    """The loss of each step of each form, and of CONTROL, on one device.

    Args:
      config: of the training; LARS's schedule is that of `steps`.
      steps: of each curve.
      forms: what a step is traced in, by name; one is `plain`. All begin with the same weights
        and see the same made tiles in the same order.
      tile_px: side of a tile; 0: as a view.
    """
    tiles = made_tiles(TILES, tile_px or config.tile_px)
    curves = {
        name: _curve(config, steps, tiles, form, rounded=False) for name, form in forms.items()
    }
    return curves | {CONTROL: _curve(config, steps, tiles, forms["plain"], rounded=True)}


def made_tiles(count: int, side: int) -> np.ndarray:
    """(count, side, side, 3) uint8: spots of SPOT px, each tile with colours of its own."""
    rng = np.random.default_rng(SEED)
    stain = rng.uniform(60, 200, (count, 1, 1, 3))
    spots = rng.normal(0, 40, (count, -(-side // SPOT), -(-side // SPOT), 3))
    fine = (stain + spots).repeat(SPOT, 1).repeat(SPOT, 2)[:, :side, :side]
    return np.clip(fine + rng.normal(0, 8, fine.shape), 0, 255).astype(np.uint8)


def _curve(
    config: PretrainConfig, steps: int, tiles: np.ndarray, form: Form, rounded: bool
) -> np.ndarray:
    import jax

    from jaxhisto.distributed import make_mesh, to_global
    from jaxhisto.pretrain.step import init_state, make_train_step

    mesh, N = make_mesh(1), config.batch_size
    epoch = len(tiles) // N
    rng = np.random.default_rng(SEED)
    state = init_state(config, steps, epoch, mesh)
    if rounded:
        noise = np.random.default_rng(SEED + 1)
        state = replace(state, params=jax.tree.map(lambda p: moved(p, noise), state.params))
    sizes = np.full((N, 2), tiles.shape[1], np.int32)
    losses: list[float] = []
    # What was traced in another form must not be taken for this one's.
    jax.clear_caches()
    train_step = make_train_step(config, steps, epoch)
    with jax.set_mesh(mesh), form():
        for step in range(steps):
            if step % epoch == 0:
                order = rng.permutation(len(tiles))
            rows = order[step % epoch * N :][:N]
            state, metrics = train_step(state, *to_global((tiles[rows], sizes), mesh))
            losses.append(float(metrics["loss"]))
    return np.array(losses)


def moved(parameter: Any, rng: np.random.Generator) -> Any:
    """A parameter times 1 plus or minus about one rounding, where it lies."""
    import jax

    host = np.asarray(parameter)
    signs = rng.choice(np.array([-1.0, 1.0], np.float32), host.shape)
    return jax.device_put(
        host * (np.float32(1) + np.float32(2 * ROUNDING) * signs), parameter.sharding
    )


def agreement(
    plain: Sequence[float] | np.ndarray, other: np.ndarray, control: np.ndarray
) -> Agreement:
    """How far `other` is from `plain`, beside how far the control is."""
    base = np.asarray(plain)
    late = slice(-max(1, len(base) // 4), None)

    def rms(curve: np.ndarray) -> float:
        return float(np.sqrt(np.mean((curve[late] - base[late]) ** 2)))

    def shift(curve: np.ndarray) -> float:
        return float(curve[late].mean() - base[late].mean())

    def first(curve: np.ndarray) -> float:
        return float(np.abs(curve[:FIRST] - base[:FIRST]).max())

    return Agreement(
        first=first(other),
        control_first=first(control),
        last=rms(other),
        control_last=rms(control),
        mean=shift(other),
        control_mean=shift(control),
        size=float(base[late].mean()),
    )


def draw(curves: Mapping[str, np.ndarray], path: Path) -> Path:
    """Draws the curves over each other, and their distances from the plain one, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    widths = {"plain": 3.0}
    for name, curve in curves.items():
        steps = np.arange(1, len(curve) + 1)
        colour = {"plain": "0.7", CONTROL: "C1"}.get(name, "C0")
        above.plot(steps, curve, color=colour, linewidth=widths.get(name, 0.9), label=name)
        if name != "plain":
            distance = np.maximum(np.abs(curve - curves["plain"]), 1e-9)
            below.plot(steps, distance, color=colour, linewidth=0.9, label=name)
    above.set_ylabel("NT-Xent")
    above.legend(frameon=False)
    below.set(yscale="log", xlabel="step", ylabel="distance from plain")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    return path
