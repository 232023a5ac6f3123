"""Options of the XLA compiler as a setting: NAME=VALUE to what `jax.jit(compiler_options=)` takes.

(`jaxhisto/xla_flags.py` has the flags of a bit-exact run, which must be set before XLA starts.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxhisto.errors import ConfigError

Options = dict[str, str | bool]

FLAG = "--step.xla"
ONE = re.compile(r"(xla_[a-z0-9_]+)=(\S*)")
PASSES = "xla_disable_hlo_passes"


def parsed(given: Sequence[str], flag: str = FLAG) -> Options:
    """The options by name.

    Args:
      given: `xla_name=value` each; true and false are booleans, and XLA itself reads numbers.
      flag: that they came by.

    Raises:
      ConfigError: one that is not of this form, or that is given twice.
    """
    found: Options = {}
    for text in given:
        match = ONE.fullmatch(text)
        if match is None:
            raise ConfigError(
                f"{flag} {text}: is no NAME=VALUE of an XLA option; write it as "
                "xla_gpu_autotune_level=4, without dashes and spaces."
            )
        name, value = match.groups()
        if name in found:
            raise ConfigError(f"{flag} {text}: {name} is given twice; keep one.")
        # XLA takes the word `true` for no boolean of its own, only JAX's.
        found[name] = {"true": True, "false": False}.get(value.lower(), value)
    return found


def merged(ours: Mapping[str, str | bool], given: Mapping[str, str | bool]) -> Options:
    """Both; of a list of passes all, of anything else what is given."""
    both = {**ours, **given}
    lists = [str(options[PASSES]) for options in (ours, given) if PASSES in options]
    return both | ({PASSES: ",".join(lists)} if lists else {})


def check_options(given: Sequence[str]) -> None:
    """Compiles next to nothing with them, so that what XLA refuses ends a run before it begins.

    Raises:
      ConfigError: as `parsed`, and options that XLA does not know or whose value it cannot read.
    """
    options = parsed(given)
    if not options:
        return
    number = jax.ShapeDtypeStruct((), jnp.float32)
    try:
        jax.jit(jnp.negative, compiler_options=options).lower(number).compile()
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(
            f"{FLAG}: XLA on {jax.default_backend()} refuses: {reason(error)}; mend or leave out "
            "that option (names change between versions of jaxlib)."
        ) from error


def reason(error: Exception) -> str:
    """What XLA said, as one line without its code, period or stack."""
    said = " ".join(str(error).partition("\n\n")[0].split())
    return re.sub(r"^[A-Z_]+: ", "", said).rstrip(".")[:200]
