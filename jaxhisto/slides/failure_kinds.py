"""Slides that failed, by kind: in a list of hundreds, a person looks for what they share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

# What a reason says -> its kind, the first that fits. The reasons themselves are what is kept in
# the manifest; a kind is only how the report groups them.
KINDS = {
    " is empty (0 bytes)": "empty file",
    "no usable pixel size": "no usable pixel size",
    "coarser than the ": "coarser than asked for",
    "no foreground, ": "no foreground",
    " has enough foreground: ": "no foreground",
    " cells have marker ink": "marker ink",
    "smaller than one tile": "smaller than a tile",
    "is not 8-bit RGB": "not 8-bit RGB",
    "OpenSlide does not read this file": "not a slide",
    "is DICOM, but no whole slide": "not a slide",
    "(DICOM transfer syntax ": "packing that is not read",
    "of whose levels no file": "part of the slide is missing",
    "of 8-bit RGB and one focal plane": "not 8-bit RGB",
    "is missing beside it": "part of the slide is missing",
    "in several files": "part of the slide is missing",
    "too large": "too large",
    "needs imagecodecs": "codec not installed",
    "the file is damaged or cut off": "damaged",
    "cells cannot be read": "damaged",
    "its process died": "process died",
    "took longer than": "took too long",
    "cannot be read (": "cannot be read",
}
OTHER = "other"


def kind_of(reason: str) -> str:
    """The kind of a failure by its reason."""
    return next((kind for text, kind in KINDS.items() if text in reason), OTHER)


def by_kind(failures: Iterable[Mapping[str, str]]) -> dict[str, list[Mapping[str, str]]]:
    """The failures of each kind, the most frequent kind first."""
    found: dict[str, list[Mapping[str, str]]] = defaultdict(list)
    for failure in failures:
        found[kind_of(failure["reason"])].append(failure)
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))
