"""The command line and TOML files, read by one parser into the settings of config.py."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

from jaxhisto.errors import ConfigError
from jaxhisto.settings import EITHER, check, known

Config = TypeVar("Config")


def parse(cls: type[Config], argv: Sequence[str], verb: str, recipe: bool = True) -> Config:
    """Builds a config from `[CONFIG.toml] --flags`; the flags win over the file.

    The file is read as the flags it stands for, so that one parser checks both.

    Args:
      recipe: whether a first word that ends in .toml is such a file; else it is the verb's own.

    Raises:
      ConfigError: a file that is absent or no TOML, or an unknown key (with a suggestion).
      SystemExit: `--help` (0), or a flag that the parser refuses (2).
    """
    import tyro

    args = list(argv)
    # A folder of slides may bear a recipe's name: what exists wins.
    named = args and args[0] in shipped_configs() and not Path(args[0]).exists()
    if recipe and (named or (args and args[0].endswith(".toml"))):
        path = config_file(args.pop(0))
        args = _file_flags(cls, path, args) + args
    parsed = tyro.cli(
        _with_marks(cls),
        args=args,
        prog=f"jaxhisto {verb}",
        description=cls.__doc__,
    )
    return check(_plain(cls, parsed))


def shipped_configs() -> dict[str, Path]:
    """The recipes that come with the package, by bare name."""
    folder = Path(__file__).parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def _marked(hint: Any, meta: Mapping[str, Any]) -> Any:
    """The hint as the parser wants it: positional, or under a name that Python reserves."""
    import tyro

    if "flag" in meta:
        return Annotated[hint, tyro.conf.arg(name=meta["flag"])]
    positional: Any = tyro.conf.Positional
    return positional[hint]


def _with_marks(cls: type[Config]) -> type[Config]:
    """The same dataclass with its positional and renamed fields marked for the parser."""
    hints = get_type_hints(cls)
    marked = {
        f.name: _marked(hints[f.name], f.metadata)
        for f in _fields(cls)
        if {"positional", "flag"} & f.metadata.keys()
    }
    if not marked:
        return cls
    namespace = {"__annotations__": marked, "__doc__": cls.__doc__, "__module__": cls.__module__}
    return dataclass(frozen=True)(type(cls.__name__, (cls,), namespace))


def _plain(cls: type[Config], parsed: Any) -> Config:
    return cls(**{f.name: getattr(parsed, f.name) for f in _fields(cls)})


def _fields(cls: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(cls)


def config_file(name: str) -> Path:
    """A TOML file, or one of the shipped recipes by its bare name.

    Raises:
      ConfigError: there is neither.
    """
    path = Path(name)
    if not path.exists():
        path = shipped_configs().get(path.stem if path.parent == Path() else name, path)
    if not path.is_file():
        raise ConfigError(
            f"{name}: no such file; give a TOML file or one of {', '.join(shipped_configs())}."
        )
    return path


def _file_flags(cls: type[Any], path: Path, args: Sequence[str]) -> list[str]:
    """The file as flags, without those that the command line replaces."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML ({error}); mend that line.") from error
    given = {a.split("=")[0].lstrip("-").replace("-", "_") for a in args if a.startswith("--")}
    for pair in EITHER:
        if pair & given:
            given |= pair
    flags: list[str] = []
    for name, value in _flat(cls, table, str(path)):
        if name not in given:
            flags += _words(name.replace("_", "-"), value)
    return flags


def _flat(cls: Any, table: Mapping[str, Any], where: str, prefix: str = "") -> Iterator[Any]:
    hints = get_type_hints(cls)
    for key, value in table.items():
        known(key, list(hints), where, prefix)
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ConfigError(f"{where}: {prefix}{key} is a group; write [{prefix}{key}].")
            yield from _flat(hints[key], value, where, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _words(flag: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        group, _, name = flag.rpartition(".")
        return [f"--{group}.{'' if value else 'no-'}{name}".replace("--.", "--")]
    return [f"--{flag}", *(str(v) for v in (value if isinstance(value, list) else [value]))]
