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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from jaxhisto.bench import memory
from jaxhisto.bench.record import GIVEN, OF_DATA, OF_MODEL, OURS, Row, row_to_json
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
    import jax

    from jaxhisto.bench.ours import Point, Setup

    point = Point(**job["point"])
    settings = dict(job["point"])
    calls = 1 if jax.default_backend() == "cpu" else job["steps"]
    setup = attempt_setup(lambda: Setup(point, calls=calls), settings)
    stages = [stage for stage in (*OF_DATA, *OF_MODEL, "compile") if stage in job["stages"]]
    if isinstance(setup, str):
        yield from (Row(stage, OURS, settings, why=setup) for stage in stages)
        return
    with closing(Source(job)) as source:
        for stage in parts_of(stages, job.get("peers", ())):
            say(f"{stage} ...")
            yield from measured(stage, setup, source, job, say)


def parts_of(stages: Sequence[str], peers: Sequence[str]) -> list[str]:
    """The stages, and after the step that on given views, if a peer takes it.

    There both sides do the same: on a GPU without kornia, a peer's own views are made image by
    image, and a ratio of whole steps is one of that.
    """
    from jaxhisto.bench.peers import peers_of

    found = list(stages)
    if "step" in found and set(peers_of("step")) & set(peers):
        found.insert(found.index("step") + 1, GIVEN)
    return found


def measured(
    stage: str, setup: Any, source: Source, job: Mapping[str, Any], say: Callable[[str], None]
) -> Iterator[Row]:
    """The rows of a stage. What its runners hold is freed before the next stage's are prepared.

    Memory may be out for what others hold that take turns: ours is then measured again alone.
    """
    makes = ours_of(stage, setup, source, job)
    runners = prepared(stage, makes, source, job)
    rows = measure(runners, job["repeats"], say)
    for runner in runners:
        if isinstance(runner, Runner):
            runner.close()
    del runners
    beside = [row for row in rows if row.who != OURS and row.peak_bytes]
    for i, row in enumerate(rows):
        if row.why not in (memory.OUT, memory.NO_ALGORITHM):
            yield row
        elif row.who == OURS and beside:
            name, settings, make = makes[i]
            say(f"{row.stage}: {row.why} beside {named(beside)}; alone ...")
            settings = {**settings, "alone": True}
            yield from measure([again(make, name, settings)], job["repeats"], say)
        elif row.who == OURS:
            yield row
        else:
            held = [*(one for one in rows if one.who == OURS and one.peak_bytes), *beside]
            yield replace(row, why=f"{row.why}, beside {named(held)}" if held else row.why)


def again(make: Callable[[], Any], stage: str, settings: Mapping[str, Any]) -> Runner | Row:
    """What ran out of memory, made once more with settings that say so."""
    made = attempt(make, stage, OURS, settings)
    return replace(made, settings={**made.settings, **settings})


def named(rows: Sequence[Row]) -> str:
    """`pytorch (holding 31 GB)`."""
    return " and ".join(f"{row.who} (holding {(row.peak_bytes or 0) / 1e9:.0f} GB)" for row in rows)


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


Make = tuple[str, Mapping[str, Any], Callable[[], Any]]


def prepared(
    stage: str, makes: Sequence[Make], source: Source, job: Mapping[str, Any]
) -> list[Runner | Row]:
    """The runners of a stage that take turns: ours, then the peers."""
    found = [attempt(make, name, OURS, of) for name, of, make in makes]
    return [*found, *peers_of(stage, found[-1].settings, source, job)]


def ours_of(stage: str, setup: Any, source: Source, job: Mapping[str, Any]) -> list[Make]:
    """The stage of a row, its settings, and what makes its runner, for each of ours.

    `pipeline` has one for each cache, and the step on tiles that are there: whether the input
    costs anything is seen beside it, not minutes later.
    """
    settings = setup.settings
    if stage == "read":
        return [(stage, settings, partial(reading, setup, source, job))]
    if stage == GIVEN:
        return [("step", settings | {"beside": GIVEN}, partial(setup.runner, "given"))]
    if stage != "pipeline":
        return [(stage, settings, partial(setup.runner, stage))]
    setup.drop_views()
    makes: list[Make] = [
        ("step", settings | {"beside": "pipeline"}, partial(beside_step, setup, job))
    ]
    for cache in job["cache"]:
        of = settings | {"cache": cache}
        makes.append((stage, of, partial(piped, setup, source, cache, job)))
    return makes


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

    given, stage = stage == GIVEN, "step" if stage == GIVEN else stage
    wanted = [who for who in peers.peers_of(stage) if who in job.get("peers", ())]
    if not wanted:
        return
    import jax

    more: dict[str, Any] = {"platform": jax.default_backend()}
    if given:
        more |= {"augment": False}
    if stage in ("read", "pipeline"):
        more |= {"cache": "none", "images": settings["batch"] * job["steps"]}

    def prepared(who: str) -> Runner:
        files = source.files() if stage in ("read", "pipeline") else {}
        of = {**settings, **more, **files}
        return peers.prepare_peer(stage, of, who, job.get("peer_envs"))  # type: ignore[return-value]

    for who in wanted:  # what stops a peer stops no figure of ours
        yield attempt(partial(prepared, who), stage, who, {**settings, **more})


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception as error:  # the parent takes the last line as the reason
        if memory.is_out_of_memory(error):
            sys.exit(memory.EXIT)
        raise
