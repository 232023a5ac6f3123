"""Marker ink on a slide, told from stains by how it absorbs red, green and blue.

Haematoxylin, eosin and DAB absorb green more than red; felt pens need not. In decadic optical
density, of pixels above `LEAST`:

- green and blue ink: red above `COOL` times green. No pixel of the H&E measured reaches it
  (docs/foreground.md); alcian blue, aniline blue, methyl green and tissue-marking dyes do.
- red ink: red below `RED_RED` times green, and blue above `RED_BLUE` times green, which eosin
  leaves through. Blood, AEC and Congo red may look like that.
- black ink: dense, and all three within a fifth of each other. So are pigment, hairs and silver.

Ink through which tissue is seen sums with it: blue and red over dense H&E are mostly missed.
"""

from __future__ import annotations

import cv2
import numpy as np

from jaxhisto.slides.reader import Flags, Pixels

LEAST = 0.2
COOL = 1.4
RED_RED, RED_BLUE = 0.35, 0.7
BLACK, NEUTRAL = 0.5, 0.8
WIDTH_UM = 24.0
"""Narrower spots are dirt: a pen's strokes are ten times as wide. More would lose ink that shows
between nuclei alone."""
MOST = 0.1
"""A tile with so much ink or more, as a share of it, is rejected."""
SUSPECT = 0.25  # of the foreground: rather a stain than pens

_DENSITY = -np.log10(np.maximum(np.arange(256), 1) / 255).astype(np.float32)
ROWS = 256  # taken at a time: the densities of a whole overview would be 12 bytes a pixel


def pen_marks(rgb: Pixels, pen: str, mpp: float) -> Flags:
    """Which pixels are marker ink.

    Args:
      rgb: (h, w, 3) uint8, meant for about 8 um/px.
      pen: `none`, `green_blue` or `all` (red and black too).
      mpp: um/px of `rgb`.

    Returns:
      (h, w) bool.
    """
    ink = np.zeros(rgb.shape[:2], bool)
    if pen == "none":
        return ink
    for top in range(0, len(rgb), ROWS):
        ink[top : top + ROWS] = _ink(rgb[top : top + ROWS], red_and_black=pen == "all")
    radius = int(WIDTH_UM / 2 / mpp)
    if radius < 1 or not ink.any():
        return ink
    # Odd: an even one would shift what it opens.
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    return np.asarray(cv2.morphologyEx(ink.astype(np.uint8), cv2.MORPH_OPEN, disc) > 0)


def ink_note(ink: Flags, mask: Flags) -> str:
    """One sentence where so much of the foreground is ink that it may be a stain; else ""."""
    share = float((ink & mask).sum() / max(1, mask.sum()))
    if share < SUSPECT:
        return ""
    return f"{share:.0%} of the foreground looks like marker ink; if it is a stain, pass --pen none"


def _ink(rgb: Pixels, red_and_black: bool) -> Flags:
    red, green, blue = cv2.split(cv2.LUT(rgb, _DENSITY))
    most = cv2.max(cv2.max(red, green), blue)
    ink = red > COOL * green
    if red_and_black:
        ink |= (red < RED_RED * green) & (blue > RED_BLUE * green)
        ink |= (cv2.min(cv2.min(red, green), blue) > NEUTRAL * most) & (most > BLACK)
    return np.asarray(ink & (most > LEAST))
