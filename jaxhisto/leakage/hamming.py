"""All pairs of codes within a Hamming distance, without comparing all pairs.

Multi-index hashing (Norouzi et al. 2012): two codes that differ in at most r of 64 bits differ in
few bits of at least one of four bands of 16, so the codes whose band lies that near are the only
ones to compare. Exact: every pair within r is found, and no other.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

BANDS = 4
WIDTH = 16
AT_ONCE = 1024  # queries: their probes and candidates stay within some tens of megabytes
MOST = 23
"""Largest distance: beyond it the bands' balls hold more than comparing all pairs costs."""


class HammingIndex:
    """Codes to search in.

    Attributes:
      radius: Hamming distance up to which pairs are found, 0..23.
    """

    def __init__(self, codes: NDArray[np.uint64], radius: int) -> None:
        """Sorts the codes by each band: 12 bytes a code and band, 4 with the offsets aside."""
        if not 0 <= radius <= MOST:
            raise ValueError(f"radius {radius}: must lie in 0..{MOST}")
        self.radius = radius
        self._codes = codes
        self._rows, self._starts = [], []
        for band in range(BANDS):
            key = _band(codes, band)
            self._rows.append(np.argsort(key, kind="stable").astype(np.int32))
            counts = np.bincount(key, minlength=1 << WIDTH)
            self._starts.append(np.concatenate([[0], np.cumsum(counts)]))
        # Pigeonhole: were the first `more` bands all above `least` and the others all above
        # `least - 1`, the distance would exceed the radius.
        least, rest = divmod(radius, BANDS)
        self._masks = [_ball(least if b <= rest else least - 1) for b in range(BANDS)]

    def pairs(
        self, queries: NDArray[np.uint64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """(query, code, distance) of each pair within the radius, by query, then code.

        Args:
          queries: (n,) uint64.
        """
        parts = [
            found + np.array([[start], [0], [0]])
            for start in range(0, len(queries), AT_ONCE)
            for found in [self._block(queries[start : start + AT_ONCE])]
        ]
        query, code, distance = np.concatenate(parts, axis=1) if parts else np.empty((3, 0), int)
        return query, code, distance

    def _block(self, queries: NDArray[np.uint64]) -> NDArray[np.int64]:
        found = [np.empty((3, 0), np.int64), *(self._of_band(queries, b) for b in range(BANDS))]
        together = np.concatenate(found, axis=1)
        return np.asarray(np.unique(together, axis=1), np.int64)

    def _of_band(self, queries: NDArray[np.uint64], band: int) -> NDArray[np.int64]:
        masks, starts = self._masks[band], self._starts[band]
        if not len(masks):
            return np.empty((3, 0), np.int64)
        keys = (_band(queries, band)[:, None] ^ masks[None]).ravel()
        first, counts = starts[keys], starts[keys + 1] - starts[keys]
        hit = np.flatnonzero(counts)
        query = np.repeat(hit // len(masks), counts[hit])
        code = self._rows[band][spans(first[hit], counts[hit])].astype(np.int64)
        distance = np.bitwise_count(queries[query] ^ self._codes[code]).astype(np.int64)
        near = distance <= self.radius
        return np.stack([query[near], code[near], distance[near]])


def spans(first: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """first[0], first[0] + 1, ... counts[0] of them, then those of the next, in one array."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.asarray(np.arange(total) + np.repeat(first - (ends - counts), counts), np.int64)


def _band(codes: NDArray[np.uint64], band: int) -> NDArray[np.int64]:
    mask = np.uint64((1 << WIDTH) - 1)
    return ((codes >> np.uint64(WIDTH * band)) & mask).astype(np.int64)


def _ball(radius: int) -> NDArray[np.int64]:
    """All 16-bit masks with at most so many bits set; none below 0."""
    return np.array(list(_masks(radius)), np.int64)


def _masks(radius: int) -> Iterator[int]:
    for bits in range(radius + 1):
        for places in itertools.combinations(range(WIDTH), bits):
            yield sum(1 << p for p in places)
