"""The verbs of this stage for the command line; importing them loads no JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence

VERBS: tuple[Callable[[Sequence[str]], int], ...] = ()
