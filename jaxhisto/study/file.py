"""A study as a TOML file: encoders, tasks, shares of the labels, repeats, settings.

Every name and number is checked when the file is read; what it names on the disk is looked at by
`plan`, before the first cell is computed.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from jaxhisto.config import within
from jaxhisto.downstream_config import ProbeConfig
from jaxhisto.errors import ConfigError
from jaxhisto.settings import check, known
from jaxhisto.study.paper_tables import FROZEN_TABLE, TABLES
from jaxhisto.task_config import TaskConfig
from jaxhisto.tasks.splits import PERCENTS
from jaxhisto.training_config import FinetuneConfig, SegmentConfig

Table = Mapping[str, Any]
T = TypeVar("T")

SETTINGS = ("last_layer", "linear", "knn", "finetune", "segment")
FROZEN = SETTINGS[:3]
PROBE_FIELDS = ("scarce", "epochs", "batch", "rate", "weight_decay", "standardise", "select", "k",
                "tau", "embed_batch")  # fmt: skip
OTHERS = {"finetune": FinetuneConfig, "segment": SegmentConfig}
OWN = ("encoder", "out", "task", "percent", "scarce", "repeat", "seed", "draws", "mean", "std")
OWN_OF_TRAINING = ("seed", "devices", "threads")
"""Settings of these two that a cell, `[probe]` or the command line says."""
UNET_STRIDE = 32
COLUMN_OF = {
    "bach": "BACH",
    "breakhis": "BreakHis",
    "nct_crc": "NCT",
    "lymph": "Lymph",
    "gleason2019": "Gleason2019",
    "bach_segmentation": "BACH segmentation",
    "digestpath2019": "Dp19",
    "breastpathq": "Bpq",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the tables: one encoder, or the same one pretrained with several seeds.

    Fields:
      files: a run folder, file or name each, as `jaxhisto embed` takes them.
      mean, std: how they want to be fed, where their files do not say.
      paper: the row of the paper's table to stand beside, such as `18 Self supervised`.
    """

    files: tuple[str, ...] = ()
    mean: tuple[float, float, float] | None = within(None, -10, 10)
    std: tuple[float, float, float] | None = within(None, 1e-3, 10)
    paper: str = ""


@dataclasses.dataclass(frozen=True)
class Study:
    """What a file says.

    Fields:
      title: of the report.
      paper: the paper's table for its fine-tuned encoders; empty: D.7. Frozen ones: D.8.
      percents: of the training labels, ascending.
      repeats: draws of these labels.
      settings: of `SETTINGS`, in the order of the report.
      seed: of draws, weights and statistics.
      draws: bootstrap draws.
      encoders, tasks: by name, in the order of the file.
      columns: the column of the paper's tables for each task that is one of its sets.
      probe: settings of `last_layer`, `linear` and `knn`.
      others: the `FinetuneConfig` and `SegmentConfig` of which each cell fills in its own.
    """

    title: str
    paper: str
    percents: tuple[float, ...]
    repeats: int
    settings: tuple[str, ...]
    seed: int
    draws: int
    encoders: Mapping[str, Row]
    tasks: Mapping[str, TaskConfig]
    columns: Mapping[str, str]
    probe: ProbeConfig
    others: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class _Head:
    """The keys of a file that are no tables."""

    title: str = ""
    paper: str = ""
    percents: tuple[float, ...] = within(PERCENTS, 1e-9, 100)
    repeats: int = within(5, 1, 1000)
    settings: tuple[Literal["last_layer", "linear", "knn", "finetune", "segment"], ...] = (
        "last_layer",
    )
    seed: int = within(0, 0, 1 << 20)
    draws: int = within(2000, 100, 1_000_000)


GROUPS = ("encoders", "tasks", "probe", "finetune", "segment")


def shipped_studies() -> dict[str, Path]:
    """The studies that come with the package, by bare name."""
    folder = Path(__file__).parents[1] / "configs" / "studies"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def find_study(name: str) -> Path:
    """The file of that name, or the shipped study.

    Raises:
      ConfigError: neither is there.
    """
    path = Path(name)
    # A folder may bear the study's name: `--out study_paper`.
    if not path.is_file() and path.parent == Path():
        path = shipped_studies().get(path.stem, path)
    if not path.is_file():
        raise ConfigError(
            f"{name}: no such file; give a study's TOML file or one of "
            f"{', '.join(shipped_studies())}."
        )
    return path


