"""The slides cut by Apache Beam in place of the local pool, on whatever runner the flags name.

Beam moves only the numbers of batches. The jobs of a batch and their answers are files in
STORE/unfinished/beam, since the workers write the parts into STORE/unfinished anyway: slides and
store lie on a disk that all workers see. On a worker each batch has a supervised process of its
own, so that a slide which hangs or crashes costs only itself there too.
"""

from __future__ import annotations

import pickle
import shlex
import shutil
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jaxhisto.data.durable import settle, temporary_name, writing
from jaxhisto.data.store import UNFINISHED
from jaxhisto.errors import ConfigError, SlideError, StoreError
from jaxhisto.slides import pool

Job = TypeVar("Job")
Value = TypeVar("Value")

BATCH = 16  # slides a process is started for: its imports take about a second
SPREAD = 64  # batches at least, where there are so many slides: for workers of unequal speed


def run(
    function: Callable[[Job], Value],
    jobs: Sequence[Job],
    store: Path,
    flags: str,
    timeout: float,
) -> Generator[pool.Answer[Value], None, None]:
    """Runs function(job) for each job on a Beam runner; yields the answers when all are done.

    Args:
      function: importable by name on the workers, and it must be harmless to run it twice.
      jobs: what can be pickled.
      store: whose `unfinished` folder all workers can write.
      flags: of the runner, as on a command line.
      timeout: seconds a job may take.

    Raises:
      ConfigError: Beam is not installed.
      StoreError: the store cannot be written.
      SlideError: the runner gave up.
    """
    if not jobs:
        return
    folder = store / UNFINISHED / "beam"
    shutil.rmtree(folder, ignore_errors=True)
    with writing(store):
        folder.mkdir(parents=True)
    size = max(1, min(BATCH, len(jobs) // SPREAD))
    starts = range(0, len(jobs), size)
    for number, start in enumerate(starts):
        _write(store, folder / f"{number}.jobs", jobs[start : start + size])
    failure = _drive(function, store, len(starts), flags, timeout)
    answered = 0
    for number, start in enumerate(starts):
        file = folder / f"{number}.answers"
        for answer in pickle.loads(file.read_bytes()) if file.is_file() else ():
            answered += 1
            yield pool.Answer(start + answer.index, answer.value, answer.error)
    if answered < len(jobs):
        why = f"{type(failure).__name__}: {failure}" if failure else "it left some out"
        raise SlideError(
            f"--beam {flags}: the runner gave up with {len(jobs) - answered} of {len(jobs)} slides "
            f"not tried ({why.splitlines()[0][:300]}); see to it and run the same command again, "
            "which keeps the slides that are finished"
        )
    shutil.rmtree(folder, ignore_errors=True)


def _drive(
    function: Callable[[Any], Any], store: Path, batches: int, flags: str, timeout: float
) -> Exception | None:
    """Runs the pipeline to its end; returns what the runner raised."""
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ConfigError(
            f"--beam: Apache Beam is not here ({error}); pip install 'jaxhisto[beam]', or leave "
            "--beam out"
        ) from error
    try:
        with beam.Pipeline(options=PipelineOptions(shlex.split(flags))) as pipeline:
            numbers = pipeline | "batches" >> beam.Create(range(batches))
            spread = numbers | "spread" >> beam.Reshuffle()
            _ = spread | "cut" >> beam.Map(cut_batch, function, str(store), timeout)
    except Exception as error:  # a runner raises what it likes
        return error
    return None


def cut_batch(number: int, function: Callable[[Any], Any], store: str, timeout: float) -> int:
    """Runs on a worker: the jobs of one batch, one after the other; returns its number.

    Raises:
      StoreError: the store cannot be written, which no other batch can either.
    """
    folder = Path(store) / UNFINISHED / "beam"
    jobs = pickle.loads((folder / f"{number}.jobs").read_bytes())
    answers = list(pool.run(function, jobs, processes=1, timeout=timeout))
    _write(Path(store), folder / f"{number}.answers", answers)
    for answer in answers:
        if isinstance(answer.error, StoreError):
            raise answer.error
    return number


def _write(store: Path, file: Path, value: Any) -> None:
    with writing(store):
        temporary = temporary_name(file)
        temporary.write_bytes(pickle.dumps(value))
        settle(temporary, file)
