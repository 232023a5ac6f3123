"""The sweep: what is measured, in which order, and the record that grows with it."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxhisto.bench import memory
from jaxhisto.bench.child import OutOfMemory, ask
from jaxhisto.bench.peers import peer_envs
from jaxhisto.bench.record import (
    OF_DATA,
    OF_MODEL,
    OURS,
    STAGES,
    Record,
    Row,
    row_from_json,
    write_record,
)
from jaxhisto.bench.runner import Runner, measure, missing
from jaxhisto.bench.verdict import verdicts
from jaxhisto.bench_config import BenchConfig
from jaxhisto.console import counted, say
from jaxhisto.errors import ConfigError, RunError, StoreError

CPU_BATCHES, ACCELERATOR_BATCHES = (32,), (256, 512, 1024)
HELP = "import sys; from jaxhisto.cli import main; sys.exit(main(['--help']))"


def run_bench(config: BenchConfig) -> Path:
    """Measures what the settings ask for, and writes the record after each part of it.

    Returns:
      The record's path.

    Raises:
      ConfigError: stages or models of which there are none.
      StoreError: a store that is missing or damaged.
      RunError: a process that measures ended, and not for want of memory.
    """
    check(config)
    limit_cores(config.threads)
    path = Path(config.out or "bench.json")
    machine = machine_of(config)
    say(heading(machine))
    config = completed(config, machine)
    record = Record(said_settings(config), machine)
    write_record(path, record)  # what cannot be written is said now, not after hours
    with made_stores(config) as made:
        for rows in parts(config, machine, made):
            record = dataclasses.replace(record, rows=in_order((*record.rows, *rows)))
            record = dataclasses.replace(record, verdict=verdicts(record))
            write_record(path, record)
    for verdict in record.verdict.get("of", ()):
        say(f"{described(verdict['settings'])}: {verdict['says']}")
    return path


def check(config: BenchConfig) -> None:
    """Refuses what could only fail later."""
    peer_envs(config.peer_env)
    for name in ("stages", "models", "tile_px", "cache"):
        if not getattr(config, name):
            raise ConfigError(f"--{name.replace('_', '-')}: names nothing; leave it out for all.")
    folder = Path(config.out or "bench.json").parent
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder; make it, or give --out another place.")
    for store in config.stores:
        if not store.startswith("tfds:") and not Path(store).expanduser().exists():
            raise StoreError(f"{store}: no such file or folder; give --stores what `jaxhisto tile` "
                             "wrote, or leave it out for made tiles.")  # fmt: skip


def limit_cores(threads: int) -> None:
    """Keeps this process and its children to so many cores; 0: as it is."""
    if threads and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def machine_of(config: BenchConfig) -> dict[str, Any]:
    """Device, versions and peaks, from a process of its own: this one never takes a device."""
    needed = {"forward", "backward", "step", "augment", "optimizer"} & set(config.stages)
    say("looking at the machine" + (" and measuring its peaks" if needed else ""))
    machine: dict[str, Any] = {}
    for answer in ask({"what": "machine", "peaks": bool(needed)}):
        machine |= answer.get("machine", {})
    return machine


def heading(machine: Mapping[str, Any]) -> str:
    """What is measured, as a line; that there is no accelerator, as another."""
    peaks = machine["peaks"]
    line = f"{machine['device']} x {len(machine['devices'])}, {counted(machine['cores'], 'core')}"
    if peaks:
        products = ", ".join(f"{kind} {value:.3g}" for kind, value in peaks["tflops"].items())
        line += f"; products at most {products} TFLOP/s, memory {peaks['gb_per_s']:.3g} GB/s"
    if machine["platform"] == "cpu":
        line = (
            "no accelerator: JAX finds CPUs alone, and those are measured (with an NVIDIA GPU, "
            f"pip install 'jaxhisto[cuda]')\n{line}"
        )
    return line


def completed(config: BenchConfig, machine: Mapping[str, Any]) -> BenchConfig:
    """The settings with what depends on the machine filled in.

    Raises:
      ConfigError: a batch that the devices cannot share.
    """
    on_cpu = machine["platform"] == "cpu"
    precision = ("f32" if on_cpu else "bf16") if config.precision == "auto" else config.precision
    batches = config.batch_sizes or (CPU_BATCHES if on_cpu else ACCELERATOR_BATCHES)
    devices = config.devices or (1 if on_cpu else len(machine["devices"]))
    for batch in batches:
        if batch % devices:
            raise ConfigError(
                f"--batch-sizes {batch} does not divide among {devices} devices; take a multiple."
            )
    return dataclasses.replace(
        config,
        precision=precision,
        batch_sizes=tuple(sorted(set(batches))),
        devices=devices,
        steps=config.steps or (4 if on_cpu else 20),
    )


def said_settings(config: BenchConfig) -> dict[str, Any]:
    """The settings for the record, without paths."""
    table = dataclasses.asdict(config)
    for name in ("out", "report", "recipe", "record"):
        del table[name]
    own = sorted(item.partition("=")[0] for item in config.peer_env)
    return table | {"stores": len(config.stores), "peer_env": own}


@contextmanager
def made_stores(config: BenchConfig) -> Iterator[dict[int, str]]:
    """By side of a tile, a store of made tiles; none where stores are given or cannot be made."""
    with tempfile.TemporaryDirectory(prefix="jaxhisto-bench-") as folder:
        made: dict[int, str] = {}
        if not config.stores and {"read", "pipeline"} & set(config.stages):
            for side in config.tile_px:
                try:
                    from jaxhisto.bench.made import made_store

                    path = Path(folder) / f"made-{side}"
                    made[side] = str(made_store(path, side, made_count(config)))
                except ImportError as error:
                    say(f"no store can be made ({missing(error)}): tiles in memory instead")
                    break
        yield made


def made_count(config: BenchConfig) -> int:
    """Tiles to make: no batch twice the same tile, within reason."""
    from jaxhisto.bench.made import MADE, MOST

    return min(max(MADE, *config.batch_sizes), MOST)


def parts(
    config: BenchConfig, machine: Mapping[str, Any], made: Mapping[int, str]
) -> Iterator[list[Row]]:
    """The rows, part by part."""
    stages = set(config.stages)
    if "startup" in stages:
        yield start_up(config)
    for side, batch in itertools.product(config.tile_px, config.batch_sizes):
        for i, model in enumerate(config.models):
            wanted = [s for s in OF_MODEL if s in stages]
            wanted += [s for s in OF_DATA if s in stages and i == 0]
            job = job_of(config, made, model, side, batch, wanted)
            yield from point(config, machine, job)
            if "compile" in stages and batch == config.batch_sizes[0]:
                yield from compilation(config, machine, {**job, "stages": ["compile"]})


def job_of(
    config: BenchConfig,
    made: Mapping[int, str],
    model: str,
    side: int,
    batch: int,
    stages: Sequence[str],
) -> dict[str, Any]:
    """What a child needs to know."""
    return {
        "what": "point",
        "point": {
            "model": model,
            "tile_px": side,
            "batch": batch,
            "precision": config.precision,
            "devices": config.devices,
        },
        "stages": list(stages),
        "stores": [str(Path(s).expanduser()) for s in config.stores],
        "made": made.get(side, ""),
        "count": made_count(config),
        "cache": list(config.cache),
        "steps": config.steps,
        "repeats": config.repeats,
        "peers": list(config.peers),
        "peer_envs": peer_envs(config.peer_env),
    }


def point(
    config: BenchConfig,
    machine: Mapping[str, Any],
    job: Mapping[str, Any],
    env: Mapping[str, str] | None = None,
) -> Iterator[list[Row]]:
    """The rows of a child, one by one; what a child that ran out of memory owes, in one."""
    if not job["stages"]:
        return
    done: list[str] = []
    name = described(job["point"])
    try:
        for answer in ask(job, {**devices_env(config, machine), **(env or {})}):
            if "say" in answer:
                say(f"{name}: {answer['say']}")
            elif "row" in answer:
                row = row_from_json(answer["row"])
                done.append(row.stage)
                say(f"{name}: {line_of(row)}")
                yield [row]
    except OutOfMemory:
        say(f"{name}: {memory.OUT}; going on with the next")
        owed = [stage for stage in job["stages"] if stage not in done]
        yield [Row(stage, OURS, job["point"], why=memory.OUT) for stage in owed]


def compilation(
    config: BenchConfig, machine: Mapping[str, Any], job: Mapping[str, Any]
) -> Iterator[list[Row]]:
    """Compilation with a cache on disk that is empty, then with what it left there."""
    with tempfile.TemporaryDirectory(prefix="jaxhisto-bench-") as folder:
        env = {
            "JAX_COMPILATION_CACHE_DIR": folder,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        yield from point(config, machine, job, env)


def devices_env(config: BenchConfig, machine: Mapping[str, Any]) -> dict[str, str]:
    """Several devices of one CPU have to be asked for before JAX starts."""
    if machine["platform"] != "cpu":
        return {}
    given = [
        flag
        for flag in os.environ.get("XLA_FLAGS", "").split()
        if not flag.startswith("--xla_force_host_platform_device_count")
    ]
    given.append(f"--xla_force_host_platform_device_count={config.devices}")
    return {"XLA_FLAGS": " ".join(given)}


def start_up(config: BenchConfig) -> list[Row]:
    """Seconds of `jaxhisto --help` as a process."""

    def run() -> tuple[float, float]:
        start, before = time.perf_counter(), os.times()
        subprocess.run([sys.executable, "-c", HELP], check=True, stdout=subprocess.DEVNULL)
        wall, after = time.perf_counter() - start, os.times()
        worked = (after.children_user + after.children_system) - (
            before.children_user + before.children_system
        )
        return wall, worked

    settings = {"line": "jaxhisto --help"}
    runner = Runner("startup", OURS, run, 0, settings, peak=lambda: None, child=True)
    rows = measure([runner], config.repeats)
    say(line_of(rows[0]))
    return rows


def in_order(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """By stage; within one as measured."""
    return tuple(sorted(rows, key=lambda row: STAGES.index(row.stage)))


def line_of(row: Row) -> str:
    """A row for the terminal."""
    name = row.stage if row.who == OURS else f"{row.stage}, {row.who}"
    if "cache" in row.settings and row.stage == "pipeline":
        name += f", cache {row.settings['cache']}"
    if "variant" in row.settings:
        name += f", {row.settings['variant']}"
    elif "beside" in row.settings:
        name += f", beside {row.settings['beside']}"
    if row.why:
        return f"{name}: no figure, {row.why}"
    speed = f", {row.images_per_s:,.1f} images/s" if row.images and row.median > 0 else ""
    noise = "" if row.conclusive else " (inconclusive)"
    return f"{name}: {row.median:.4g} s{speed}, spread {row.spread:.0%}{noise}"


def described(settings: Mapping[str, Any]) -> str:
    """A setting in a few words."""
    words = [f"{settings['model']}"] if "model" in settings else []
    words += [f"{settings['tile_px']} px"] if "tile_px" in settings else []
    words += [f"batch {settings['batch']}"] if "batch" in settings else []
    words += [f"{settings['precision']}"] if "precision" in settings else []
    words += [f"cache {settings['cache']}"] if "cache" in settings else []
    return ", ".join(words)
