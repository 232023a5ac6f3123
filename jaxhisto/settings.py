"""What can be done with any group of settings: check, compare, write as JSON and read again."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, get_type_hints

from jaxhisto.errors import ConfigError

Config = TypeVar("Config")


def check(config: Config) -> Config:
    """The same config, once every number is inside its range.

    Raises:
      ConfigError: naming the first field that is not, and its range.
    """
    for name, value, meta in _leaves(config):
        low, high = meta.get("range", (None, None))
        values = value if isinstance(value, tuple) else (value,)
        if low is not None and any(v is not None and not low <= v <= high for v in values):
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must lie in {low}..{high}.")
        if meta.get("ordered") and value is not None and not values[0] <= values[-1]:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: the first must not be larger.")
    for pair in EITHER:
        if all(getattr(config, name, None) is not None for name in pair):
            raise ConfigError(f"--{' and --'.join(sorted(pair))} are both given; keep one.")
    return config


def to_json(config: Any) -> str:
    """The config as JSON text, every field included, in field order."""
    return json.dumps(dataclasses.asdict(config), indent=1) + "\n"


def from_json(cls: type[Config], text: str, where: str = "config.json") -> Config:
    """Reads what `to_json` wrote; a key that this version does not know raises ConfigError."""
    return check(_build(cls, json.loads(text), where))


def identity(config: Any) -> dict[str, Any]:
    """The dotted fields that make two runs the same run: all that are not operational."""
    return {name: value for name, value, meta in _leaves(config) if not meta.get("operational")}


PLACES = {"data.stores", "data.manifest"}
"""Fields that say where the data lies: it may move, and its hash says whether it is the same."""
MAY_DIFFER = PLACES | {"data.threads", "data.prefetch", "log_every", "tensorboard"}
"""Fields that may differ between the processes of one run: where the data lies on a host (its
hash may not differ), and what changes neither a batch nor a checkpoint."""


def common(config: Any) -> dict[str, Any]:
    """The dotted fields that all processes of one run must hold alike, operational ones too."""
    return {
        name: value
        for name, value, _ in _leaves(config)
        if name not in MAY_DIFFER and not name.startswith("distributed.")
    }


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """`field: theirs -> ours` for each field in which two identities differ."""
    names = list(dict.fromkeys([*theirs, *ours]))
    return [
        f"{name}: {theirs.get(name)} -> {ours.get(name)}"
        for name in names
        if _comparable(theirs.get(name)) != _comparable(ours.get(name))
    ]


def _comparable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, value, f.metadata


# On the command line one of these replaces the other in the file.
EITHER = ({"steps", "epochs"},)


def known(key: str, names: list[str], where: str, prefix: str) -> None:
    """Raises ConfigError for a key that is none of `names`, with a suggestion."""
    if key in names:
        return
    near = difflib.get_close_matches(key, names, 1)
    remedy = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(names)}."
    raise ConfigError(f"{where}: unknown key {prefix}{key}; {remedy}")


def _build(cls: type[Config], table: Mapping[str, Any], where: str, prefix: str = "") -> Config:
    hints, values = get_type_hints(cls), {}
    for key, value in table.items():
        known(key, list(hints), where, prefix)
        if dataclasses.is_dataclass(hints[key]):
            value = _build(hints[key], value, where, f"{prefix}{key}.")
        values[key] = tuple(value) if isinstance(value, list) else value
    return cls(**values)
