"""`jaxhisto tile`: find the slides, cut each in a process of its own, finish the store."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxhisto import __version__
from jaxhisto.config import TileConfig
from jaxhisto.data.store_writer import StoreWriter
from jaxhisto.errors import ConfigError, JaxhistoError, SlideError, StoreError
from jaxhisto.settings import check, identity
from jaxhisto.slides import pool
from jaxhisto.slides.cutting import Cut, Job, cut_slide
from jaxhisto.slides.pixel_size import GivenPixelSize
from jaxhisto.slides.progress import Progress
from jaxhisto.slides.reader import SUFFIXES, dicom_series
from jaxhisto.slides.report import page

# Per slide, not per store: a slide is cut again when its own pixel size has changed.
PER_SLIDE = {"slides", "out", "mpp", "mpp_source"}


@dataclass(frozen=True)
class Failure:
    """A slide that is not in the store, and why."""

    slide: str
    reason: str


@dataclass(frozen=True)
class TileResult:
    """What a run of `tile` left behind.

    Args:
      store: the folder, a finished store.
      manifest: what it says; `slides` holds tiles kept and rejected by reason for each slide.
      failures: slides that are not in it.
      failures_allowed: of the config.
      reused: slides that an earlier run had finished.
    """

    store: Path
    manifest: dict[str, Any]
    failures: tuple[Failure, ...]
    failures_allowed: int
    reused: int

    @property
    def exit_code(self) -> int:
        """0, or 1 when more slides failed than are allowed to."""
        return int(len(self.failures) > self.failures_allowed)

    def summary(self) -> list[str]:
        """Lines for a person."""
        slides = self.manifest["slides"]
        lines = [
            f"{s['id']}: {s['tiles']} tiles at {s['tile_mpp']:.4g} um/px ({s['mpp_source']}); "
            f"rejected {rejections(s['rejected'])}"
            for s in slides
        ]
        lines += [f"{s['id']}: note: {note}" for s in slides for note in s["notes"]]
        lines += [f"failed: {failure.reason}" for failure in self.failures]
        reused = f", {self.reused} of them from an earlier run" if self.reused else ""
        failed = f", {len(self.failures)} failed" if self.failures else ""
        return [
            *lines,
            f"{self.store}: {self.manifest['tiles']} tiles of {len(slides)} slides{reused}{failed}"
            f"; look at {self.store / 'report.html'}",
        ]


def tile(config: TileConfig) -> TileResult:
    """Cuts slides into a store; what an earlier, stopped or smaller run finished is kept.

    Shows progress on stderr. Call it under `if __name__ == "__main__":` in a script, since it
    spawns processes.

    Raises:
      ConfigError: a setting out of range.
      SlideError: no slide found, or none gave a tile.
      StoreError: the output cannot be written or holds something else.
    """
    config = checked(config)
    store = Path(config.out)
    jobs = find_slides(config)
    settings = {k: v for k, v in identity(config).items() if k not in PER_SLIDE}
    if not config.passthrough:  # stores from before there was such a setting can be completed
        del settings["passthrough"]
    with StoreWriter(store, settings) as writer, Progress(len(jobs)) as progress:
        _refuse_shrinking(writer, jobs)
        jobs = [dataclasses.replace(job, known=writer.finished(job.id)) for job in jobs]
        cuts, failures = _cut_all(jobs, config, progress)
        if not cuts:
            raise SlideError(_all_failed(failures))
        facts = {
            "code_version": __version__,
            "dataset": config.dataset,
            "tile_px": config.tile_px,
            "failures": [dataclasses.asdict(f) for f in failures],
        }
        records = [cut.record for _, cut in sorted(cuts.items())]
        manifest = writer.finish(records, facts, lambda m: page(m, store / "report"))
    reused = sum(cut.reused for cut in cuts.values())
    return TileResult(store, manifest, tuple(failures), config.failures_allowed, reused)


def rejections(rejected: dict[str, int]) -> str:
    """`background 310, over_cap 12`, or `none`."""
    return ", ".join(f"{reason} {n}" for reason, n in rejected.items() if n) or "none"


def checked(config: TileConfig) -> TileConfig:
    """The config with its ranges checked and the dataset's name filled in."""
    check(config)
    if not config.slides:
        raise ConfigError("no slides given: name slides, or folders that hold them")
    return dataclasses.replace(config, dataset=config.dataset or Path(config.out).resolve().name)


