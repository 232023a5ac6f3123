"""From single tiles of a mix back to what a manifest calls them, and a manifest of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from jaxhisto.data.image_source import ImageSource
from jaxhisto.data.manifest import Entry, Manifest
from jaxhisto.data.sources import Source, StoreSource, Tiles
from jaxhisto.data.store import read_manifest
from jaxhisto.errors import StoreError


class Origins:
    """What each tile of a mix is in a manifest; the stores' own are read once."""

    def __init__(self, tiles: Tiles) -> None:
        self._tiles = tiles
        self._stores: dict[int, dict[str, Any]] = {}

    def entry(self, i: int) -> Entry:
        """Tile i alone; of an image that is cut into cells, the whole image.

        Raises:
          StoreError: its source is no store and no images.
        """
        source, row = self._tiles.origin(i)
        if isinstance(source, StoreSource):
            return self._of_store(source, row)
        if isinstance(source, ImageSource):
            image = source.image_of[row]
            name = source.path.resolve().name
            return Entry(name, image.name, None, image.sha256.hex(), None)
        raise StoreError(
            f"{source.path}: tiles are picked from stores and images alone; cut the slides with "
            "`jaxhisto tile` and embed that store."
        )

    def manifest(self, chosen: Iterable[int], rule: Mapping[str, Any], seed: int) -> Manifest:
        """The list of these tiles, for `jaxhisto pretrain --data.manifest`.

        Args:
          chosen: positions in the mix.
          rule: how they were chosen.
          seed: of that choice.
        """
        rows: dict[tuple[str, str, float | None, str], set[int]] = defaultdict(set)
        for entry in map(self.entry, chosen):
            of = rows[entry.dataset, entry.slide, entry.mpp, entry.sha256]
            of.update(entry.rows or ())
        entries = [
            Entry(*key, tuple(sorted(of)) if of else None)
            for key, of in sorted(rows.items(), key=lambda item: (*item[0][:2], item[0][2] or 0))
        ]
        sources = [_record(source) for source in self._tiles.origins()]
        there, taken = Counter[str](), Counter[str]()
        for record in sources:
            there[record["dataset"]] += record["tiles"]
        for entry in entries:
            taken[entry.dataset] += entry.tiles
        datasets = [
            {"name": name, "organ": "", "stain": "", "available": there[name]}
            | {"asked": taken[name], "taken": taken[name], "why": "picked"}
            for name in sorted(taken)
        ]
        return Manifest(dict(rule), seed, sources, datasets, entries)

    def _of_store(self, source: StoreSource, row: int) -> Entry:
        manifest = self._stores.setdefault(id(source), read_manifest(source.path))
        at = source.row_in_store(row)
        for slide in manifest["slides"]:
            if at < slide["tiles"]:
                part = slide["part"]["sha256"]
                return Entry(manifest["dataset"], slide["id"], slide["tile_mpp"], part, (at,))
            at -= slide["tiles"]
        raise AssertionError(f"{source.path}: row {row} is beyond the manifest")


def _record(source: Source) -> dict[str, Any]:
    store = isinstance(source, StoreSource)
    dataset = read_manifest(source.path)["dataset"] if store else source.path.resolve().name
    kind = "store" if store else "folder"
    return {"kind": kind, "dataset": dataset, "hash": source.hash, "tiles": len(source)}
