"""The disk: what is said before the start, and what a full one leaves behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
from made_slides import GLASS, PINK, painted, write_slide

from jaxhisto.cli import main
from jaxhisto.config import TileConfig
from jaxhisto.data.store import TileStore, is_store
from jaxhisto.errors import StoreError
from jaxhisto.slides import disk

TILES = 32  # of a slide of 512 x 256 px


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    for i in range(14):
        write_slide(folder / f"{i:02d}.tif", painted(512, 256, PINK, i))
    return folder


def flags(slides: Path, out: Path, *more: str) -> list[str]:
    return [
        "tile", str(slides), "--out", str(out), "--tile-px", "64", "--max-tiles", "0",
        "--processes", "1", "--dataset", "d", *more,
    ]  # fmt: skip


def with_free(monkeypatch, free: float) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**15, 0, int(free)))


def test_what_fits_by_its_bound_alone_is_not_sampled(slides, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(disk, "_sampled", lambda *_: pytest.fail("was sampled"))
    config = TileConfig(slides=("x",), out=str(tmp_path / "s"), tile_px=64, max_tiles=100)
    jobs = [disk.Job(p, p.name, None, config) for p in sorted(slides.iterdir())]
    disk.check_disk(jobs, config, 0, 1)

    tiles = min(14 * 100 * 64 * 64 * 3, 100 * sum(p.stat().st_size for p in slides.iterdir()))
    most = 2 * tiles + 14 * 200_000  # the parts beside their shard, and the reports
    said = capsys.readouterr().err
    assert said.startswith(f"disk: at most {most / 1e6:.3g} MB for 14 slides; ")
    assert said.count("\n") == 1
    assert f"are free at {tmp_path / 's'}" in said


def test_what_does_not_fit_is_refused_with_numbers_and_a_way_out(
    slides, tmp_path, monkeypatch, capsys
):
    """The estimate of a sample, against the store that comes of it in the end."""
    monkeypatch.setattr(disk, "SAMPLE", 4)
    with monkeypatch.context() as patch:
        with_free(patch, 5e6)
        assert main(flags(slides, tmp_path / "s")) == 1
        said = capsys.readouterr().err
        last = said.strip().splitlines()[-1]
        assert re.search(
            r"s: about [0-9.]+ MB for 14 slides \(from 4 of them: 32 tiles a slide of "
            r"[0-9.]+ kB\) will not fit where 5 MB are free; free space, .* --no-check-disk",
            last,
        )
        assert not (tmp_path / "s").exists()
        assert main(flags(slides, tmp_path / "s", "--no-check-disk")) == 0
    store = sum(f.stat().st_size for f in (tmp_path / "s").glob("*.array_record*"))
    estimate = 448 * 1e3 * float(re.search(r"slide of ([0-9.]+) kB", said)[1])
    assert 0.9 * store < estimate < 1.1 * store


def test_slides_that_are_cut_already_need_nothing(slides, tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    for i in range(3):
        shutil.copy(slides / f"{i:02d}.tif", tmp_path / "in")
    assert main(flags(tmp_path / "in", tmp_path / "s")) == 0
    capsys.readouterr()
    with_free(monkeypatch, 0)
    assert main(flags(tmp_path / "in", tmp_path / "s")) == 0
    assert "disk:" not in capsys.readouterr().err


def test_where_no_sample_gives_a_tile_the_run_goes_on(tmp_path, monkeypatch, capsys):
    path = write_slide(tmp_path / "a.tif", painted(256, 256, GLASS))
    with_free(monkeypatch, 0)
    assert main(flags(path, tmp_path / "s")) == 1
    errors = capsys.readouterr().err
    assert "disk: at most" in errors
    assert "no foreground" in errors.splitlines()[-1]


RUN = """
import os, sys, time
from jaxhisto.cli import main
from jaxhisto.data import compaction, held
compaction.SHARD_BYTES = 2_000_000
def unhurried(*args, write=held.write_shard):
    time.sleep(float(os.environ.get("BEFORE_A_SHARD", 0)))
    return write(*args)
