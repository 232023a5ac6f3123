"""Shards: what lies where, and what a stop or damage costs."""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from made_stores import FACTS, add

from jaxhisto.data import compaction
from jaxhisto.data.held import part_file
from jaxhisto.data.store import TileStore, is_store, manifest_hash
from jaxhisto.data.store_writer import (
    StoreWriter,
)
from jaxhisto.errors import StoreError


class Stops:
    """Ends the run at the nth change of a folder: rename, link, deletion or new file name."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int) -> None:
        self.at, self.count = at, 0
        for name in ("replace", "link", "unlink"):
            patch.setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, real):
        def change(*args, **kwargs):
            if Path(os.fspath(args[0])).name not in ("lock", "settings.json"):
                self.count += 1
                if self.count >= self.at:
                    raise KeyboardInterrupt
            return real(*args, **kwargs)

        return change


def cut(store: Path, slides: dict[str, int]) -> tuple[dict, list[str]]:
    """One run: what is finished is kept. Returns the manifest and the slides that were cut."""
    new = []
    with StoreWriter(store, {"seed": 0}) as writer:
        records = []
        for slide, n in sorted(slides.items()):
            known = writer.finished(slide)
            if not known or known["tiles"] != n:
                new.append(slide)
                known = add(store, slide, n)
            records.append(known)
        return writer.finish(records, FACTS, lambda manifest: "<html>"), new


def content(store: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in store.iterdir() if p.is_file()}


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of two or three made slides."""
    monkeypatch.setattr(compaction, "SHARD_BYTES", 400_000)


MANY = {f"s{i:02d}": 2 + i % 5 for i in range(12)}
FEWER = {slide: n for slide, n in MANY.items() if slide not in ("s03", "s04", "s09")}


def test_slides_share_shards_and_tfds_reads_them(tmp_path, small_shards):
    manifest, _ = cut(tmp_path / "s", MANY)
    store = TileStore(tmp_path / "s")
    source = tfds.builder_from_directory(tmp_path / "s").as_data_source(split="train")

    files = sorted((tmp_path / "s").glob("*.array_record*"))
    assert [f.name for f in files] == [shard["file"] for shard in manifest["shards"]]
    assert 3 <= len(files) <= 8
    assert not (tmp_path / "s" / "unfinished").exists()
    assert len(source) == len(store) == sum(MANY.values())
    for i, slide in enumerate(store.slides()):
        assert source[i]["slide"].decode() == store[i]["slide"] == slide
        assert source[i]["y"] == store[i]["y"]


def test_grain_reads_the_store_with_no_code_of_ours(tmp_path, small_shards):
    import grain

    manifest, _ = cut(tmp_path / "s", MANY)
    source = tfds.builder_from_directory(tmp_path / "s").as_data_source(split="train")
    read = list(grain.MapDataset.source(source).map(lambda tile: tile["slide"].decode()))
    assert read == TileStore(tmp_path / "s").slides()
    files = [str(tmp_path / "s" / shard["file"]) for shard in manifest["shards"]]
    with grain.sources.ArrayRecordDataSource(files) as records:
        assert len(records) == len(read)
        assert all(slide.encode() in records[i] for i, slide in enumerate(read))


def test_the_manifest_places_and_sums_each_slide(tmp_path, small_shards):
    """Read with ArrayRecord alone; the sum restated: records after their lengths."""
    import hashlib

    from array_record.python.array_record_module import ArrayRecordReader

    manifest, _ = cut(tmp_path / "s", MANY)
    assert [s["id"] for s in manifest["slides"]] == sorted(MANY)
    for slide in manifest["slides"]:
        reader = ArrayRecordReader(str(tmp_path / "s" / manifest["shards"][slide["shard"]]["file"]))
        rows = reader.read(slide["row"], slide["row"] + slide["tiles"])
        text = b"".join(len(row).to_bytes(8, "little") + row for row in rows)
        assert hashlib.sha256(text).hexdigest() == slide["part"]["records"]
        assert all(slide["id"].encode() in row for row in rows)
        assert len(rows) == MANY[slide["id"]]
        reader.close()


def test_a_change_elsewhere_leaves_most_shards_as_they_are():
    slides = [{"id": f"{i:05d}", "part": {"bytes": 3_500_000 + i}} for i in range(5000)]
    before = compaction.plan(slides)
    after = compaction.plan([*slides[:1000], *slides[1001:3000], slides[0], *slides[3000:]])

    assert [slide for shard in before for slide in shard] == slides
    sizes = [sum(slide["part"]["bytes"] for slide in shard) for shard in before]
    assert max(sizes) <= compaction.SHARD_BYTES
    assert min(sizes[:-1]) >= compaction.SHARD_BYTES // 4
    assert 40 <= len(before) <= 70
    new = [shard for shard in after if shard not in before]
    assert 2 <= len(new) <= 8


def test_an_extended_store_keeps_the_shards_that_have_not_changed(tmp_path, small_shards):
    cut(tmp_path / "s", FEWER)
    was = {p.stat().st_ino for p in (tmp_path / "s").glob("*.array_record*")}
    manifest, new = cut(tmp_path / "s", MANY)

    assert new == ["s03", "s04", "s09"]
    assert was & {p.stat().st_ino for p in (tmp_path / "s").glob("*.array_record*")}
    assert manifest == cut(tmp_path / "t", MANY)[0]
    assert content(tmp_path / "s") == content(tmp_path / "t")


