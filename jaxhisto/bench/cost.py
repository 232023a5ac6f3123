"""What training by a recipe costs on this machine: hours, accelerator-hours and energy.

A projection: speed as measured, times the images of all epochs. What was measured and what is
taken for granted beyond it stands with each figure.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from jaxhisto.bench import flops
from jaxhisto.bench.child import OutOfMemory, ask
from jaxhisto.bench.record import OURS, Record, Row, row_from_json
from jaxhisto.config import DataConfig, PretrainConfig
from jaxhisto.errors import ConfigError, RunError
from jaxhisto.flags import config_file
from jaxhisto.pretrain.plan import check_batch, schedule_length
from jaxhisto.settings import from_json, to_json

PAPER_TILES, PAPER_EPOCHS, PAPER_BATCH, PAPER_SIDE = 500_000, 1000.0, 512, 224
"""Ciga, Xu, Martel, sec. 5: `half a million images`, and sec. 4."""
CLAIM_HOURS, CLAIM_DEVICES, CLAIM_MODEL = 24.0, 4, "resnet18"
"""Sec. 5: a day on four P100. Above what those cards can compute (docs/paper.md): no figure to
hold a machine against, a speed to reach."""
LEFT_OUT = "checkpoints, monitoring, start-up and compilation are not in it"
CPU_BATCH = 32
SMALLEST = 8


@dataclass(frozen=True)
class Speed:
    """What a projection is made of.

    Attributes:
      who: ours or a peer.
      row: of `step` or `pipeline`, with its settings.
      energy: `energy.Energy` of `images` images as a dict; empty where none was looked for.
    """

    who: str
    row: Row
    energy: Mapping[str, Any]
    images: int = 0


@dataclass(frozen=True)
class Projection:
    """The cost of a training.

    Attributes:
      name: of the recipe. who: ours or a peer.
      tiles, epochs, steps, batch: of the training.
      images_per_s: as projected.
      hours: by the clock. accelerator_hours: times the devices.
      kwh: None where energy could not be read; `why` says so.
      beyond: what was not measured and is taken for granted, a sentence each.
    """

    name: str
    who: str
    model: str
    tiles: int
    epochs: float
    steps: int
    batch: int
    images_per_s: float
    devices: int
    hours: float
    accelerator_hours: float
    kwh: float | None
    why: str
    beyond: tuple[str, ...]


def read_recipe(name: str) -> PretrainConfig:
    """A recipe's settings, from a file or from one that is shipped.

    Raises:
      ConfigError: no such file, no TOML, or an unknown key.
    """
    path = config_file(name)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML ({error}); mend that line.") from error
    return from_json(PretrainConfig, json.dumps({"out": "", **table}), str(path))


def trainings(
    config: PretrainConfig, name: str, tiles: int
) -> list[tuple[str, PretrainConfig, int]]:
    """(name, settings, tiles): the recipe's, and the paper's where that is another one.

    Without tiles of its own the recipe is taken to have the paper's number.
    """
    paper = replace(
        config, steps=None, epochs=PAPER_EPOCHS, batch_size=PAPER_BATCH, tile_px=PAPER_SIDE
    )
    tiles = tiles or PAPER_TILES
    the_papers = (f"the paper's recipe (sec. 5), {PAPER_TILES:,} tiles", paper, PAPER_TILES)
    if (config, tiles) == (paper, PAPER_TILES):
        return [the_papers]
    return [(f"{name}, {tiles:,} tiles", config, tiles), the_papers]


def tiles_of(stores: Sequence[str]) -> int:
    """Tiles in some stores, together; 0 of none.

    Raises:
      StoreError: one that is missing or damaged.
    """
    if not stores:
        return 0
    from jaxhisto.data.sources import open_tiles

    return len(open_tiles(DataConfig(stores=tuple(stores))))


def project(name: str, config: PretrainConfig, tiles: int, speed: Speed) -> Projection:
    """What a training costs at a speed.

    Raises:
      RunError: fewer tiles than a batch.
    """
    settings = speed.row.settings
    devices = int(settings.get("devices", 1))
    check_batch(config, tiles, devices)
    steps, _ = schedule_length(config, tiles)
    images = steps * config.batch_size
    factor, beyond = scaled(config, speed.row)
    per_s = speed.row.images_per_s * factor
    hours = images / per_s / 3600
    joules = speed.energy.get("joules")
    kwh = None
    if joules is not None and speed.images:
        kwh = joules / speed.images / factor * images / 3.6e6
    why = "" if kwh is not None else speed.energy.get("why", "") or NO_POWER
    turns = len(speed.row.seconds)
    measured = f"{turns} turns of {speed.row.images:,} images stand for {images:,}"
    return Projection(
        name=name,
        who=speed.who,
        model=config.model.name,
        tiles=tiles,
        epochs=images / tiles,
        steps=steps,
        batch=config.batch_size,
        images_per_s=per_s,
        devices=devices,
        hours=hours,
        accelerator_hours=hours * devices,
        kwh=kwh,
        why=why,
        beyond=(measured, *beyond, LEFT_OUT),
    )


NO_POWER = "the record holds no power; without --record it is read while a few steps run"


def scaled(config: PretrainConfig, row: Row) -> tuple[float, list[str]]:
    """What a measured speed is multiplied by for a recipe, and what that takes for granted."""
    of, beyond, factor = row.settings, [], 1.0
    if row.stage == "step":
        beyond.append("tiles are there: reading them is not in it")
    wanted = (config.model.name, config.tile_px)
    got = (of["model"], of["tile_px"])
    if wanted != got:
        per_image = [flops.step_flops(model, side, 1) for model, side in (got, wanted)]
        factor = per_image[0] / per_image[1]
        beyond.append(
            f"measured {got[0]} at {got[1]} px; {wanted[0]} at {wanted[1]} px by its operations, "
            f"x {1 / factor:.2f}"
        )
    if of["precision"] != config.precision:
        beyond.append(f"measured in {of['precision']}, the recipe trains in {config.precision}")
    if of["batch"] != config.batch_size:
        beyond.append(f"the speed at batch {of['batch']} is taken for {config.batch_size}")
        if config.memory.accumulate > 1:
            beyond.append(f"and in one go for one in {config.memory.accumulate} micro-batches")
    if not row.conclusive:
        beyond.append(f"inconclusive: the turns spread by {row.spread:.0%}")
    return factor, beyond


def speeds_of(record: Record, config: PretrainConfig) -> list[Speed]:
    """Ours, and each peer's, nearest to a recipe: same network, side, precision; from a store
    before tiles that are there; then by the batch; then the quickest.

    Raises:
      RunError: a record without a step of ours.
    """

    def away(row: Row) -> tuple[Any, ...]:
        of = row.settings
        return (
            of["model"] != config.model.name,
            of["tile_px"] != config.tile_px,
            of["precision"] != config.precision,
            row.stage != "pipeline",
            abs(math.log2(of["batch"] / config.batch_size)),
            -row.images_per_s,
        )

    found: dict[str, Row] = {}
    for row in record.rows:
        usable = row.stage in ("step", "pipeline") and row.seconds and row.images
        usable = usable and "variant" not in row.settings  # what the recipe does not set
        if usable and (row.who not in found or away(row) < away(found[row.who])):
            found[row.who] = row
    if OURS not in found:
        raise RunError(
            "--record: holds no step of ours; measure one with `jaxhisto bench --stages step`, or "
            "leave --record out."
        )
    ours = found.pop(OURS)
    # A peer's figure stands beside ours only where the same was measured.
    same = [row for row in found.values() if away(row)[:4] == away(ours)[:4]]
    return [Speed(row.who, row, {}) for row in (ours, *same)]


def measure_speed(
    config: PretrainConfig,
    machine: Mapping[str, Any],
    devices: int,
    repeats: int,
    env: Mapping[str, str] | None = None,
) -> Speed:
    """A few steps of the recipe in a process of its own, with their energy.

    On a CPU at most CPU_BATCH images a step; where memory is out, half as many, and again.

    Raises:
      RunError: not even SMALLEST images fit.
    """
    on_cpu = machine["platform"] == "cpu"
    batch = min(config.batch_size, CPU_BATCH) if on_cpu else config.batch_size
    job = {"what": "cost", "repeats": repeats, "recipe": to_json(config)}
    while batch >= SMALLEST:
        point = {
            "model": config.model.name,
            "tile_px": config.tile_px,
            "batch": batch,
            "precision": "f32" if on_cpu else config.precision,
            "devices": devices,
        }
        try:
            for answer in ask(job | {"point": point}, env):
                row = row_from_json(answer["row"])
                if row.seconds:
                    return Speed(OURS, row, answer["energy"], answer["images"])
        except OutOfMemory:
            pass
        batch //= 2
    raise RunError(
        f"{config.model.name} at {config.tile_px} px: not even {SMALLEST} images fit into memory; "
        "take a smaller network or side."
    )


def costs(
    config: PretrainConfig, name: str, tiles: int, speeds: Sequence[Speed]
) -> list[dict[str, Any]]:
    """The projections of a recipe, ours and the peers', for a record.

    Raises:
      RunError: fewer tiles than a batch.
    """
    return [
        asdict(project(title, training, count, speed))
        for title, training, count in trainings(config, name, tiles)
        for speed in speeds
    ]


def line_of(one: Mapping[str, Any]) -> str:
    """A projection for the terminal."""
    energy = (
        f"{one['kwh']:,.3g} kWh" if one["kwh"] is not None else f"energy not known: {one['why']}"
    )
    return (
        f"{one['name']}, {one['model']}, {one['who']}: {figure(one['hours'])} h at "
        f"{figure(one['images_per_s'])} images/s, {figure(one['accelerator_hours'])} "
        f"accelerator-hours, {energy} ({'; '.join(one['beyond'])})"
    )


def section(found: Sequence[Mapping[str, Any]]) -> str:
    """The Markdown of `costs`."""
    head = ("training", "who", "network", "images/s", "hours", "accelerator-hours", "kWh")
    lines = [
        "### Cost to train",
        "",
        f"| {' | '.join(head)} |",
        "|" + "---|" * len(head),
    ]
    for one in found:
        energy = f"{one['kwh']:,.3g}" if one["kwh"] is not None else "not known"
        cells = (one["name"], one["who"], one["model"], figure(one["images_per_s"]),
                 figure(one["hours"]), figure(one["accelerator_hours"]), energy)  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    claim = PAPER_TILES * PAPER_EPOCHS / CLAIM_HOURS / 3600
    cells = ("the paper's claim", "4 P100", CLAIM_MODEL, figure(claim), figure(CLAIM_HOURS),
             figure(CLAIM_HOURS * CLAIM_DEVICES), "not stated")  # fmt: skip
    lines += [f"| {' | '.join(cells)} |", "", "Measured, and taken for granted beyond it:", ""]
    for one in found:
        no_energy = [f"energy not known: {one['why']}"] if one["why"] else []
        said = "; ".join([*one["beyond"], *no_energy])
        lines.append(f"- {one['name']}, {one['who']}: {said}.")
    return "\n".join([*lines, ""])


def figure(value: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
