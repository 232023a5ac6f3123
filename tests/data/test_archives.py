"""Images in zip and tar files; the folder they were packed from is the oracle."""

from __future__ import annotations

import errno
import io
import os
import shutil
import struct
import subprocess
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_images import encoded, noise, write_pngs

from jaxhisto.config import DataConfig
from jaxhisto.data.sources import Tiles, open_tiles
from jaxhisto.errors import StoreError

IMAGES = {
    "b.png": noise(8, 9, 1),
    "sub/größe 厚.png": noise(50, 21, 2),
    "sub/deep/C5_1.png": noise(12, 12, 3),
    "sub/a.png": noise(7, 5, 4),
}
PACKINGS = ("stored", "deflated", "bzip2", "lzma", "tar", "pax tar", "v7 tar")


def opened(*paths: Path | str, **settings: object) -> Tiles:
    return open_tiles(replace(DataConfig(stores=tuple(map(str, paths)), threads=2), **settings))


def packed(kind: str, folder: Path, out: Path) -> Path:
    """The files below a folder as an archive, made by Python's own writers."""
    files = sorted((p for p in folder.rglob("*") if p.is_file()), reverse=True)
    if "tar" in kind:
        path = out.with_suffix(".tar")
        formats = {
            "tar": tarfile.GNU_FORMAT,
            "pax tar": tarfile.PAX_FORMAT,
            "v7 tar": tarfile.USTAR_FORMAT,
        }
        with tarfile.open(path, "w", format=formats[kind]) as tar:
            for file in files:
                tar.add(file, file.relative_to(folder).as_posix())
        return path
    methods = {"stored": 0, "deflated": 8, "bzip2": 12, "lzma": 14}
    path = out.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", methods[kind]) as archive:
        archive.mkdir("sub")
        for file in files:
            archive.write(file, file.relative_to(folder).as_posix())
    return path


@pytest.mark.parametrize("kind", PACKINGS)
def test_an_archive_is_the_folder_it_was_made_of(tmp_path: Path, kind: str) -> None:
    folder = write_pngs(tmp_path / "images", IMAGES)
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"")
    write_pngs(folder / "__MACOSX", {"._b.png": noise(4, 4)})
    path = packed(kind, folder, tmp_path / "packed")
    plain, tiles = opened(folder, max_side=20), opened(path, max_side=20)
    assert tiles.hash == plain.hash
    assert len(tiles) == len(plain) == 9
    assert tiles.canvas == plain.canvas
    for i in range(9):
        np.testing.assert_array_equal(tiles.read(i), plain.read(i))
        assert tiles.sizes(i) == plain.sizes(i)
        assert tiles.names(i) == plain.names(i).replace(str(folder), str(path))
    assert "4 images in 9 cells; sides above 20 px cut, smaller images whole" in tiles.summary()
    assert not list(tmp_path.rglob("*/a.png"))[1:]  # nothing was unpacked
    without = opened(path, exclude=("C5_*",))
    assert len(without) == 3
    assert "3 images, 1 excluded" in without.summary()


@pytest.mark.parametrize("kind", ["deflated", "tar"])
def test_threads_read_an_archive_at_once(tmp_path: Path, kind: str) -> None:
    images = {f"{i:03}.png": noise(16, 16, i) for i in range(60)}
    tiles = opened(packed(kind, write_pngs(tmp_path / "images", images), tmp_path / "a"))
    order = np.random.default_rng(0).integers(0, 60, 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        for i, pixels in zip(order, pool.map(tiles.read, order), strict=True):
            assert np.array_equal(pixels, images[f"{i:03}.png"])


def test_a_zip_and_a_tar_of_other_programs(tmp_path: Path) -> None:
    """GNU tar, where there is one; its long names and its padding to 10 KiB."""
    if not shutil.which("tar"):
        pytest.skip("no tar program here")
    name = "/".join(["n" * 90] * 3) + "/" + "x" * 120 + ".png"
    folder = write_pngs(tmp_path / "images", {**IMAGES, name: noise(6, 6, 9)})
    subprocess.run(["tar", "cf", tmp_path / "a.tar", "-C", folder, *os.listdir(folder)], check=True)
    subprocess.run(["tar", "cf", tmp_path / "dot.tar", "-C", folder, "."], check=True)
    for path in ("a.tar", "dot.tar"):
        assert opened(tmp_path / path).hash == opened(folder).hash


@pytest.mark.parametrize("kind", ["stored", "deflated", "bzip2", "lzma", "tar"])
def test_damage_in_an_archive_is_named_and_counted(tmp_path: Path, kind: str) -> None:
    folder = write_pngs(tmp_path / "images", IMAGES)
    path = packed(kind, folder, tmp_path / "packed")
    data = bytearray(path.read_bytes())
    at = data.find((folder / "sub" / "a.png").read_bytes()[:60])
    if at < 0:  # packed: somewhere in the member's data
        with zipfile.ZipFile(path) as archive:
            at = archive.getinfo("sub/a.png").header_offset + 30 + len("sub/a.png")
    data[at + 45 : at + 50] = bytes(5)
    path.write_bytes(data)
    with pytest.raises(
        StoreError, match=r"1 of 4 images cannot be used, the first, sub/a\.png, .*or "
    ):
        opened(path)
    tiles = opened(path, failures_allowed=1)
    assert len(tiles) == 3
    assert [name for name, _ in tiles.dropped] == [f"{path}/sub/a.png"]


@pytest.mark.parametrize("kind", ["deflated", "tar"])
def test_an_archive_cut_anywhere_is_refused(tmp_path: Path, kind: str) -> None:
    folder = write_pngs(tmp_path / "images", IMAGES)
    path = packed(kind, folder, tmp_path / "packed")
    whole = path.read_bytes()
    end = len(whole) if kind == "deflated" else len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for cut in {*range(1, end, 97), *range(512, end, 512), end - 1} - {end}:
        path.write_bytes(whole[:cut])
        with pytest.raises(StoreError, match=r"packed\.\w+: .*(again|end mark|images)"):
            opened(path)


def test_an_archive_that_changes_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = packed(
        "stored", write_pngs(tmp_path / "images", {"a.png": noise(64, 64)}), tmp_path / "a"
    )
    tiles = opened(path)
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"a\.zip/a\.png: is damaged .*copy the archive again"):
        tiles.read(0)
    path = packed("tar", tmp_path / "images", tmp_path / "b")
    tiles = opened(path)
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"b\.tar/a\.png: changed since the run opened it"):
        tiles.read(0)