def test_without_hard_links_shards_are_copied(tmp_path, small_shards, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    cut(tmp_path / "s", FEWER)
    cut(tmp_path / "s", MANY)
    cut(tmp_path / "t", MANY)
    assert content(tmp_path / "s") == content(tmp_path / "t")


@pytest.mark.parametrize("change", ["first", "extended"])
def test_a_stop_at_any_moment_leaves_a_store_and_loses_no_slide(
    tmp_path, small_shards, monkeypatch, change
):
    """Stops at each change of the folder in turn, looks, and starts again."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no test of the disk, and a second each
    if change == "first":
        before, after = {}, dict(list(MANY.items())[6:])
    else:
        before, after = FEWER | {"s05": 1}, MANY  # three new slides, and one that has changed
    cut(tmp_path / "whole", after)
    if before:
        cut(tmp_path / "old", before)
    for at in range(1, 500):
        store = tmp_path / f"s{at}"
        if before:
            shutil.copytree(tmp_path / "old", store)
        with monkeypatch.context() as patch:
            stops = Stops(patch, at)
            with suppress(KeyboardInterrupt):
                cut(store, after)
        # Alive is what has its entry, and what the old store holds as it should be.
        finished = {json.loads(p.read_text())["id"] for p in entries(store)}
        finished |= {s for s, n in before.items() if after[s] == n}
        if before or is_store(store):
            read = TileStore(store)
            assert len(read) in (sum(before.values()), sum(after.values()))
            source = tfds.builder_from_directory(store).as_data_source(split="train")
            assert len(source) in (sum(before.values()), sum(after.values()))
            assert source[len(source) - 1]["slide"].decode() == "s11"
            if len(read) == sum(after.values()):
                finished = set(after)
        _, new = cut(store, after)
        assert not finished & set(new)
        assert content(store) == content(tmp_path / "whole")
        assert not (store / "unfinished").exists()
        if stops.count < at:
            break
        shutil.rmtree(store)
    assert 20 < at < 499


def entries(store: Path) -> list[Path]:
    return [p for p in store.glob("unfinished/*.json") if re.fullmatch("[0-9a-f]{20}", p.stem)]


def test_damaged_tiles_are_cut_again_and_no_others(tmp_path, small_shards):
    manifest, _ = cut(tmp_path / "s", MANY)
    good = content(tmp_path / "s")
    file = tmp_path / "s" / manifest["shards"][1]["file"]
    inside = [s["id"] for s in manifest["slides"] if s["shard"] == 1]
    file.write_bytes(file.read_bytes()[:-9] + b"rotten by")
    with pytest.raises(StoreError, match="is damaged"):
        TileStore(tmp_path / "s")

    assert cut(tmp_path / "s", MANY)[1] == inside
    assert content(tmp_path / "s") == good


def test_a_part_that_rots_before_compaction_is_named_and_cut_again(tmp_path):
    with StoreWriter(tmp_path / "s", {"seed": 0}) as writer:
        records = [add(tmp_path / "s", slide, 3) for slide in "ab"]
        other = part_file(tmp_path / "s", "a").read_bytes()
        part_file(tmp_path / "s", "b").write_bytes(other)  # sound, but another slide's
        with pytest.raises(StoreError, match=r"the tiles of b are not those .* cut anew"):
            writer.finish(records, FACTS, lambda manifest: "<html>")
    assert cut(tmp_path / "s", {"a": 3, "b": 3})[1] == ["b"]


def test_a_store_of_the_first_format_is_read_and_extended(tmp_path, small_shards):
    """One part a slide, named in its entry."""
    new = tmp_path / "new"
    old = as_first_format(new, tmp_path / "old", FEWER)
    store = TileStore(old)
    assert store.slides() == [s for s, n in FEWER.items() for _ in range(n)]
    assert [store[i] for i in range(len(store))] == [TileStore(new)[i] for i in range(len(store))]

    assert cut(old, MANY)[1] == ["s03", "s04", "s09"]
    cut(tmp_path / "fresh", MANY)
    assert content(old) == content(tmp_path / "fresh")


def as_first_format(new: Path, old: Path, slides: dict[str, int]) -> Path:
    """Writes what the first version wrote, beside the same store of today."""
    old.mkdir()
    with StoreWriter(new, {"seed": 0}) as writer:
        records = [add(new, slide, n) for slide, n in slides.items()]
        listed = []
        for i, record in enumerate(records):
            name = f"my_set-train.array_record-{i:05d}-of-{len(records):05d}"
            shutil.copy(part_file(new, record["id"]), old / name)
            part = {k: record["part"][k] for k in ("bytes", "sha256")}
            listed.append({**record, "part": {**part, "file": name}})
        writer.finish(records, FACTS, lambda manifest: "<html>")
    manifest = {"format": "jaxhisto-tiles-1", **FACTS, "settings": {"seed": 0}, "slides": listed}
    manifest["tiles"] = sum(slides.values())
    manifest["hash"] = manifest_hash(manifest)
    (old / "manifest.json").write_text(json.dumps(manifest))
    return old