def find_slides(config: TileConfig) -> list[Job]:
    """One job a slide, sorted by slide id, which is its name relative to the folder given.

    Raises:
      SlideError: a path that is not there, a folder without slides, or one id for two slides.
    """
    found: dict[str, Job] = {}
    for name in config.slides:
        root = Path(name)
        folder = root if os.path.isdir(root) else root.parent
        for path in _slides_below(root):
            folders = tuple(dict.fromkeys((path.parent, folder)))
            given = GivenPixelSize(config.mpp, config.mpp_source, folders)
            job = Job(path, path.relative_to(folder).as_posix(), given, config)
            # Not Path.resolve: Python 3.11's raises on a link that leads to itself.
            found.setdefault(os.path.realpath(path), job)
    jobs = sorted(_one_a_series(list(found.values()), config), key=lambda job: job.id)
    for a, b in itertools.pairwise(jobs):
        if a.id == b.id:
            raise SlideError(
                f"{a.path} and {b.path}: both would be called {a.id}; give the folder above both, "
                "or rename one"
            )
    return jobs


def _slides_below(root: Path) -> list[Path]:
    if os.path.isfile(root):  # not Path.is_file: it raises on a name that is too long
        return [root]
    if not os.path.isdir(root):
        raise SlideError(f"{root}: is not there; check the path")
    paths = [
        Path(folder) / name
        for folder, _, names in os.walk(root, onerror=_unreadable_folder)
        for name in names
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    ]
    if not paths:
        raise SlideError(
            f"{root}: holds no slide (looked for {' '.join(SUFFIXES)}, in its folders too); give "
            "a folder with slides"
        )
    return sorted(paths)


def _unreadable_folder(error: OSError) -> None:
    raise SlideError(f"{error.filename}: cannot be read ({error.strerror}); check its rights")


def _one_a_series(jobs: list[Job], config: TileConfig) -> list[Job]:
    """One job for all files of a DICOM series in a folder: OpenSlide opens them together."""
    by_folder: dict[Path, list[Job]] = {}
    for job in jobs:
        if job.path.suffix.lower() == ".dcm":
            by_folder.setdefault(job.path.parent, []).append(job)
    many = [job for group in by_folder.values() if len(group) > 1 for job in group]
    if not many:
        return jobs
    answers = pool.run(
        dicom_series, [j.path for j in many], _processes(config), config.slide_timeout
    )
    series: dict[tuple[Path, str], list[Job]] = {}
    for answer in sorted(answers, key=lambda a: many[a.index].id):
        job = many[answer.index]
        series.setdefault((job.path.parent, answer.value or job.id), []).append(job)
    whole = [
        dataclasses.replace(files[0], others=tuple(job.path for job in files[1:]))
        for files in series.values()
    ]
    return [job for job in jobs if job not in many] + whole


def _processes(config: TileConfig) -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return config.processes or len(os.sched_getaffinity(0))
    return config.processes or os.cpu_count() or 1


def _refuse_shrinking(writer: StoreWriter, jobs: Sequence[Job]) -> None:
    ids = {job.id for job in jobs}
    gone = [s["id"] for s in (writer.manifest or {"slides": []})["slides"] if s["id"] not in ids]
    if gone:
        raise StoreError(
            f"{writer.path}: holds {len(gone)} slides that are not among those given (first: "
            f"{gone[0]}); give those too, or another --out"
        )


def _cut_all(
    jobs: list[Job], config: TileConfig, progress: Progress
) -> tuple[dict[str, Cut], list[Failure]]:
    """Cuts every slide; a failing one costs only itself, an unwritable store ends the run."""
    cuts: dict[str, Cut] = {}
    failures: list[Failure] = []
    answers = pool.run(cut_slide, jobs, _processes(config), config.slide_timeout)
    with contextlib.closing(answers):  # ends the processes at once when the store cannot be written
        for answer in answers:
            job = jobs[answer.index]
            if answer.value is not None:
                cuts[job.id] = answer.value
                record = answer.value.record
                again = "kept from an earlier run" if answer.value.reused else "cut"
                progress.done(job.id, f"{record['tiles']} tiles {again}", record["tiles"])
                continue
            if isinstance(answer.error, StoreError):
                raise answer.error
            failures.append(Failure(job.id, _reason(job, answer.error)))
            if len(jobs) > 1:  # a lone slide's reason is the error that ends the run
                progress.failed(failures[-1].reason)
    return cuts, sorted(failures, key=lambda failure: failure.slide)


def _reason(job: Job, error: Exception | None) -> str:
    """One sentence that names the slide by its id: the store must not depend on where it lay."""
    if isinstance(error, JaxhistoError):
        return str(error).replace(str(job.path), job.id)
    if isinstance(error, pool.TooSlow):
        return f"{job.id}: {error}; raise --slide-timeout, or leave the slide out"
    if isinstance(error, pool.ProcessDied):
        return (
            f"{job.id}: {error}, twice: the file is damaged or memory ran out; lower --processes, "
            "or leave the slide out"
        )
    return f"{job.id}: {type(error).__name__}: {error}; this is a fault of jaxhisto, report it"


def _all_failed(failures: Sequence[Failure]) -> str:
    if len(failures) == 1:
        return failures[0].reason
    return f"none of {len(failures)} slides gave a tile; the first: {failures[0].reason}"
