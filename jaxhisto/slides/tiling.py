"""`jaxhisto tile`: find the slides, cut each in a process of its own, finish the store."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxhisto import __version__
from jaxhisto.config import TileConfig
from jaxhisto.console import counted, warn
from jaxhisto.data.store import dataset_of
from jaxhisto.data.store_writer import StoreWriter
from jaxhisto.errors import ConfigError, JaxhistoError, SlideError, StoreError
from jaxhisto.settings import check, identity
from jaxhisto.slides import beam_engine, pool
from jaxhisto.slides.cohort_report import same_content, write_report
from jaxhisto.slides.cutting import Cut, Job, cut_slide
from jaxhisto.slides.disk import check_disk
from jaxhisto.slides.finding import find_slides, linked_twice, misspelt, processes_of
from jaxhisto.slides.progress import SlideProgress

LINES = 60  # of a kind that are printed; report.csv has all
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
        """Lines for a person: each slide, or of a cohort each dataset."""
        slides = self.manifest["slides"]
        one_by_one = len(slides) <= LINES
        lines = [_slide_line(s) for s in slides] if one_by_one else self._dataset_lines()
        notes = [f"{s['id']}: note: {note}" for s in slides for note in s["notes"]]
        lines += [*_few(notes)]
        lines += _few([f"failed: {failure.reason}" for failure in self.failures])
        if twins := same_content(self.manifest):
            lines.append(f"note: {len(twins)} slides have the same bytes as another one")
        reused = f", {self.reused} of them from an earlier run" if self.reused else ""
        failed = f", {len(self.failures)} failed" if self.failures else ""
        return [
            *lines,
            f"{self.store}: {counted(self.manifest['tiles'], 'tile')} of "
            f"{counted(len(slides), 'slide')}{reused}{failed}"
            f"; look at {self.store / 'report.html'}",
        ]

    def _dataset_lines(self) -> list[str]:
        counts: dict[str, list[int]] = {}
        for slide in self.manifest["slides"]:
            counts.setdefault(dataset_of(self.manifest, slide), []).append(slide["tiles"])
        return [
            f"{name}: {counted(sum(tiles), 'tile')} of {counted(len(tiles), 'slide')}"
            for name, tiles in sorted(counts.items())
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
    if not config.dataset_by_folder:  # stores from before there were these settings stay the same
        del settings["dataset_by_folder"]
    if not config.passthrough:
        del settings["passthrough"]
    notes = [
        *misspelt({job.dataset or config.dataset for job in jobs}),
        *linked_twice(jobs),
    ]
    for note in notes:  # before hours of work
        warn(f"note: {note}")
    with StoreWriter(store, settings) as writer:
        _refuse_shrinking(writer, jobs)
        jobs = [dataclasses.replace(job, known=writer.finished(job.id)) for job in jobs]
        check_disk(jobs, config, writer.stored_bytes(), processes_of(config))
        with SlideProgress(len(jobs)) as progress:
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
        manifest = writer.finish(records, facts, lambda m: write_report(m, store, notes))
    reused = sum(cut.reused for cut in cuts.values())
    return TileResult(store, manifest, tuple(failures), config.failures_allowed, reused)


def _slide_line(slide: dict[str, Any]) -> str:
    return (
        f"{slide['id']}: {slide['tiles']} tiles at {slide['tile_mpp']:.4g} um/px "
        f"({slide['mpp_source']}); rejected {rejections(slide['rejected'])}"
    )


def _few(lines: list[str]) -> list[str]:
    more = [f"and {len(lines) - LINES:,} more such lines, in report.csv"]
    return lines[:LINES] + (more if len(lines) > LINES else [])


def rejections(rejected: dict[str, int]) -> str:
    """`background 310, over_cap 12`, or `none`."""
    return ", ".join(f"{reason} {n}" for reason, n in rejected.items() if n) or "none"


def checked(config: TileConfig) -> TileConfig:
    """The config with its ranges checked and the dataset's name filled in."""
    check(config)
    if not config.slides:
        raise ConfigError("no slides given: name slides, or folders that hold them")
    return dataclasses.replace(config, dataset=config.dataset or Path(config.out).resolve().name)


def _refuse_shrinking(writer: StoreWriter, jobs: Sequence[Job]) -> None:
    ids = {job.id for job in jobs}
    gone = [s["id"] for s in (writer.manifest or {"slides": []})["slides"] if s["id"] not in ids]
    if gone:
        raise StoreError(
            f"{writer.path}: holds {len(gone)} slides that are not among those given (first: "
            f"{gone[0]}); give those too, or another --out"
        )


def _cut_all(
    jobs: list[Job], config: TileConfig, progress: SlideProgress
) -> tuple[dict[str, Cut], list[Failure]]:
    """Cuts every slide; a failing one costs only itself, an unwritable store ends the run."""
    cuts: dict[str, Cut] = {}
    failures: list[Failure] = []
    answers = _answers(jobs, config)
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


def _answers(jobs: list[Job], config: TileConfig) -> Generator[pool.Answer[Cut], None, None]:
    """`cut_slide` of each job, in local processes or on a Beam runner."""
    if config.beam:
        return beam_engine.run(cut_slide, jobs, Path(config.out), config.beam, config.slide_timeout)
    return pool.run(cut_slide, jobs, processes_of(config), config.slide_timeout)


def _reason(job: Job, error: Exception | None) -> str:
    """One sentence that names the slide by its id: the store must not depend on where it lay."""
    if isinstance(error, JaxhistoError):
        return str(error).replace(str(job.path), job.id)
    if isinstance(error, pool.TooSlow):
        return f"{job.id}: {error}, twice; raise --slide-timeout, or leave the slide out"
    if isinstance(error, pool.ProcessDied):
        return (
            f"{job.id}: {error}, twice: the file is damaged or memory ran out; lower --processes, "
            "or leave the slide out"
        )
    if isinstance(error, MemoryError):
        return f"{job.id}: memory ran out; lower --processes, or leave the slide out"
    return f"{job.id}: {type(error).__name__}: {error}; this is a fault of jaxhisto, report it"


def _all_failed(failures: Sequence[Failure]) -> str:
    if len(failures) == 1:
        return failures[0].reason
    return f"none of {len(failures)} slides gave a tile; the first: {failures[0].reason}"
