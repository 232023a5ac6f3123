"""Slides and patients by name: what a tile's or image's name says of where it comes from."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from jaxhisto.data.image_source import ImageSource
from jaxhisto.data.listed import Listed
from jaxhisto.data.sources import Source
from jaxhisto.errors import ConfigError

TCGA_SLIDE = re.compile(r"TCGA(?:-[A-Z0-9]{2,4}){2}-\d\d[A-Z]-[A-Z0-9]{2,3}-[A-Z0-9]{2,4}", re.I)
_TILE = re.compile(r".*: tile \d+ \(slide (.*)\)", re.S)


@dataclass(frozen=True)
class Origin:
    """Fields:
    own: slide id of a store's tile, or the image's name relative to its folder.
    stored: it comes from a tile store, whose slide ids are slide ids.
    slide, patient: what the name says, in capitals; empty where it says nothing.
    """

    own: str
    stored: bool
    slide: str
    patient: str

    @property
    def stem(self) -> str:
        """The last part of the name without suffix, in capitals."""
        return stem(self.own)


@dataclass(frozen=True)
class Patterns:
    """How names are read; both patterns have a group, or count whole."""

    patient: re.Pattern[str]
    slide: re.Pattern[str] | None

    def origin(self, source: Source, row: int) -> Origin:
        """Where a tile comes from, by its name."""
        own, stored = own_name(source, row)
        return Origin(own, stored, self._slide(own, stored), _first(self.patient, own))

    def _slide(self, own: str, stored: bool) -> str:
        if self.slide is not None:
            return _first(self.slide, own)
        return _first(TCGA_SLIDE, own) or (stem(own) if stored else "")


def read_patterns(patient: str, slide: str) -> Patterns:
    """The patterns of the command line.

    Raises:
      ConfigError: one that is no regular expression, or has more than one group.
    """
    compiled = []
    for flag, text in (("--patient-pattern", patient), ("--slide-pattern", slide)):
        try:
            compiled.append(re.compile(text, re.I))
        except re.error as error:
            raise ConfigError(f"{flag} {text!r}: no regular expression ({error}).") from error
        if compiled[-1].groups > 1:
            raise ConfigError(f"{flag} {text!r}: has several groups; make all but one (?:...).")
    return Patterns(compiled[0], compiled[1] if slide else None)


def own_name(source: Source, row: int) -> tuple[str, bool]:
    """Slide id and True of a store's tile; of an image its relative name and False.

    A tile of a list is named as in the store or folder it was found in.
    """
    if isinstance(source, Listed):
        source, row = source.at(row)
    text = source.name(row)
    tile = _TILE.fullmatch(text)
    if tile:
        return tile[1], True
    name = Path(text)
    # Images of an archive or table may lie elsewhere.
    inside = name.is_relative_to(source.path)
    return (name.relative_to(source.path) if inside else name).as_posix(), False


def file_digests(source: Source) -> dict[str, bytes]:
    """SHA-256 of each image file of a folder, or of a list's folders, by its full name; none of a
    store."""
    if isinstance(source, Listed):
        return {name: d for each in source.sources for name, d in file_digests(each).items()}
    if not isinstance(source, ImageSource):
        return {}
    return {str(source.path / image.name): image.sha256 for image in source.images}


def stem(name: str) -> str:
    """The last part of a name without its suffix, in capitals; dots within an id stay."""
    last = name.rpartition("/")[2]
    head, dot, suffix = last.rpartition(".")
    return (head if dot and 1 < len(suffix) < 6 else last).upper()


@dataclass
class Group:
    """Tiles of one slide, patient or name: how many, and the first of them."""

    tiles: int = 0
    example: str = ""


@dataclass
class Groups:
    """All slides, patients and names of one side."""

    slides: dict[str, Group] = field(default_factory=dict)
    patients: dict[str, Group] = field(default_factory=dict)
    stems: dict[str, Group] = field(default_factory=dict)

    def add(self, origin: Origin, name: str) -> None:
        """Counts one more tile."""
        for groups, key in (
            (self.slides, origin.slide),
            (self.patients, origin.patient),
            (self.stems, origin.stem),
        ):
            if key:
                group = groups.setdefault(key, Group(example=name))
                group.tiles += 1


@dataclass(frozen=True)
class Shared:
    """A slide, a patient or a bare name that both sides have."""

    kind: str
    id: str
    pretraining: Group
    labelled: Group


def shared(pretraining: Groups, labelled: Groups) -> list[Shared]:
    """What both sides have, slides first.

    A name that is a slide's id on the other side counts as that slide. Equal names of images in
    two folders (`1.png`) are listed as `name`, and prove nothing.
    """
    found = []
    slides = _both(pretraining.slides, labelled.slides)
    slides |= _both(pretraining.slides, labelled.stems) | _both(pretraining.stems, labelled.slides)
    found += [Shared("slide", key, *slides[key]) for key in sorted(slides)]
    patients = _both(pretraining.patients, labelled.patients)
    found += [Shared("patient", key, *patients[key]) for key in sorted(patients)]
    stems = _both(pretraining.stems, labelled.stems)
    found += [Shared("name", key, *stems[key]) for key in sorted(stems.keys() - slides.keys())]
    return found


def _both(a: dict[str, Group], b: dict[str, Group]) -> dict[str, tuple[Group, Group]]:
    return {key: (a[key], b[key]) for key in _keys(a, b)}


def _keys(a: Iterable[str], b: Iterable[str]) -> set[str]:
    return set(a) & set(b)


def _first(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    if not found:
        return ""
    return (found[1] if pattern.groups else found[0] or "").upper()