def read_study(path: Path) -> Study:
    """A study file, checked.

    Raises:
      ConfigError: no TOML, an unknown key (with a suggestion), a value of another kind or outside
        its range, names that cannot be names of files, nothing to do.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name another.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML ({error}); mend that line.") from error
    where = str(path)
    names = [f.name for f in dataclasses.fields(_Head)]
    for key in table:
        known(key, [*names, *GROUPS], where, "")
    for group in GROUPS:
        if not isinstance(table.get(group, {}), dict):
            raise ConfigError(f"{where}: {group} is a group; write [{group}].")
    head = built(_Head, {k: v for k, v in table.items() if k in names}, where)
    encoders = {n: _row(n, v, where) for n, v in table.get("encoders", {}).items()}
    tasks, columns = _tasks(table.get("tasks", {}), where)
    study = Study(
        title=head.title or path.stem,
        paper=head.paper,
        percents=tuple(sorted(set(head.percents))),
        repeats=head.repeats,
        settings=tuple(dict.fromkeys(head.settings)),
        seed=head.seed,
        draws=head.draws,
        encoders=encoders,
        tasks=tasks,
        columns=columns,
        probe=_probe(table.get("probe", {}), where),
        others={name: _other(name, table.get(name, {}), where) for name in OTHERS},
    )
    _refuse_empty(study, where)
    return study


def built(cls: type[T], table: Table, where: str, prefix: str = "") -> T:
    """A dataclass from a TOML table: keys known, values of the kinds of its fields, in range.

    Raises:
      ConfigError: naming the first that is not.
    """
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in table.items():
        known(key, list(hints), where, prefix)
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ConfigError(f"{where}: {prefix}{key} is a group; write [{prefix}{key}].")
            values[key] = built(hints[key], value, where, f"{prefix}{key}.")
        else:
            values[key] = _value(hints[key], value, f"{where}: {prefix}{key}")
    missing = [
        f.name
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]
        if f.name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: {prefix}{missing[0]} is missing; add it.")
    try:
        return check(cls(**values))
    except ConfigError as error:
        raise ConfigError(f"{where}: {prefix}{str(error).removeprefix('--')}") from error


def rooted(path: str, root: str) -> str:
    """A path of the file below the root; absolute ones and empty ones as they are."""
    return str(Path(root) / Path(path).expanduser()) if path else ""


def rooted_task(task: TaskConfig, root: str) -> TaskConfig:
    """The task with its paths below the root."""
    return dataclasses.replace(
        task,
        data=rooted(task.data, root),
        labels=rooted(task.labels, root),
        masks=rooted(task.masks, root),
        split=rooted(task.split, root),
    )


def rooted_encoder(name: str, root: str) -> str:
    """The encoder's file below the root where there is one, else the name as it is (the zoo's).

    Raises:
      ConfigError: there is none, and the name is a path.
    """
    path = Path(rooted(name, root))
    if path.exists():
        return str(path)
    if Path(name).suffix or Path(name).parent != Path():
        raise ConfigError(f"{path}: does not exist; mend the name, or --root.")
    return name


def _row(name: str, value: Any, where: str) -> Row:
    """`"a.safetensors"`, `["a", "b"]`, or a table with `files`."""
    _refuse_name(name, "encoders", where)
    if isinstance(value, str):
        value = {"files": [value]}
    elif isinstance(value, list):
        value = {"files": value}
    elif not isinstance(value, dict):
        raise ConfigError(
            f"{where}: encoders.{name} is {value!r}; write a name, a list of names, or "
            f"[encoders.{name}] with files."
        )
    if isinstance(value.get("files"), str):
        value = {**value, "files": [value["files"]]}
    row = built(Row, value, where, f"encoders.{name}.")
    if not row.files or not all(row.files):
        raise ConfigError(f"{where}: encoders.{name} names no encoder; fill in its files.")
    if len(set(row.files)) != len(row.files):
        raise ConfigError(
            f"{where}: encoders.{name} names a file twice; name one for each pretraining seed."
        )
    return row


def _tasks(tables: Table, where: str) -> tuple[dict[str, TaskConfig], dict[str, str]]:
    tasks, columns = {}, {}
    for name, table in tables.items():
        _refuse_name(name, "tasks", where)
        if not isinstance(table, dict):
            raise ConfigError(f"{where}: tasks.{name} is a group; write [tasks.{name}].")
        task = built(
            TaskConfig, {k: v for k, v in table.items() if k != "paper"}, where, f"tasks.{name}."
        )
        if not task.data:
            raise ConfigError(f'{where}: tasks.{name} names no data; add data = "FOLDER".')
        column = table.get("paper", COLUMN_OF.get(task.layout, ""))
        if column and column not in COLUMN_OF.values():
            raise ConfigError(
                f"{where}: tasks.{name}.paper {column!r}: is no column of the paper's tables; "
                f"they have {', '.join(COLUMN_OF.values())}."
            )
        tasks[name] = task
        if column:
            columns[name] = column
    return tasks, columns


def _probe(table: Table, where: str) -> ProbeConfig:
    for key in table:
        known(key, list(PROBE_FIELDS), where, "probe.")
    return built(ProbeConfig, {"features": "", "out": "", **table}, where, "probe.")


def _other(name: str, table: Table, where: str) -> Any:
    """The settings of what a verb of its own trains."""
    cls = OTHERS[name]
    for key in table:
        known(
            key, [f.name for f in dataclasses.fields(cls) if f.name not in OWN], where, f"{name}."
        )
    taken = [key for key in table.get("training", {}) if key in OWN_OF_TRAINING]
    if taken:
        raise ConfigError(f"{where}: {name}.training.{taken[0]}: is the study's; leave it out.")
    config: Any = built(cls, {"encoder": "", "out": "", **table}, where, f"{name}.")
    if getattr(config, "crop_px", 0) % UNET_STRIDE:
        raise ConfigError(
            f"{where}: {name}.crop_px {config.crop_px}: a UNet halves its images five times; take "
            f"a multiple of {UNET_STRIDE}."
        )
    return config


def _refuse_name(name: str, group: str, where: str) -> None:
    """Names become names of files and rows of tables."""
    if not name or name != name.strip() or set(name) & set("/\\\n\t|"):
        raise ConfigError(
            f"{where}: {group}.{name!r} is no name for a row; use letters, digits, spaces, - and _."
        )


def _refuse_empty(study: Study, where: str) -> None:
    for what in ("encoders", "tasks", "percents", "settings"):
        if not getattr(study, what):
            raise ConfigError(f"{where}: names no {what}; a study needs at least one.")
    if study.probe.select == "groups" and "linear" in study.settings and study.percents[0] < 100:
        raise ConfigError(
            f"{where}: probe.select 'groups': fits on all validation images too, which makes more "
            f'of {study.percents[0]:g} % than it says; take "validation", or percents = [100].'
        )
    trained = [table for table in TABLES if table != FROZEN_TABLE]
    if study.paper and study.paper not in trained:
        raise ConfigError(
            f"{where}: paper {study.paper!r}: is no table of trained encoders; there is "
            f"{', '.join(trained)}, and {FROZEN_TABLE} stands beside last_layer by itself."
        )


def _value(hint: Any, value: Any, where: str) -> Any:
    """The TOML value as the field has it; ConfigError where it is of another kind."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where} {value!r}: must be one of {', '.join(map(str, args))}.")
        return value
    if origin is tuple:
        return _items(args, value, where)
    if type(None) in args:
        return _value(next(a for a in args if a is not type(None)), value, where)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        kind = {
            str: "a text in quotes",
            int: "a whole number",
            float: "a number",
            bool: "true or false",
        }
        raise ConfigError(f"{where} {value!r}: must be {kind.get(hint, hint)}.")
    return value


def _items(kinds: Sequence[Any], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ConfigError(f"{where} {value!r}: must be a list, in [ ].")
    if kinds[-1] is Ellipsis:
        return tuple(_value(kinds[0], v, where) for v in value)
    if len(value) != len(kinds):
        raise ConfigError(f"{where} {value!r}: must be a list of {len(kinds)}.")
    return tuple(_value(kind, v, where) for kind, v in zip(kinds, value, strict=True))
