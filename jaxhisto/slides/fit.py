"""Does a foreground detector fit the slide's stain? If not, which one does.

Compared on the overview with all that is stained: dense pixels that are no marker ink. It costs
some hundredths of a second a slide, and changes no mask.
"""

from __future__ import annotations

import cv2
import numpy as np

from jaxhisto.slides.foreground import foreground
from jaxhisto.slides.pen import pen_marks
from jaxhisto.slides.reader import Flags, Overview, Pixels

KEPT = 0.85
"""Of the stained pixels. Pink and violet H&E: 0.97 and more; bluish: 0.74 (docs/foreground.md)."""
FITS = 0.9  # of the stained pixels that another detector must take to be named
STAINED = 0.2  # decadic optical density of the channel that is absorbed most
LEAST = 0.003  # of the slide: a small biopsy; below it, dirt decides
PIXELS = 500_000  # looked at, about: a shrunk grid shows the stain as well
HALO_UM = 100.0  # around ink, which fades out at its edges
OTHERS = {"ciga2022": ("od", "otsu"), "od": ("otsu",), "otsu": ("od",)}
GREY = 20  # of 255: the chroma of no stain


def fit_note(view: Overview, mask: Flags, detector: str, mpp: float) -> str:
    """One sentence where `detector` keeps too little of what is stained; else "".

    Args:
      view: the overview, `mpp` um/px.
      mask: (h, w) bool, of `detector` on it.
    """
    step = max(1, int(np.sqrt(mask.size / PIXELS)))
    grid = (slice(None, None, step), slice(None, None, step))
    rgb, there = np.ascontiguousarray(view.rgb[grid]), (view.there & view.known)[grid]
    mask, mpp = mask[grid], mpp * step
    stained = (rgb.min(axis=2) < 255 * 10**-STAINED) & there & ~_inked(rgb, mpp)
    if stained.sum() < LEAST * max(1, there.sum()) or _share(mask, stained) >= KEPT:
        return ""
    for other in OTHERS[detector]:
        theirs = foreground(rgb, other, mpp, 0.0)
        if _share(theirs, stained) >= FITS:
            kept = _share(mask, theirs & stained)
            return (
                f"{detector} keeps {kept:.0%} of what {other} calls tissue "
                f"({_colour(rgb[stained & ~mask])}); try --foreground {other}"
            )
    return ""


def _share(mask: Flags, of: Flags) -> float:
    return float((mask & of).sum() / max(1, of.sum()))


def _inked(rgb: Pixels, mpp: float) -> Flags:
    ink = pen_marks(rgb, "all", mpp).astype(np.uint8)
    side = 2 * round(HALO_UM / mpp) + 1
    return np.asarray(cv2.dilate(ink, np.ones((side, side), np.uint8)) > 0)


def _colour(missed: Pixels) -> str:
    """What the (n, 3) pixels look like, by the median of each channel."""
    median = np.median(missed, axis=0).astype(np.uint8)
    if int(median.max()) - int(median.min()) < GREY:
        return "grey"
    degrees = 2 * int(cv2.cvtColor(median[None, None], cv2.COLOR_RGB2HSV)[0, 0, 0])
    bounds = ((15, "red"), (60, "brown"), (180, "green"), (255, "bluish stain"), (332, "violet"))
    return next((name for bound, name in bounds if degrees < bound), "red")