held.write_shard = unhurried
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


def run(arguments: list[str], limit: str = "") -> subprocess.CompletedProcess[str]:
    """`jaxhisto` as a process, with shards of some ten slides."""
    command = f'{limit} exec "$@"'
    return subprocess.run(
        ["bash", "-c", command, "sh", sys.executable, "-c", RUN, *arguments],
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.fixture(scope="module")
def whole(slides, tmp_path_factory):
    """The store of an undisturbed run."""
    store = tmp_path_factory.mktemp("whole") / "s"
    assert run(flags(slides, store)).returncode == 0
    return store


def content(store: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in store.iterdir() if p.is_file()}


def kept(store: Path) -> set[str]:
    """Slides whose tiles are in a part or a shard of an unfinished store."""
    folder = store / "unfinished"
    names = set()
    for file in folder.glob("*.json"):
        if file.with_suffix(".array_record").is_file():
            said = json.loads(file.read_text())
            names |= {slide["id"] for slide in said.get("slides", [said])}
    return names


@pytest.mark.slow
def test_a_limit_met_in_compaction_is_said_and_lifted_later(slides, whole, tmp_path):
    """Each part is below the limit on file sizes, a shard is not."""
    size = max(p.stat().st_size for p in whole.glob("*.array_record*"))
    stopped = run(flags(slides, tmp_path / "s"), limit=f"ulimit -f {size // 2048};")

    assert stopped.returncode == 1
    last = stopped.stderr.strip().splitlines()[-1]
    assert f"{tmp_path / 's'}: cannot be written (" in last
    assert "run the same command again" in last
    assert len(kept(tmp_path / "s")) == 14
    with pytest.raises(StoreError, match="tiling was stopped; run the same"):
        TileStore(tmp_path / "s")
    resumed = run(flags(slides, tmp_path / "s"))
    assert resumed.returncode == 0
    assert "14 of them from an earlier run" in resumed.stdout
    assert content(tmp_path / "s") == content(whole)


@pytest.fixture
def little_disk(tmp_path):
    """A function that mounts a disk of so many kilobytes."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kilobytes: int) -> Path:
        how = f"remount,size={kilobytes}k" if folder.is_mount() else f"size={kilobytes}k"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", how, "none", str(folder)], capture_output=True
        )
        if done.returncode:
            pytest.skip("a small disk cannot be mounted here (needs root)")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("mount"), reason="no `mount` here")
def test_a_full_disk_stops_cutting_and_compaction_and_loses_nothing(slides, whole, little_disk):
    files = [p for p in whole.rglob("*") if p.is_file()]
    total = sum(p.stat().st_size for p in files) // 1024
    store = little_disk(total // 2) / "s"
    seen = []
    for kilobytes in (total // 2, total, total + 700, total + 10_000):
        # While cutting, while compacting, and with room for a shard that is written.
        little_disk(kilobytes)
        before = kept(store)
        done = run(flags(slides, store, "--no-check-disk"))
        seen.append(done.returncode)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1]
            assert f"{store}: cannot be written (" in last
            assert "Traceback" not in done.stderr
            assert not is_store(store)
            assert before <= kept(store)
    assert seen[0] == 1
    assert seen[-1] == 0
    assert content(store) == content(whole)


@pytest.mark.slow
def test_a_run_killed_in_compaction_is_completed_to_the_same_store(slides, whole, tmp_path):
    command = [sys.executable, "-c", RUN, *flags(slides, tmp_path / "s")]
    killed = subprocess.Popen(
        command, env=os.environ | {"BEFORE_A_SHARD": "1"}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not list((tmp_path / "s").glob("unfinished/shard-*.json")):
        assert killed.poll() is None
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()

    assert len(kept(tmp_path / "s")) == 14
    assert not is_store(tmp_path / "s")
    done = run(flags(slides, tmp_path / "s"))
    assert done.returncode == 0
    assert "14 of them from an earlier run" in done.stdout
    assert content(tmp_path / "s") == content(whole)
