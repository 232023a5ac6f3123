"""The verbs of this stage for the command line; importing them loads no JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from shlex import quote

from jaxhisto.console import say, say_next, warn
from jaxhisto.downstream_config import EmbedConfig, ProbeConfig, StudyConfig
from jaxhisto.flags import parse


def embed(argv: Sequence[str]) -> int:
    """tiles, images or whole slides -> their features in an HDF5 file"""
    config = parse(EmbedConfig, argv, "embed")
    from jaxhisto.downstream.embed import embed as run

    done = run(config)
    kept = f", {done.earlier:,} of them from an earlier start" if done.earlier else ""
    say(f"{done.out}: {done.rows:,} x {done.width} features{kept}")
    if done.per_slide:
        say(f"{config.per_slide}: {len(done.per_slide):,} slides")
    say_next(f"jaxhisto probe {quote(str(done.out))} --task.data FOLDER --out probe.json")
    return 0


def probe(argv: Sequence[str]) -> int:
    """what frozen features are worth on a task: last layer, linear probe, neighbours"""
    config = parse(ProbeConfig, argv, "probe")
    from jaxhisto.downstream.probe import run_probe

    run_probe(config)
    say(f"wrote {config.out}")
    return 0


def study(argv: Sequence[str]) -> int:
    """encoders x tasks x shares of the labels: tables, figures, intervals, tests"""
    config = parse(StudyConfig, argv, "study", recipe=False)
    from jaxhisto.downstream.study import run_study

    done = run_study(config)
    if config.plan:
        return 0
    say(f"{done.out / 'report.html'}: {done.cells - len(done.failures):,} of {done.cells:,} cells")
    if done.failures:
        warn(f"{len(done.failures):,} cells failed, as {done.out / 'failures.json'} says; the same "
             "line tries them again")  # fmt: skip
    return 1 if done.failures else 0


VERBS: tuple[Callable[[Sequence[str]], int], ...] = (embed, probe, study)
