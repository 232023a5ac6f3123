"""A cohort as a user cuts it: real processes, counts known beforehand, killed and finished.

    JAXHISTO_COHORT=2000 pytest tests/slides/test_cohort.py -m slow -s

cuts the whole 2,000 slides and prints the figures; without it there are as many as CI has time for.
"""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from cohort import BROKEN, DATASETS, FLAGS, Expected, make_cohort

from jaxhisto.cli import main
from jaxhisto.data.store import TileStore, is_store
from jaxhisto.slides.failure_kinds import OTHER, kind_of

SLIDES = int(os.environ.get("JAXHISTO_COHORT", "300"))
KILLS = 5  # while it cuts, and once more while it puts the store together
FLAT = 24 << 20  # bytes: what memory may differ by from slide to slide, and no more over the run


@dataclass(frozen=True)
class Cohort:
    folder: Path
    expected: dict[str, Expected]

    @property
    def failing(self) -> dict[str, Expected]:
        return {name: e for name, e in self.expected.items() if e.reason}

    def command(self, out: Path) -> list[str]:
        return [
            sys.executable, "-m", "jaxhisto.cli", "tile", str(self.folder), "--dataset-by-folder",
            *FLAGS, "--processes", "2", "--failures-allowed", str(len(self.failing)),
            "--out", str(out),
        ]  # fmt: skip


@dataclass(frozen=True)
class Run:
    out: Path
    said: str
    seconds: float
    parent: list[int]
    workers: list[int]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    folder = tmp_path_factory.mktemp("cohort") / "slides"
    return Cohort(folder, make_cohort(folder, SLIDES))


