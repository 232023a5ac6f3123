"""`jaxhisto bench --growth`, `--variants` and `--recipe`: what has a purpose, and its record."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

from jaxhisto.bench.cost import Speed
from jaxhisto.bench.record import Record, read_record, write_record
from jaxhisto.bench.verdict import verdicts
from jaxhisto.bench_config import BenchConfig
from jaxhisto.config import PretrainConfig
from jaxhisto.console import say
from jaxhisto.errors import RunError

SMALL_SIDE = 32
"""Side of growth's tiles on a CPU, px, where none is given: at 224 px a batch takes long."""


def run_growth(config: BenchConfig) -> Path:
    """Measures how a step grows around the first model and side that the settings name.

    Several sides or models are those to grow over, in place of the usual ones.

    Returns:
      The record's path; `growth` in it is as `growth.measure_growth` gives it.

    Raises:
      RunError: a process that measures ended, and not for want of memory.
    """
    from jaxhisto.bench import run
    from jaxhisto.bench.growth import BATCHES, MODELS, SIDES, measure_growth, series_of

    run.limit_cores(config.threads)
    path = Path(config.out or "growth.json")
    machine = run.machine_of(dataclasses.replace(config, stages=()))
    say(run.heading(machine))
    sizes = config.batch_sizes or BATCHES
    on_cpu = machine["platform"] == "cpu"
    base = run.completed(dataclasses.replace(config, batch_sizes=()), machine)
    usual = config.tile_px == BenchConfig().tile_px
    point = {
        "model": config.models[0],
        "tile_px": SMALL_SIDE if on_cpu and usual else config.tile_px[0],
        "batch": base.batch_sizes[0],
        "precision": base.precision,
        "devices": base.devices,
    }
    record = Record(run.said_settings(base), machine)
    write_record(path, record)  # a folder that cannot be written is said before, not after
    env = run.devices_env(base, machine)
    sides = config.tile_px if len(config.tile_px) > 1 else SIDES
    models = config.models if len(config.models) > 1 else MODELS
    series = series_of(point, sizes, sides, models)
    found = measure_growth(series, config.repeats, config.limit, env)
    write_record(path, dataclasses.replace(record, more={"growth": found}))
    return path


def run_variants(config: BenchConfig) -> Path:
    """Measures the step in its variants, at each model, side and batch.

    Returns:
      The record's path; the rows of variants hold `variant` and `flags`.

    Raises:
      ConfigError: options that are none. RunError: the plain step cannot be measured.
    """
    from jaxhisto.bench import run, variants
    from jaxhisto.pretrain.xla import parsed

    parsed(config.xla, "--xla")
    run.check(config)
    run.limit_cores(config.threads)
    path = Path(config.out or "variants.json")
    machine = run.machine_of(dataclasses.replace(config, stages=("step",)))
    say(run.heading(machine))
    base = run.completed(config, machine)
    # Steps of a turn: on a CPU one is long enough, on an accelerator one is mostly its launch.
    steps = config.steps or (1 if machine["platform"] == "cpu" else base.steps)
    record = Record(run.said_settings(dataclasses.replace(base, steps=steps)), machine)
    write_record(path, record)
    env = run.devices_env(base, machine)
    tried = variants.variants_of(machine["platform"], base.devices, config.xla)
    for side, batch, model in itertools.product(base.tile_px, base.batch_sizes, base.models):
        point = {"model": model, "tile_px": side, "batch": batch, "precision": base.precision,
                 "devices": base.devices}  # fmt: skip
        for found in variants.measured(point, tried, steps, config.repeats, env):
            if isinstance(found, str):
                say(f"{run.described(point)}: {found}")
                continue
            say(f"{run.described(point)}: {run.line_of(found)}")
            record = dataclasses.replace(record, rows=(*record.rows, found))
            record = dataclasses.replace(record, verdict=verdicts(record))
            write_record(path, record)
    for row in record.rows:
        if "variant" in row.settings:
            plain = variants.plain_of(row, record.rows)
            kept = variants.outcome(plain, row, machine["platform"] == "cpu")
            say(f"{run.described(row.settings)}, {row.settings['variant']}: kept: {kept}")
    return path


def run_cost(config: BenchConfig) -> Path:
    """Projects what a recipe costs, from a record or from a few steps measured now.

    Returns:
      The path of a record whose `cost` has the projections: the one given with them added where
      it is the source.

    Raises:
      ConfigError: no such recipe. RunError: no such record, or none with a step of ours.
    """
    from jaxhisto.bench import cost

    recipe = cost.read_recipe(config.recipe)
    tiles = config.tiles or cost.tiles_of(config.stores)
    if config.record:
        record = read_record(config.record)
        speeds = cost.speeds_of(record, recipe)
    else:
        record, speeds = measured_now(config, recipe)
    found = cost.costs(recipe, Path(config.recipe).stem, tiles, speeds)
    for one in found:
        say(cost.line_of(one))
    path = Path(config.out or "cost.json")
    if path.resolve() == Path(config.record or ".").resolve():
        raise RunError(f"--out {path}: is --record too; give the costs a file of their own.")
    more = {**record.more, "cost": found}
    write_record(path, dataclasses.replace(record, more=more))
    return path


def measured_now(config: BenchConfig, recipe: PretrainConfig) -> tuple[Record, list[Speed]]:
    """A record of a few steps of the recipe, and their speed and energy."""
    from jaxhisto.bench import cost, run

    run.limit_cores(config.threads)
    machine = run.machine_of(dataclasses.replace(config, stages=()))
    say(run.heading(machine))
    base = run.completed(config, machine)
    env = run.devices_env(base, machine)
    speed = cost.measure_speed(recipe, machine, base.devices, config.repeats, env)
    say(run.line_of(speed.row))
    return Record(run.said_settings(base), machine, rows=(speed.row,)), [speed]
