"""`python -m jaxhisto.bench`: the verb where tyro is not installed, with the same flags.

A machine with an accelerator often has what its image has, and nothing more can be installed.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import sys
import traceback
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jaxhisto.bench.verb import bench
from jaxhisto.bench_config import BenchConfig
from jaxhisto.errors import JaxhistoError
from jaxhisto.settings import check


def main(argv: Sequence[str] | None = None) -> int:
    """As `jaxhisto bench`: 0, 1 (failure, one sentence on stderr), 2 (usage)."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    try:
        return bench(parsed([arg for arg in args if arg != "--debug"]), "python -m jaxhisto.bench")
    except JaxhistoError as error:
        if debug:
            traceback.print_exc()
        print(f"python -m jaxhisto.bench: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("python -m jaxhisto.bench: interrupted; start the same line again.", file=sys.stderr)
        return 130


def parsed(argv: Sequence[str]) -> BenchConfig:
    """The settings.

    Raises:
      SystemExit: `--help` (0), or a flag that is none (2).
      ConfigError: a number out of its range.
    """
    parser = argparse.ArgumentParser("python -m jaxhisto.bench", description=BenchConfig.__doc__)
    parser.add_argument("--debug", action="store_true", help="show where an error was raised")
    hints, texts = get_type_hints(BenchConfig), helps()
    for field in dataclasses.fields(BenchConfig):
        flag = f"--{field.name.replace('_', '-')}"
        text = texts.get(field.name, "").replace("%", "%%")
        parser.add_argument(flag, default=field.default, help=text, **words(hints[field.name]))
    values: dict[str, Any] = vars(parser.parse_args(argv))
    del values["debug"]
    lists: dict[str, Any] = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
    return check(BenchConfig(**(values | lists)))


def helps() -> dict[str, str]:
    """By field, the text under it, which is a flag's help; tyro reads the same."""
    (table,) = ast.parse(inspect.getsource(BenchConfig)).body
    assert isinstance(table, ast.ClassDef)
    found, name = {}, ""
    for one in table.body:
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
            name = one.target.id
        elif name and isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant):
            found[name] = " ".join(str(one.value.value).split())
    return found


def words(hint: Any) -> dict[str, Any]:
    """What argparse has to know of a field's type."""
    if get_origin(hint) is tuple:
        return {"nargs": "*", **words(get_args(hint)[0])}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if hint is bool:
        return {"action": "store_true"}
    return {"type": hint}


if __name__ == "__main__":
    sys.exit(main())
