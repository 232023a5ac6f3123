"""Groups of images in parts of stated shares, none of them torn.

Which assignment is best is a hard problem (number partitioning); drawn orders with a greedy
choice and moves come close enough, and leave the outcome to the seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

DRAWS = 32  # drawn orders tried; the first good enough is taken
NEAR = 50  # one part in so many of all images (2 %) is near enough to a share
PASSES = 20  # over all groups, each moved where that helps

Counts = Mapping[str, Sequence[int]]
Cost = tuple[int, int]


def divide_groups(counts: Counts, shares: Sequence[int], key: str) -> dict[str, int]:
    """The part, 0 .. P-1, of each group.

    The first of `DRAWS` drawn orders is taken in which every part has every class and meets its
    share of the images within 2 % of all or half the largest group; else the best of them.

    Args:
      counts: images of each class by group: C whole numbers each; at least P groups.
      shares: P whole numbers; a part's share is its number over their sum.
      key: with the groups' names, the seed.
    """
    best: tuple[Cost, dict[str, int]] | None = None
    for draw in range(DRAWS):
        order = sorted(counts, key=lambda g: _key(f"{key} {draw}", g))
        parts = _Parts(counts, shares)
        for group in order:
            parts.place(group)
        for _ in range(PASSES):
            moved = [group for group in order if parts.improve(group)]
            if not moved:
                break
        if parts.near_enough():
            return parts.part_of
        cost = parts.cost()
        if best is None or cost < best[0]:
            best = cost, dict(parts.part_of)
    assert best is not None
    return best[1]


class _Parts:
    """Groups placed so far, and how far the parts are from their shares, in whole numbers."""

    def __init__(self, counts: Counts, shares: Sequence[int]) -> None:
        self.counts, self.shares, self.sum = counts, shares, sum(shares)
        self.classes = len(next(iter(counts.values())))
        self.totals = [sum(c[k] for c in counts.values()) for k in range(self.classes)]
        self.all = sum(self.totals)
        self.held = [[0] * self.classes for _ in shares]
        self.part_of: dict[str, int] = {}

    def cost(self) -> Cost:
        """Classes (or whole parts) missing, then squared distances from the shares."""
        missing = sum(
            1 for held in self.held for n, t in zip(held, self.totals, strict=True) if t and not n
        )
        squares = 0
        for held, share in zip(self.held, self.shares, strict=True):
            squares += self.classes * (sum(held) * self.sum - share * self.all) ** 2
            for n, total in zip(held, self.totals, strict=True):
                squares += (n * self.sum - share * total) ** 2
        return missing, squares

    def place(self, group: str) -> None:
        """Where the cost is then least; of equals, the first."""
        _, best = min((self._with(group, p), p) for p in range(len(self.shares)))
        self._add(group, best, 1)
        self.part_of[group] = best

    def improve(self, group: str) -> bool:
        """Moves a group to where the cost is less; whether it did."""
        before, cost = self.part_of[group], self.cost()
        self._add(group, before, -1)
        found, best = min((self._with(group, p), p) for p in range(len(self.shares)))
        best = best if found < cost else before
        self._add(group, best, 1)
        self.part_of[group] = best
        return best != before

    def near_enough(self) -> bool:
        if self.cost()[0]:
            return False
        largest = max(sum(c) for c in self.counts.values())
        tolerance = max(self.sum * self.all // NEAR, self.sum * largest // 2)
        return all(
            abs(sum(held) * self.sum - share * self.all) <= tolerance
            for held, share in zip(self.held, self.shares, strict=True)
        )

    def _with(self, group: str, part: int) -> Cost:
        self._add(group, part, 1)
        cost = self.cost()
        self._add(group, part, -1)
        return cost

    def _add(self, group: str, part: int, sign: int) -> None:
        held = self.held[part]
        for k, n in enumerate(self.counts[group]):
            held[k] += sign * n


def _key(key: str, name: str) -> bytes:
    return hashlib.blake2b(f"{key} {name}".encode()).digest()
