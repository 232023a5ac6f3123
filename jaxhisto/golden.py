"""Golden tiles: synthetic H&E that every export is checked on; no patient data, numpy alone.

The features of these tiles are computed once by JAX and stored beside the weights, so that
whoever loads the weights elsewhere can compare. The tiles themselves are stored too: the
generator only has to be stable, not to be carried to the other side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Plane = npt.NDArray[np.float64]

COUNT = 8

# Optical density of one unit of stain in R, G, B: the reference of Macenko et al. 2009.
HAEMATOXYLIN = np.array([0.5626, 0.7201, 0.4062])
EOSIN = np.array([0.2159, 0.8012, 0.5581])


@dataclass(frozen=True)
class _Tissue:
    """What one golden tile shows."""

    spacing_px: float  # mean distance between nuclei
    radius_px: float  # mean radius of a nucleus
    filled: float  # share of the grid that holds a nucleus, 0..1
    fibre: float  # how much longer the texture is along x than along y
    eosin: float  # mean eosin density, optical density units
    lumen: float  # radius of a hole in the tissue as a share of the side, 0: none


_TISSUES = (
    _Tissue(15, 5.0, 0.8, 1, 0.35, 0.0),  # tumour sheet
    _Tissue(9, 3.6, 0.95, 1, 0.20, 0.0),  # lymphocytes
    _Tissue(26, 4.0, 0.6, 6, 0.60, 0.0),  # fibrous stroma
    _Tissue(13, 4.6, 0.9, 1, 0.40, 0.27),  # gland with its lumen
    _Tissue(34, 5.0, 0.5, 10, 0.75, 0.0),  # muscle
    _Tissue(19, 8.0, 0.8, 1, 0.30, 0.0),  # large pale nuclei
    _Tissue(40, 3.5, 0.4, 1, 0.10, 0.42),  # fat: mostly empty
    _Tissue(16, 5.5, 0.7, 3, 0.50, 0.15),  # mixed
)


def golden_tiles(side: int) -> npt.NDArray[np.uint8]:
    """The eight golden tiles.

    Args:
      side: height and width in pixels, at least 1.

    Returns:
      (8, side, side, 3) uint8 RGB, the same for the same side everywhere.
    """
    if side < 1:
        raise ValueError(f"golden tiles have at least one pixel a side, not {side}.")
    return np.stack([_tile(index, side) for index in range(COUNT)])


def _tile(index: int, side: int) -> npt.NDArray[np.uint8]:
    """One tile (side, side, 3): densities of two stains, then Beer and Lambert."""
    tissue = _TISSUES[index]
    # RandomState's stream is frozen by numpy's policy (NEP 19); Generator's is not.
    random = np.random.RandomState(2011 + index)
    fibres = _noise(random, side, 24.0, tissue.fibre) + 0.5 * _noise(
        random, side, 7.0, tissue.fibre
    )
    nuclei = _nuclei(random, side, tissue)
    present = _outside_lumen(side, tissue.lumen, _noise(random, side, 16.0, 1.0))
    chromatin = 0.75 + 0.5 * _noise(random, side, 3.0, 1.0)
    haematoxylin = present * (0.08 + 0.95 * nuclei * chromatin)
    eosin = present * tissue.eosin * (0.35 + fibres) * (1.0 - 0.5 * nuclei)
    density = haematoxylin[..., None] * HAEMATOXYLIN + eosin[..., None] * EOSIN
    grain = 2.0 * (random.random_sample((side, side, 3)) - 0.5)
    light: Plane = np.clip(np.rint(243.0 * np.exp(-density) + grain), 0, 255)
    return light.astype(np.uint8)


def _noise(random: np.random.RandomState, side: int, cell_px: float, stretch: float) -> Plane:
    """Smooth noise (side, side) in 0..1: a random lattice, interpolated; longer along x."""
    y, x = np.arange(side) / cell_px, np.arange(side) / (cell_px * stretch)
    lattice = random.random_sample((int(y[-1]) + 2, int(x[-1]) + 2))
    return _interpolation(y, lattice.shape[0]) @ lattice @ _interpolation(x, lattice.shape[1]).T


def _interpolation(position: Plane, knots: int) -> Plane:
    """(len(position), knots) weights, linear with a smoothstep so that no lattice shows."""
    below = position.astype(int)
    share = position - below
    share = share * share * (3.0 - 2.0 * share)
    weights = np.zeros((len(position), knots))
    rows = np.arange(len(position))
    weights[rows, below] = 1.0 - share
    weights[rows, below + 1] = share
    return weights


def _nuclei(random: np.random.RandomState, side: int, tissue: _Tissue) -> Plane:
    """Coverage (side, side) in 0..1 of soft ellipses on a jittered grid."""
    cells = int(side / tissue.spacing_px) + 2
    draw = random.random_sample((cells, cells, 6))
    y, x = np.mgrid[0:side, 0:side].astype(np.float64)
    nuclei = np.zeros((side, side))
    for row, column in np.ndindex(cells, cells):
        keep, dy, dx, size, angle, flat = draw[row, column]
        if keep > tissue.filled:
            continue
        centre_y = (row + 1.1 * (dy - 0.5)) * tissue.spacing_px
        centre_x = (column + 1.1 * (dx - 0.5)) * tissue.spacing_px
        radius = tissue.radius_px * (0.75 + 0.5 * size)
        reach = int(2 * radius) + 2
        window = (
            slice(max(0, int(centre_y) - reach), max(0, int(centre_y) + reach)),
            slice(max(0, int(centre_x) - reach), max(0, int(centre_x) + reach)),
        )
        v, u = y[window] - centre_y, x[window] - centre_x
        sin, cos = np.sin(np.pi * angle), np.cos(np.pi * angle)
        stretch = 1.0 + 0.5 * flat
        distance = np.hypot((u * cos + v * sin) / stretch, (v * cos - u * sin) * stretch)
        nuclei[window] = np.maximum(nuclei[window], np.clip(radius - distance + 0.5, 0.0, 1.0))
    return nuclei


def _outside_lumen(side: int, radius: float, wobble: Plane) -> Plane:
    """(side, side) in 0..1: 0 inside the hole, whose edge follows the noise `wobble`."""
    if radius == 0.0:
        return np.ones((side, side))
    y, x = (np.mgrid[0:side, 0:side] + 0.5) / side - 0.5
    distance = np.hypot(y, x) + 0.12 * (wobble - 0.5) - radius
    present: Plane = np.clip(distance * side / 2.0 + 0.5, 0.0, 1.0)
    return present
