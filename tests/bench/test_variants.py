"""Variants of the step: what is tried, how it is judged, what becomes of one that fails."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from jaxhisto.bench import cost, report, variants
from jaxhisto.bench.child import OutOfMemory
from jaxhisto.bench.record import Record, Row, read_record, row_to_json, write_record
from jaxhisto.bench.variants import Variant, measured, outcome, settings_of, variants_of
from jaxhisto.errors import ConfigError, RunError
from jaxhisto.pretrain.xla import check_options

AT = {"model": "resnet18", "tile_px": 64, "batch": 8, "precision": "f32", "devices": 1}
STEM, SLOW, WRONG = Variant("a", "space_to_depth"), Variant("b", forms="plain"), Variant("c")


def row(seconds=(1.0, 1.1, 1.05), why="", worked=(), **settings):
    return Row("step", "jaxhisto", AT | settings, tuple(seconds), 8, why=why, cpu_seconds=worked)


def pair(variant, seconds, plain=(1.0, 1.1, 1.05), **settings):
    return (
        row(plain, beside=variant.name, loss=2.0),
        row(seconds, **settings_of(variant), loss=2.0, **settings),
    )


def test_kept_is_what_is_quicker_beyond_the_spread():
    """Against turns of 1.0 to 1.1 s: the slowest must take 0.98 s or less."""
    plain = row()
    for seconds, said in (
        ((0.9, 0.98), "yes"),
        ((0.9, 0.981), "no, not beyond the spread"),
        ((1.0, 1.1), "no, not beyond the spread"),
        ((1.13, 1.2), "no, slower"),
        ((1.12, 1.2), "no, not beyond the spread"),
        ((0.5, 0.7), "inconclusive"),  # 40 % between its own turns
    ):
        assert outcome(plain, row(seconds), on_cpu=False) == said, seconds
    assert outcome(row((1.0, 1.3)), row((0.5, 0.5)), on_cpu=False) == "inconclusive"
    assert outcome(plain, row((), why="XLA refuses"), on_cpu=True) == "no figure"
    assert outcome(None, row((0.5,)), on_cpu=True) == "no figure"


def test_where_others_took_the_clock_a_cpus_own_seconds_count():
    plain, quick = (row((1.0, 3.0), worked=w) for w in ((1.0, 1.1), (0.9, 0.98)))
    assert outcome(plain, quick, on_cpu=True) == "yes, by core s"
    assert outcome(quick, plain, on_cpu=True) == "no, slower, by core s"
    # On an accelerator they are those of the host, which only waits.
    assert outcome(plain, quick, on_cpu=False) == "inconclusive"
    assert outcome(plain, row((1.0, 3.0)), on_cpu=True) == "inconclusive"
    assert outcome(plain, row((1.0, 3.0), worked=(0.5, 0.7)), on_cpu=True) == "inconclusive"
    # The clock goes first where it says something.
    assert outcome(row(worked=(1.0,)), row((1.0,), worked=(0.5,)), on_cpu=True).startswith(
        "no, not"
    )


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_what_is_tried_is_named_once_and_well_formed(platform):
    one, four = (variants_of(platform, devices) for devices in (1, 4))
    assert len({v.name for v in four}) == len(four)
    assert one == four[: len(one)]
    assert (len(four) > len(one)) == (platform != "cpu")
    for variant in four:
        assert not any("fast_math" in option for option in variant.xla)
        if platform == "tpu":  # whose compiler is not here to ask
            continue
        try:
            check_options(variant.xla)
        except ConfigError as refused:  # a later XLA may drop a name; a value is never wrong
            assert "No such compile option" in str(refused), refused  # noqa: PT017
    assert (
        variants_of(platform, 1, ("xla_a=1", "xla_b=2"))[-1].flags == "--step.xla xla_a=1 xla_b=2"
    )


def asker(monkeypatch, *lives):
    """What child after child answers, and the jobs they were given; an error ends one."""
    jobs = []

    def ask(job, env):
        jobs.append(job)
        for answer in lives[len(jobs) - 1]:
            if isinstance(answer, Exception):
                raise answer
            yield {"row": row_to_json(answer)} if isinstance(answer, Row) else answer

    monkeypatch.setattr(variants, "ask", ask)
    return jobs


def test_where_the_process_ends_the_others_go_on(monkeypatch):
    ended = RunError("the process that measures ended with code -6 (Check failed); run it again.")
    jobs = asker(
        monkeypatch,
        [{"say": "the plain step ..."}, row(), *pair(STEM, (0.5, 0.5)), ended],
        [OutOfMemory()],
        [*pair(WRONG, (2.0, 2.0))],
    )
    more = Variant("d", xla=("xla_a=1",))
    found = list(measured(AT, (STEM, SLOW, more, WRONG), 2, 3))
    assert found[0] == "the plain step ..."
    assert [[v["name"] for v in job["variants"]] for job in jobs] == [
        ["a", "b", "d", "c"], ["d", "c"], ["c"],
    ]  # fmt: skip
    assert [job["first"] for job in jobs] == [True, False, False]
    rows = {r.settings["variant"]: r for r in found[1:] if "variant" in r.settings}
    assert list(rows) == ["a", "b", "d", "c"]
    assert rows["b"].why == "the process that measures ended with code -6 (Check failed)"
    assert rows["d"].why == "out of memory"
    assert rows["d"].settings["flags"] == "--step.xla xla_a=1"
    assert rows["c"].seconds == (2.0, 2.0)


def test_a_plain_step_that_fails_ends_it(monkeypatch):
    asker(monkeypatch, [RunError("the process ended.")])
    with pytest.raises(RunError, match="the process ended"):
        list(measured(AT, (STEM,), 1, 3))
    for life in ([OutOfMemory()], [row((), why="out of memory")]):
        asker(monkeypatch, life)
        (found,) = measured(AT, (STEM,), 1, 3)
        assert (found.why, "variant" in found.settings) == ("out of memory", False)


def made():
    refused = row((), why="XLA refuses: No such compile option: 'xla_a'", **settings_of(
        Variant("e", xla=("xla_a=1",))))  # fmt: skip
    rows = (
        row((4.0, 4.0)),
        *pair(STEM, (0.5, 0.5)),
        *pair(SLOW, (2.0, 2.0), plain=(1.5, 1.5)),
        refused,
    )
    machine = {"device": "made", "platform": "cpu", "cores": 1, "date": "2026-11-25"}
    return Record({}, machine, rows)


def test_the_report_has_a_table_of_them(tmp_path):
    write_record(tmp_path / "v.json", made())
    text = report.write_report([tmp_path / "v.json"], tmp_path / "v.md").read_text()
    part = text.split("### Variants of the step, by turns")[1].split("##")[0]
    lines = [[c.strip() for c in line[1:-1].split("|")] for line in part.splitlines() if line]
    head, _, *body = lines
    stem, slow, refused = (dict(zip(head, line, strict=True)) for line in body)
    assert (stem["variant"], stem["kept"], stem["time / plain"]) == ("a", "yes", "0.476")
    assert (stem["set by"], stem["loss off by"]) == ("`--step.stem space_to_depth`", "0e+00")
    assert (slow["kept"], slow["plain, s"], slow["set by"]) == ("no, slower", "1.5", "")
    assert refused["kept"] == "no figure: XLA refuses: No such compile option: 'xla_a'"
    # They are in no other table: the step has one row there, and nothing was trained from a store.
    assert text.count("| step | jaxhisto |") == 1
    assert "Training from a store" not in text.split("## How it is counted")[0]


def test_a_recipes_cost_is_never_that_of_a_variant():
    recipe = cost.read_recipe("pretrain_resnet18")
    (speed,) = cost.speeds_of(made(), recipe)
    assert "variant" not in speed.row.settings


def test_options_that_are_none_are_refused_before_anything_is_measured(jaxhisto, tmp_path):
    out = tmp_path / "v.json"
    code, _, err = jaxhisto("bench", "--variants", "--xla", "fast", "--out", out)
    assert code == 2
    assert err.startswith("jaxhisto bench: --xla fast: is no NAME=VALUE of an XLA option")
    assert not out.exists()


@pytest.mark.slow
def test_as_a_process_of_its_own(tmp_path, monkeypatch, jaxhisto):
    """The stem and an option that XLA refuses, of a tiny network; and then the report."""
    monkeypatch.setitem(variants.ON, "cpu", ())
    out = tmp_path / "v.json"
    code, said, err = jaxhisto(
        "bench", "--variants", "--models", "resnet10", "--tile-px", 32, "--batch-sizes", 4,
        "--repeats", 3, "--xla", "xla_no_such_thing=1", "--out", out,
    )  # fmt: skip
    assert code == 0, err
    rows = read_record(out).rows
    assert [r.settings.get("variant", r.settings.get("beside")) for r in rows] == [
        None, "stem by space-to-depth", "stem by space-to-depth", "as given",
    ]  # fmt: skip
    plain, beside, stem, refused = rows
    assert [len(r.seconds) for r in rows] == [3, 3, 3, 0]
    assert refused.why == "XLA refuses: No such compile option: 'xla_no_such_thing'"
    assert beside.settings["loss"] == plain.settings["loss"]
    # Another order of sums, in the second step after an update: no more than that.
    assert stem.settings["loss"] == pytest.approx(plain.settings["loss"], rel=1e-3)
    assert stem.flops == plain.flops
    assert "stem by space-to-depth: kept: " in said
    done = subprocess.run(
        [sys.executable, "-m", "jaxhisto.bench", "--report", out, "--out", tmp_path / "v.md"],
        env=dict(os.environ), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "v.md").read_text()
    assert "| no figure: XLA refuses: No such compile option" in text
