"""What can be drawn: the slides and images of the sources given, and those that were asked for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxhisto.config import DataConfig
from jaxhisto.data import catalog
from jaxhisto.data.catalog import About
from jaxhisto.data.folder_source import FolderSource
from jaxhisto.data.sources import StoreSource, open_tiles
from jaxhisto.data.store import dataset_of, read_manifest
from jaxhisto.errors import ConfigError, StoreError
from jaxhisto.file_config import SampleConfig

Known = Mapping[str, tuple[str, About]]
"""What `catalog.known_datasets` returns."""


@dataclass(frozen=True, slots=True)
class Slide:
    """What can be drawn of a slide at one resolution, or an image.

    Fields:
      dataset, slide, mpp, sha256: as in `manifest.Entry`.
      count: tiles; none for an image of a folder, which is one.
      source: which of the sources given it is from, from 0.
    """

    dataset: str
    slide: str
    mpp: float | None
    sha256: str
    count: int | None
    source: int

    @property
    def tiles(self) -> int:
        return 1 if self.count is None else self.count


@dataclass(frozen=True)
class Pool:
    """All that was given: slides and images, where they lie, what is unreadable; and a record of
    each dataset of each source, with `source` as in `Slide`."""

    slides: Sequence[Slide]
    paths: Sequence[str]
    sources: Sequence[dict[str, Any]]
    dropped: Sequence[tuple[str, str]]

    def datasets(self) -> list[str]:
        """Their names, sorted."""
        return sorted({slide.dataset for slide in self.slides})


def open_pool(config: SampleConfig, known: Known) -> Pool:
    """Opens and checks all sources.

    Raises:
      StoreError: as `open_tiles`; a source that names no tiles; a slide or folder name twice.
    """
    named = [_named(text) for text in config.sources]
    paths = tuple(str(path) for _, path in named)
    data = DataConfig(
        stores=paths,
        exclude=config.exclude,
        failures_allowed=config.failures_allowed,
        threads=config.threads,
    )
    try:
        tiles = open_tiles(data)
    except StoreError as error:
        raise StoreError(_in_our_flags(str(error))) from error
    slides: list[Slide] = []
    records: list[dict[str, Any]] = []
    for i, (source, (name, path)) in enumerate(zip(tiles.sources, named, strict=True)):
        if isinstance(source, StoreSource):
            kind, found = "store", _of_store(source, i, name)
        elif isinstance(source, FolderSource):
            kind, found = "folder", _of_folder(source, i, name, known)
        else:
            raise StoreError(
                f"{path}: tiles are drawn from stores and image folders alone; cut it into a "
                "store, or unpack it into a folder."
            )
        slides += found
        tiles_of: dict[str, int] = defaultdict(int)
        for slide in found:
            tiles_of[slide.dataset] += slide.tiles
        records += [
            {"kind": kind, "dataset": dataset, "hash": source.hash, "tiles": count, "source": i}
            for dataset, count in sorted(tiles_of.items())
        ]
    _refuse_twice(slides, records, paths)
    return Pool(slides, paths, records, tiles.dropped)


def chosen(
    config: SampleConfig,
    slides: Sequence[Slide],
    about: Mapping[str, About],
    known: Known,
) -> tuple[list[Slide], list[str]]:
    """The slides of the datasets, organs, stains and resolutions asked for, and a line for each
    dataset of which something is left out by its um/px."""
    names = _asked_names(config, about, known)
    if not names:
        raise StoreError(
            f"{config.out}: none of the {len(about)} datasets given is of that organ and stain "
            f"({_few([f'{n}: {a.organ}, {a.stain}' for n, a in about.items()])}); change --organ "
            "or --stain, or give others."
        )
    of_these = [slide for slide in slides if slide.dataset in names]
    kept = [slide for slide in of_these if _at_resolution(slide.mpp, config)]
    if not kept:
        found = sorted({f"{s.mpp:.3g}" if s.mpp else "not stated" for s in of_these})
        raise StoreError(
            f"{config.out}: no tile is at --mpp {' '.join(f'{m:g}' for m in config.mpp)} within "
            f"{config.mpp_tolerance:.0%} (um/px there: {_few(found)}); cut stores at that size "
            "with `jaxhisto tile --tile-mpp`."
        )
    lost: dict[str, int] = defaultdict(int)
    for slide in of_these:
        lost[slide.dataset] += 0 if _at_resolution(slide.mpp, config) else slide.tiles
    return kept, [f"{name}: {n:,} tiles of other um/px" for name, n in sorted(lost.items()) if n]


def _asked_names(config: SampleConfig, about: Mapping[str, About], known: Known) -> set[str]:
    cells = [row for _, row in known.values()]
    organs, stains = ([getattr(row, f) for row in cells] for f in ("organ", "stain"))
    catalog.refuse_unknown("--organ", config.organ, catalog.known_terms(organs))
    catalog.refuse_unknown("--stain", config.stain, catalog.known_terms(stains))
    here = {catalog.name_key(name): (name, row) for name, row in about.items()}
    for name in config.only:
        if catalog.name_key(name) not in here:
            near = catalog.nearest_name(name, here) or f"; there is {_few(sorted(about))}"
            raise ConfigError(f"--only {name}: no source is of that dataset{near}.")
    only = {here[catalog.name_key(name)][0] for name in config.only} or set(about)
    for name in sorted(only):
        for what, flag in (("organ", config.organ), ("stain", config.stain)):
            if flag and not getattr(about[name], what):
                near = catalog.nearest_name(name, known)
                raise StoreError(
                    f"{name}: its {what} is not known{near}; give it in a --datasets file "
                    "(dataset,organ,stain), or leave it out with --only."
                )
    return {
        name
        for name in only
        if catalog.holds(about[name].organ, config.organ)
        and catalog.holds(about[name].stain, config.stain)
    }


def _of_store(source: StoreSource, index: int, name: str) -> list[Slide]:
    manifest = read_manifest(source.path)
    datasets = sorted({dataset_of(manifest, s) for s in manifest["slides"]})
    if name and [name] != datasets:
        several = f" and {len(datasets) - 1} more" if len(datasets) > 1 else ""
        raise StoreError(
            f"{source.path}: is a store of dataset {datasets[0]!r}{several}; give it without "
            f"{name}=, since its tiles carry their name."
        )
    return [
        Slide(
            dataset_of(manifest, s), s["id"], s["tile_mpp"], s["part"]["sha256"], s["tiles"], index
        )
        for s in manifest["slides"]
        if s["id"] in source.slides
    ]


def _of_folder(source: FolderSource, index: int, name: str, known: Known) -> list[Slide]:
    dataset = name or source.path.resolve().name
    mpp = known.get(catalog.name_key(dataset), ("", About()))[1].mpp
    return [
        Slide(dataset, image.name, mpp, image.sha256.hex(), None, index) for image in source.images
    ]


def _named(text: str) -> tuple[str, Path]:
    """`NAME=FOLDER` as its parts; a path that exists is a path, whatever signs it holds."""
    name, equals, path = text.partition("=")
    if equals and not Path(text).expanduser().exists():
        return name, Path(path).expanduser()
    return "", Path(text).expanduser()


def _refuse_twice(
    slides: Sequence[Slide], records: Sequence[Mapping[str, Any]], paths: Sequence[str]
) -> None:
    """Two sources with one tile would weigh it double, and make the draw ambiguous."""
    folders: dict[str, int] = {}
    for record in records:
        i = record["source"]
        if record["kind"] == "folder" and (j := folders.setdefault(record["dataset"], i)) != i:
            raise StoreError(
                f"{paths[j]} and {paths[i]}: both would be dataset {record['dataset']}; name one "
                "of them, as NAME=FOLDER."
            )
    spelt: dict[str, str] = {}
    for name in (record["dataset"] for record in records):
        if (other := spelt.setdefault(catalog.name_key(name), name)) != name:
            raise StoreError(
                f"{other} and {name}: two datasets whose names differ in spelling alone; name one "
                "otherwise, with `jaxhisto tile --dataset` or NAME=FOLDER."
            )
    parts: dict[str, Slide] = {}
    seen: dict[tuple[Any, ...], Slide] = {}
    for slide in slides:
        size = None if slide.mpp is None else f"{slide.mpp:.6g}"
        first = seen.setdefault((slide.dataset, slide.slide, size), slide)
        if slide.count is not None and first is slide:
            first = parts.setdefault(slide.sha256, slide)
        if first is not slide:
            raise StoreError(
                f"{paths[first.source]} and {paths[slide.source]}: both hold {slide.slide} of "
                f"dataset {slide.dataset} at that um/px; give one of them."
            )


def _at_resolution(mpp: float | None, config: SampleConfig) -> bool:
    near = (
        abs(mpp - want) <= config.mpp_tolerance * want * (1 + 1e-9) for want in config.mpp if mpp
    )
    return not config.mpp or any(near)


def _in_our_flags(text: str) -> str:
    """A refusal of `pretrain`'s data, with the flags that this verb has."""
    ours = {"--data.stores": "the sources", "--data.failures": "--failures", "--data.ex": "--ex"}
    for theirs, here in ours.items():
        text = text.replace(theirs, here)
    return text


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
