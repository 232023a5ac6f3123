"""`jaxhisto study`: encoders x tasks x labels x repeats x settings, and their tables."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import fnmatch
import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxhisto import __version__
from jaxhisto.console import counted, say, warn
from jaxhisto.downstream_config import StudyConfig
from jaxhisto.errors import ConfigError, JaxhistoError, RunError, StoreError
from jaxhisto.pretrain.stopping import Stopped
from jaxhisto.progress import Progress
from jaxhisto.runlog import environment, write_atomically
from jaxhisto.study.cells import (
    Cell,
    Entry,
    Outcome,
    Ready,
    cells_of,
    clear_halves,
    is_there,
    read_cell,
    write_cell,
)
from jaxhisto.study.file import Study, find_study, read_study
from jaxhisto.study.plan import HASHES, SPLITS, FeatureCache, open_entries, open_tasks
from jaxhisto.study.report import figure_name, label_curves, markdown, page, shown
from jaxhisto.study.results import MEASURES, PARTS, collect, parts_of
from jaxhisto.study.settings import SETTINGS
from jaxhisto.study.tables import tables_of

FAILURES, LOCK, RECORD = "failures.json", ".lock", "study.json"
BEGUN = (HASHES, SPLITS)
"""What a start may leave that was ended before its `RECORD`."""
OURS = re.compile(rf"[a-z]+-({'|'.join(PARTS)})-({'|'.join(MEASURES)})\.(csv|md|tex|png)")
"""Names of tables and figures of a part."""


@dataclass(frozen=True)
class Studied:
    """What a study left behind: its folder, cells in all, of an earlier start, and failed ones."""

    out: Path
    cells: int
    earlier: int
    failures: tuple[tuple[str, str], ...]


def run_study(config: StudyConfig) -> Studied:
    """Computes the cells that are not there, and writes tables, figures and report.

    A cell that fails is recorded with its sentence and tried again by the next start.

    Raises:
      ConfigError, StoreError, ExportError: the file, or what it names, before any cell.
      StoreError: no room to write.
      RunError: another process is at work in the folder.
    """
    path, out = find_study(config.file), Path(config.out)
    study = read_study(path)
    _refuse_no_plots()
    with _locked(out):
        clear_halves(out)
        entries = open_entries(study, config.root)
        tasks = open_tasks(study, config.root, out, config.threads)
        features = FeatureCache(out, study.probe.embed_batch, config.devices, config.threads)
        every = list(cells_of(study, entries, tasks, features, out, config.devices, config.threads))
        cells = _chosen(every, config.only)
        earlier = sum(is_there(cell) for cell in cells)
        say(f"{counted(len(cells), 'cell')}, {earlier:,} of them finished by an earlier start")
        if config.plan:
            return Studied(out, len(cells), earlier, ())
        _write(out / RECORD, _facts(path, study, entries, tasks))
        failures = compute(cells, out)
        write_report(study, entries, tasks, every, out, failures)
    return Studied(out, len(cells), earlier, tuple(failures))


def compute(cells: Sequence[Cell], out: Path) -> list[tuple[str, str]]:
    """Runs the cells that are not there; gives each that failed, and why.

    Raises:
      StoreError: one cannot be written.
    """
    failures: list[tuple[str, str]] = []
    waiting = [cell for cell in cells if read_cell(cell) is None]
    done = len(cells) - len(waiting)
    with Progress("study", len(cells), done, unit="cells") as progress:
        for cell in waiting:
            found = _outcome(cell)
            if isinstance(found, Outcome):
                write_cell(cell, found)
            else:
                if all(
                    sentence != found for _, sentence in failures
                ):  # one broken image, many cells
                    warn(f"failed: {cell.words}: {found}")
                failures.append((cell.words, found))
            progress.advance(1)
    file = out / FAILURES
    if failures:
        records = [{"cell": cell, "error": sentence} for cell, sentence in failures]
        _write(file, json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    else:
        file.unlink(missing_ok=True)
    return failures


def write_report(
    study: Study,
    entries: Sequence[Entry],
    tasks: Sequence[Ready],
    cells: Sequence[Cell],
    out: Path,
    failures: Sequence[tuple[str, str]],
) -> None:
    """Tables as CSV, Markdown and LaTeX, figures, report.md and report.html."""
    found = collect(study, entries, tasks, cells)
    parts = parts_of(found)
    grids = tables_of(found, parts)
    written = {out / figure_name(part) for part in parts}
    try:
        for part in parts:
            label_curves(part, out / figure_name(part))
    except OSError as error:
        raise _unwritable(out / "figures", error) from error
    for grid in (grid for _, of in grids for grid in of):
        texts = {".csv": grid.csv()}
        if shown(grid):
            texts |= {".md": grid.markdown() + "\n", ".tex": grid.latex()}
        for suffix, text in texts.items():
            _write(out / "tables" / f"{grid.name}{suffix}", text)
            written.add(out / "tables" / f"{grid.name}{suffix}")
    for path in set(out.glob("tables/*")) | set(out.glob("figures/*")):
        # What an earlier form of the study had, and this one has no more.
        if path not in written and OURS.fullmatch(path.name):
            path.unlink(missing_ok=True)
    _write(out / "report.md", markdown(found, grids))
    _write(out / "report.html", page(found, grids, out, failures))


def _facts(path: Path, study: Study, entries: Sequence[Entry], tasks: Sequence[Ready]) -> str:
    """What study.json holds: the file as understood, hashes, versions."""
    facts = {
        "file": str(path),
        "study": dataclasses.asdict(study),
        "encoders": [dataclasses.asdict(entry) for entry in entries],
        "tasks": {t.name: {"sha256": t.hash, "split_sha256": t.split.sha256} for t in tasks},
        "code_version": __version__,
        "environment": environment([]),
    }
    return json.dumps(facts, indent=1) + "\n"


def _outcome(cell: Cell) -> Outcome | str:
    """What the cell found, or why it failed."""
    try:
        return SETTINGS[cell.setting](cell)
    except Stopped as error:
        raise Stopped(f"{cell.out}: stopped in {cell.words}; start the same line again.") from error
    except JaxhistoError as error:
        return str(error)
    # One bad cell may not end a study of a thousand: its sentence is kept, the exit code says so.
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def _chosen(cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """The cells of which TASK/ENCODER/SETTING matches one of the shell patterns; all without."""
    if not patterns:
        return list(cells)
    found = [
        cell
        for cell in cells
        if any(
            fnmatch.fnmatchcase(f"{cell.ready.name}/{cell.entry.row}/{cell.setting}", pattern)
            for pattern in patterns
        )
    ]
    if not found:
        raise ConfigError(
            f"--only {' '.join(patterns)}: matches no cell; write TASK/ENCODER/SETTING, such as "
            f"{cells[0].ready.name}/*/{cells[0].setting}."
        )
    return found


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Holds OUT for this process."""
    _refuse_foreign(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / LOCK).open("w")
    except OSError as error:
        raise StoreError(
            f"{out}: is no folder that can be written ({error.strerror}); give another --out."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"{out}: another `jaxhisto study` is at work there; wait for that one, or give "
                "another --out."
            ) from error
        yield


def _refuse_foreign(out: Path) -> None:
    """Refuses a folder that holds what no study wrote, as `.` or the one of the images.

    Raises:
      StoreError: naming the first; a study's own file and hidden files may lie there.
    """
    if not out.is_dir() or (out / RECORD).is_file():
        return
    other = [p for p in sorted(out.iterdir()) if p.name not in BEGUN and p.suffix != ".toml"]
    other = [p for p in other if not p.name.startswith(".")]
    if other:
        raise StoreError(
            f"{out}: holds {other[0].name}, which no study wrote; give --out an empty or new "
            "folder."
        )


def _refuse_no_plots() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise RunError(
            "the figures need matplotlib; install it with `pip install 'jaxhisto[plots]'`."
        )


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> StoreError:
    return StoreError(
        f"{path}: cannot be written ({error.strerror}); free some space or choose another --out; "
        "finished cells are kept."
    )
