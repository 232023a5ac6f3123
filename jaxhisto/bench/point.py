"""One setting of the sweep, measured in a process of its own: job on stdin, rows on stdout.

A process of its own, because what runs out of memory may end it (the system's OOM killer, an
allocator that aborts), and the sweep goes on; and because an accelerator's peak memory is that of
a process's life. One line of JSON an answer: {"say": text}, {"row": ..}, {"machine": ..} or
{"error": sentence, "kind": name of its class}.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from jaxhisto.bench import memory
from jaxhisto.bench.record import OF_DATA, OF_MODEL, OURS, Row, row_to_json
from jaxhisto.bench.runner import Runner, attempt, measure
from jaxhisto.errors import JaxhistoError

Answer = Callable[..., None]


def main() -> int:
    """Does the job on stdin; 0, or 1 once the error has been told."""
    answer = answers()
    job = json.loads(sys.stdin.read())
    try:
        if job["what"] == "machine":
            from jaxhisto.bench.machine import describe
            from jaxhisto.bench.ours import cores

            answer(machine=describe(cores(), job["peaks"]))
        elif job["what"] == "growth":
            from jaxhisto.bench.growth_child import entries

            for entry in entries(job):
                answer(entry=entry)
        elif job["what"] == "variants":
            from jaxhisto.bench import variants_child

            for row in variants_child.rows(job, lambda text: answer(say=text)):
                answer(row=row_to_json(row))
        elif job["what"] == "cost":
            from jaxhisto.bench import cost_child

            for one in cost_child.answers(job):
                answer(**one)
        else:
            for row in rows_of(job, lambda text: answer(say=text)):
                answer(row=row_to_json(row))
    except JaxhistoError as error:
        answer(error=str(error), kind=type(error).__name__)
        return 1
    return 0


def answers() -> Answer:
    """What writes a line to the parent; whatever else is printed goes to stderr from here on."""
    lines = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(**line: Any) -> None:
        print(json.dumps(line), file=lines, flush=True)

    return answer


def rows_of(job: Mapping[str, Any], say: Callable[[str], None]) -> Iterator[Row]:
    """The rows of a job, stage by stage, ours and the peers' by turns."""
    from jaxhisto.bench.ours import Point, Setup

    point = Point(**job["point"])
    settings = dict(job["point"])
    setup = attempt_setup(lambda: Setup(point), settings)
    stages = [stage for stage in (*OF_DATA, *OF_MODEL, "compile") if stage in job["stages"]]
    if isinstance(setup, str):
        yield from (Row(stage, OURS, settings, why=setup) for stage in stages)
        return
    with closing(Source(job)) as source:
        for stage in stages:
            say(f"{stage} ...")
            runners = prepared(stage, setup, source, job)
            yield from measure(runners, job["repeats"], say)
            for runner in runners:
                if isinstance(runner, Runner):
                    runner.close()


def attempt_setup(make: Callable[[], Any], settings: Mapping[str, Any]) -> Any:
    """The setup, or why there is none."""
    found: Any = attempt(make, "step", OURS, settings)
    return found.why if isinstance(found, Row) else found


class Source:
    """The tiles of a job, opened when a stage first asks for them."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self._job = job
        self._opened: Any = None
        self._jpegs: dict[str, str] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="jaxhisto-jpegs-")

    def close(self) -> None:
        """Removes what it wrote."""
        self._folder.cleanup()

    def open(self) -> Any:
        """An `inputs.Input`.

        Raises:
          StoreError, ImportError: as `inputs.open_input`.
        """
        if self._opened is None:
            from jaxhisto.bench.inputs import open_input

            job = self._job
            tile_px = job["point"]["tile_px"]
            self._opened = open_input(job["stores"], job["made"], tile_px, job["count"])
        return self._opened

    def files(self) -> dict[str, str]:
        """Where a DataLoader finds the tiles: {"store", "files": the same JPEGs as files}.

        Empty values where there is no tile store.
        """
        if self._jpegs is None:
            from jaxhisto.bench.peers import jpeg_folder

            paths = [*self._job["stores"], *filter(None, [self._job["made"]])]
            stores = [path for path in paths if (Path(path) / "manifest.json").is_file()]
            self._jpegs = {"store": "", "files": ""}
            if stores:
                folder = Path(self._folder.name)
                self._jpegs = {"store": stores[0], "files": jpeg_folder(stores[0], folder)}
        return self._jpegs


def prepared(stage: str, setup: Any, source: Source, job: Mapping[str, Any]) -> list[Runner | Row]:
    """The runners of a stage that take turns: ours, then the peers.

    `pipeline` has one for each cache, and the step on tiles that are there: whether the input
    costs anything is seen beside it, not minutes later.
    """
    settings = setup.settings
    if stage == "read":
        makes = [(settings, partial(reading, setup, source, job))]
    elif stage == "pipeline":
        beside = settings | {"beside": "pipeline"}
        makes = [(beside, partial(beside_step, setup, job))]
        for cache in job["cache"]:
            makes.append((settings | {"cache": cache}, partial(piped, setup, source, cache, job)))
    else:
        makes = [(settings, partial(setup.runner, stage))]
    found = [attempt(make, "step" if "beside" in of else stage, OURS, of) for of, make in makes]
    return [*found, *peers_of(stage, found[-1].settings, source, job)]


def reading(setup: Any, source: Source, job: Mapping[str, Any]) -> Any:
    """The runner of `read`."""
    from jaxhisto.bench.inputs import read_runner

    return read_runner(source.open(), setup.point.tile_px, setup.point.batch, job["steps"])


def beside_step(setup: Any, job: Mapping[str, Any]) -> Any:
    """The step that takes turns with `pipeline`."""
    from jaxhisto.bench.inputs import beside_runner

    return beside_runner(setup, job["steps"])


def piped(setup: Any, source: Source, cache: str, job: Mapping[str, Any]) -> Any:
    """The runner of `pipeline` with a cache."""
    from jaxhisto.bench.inputs import pipeline_runner

    return pipeline_runner(setup, source.open(), cache, job["steps"])


def peers_of(
    stage: str, settings: Mapping[str, Any], source: Source, job: Mapping[str, Any]
) -> Iterator[Runner | Row]:
    """The peers asked for that have this stage, prepared for the same setting."""
    from jaxhisto.bench import peers

    wanted = [who for who in peers.peers_of(stage) if who in job.get("peers", ())]
    if not wanted:
        return
    import jax

    more: dict[str, Any] = {"platform": jax.default_backend()}
    if stage in ("read", "pipeline"):
        images = settings["batch"] * job["steps"]
        more |= {"cache": "none", "images": images, **source.files()}
    for who in wanted:
        yield peers.prepare_peer(stage, {**settings, **more}, who, job.get("peer_envs"))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception as error:  # the parent takes the last line as the reason
        if memory.is_out_of_memory(error):
            sys.exit(memory.EXIT)
        raise