def test_archives_that_are_refused(tmp_path: Path) -> None:
    good = encoded(noise(4, 4))
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", good)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a.png", good)
    with pytest.raises(StoreError, match=r"a\.zip: holds 2 images called a\.png; pack it anew"):
        opened(path)
    store = ["s/t.array_record-0", "a.png"]
    for names, why in [
        (["x.txt"], "no images .* in this zip file"),
        ([], "no images"),
        (store, "part of a tile store in an archive"),
    ]:
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, good)
        with pytest.raises(StoreError, match=why):
            opened(path)
    for mode, name in [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")]:
        with tarfile.open(tmp_path / "a.tgz", mode) as tar:
            tar.addfile(tarfile.TarInfo("a.png"), io.BytesIO())
        with pytest.raises(
            StoreError, match=rf"one {name} stream, .*plain tar or a folder, or pack"
        ):
            opened(tmp_path / "a.tgz")
    (tmp_path / "b.zip").write_text("no zip")
    with pytest.raises(StoreError, match=r"does not start as a \.zip file does"):
        opened(tmp_path / "b.zip")


def test_members_that_cannot_be_had_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("../out/a.png")
        good = encoded(noise(4, 4))
        info.size = len(good)
        tar.addfile(info, io.BytesIO(good))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.png"
        tar.addfile(link)
    tiles = opened(path, failures_allowed=1)
    assert tiles.dropped == [(f"{path}/link.png", "is a link")]
    assert tiles.names(0) == f"{path}/../out/a.png"
    zipped = tmp_path / "a.zip"
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", good)
        archive.writestr("locked.png", good)
        archive.writestr("more.png", bytes(100_000))
    data = bytearray(zipped.read_bytes())
    entry = data.rfind(b"PK\1\2", 0, data.rfind(b"locked.png"))
    data[entry + 8] |= 1  # says that it is encrypted
    entry = data.rfind(b"PK\1\2")
    data[entry + 24 : entry + 28] = struct.pack("<I", 64)  # says less than it unpacks to
    zipped.write_bytes(data)
    dropped = dict(opened(zipped, failures_allowed=2).dropped)
    assert dropped == {
        f"{zipped}/locked.png": "is encrypted",
        f"{zipped}/more.png": "is damaged (its checksum differs)",
    }


@pytest.mark.parametrize("name", ["a.png", "a.zip"])
def test_what_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Asked of the system where it refuses; root may read all, so there the refusal is made up."""
    write_pngs(tmp_path / "images", {"a.png": noise(4, 4)})
    packed("stored", tmp_path / "images", tmp_path / "a")
    shut = next(tmp_path.rglob(name))
    shut.chmod(0)
    if os.access(shut, os.R_OK):
        real = io.open

        def refused(file: object, *args: object, **kwargs: object) -> object:
            if str(file) == str(shut):
                raise PermissionError(errno.EACCES, "Permission denied", str(file))
            return real(file, *args, **kwargs)

        monkeypatch.setattr(io, "open", refused)
    with pytest.raises(StoreError, match=rf"{name}.* cannot be read \(Permission denied\)"):
        opened(shut.parent if name == "a.png" else shut)
