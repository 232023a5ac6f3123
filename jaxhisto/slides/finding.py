"""Which slides there are to cut, what each is called, and of which dataset it is."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from jaxhisto.config import TileConfig
from jaxhisto.data import catalog
from jaxhisto.errors import SlideError
from jaxhisto.slides import pool
from jaxhisto.slides.cutting import Job
from jaxhisto.slides.opening import dicom_series
from jaxhisto.slides.pixel_size import GivenPixelSize
from jaxhisto.slides.reader import SUFFIXES
from jaxhisto.special_files import special_kind


def find_slides(config: TileConfig) -> list[Job]:
    """One job a slide, sorted by slide id, which is its name relative to the folder given.

    A file that is there under several names, by links, is one slide, called by its own name where
    that is among them, else by the first; links that lead nowhere are slides that will fail, each
    by itself.

    Raises:
      SlideError: a path that is not there, a folder without slides, one id for two slides, and
        with `dataset_by_folder` a slide in no folder, or folders whose names differ in spelling
        alone.
    """
    found: dict[str, Job] = {}
    # Each job travels to a process, and a cut slide need not bring along the names of all.
    lean = dataclasses.replace(config, slides=())
    for name in config.slides:
        root = Path(name)
        folder = root if os.path.isdir(root) else root.parent
        for path in _slides_below(root):
            folders = tuple(dict.fromkeys((path.parent, folder)))
            given = GivenPixelSize(config.mpp, config.mpp_source, folders)
            job = Job(path, path.relative_to(folder).as_posix(), given, lean)
            # Not Path.resolve: Python 3.11's raises on a link that leads to itself.
            real = os.path.realpath(path) if os.path.exists(path) else str(path)
            first = found.setdefault(real, job)
            if job.id not in (first.id, *first.also):
                found[real] = _one_file(first, job)
            _refuse_bytes(path)
    jobs = sorted(_one_a_series(list(found.values()), config), key=lambda job: job.id)
    for a, b in itertools.pairwise(jobs):
        if a.id == b.id:
            raise SlideError(
                f"{a.path} and {b.path}: both would be called {a.id}; give the folder above both, "
                "or rename one"
            )
    return _with_datasets(jobs) if config.dataset_by_folder else jobs


def _one_file(first: Job, second: Job) -> Job:
    """One job for two names of a file. A link that is added later must not rename a slide, of which
    a store may be there."""
    if os.path.islink(first.path) and not os.path.islink(second.path):
        return dataclasses.replace(second, also=(first.id, *first.also))
    return dataclasses.replace(first, also=(*first.also, second.id))


def processes_of(config: TileConfig) -> int:
    """How many slides are cut at the same time."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return config.processes or len(os.sched_getaffinity(0))
    return config.processes or os.cpu_count() or 1


def linked_twice(jobs: list[Job]) -> list[str]:
    """A line where files are there under several names."""
    links = [(name, job.id) for job in jobs for name in job.also]
    return (
        [
            f"{len(links)} links lead to files that are there under another name too (the first: "
            f"{links[0][0]} is {links[0][1]}); each file is cut once"
        ]
        if links
        else []
    )


def misspelt(datasets: set[str]) -> list[str]:
    """A line for each dataset whose name is nearly, but not quite, one of the catalogue's."""
    known = catalog.known_datasets()
    near = {name: catalog.nearest_name(name, known, cutoff=0.8) for name in sorted(datasets)}
    return [
        f"dataset {name} is not in the catalogue{guess}; under its own name, organ and stain are "
        "not known to `jaxhisto sample`"
        for name, guess in near.items()
        if guess and catalog.name_key(name) not in known
    ]


def _with_datasets(jobs: list[Job]) -> list[Job]:
    """The jobs with the first folder below the path given as their dataset."""
    named: list[Job] = []
    spelt: dict[str, str] = {}
    for job in jobs:
        dataset, below, _ = job.id.partition("/")
        if not below:
            raise SlideError(
                f"{job.path}: lies in no folder below the path given, so that "
                "--dataset-by-folder has no name for its dataset; give the folder above, or move it"
            )
        if (other := spelt.setdefault(catalog.name_key(dataset), dataset)) != dataset:
            raise SlideError(
                f"{job.path}: the folders {other} and {dataset} differ in spelling alone and would "
                "be one dataset; rename one, or put both in one"
            )
        named.append(dataclasses.replace(job, dataset=dataset))
    return named


def _refuse_bytes(path: Path) -> None:
    """A name that is no text could be stored in no tile, manifest or report."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise SlideError(f"{shown}: its name is not UTF-8; rename it (`convmv`)") from error


def _slides_below(root: Path) -> list[Path]:
    if os.path.isfile(root):  # not Path.is_file: it raises on a name that is too long
        return [root]
    if kind := special_kind(root):
        raise SlideError(f"{root}: is {kind}, no file; name a slide, or a folder with slides")
    if not os.path.isdir(root):
        raise SlideError(f"{root}: is not there; check the path")
    paths = [
        Path(folder) / name
        for folder, names in _folders(root)
        for name in sorted(names)
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    ]
    if not paths:
        raise SlideError(
            f"{root}: holds no slide (looked for {' '.join(SUFFIXES)}, in its folders too); give "
            "a folder with slides"
        )
    return paths


def _folders(root: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder, its files) of every folder below, each once and under its own name if it has one.

    Links to folders are followed, since a cohort is often put together of them; all real folders
    come first, and one that was seen is not entered again, so that a loop ends.
    """
    seen: set[str] = set()
    waiting = [str(root)]
    while waiting:
        links: list[str] = []
        for top in waiting:
            for folder, folders, files in os.walk(top, onerror=_unreadable_folder):
                real = os.path.realpath(folder)
                if real in seen:
                    folders.clear()
                    continue
                seen.add(real)
                folders.sort()
                links += [
                    p for p in (os.path.join(folder, f) for f in folders) if os.path.islink(p)
                ]
                yield folder, files
        waiting = sorted(links)


def _unreadable_folder(error: OSError) -> None:
    remedy = "check its rights"
    if error.errno == errno.ENAMETOOLONG:
        remedy = "shorten the names on the way, or give a folder further down by a relative path"
    raise SlideError(f"{error.filename}: cannot be read ({error.strerror}); {remedy}")


def _one_a_series(jobs: list[Job], config: TileConfig) -> list[Job]:
    """One job for all files of a DICOM series in a folder: OpenSlide opens them together.

    One more for those of the series that cannot be opened: they fail, and the others are a slide.
    """
    by_folder: dict[Path, list[Job]] = {}
    for job in jobs:
        if job.path.suffix.lower() == ".dcm":
            by_folder.setdefault(job.path.parent, []).append(job)
    many = [job for group in by_folder.values() if len(group) > 1 for job in group]
    if not many:
        return jobs
    answers = pool.run(
        dicom_series, [j.path for j in many], processes_of(config), config.slide_timeout
    )
    series: dict[tuple[Path, str, bool], list[Job]] = {}
    for answer in sorted(answers, key=lambda a: many[a.index].id):
        job = many[answer.index]
        uid, opens = answer.value or ("", False)
        series.setdefault((job.path.parent, uid or job.id, opens), []).append(job)
    whole = [
        dataclasses.replace(files[0], others=tuple(job.path for job in files[1:]))
        for files in series.values()
    ]
    grouped = {job.path for job in many}
    return [job for job in jobs if job.path not in grouped] + whole