@pytest.fixture(scope="module")
def undisturbed(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run from start to end; the memory of its processes while it cuts, every 0.2 s."""
    # The store of the killed run has the same name, which is in its files.
    out = tmp_path_factory.mktemp("undisturbed") / "store"
    begun, parent, workers = time.monotonic(), [], []
    with subprocess.Popen(
        cohort.command(out), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as run:
        while run.poll() is None:
            others = [*map(resident, children(run.pid))]
            if len(others) > 2:  # two that cut and the tracker of shared things: it is cutting
                parent.append(resident(run.pid))
                workers.append(max(others))
            time.sleep(0.2)
        said = run.stdout.read() if run.stdout else ""
    assert run.returncode == 0, said
    return Run(out, said, time.monotonic() - begun, parent, workers)


@pytest.mark.slow
def test_every_slide_is_what_it_was_made_to_be(cohort: Cohort, undisturbed: Run) -> None:
    store = TileStore(undisturbed.out)
    slides = {s["id"]: s for s in store.manifest["slides"]}
    failed = {f["slide"]: f["reason"] for f in store.manifest["failures"]}

    assert slides.keys() == cohort.expected.keys() - cohort.failing.keys()
    assert failed.keys() == cohort.failing.keys()
    for name, slide in slides.items():
        expected = cohort.expected[name]
        assert (slide["tiles"], slide["rejected"]) == (expected.tiles, expected.rejected), name
        assert slide["dataset"] == name.partition("/")[0]
    for name, reason in failed.items():
        assert reason.startswith(f"{name}: ")
        assert cohort.failing[name].reason in reason
        assert kind_of(reason) == cohort.failing[name].kind != OTHER
    counts: Counter[tuple[str, str]] = Counter()
    for tile in (store[i] for i in range(len(store))):
        counts[tile["slide"], tile["dataset"]] += 1
    assert counts == {(n, s["dataset"]): s["tiles"] for n, s in slides.items()}


@pytest.mark.slow
def test_the_table_has_every_slide(cohort: Cohort, undisturbed: Run) -> None:
    with (undisturbed.out / "report.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["slide"]: row for row in csv.DictReader(file)}

    assert rows.keys() == cohort.expected.keys()
    for name, row in rows.items():
        expected = cohort.expected[name]
        assert row["status"] == ("failed" if expected.reason else "cut")
        assert row["tiles"] == ("" if expected.reason else str(expected.tiles))
        assert row["kind"] == expected.kind
    copies = sum(i % 50 == 7 and i % 11 != 5 for i in range(SLIDES))
    assert sum(bool(row["same_as"]) for row in rows.values()) == copies
    pages = {p.name for p in (undisturbed.out / "report").glob("*.html") if len(p.stem) != 20}
    assert len(pages) == len(DATASETS)


@pytest.mark.slow
def test_memory_is_flat_over_the_run(undisturbed: Run) -> None:
    print(f"\n{SLIDES} slides in {undisturbed.seconds:.0f} s; {undisturbed.said[-200:]}")
    for who, sizes in [("parent", undisturbed.parent), ("workers", undisturbed.workers)]:
        # In a short run the processes are still loading their libraries for a quarter of it.
        part = 4 if SLIDES >= 1000 else 2
        early, late = max(sizes[: len(sizes) // part]), max(sizes[len(sizes) // 2 :])
        print(f"{who}: {early >> 20} MiB in the first 1/{part}, {late >> 20} in the second half")
        assert late < early + FLAT


@pytest.mark.slow
def test_killed_at_random_and_finished_it_is_the_same_store(
    cohort: Cohort, undisturbed: Run, tmp_path: Path
) -> None:
    out, rng, kept = tmp_path / "store", random.Random(SLIDES), []
    for _ in range(KILLS):
        kept.append(killed(cohort.command(out), rng.randrange(1, SLIDES // (KILLS + 1)), rng))
        assert not is_store(out)
    kept.append(killed(cohort.command(out), SLIDES, rng))  # as it puts the store together
    done = subprocess.run(cohort.command(out), capture_output=True, text=True)
    print(f"\nkept of each run before: {kept}; {done.stdout[-200:]}")

    assert done.returncode == 0, done.stderr
    assert kept[-1] > 0
    assert contents(out) == contents(undisturbed.out)
    mine, theirs = TileStore(out), TileStore(undisturbed.out)
    assert mine.hash == theirs.hash
    assert all(mine[i] == theirs[i] for i in range(len(theirs)))


def killed(command: list[str], slides: int, rng: random.Random) -> int:
    """Runs a command and kills it and all its processes when it has dealt with so many slides
    more than runs before it; returns how many those had finished."""
    with subprocess.Popen(
        command,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        assert run.stderr
        kept = 0
        for new, line in enumerate(line for line in run.stderr if line.startswith("tile ")):
            kept += "kept from an earlier run" in line
            if new + 1 - kept >= slides or new + 1 == SLIDES:
                break
        time.sleep(rng.uniform(0, 0.2))
        os.killpg(run.pid, signal.SIGKILL)
        run.stderr.read()
    return kept


def test_a_small_cohort_by_the_verb(tmp_path, capsys):
    """Every way of being broken once."""
    expected = make_cohort(tmp_path / "slides", 2 * len(BROKEN), every=2)
    failing = [name for name, e in expected.items() if e.reason]
    line = ["tile", str(tmp_path / "slides"), "--dataset-by-folder", *FLAGS]
    line += ["--out", str(tmp_path / "store"), "--processes", "1"]

    assert main([*line, "--failures-allowed", str(len(failing) - 1)]) == 1
    assert f"{len(failing)} failed; look at" in capsys.readouterr().out
    manifest = TileStore(tmp_path / "store").manifest
    assert {s["id"]: (s["tiles"], s["rejected"]) for s in manifest["slides"]} == {
        name: (e.tiles, e.rejected) for name, e in expected.items() if not e.reason
    }
    reasons = {f["slide"]: f["reason"] for f in manifest["failures"]}
    assert sorted(reasons) == sorted(failing)
    for name, reason in reasons.items():
        assert expected[name].reason in reason
        assert kind_of(reason) == expected[name].kind


def contents(store: Path) -> dict[str, bytes]:
    """Every file of a store by its name, that of TFDS and the report among them."""
    return {
        path.relative_to(store).as_posix(): path.read_bytes()
        for path in store.rglob("*")
        if path.is_file()
    }


def children(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(after_name[1]) == parent:
            found.append(int(stat.parent.name))
    return found


def resident(process: int) -> int:
    """Bytes; 0 where the process has ended."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
