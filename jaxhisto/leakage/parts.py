"""A piece of an image found in another: cut out, turned, mirrored, rescaled or shifted.

Keypoints with a descriptor (SIFT, Lowe 2004, by OpenCV), each descriptor reduced to 128 bits: above
or below its own median. Bits are looked up in four bands of 32, of which one must agree whole. What
two images share several of is aligned by RANSAC and then compared pixel by pixel, so that a chance
agreement of descriptors is no finding. Other than the hash of whole images this search is not
exact: docs/leakage.md has the recall that was measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from jaxhisto.leakage.hamming import spans
from jaxhisto.leakage.hashes import correlation

PER_AREA = 256 * 256
"""Pixels for which a number of keypoints is meant."""
INDEXED, ASKED = 256, 192
"""Keypoints for each `PER_AREA` of labelled images and of pretraining tiles, strongest first.
More on the side that is kept, since a crop has other strongest ones than the whole."""
FEWEST = 48
MOST = 6000
CONTRAST = 0.02  # SIFT's own 0.04 leaves pale tiles without keypoints
BANDS = 4
DISTANCE = 24  # of 128 bits; of unrelated keypoints one pair in ten thousand is nearer
CROWD = 256  # keypoints under one key: a texture that says nothing
AGREEING = 4  # keypoints that fit one alignment, two more than fix it
REACH = 3.0  # px by which a keypoint may miss it
SCALES = (0.3, 3.5)
LEAST_SIDE = 40  # px of the labelled image: a smaller common piece is no evidence
COMPARED = 48  # side of the pictures that are correlated


@dataclass(frozen=True)
class Keypoints:
    """Fields:
    points: (k, 2) float32, x and y in pixels.
    codes: (k, 4) uint32, the bits of the descriptors.
    """

    points: NDArray[np.float32]
    codes: NDArray[np.uint32]


@dataclass(frozen=True)
class Common:
    """A piece that two images share.

    Fields:
      image: row of the labelled image.
      mirrored: the labelled image was mirrored left to right first.
      matrix: (2, 3) float64, pretraining pixels to those of the (mirrored) labelled image.
      correlation: of the luminances over the piece.
      share: of the labelled image's area, 0..1.
      distance: mean Hamming distance of the keypoints that agree, of 128 bits.
    """

    image: int
    mirrored: bool
    matrix: NDArray[np.float64]
    correlation: float
    share: float
    distance: float


def keypoints(luminance: NDArray[np.uint8], per_area: int) -> Keypoints:
    """The strongest keypoints of (h, w) uint8."""
    most = min(max(luminance.size * per_area // PER_AREA, FEWEST), MOST)
    opencv: Any = cv2  # its type stubs lack SIFT in some versions
    sift = opencv.SIFT_create(nfeatures=most, contrastThreshold=CONTRAST)
    found, described = sift.detectAndCompute(luminance, None)
    if not found:
        return Keypoints(np.empty((0, 2), np.float32), np.empty((0, BANDS), np.uint32))
    # OpenCV may give one more where strengths tie.
    found, described = found[:most], described[:most]
    bits = described > np.median(described, axis=1, keepdims=True)
    codes = np.packbits(bits, axis=1).view(np.uint32)
    return Keypoints(np.array([k.pt for k in found], np.float32), codes)


class PartIndex:
    """Keypoints of the labelled images, as they are and mirrored."""

    def __init__(self, images: Sequence[tuple[Keypoints, Keypoints]]) -> None:
        both = [kept for pair in images for kept in pair]
        counts = [len(kept.points) for kept in both]
        self._owner = np.repeat(np.arange(len(both), dtype=np.int32), counts)
        self._points = np.concatenate([k.points for k in both] or [np.empty((0, 2), np.float32)])
        self._codes = np.concatenate([k.codes for k in both] or [np.empty((0, 4), np.uint32)])
        self._rows = [np.argsort(self._codes[:, b]).astype(np.int32) for b in range(BANDS)]
        self._sorted = [
            self._codes[rows, band] for band, rows in zip(range(BANDS), self._rows, strict=True)
        ]

    def candidates(
        self, asked: Keypoints
    ) -> Iterator[tuple[int, bool, NDArray[np.float64], float]]:
        """(labelled row, mirrored, alignment, distance) of each image that several points fit."""
        query, hit = self._hits(asked.codes)
        owners, counts = np.unique(self._owner[hit], return_counts=True)
        for owner in owners[counts >= AGREEING]:
            mine = self._owner[hit] == owner
            a, b = query[mine], hit[mine]
            matrix, inside = cv2.estimateAffinePartial2D(
                asked.points[a], self._points[b], ransacReprojThreshold=REACH
            )
            if matrix is None or len(np.unique(a[inside.ravel() > 0])) < AGREEING:
                continue
            if SCALES[0] <= float(np.hypot(matrix[0, 0], matrix[1, 0])) <= SCALES[1]:
                fit = inside.ravel() > 0
                far = _distance(asked.codes[a[fit]], self._codes[b[fit]])
                yield int(owner) // 2, bool(owner % 2), matrix, float(np.mean(far))

    def _hits(self, codes: NDArray[np.uint32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        pairs = [np.empty((2, 0), np.int64)]
        for band in range(BANDS):
            keys = codes[:, band]
            first = np.searchsorted(self._sorted[band], keys, "left")
            counts = np.searchsorted(self._sorted[band], keys, "right") - first
            counts[counts > CROWD] = 0
            hit = self._rows[band][spans(first, counts)].astype(np.int64)
            pairs.append(np.stack([np.repeat(np.arange(len(codes)), counts), hit]))
        query, hit = np.unique(np.concatenate(pairs, axis=1), axis=1)
        near = _distance(codes[query], self._codes[hit]) <= DISTANCE
        return query[near], hit[near]


def compared(
    pretraining: NDArray[np.uint8], labelled: NDArray[np.uint8], matrix: NDArray[np.float64]
) -> tuple[float, float, float]:
    """How well two luminances agree where they overlap.

    Args:
      pretraining, labelled: (h, w) uint8, the labelled one already mirrored where it was.
      matrix: (2, 3), pixels of the first to those of the second.

    Returns:
      The correlation, the overlap as a share of the labelled image, and its standard deviation
      in grey levels; zeros where the overlap is too small to tell.
    """
    h, w = labelled.shape
    scale = float(np.hypot(matrix[0, 0], matrix[1, 0]))
    # Averaged before it is shrunk, or it would alias where the other one does not.
    source = _softened(pretraining, 1 / scale) if scale < 1 else pretraining
    warped = cv2.warpAffine(source, matrix, (w, h), flags=cv2.INTER_LINEAR)
    covered = cv2.warpAffine(
        np.full(pretraining.shape, 255, np.uint8), matrix, (w, h), flags=cv2.INTER_NEAREST
    )
    inside = covered > 0
    area = int(inside.sum())
    if area < LEAST_SIDE**2:
        return 0.0, 0.0, 0.0
    # Both at the sharpness of a small picture of the piece.
    cell = max(1.0, float(np.sqrt(area)) / COMPARED, scale)
    weight = np.maximum(cv2.GaussianBlur(inside.astype(np.float32), (0, 0), cell), 1e-3)
    soft = [
        (cv2.GaussianBlur(i.astype(np.float32) * inside, (0, 0), cell) / weight)[inside]
        for i in (warped, labelled)
    ]
    return correlation(*soft), area / (h * w), min(float(np.std(s)) for s in soft)


def _softened(image: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), 0.5 * factor), np.uint8)


def _distance(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> NDArray[np.int64]:
    return np.asarray(np.bitwise_count(a ^ b).sum(axis=1), np.int64)
