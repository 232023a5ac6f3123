"""The last line of the scripts in benchmarks/: our speed over another's, and what stands against
it. One place words it, so that no script says a ratio that its turns do not bear."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from jaxhisto.bench.record import Row, doubt_of

BY_CLOCK, BY_CORE = "images_per_s", "images_per_cpu_s"


def line(said: Sequence[str], setting: str) -> str:
    """`ratio SAID; SAID (SETTING)`, where each is as `compared` words it."""
    return f"ratio {'; '.join(said)} ({setting})"


def compared(
    ours: Row,
    theirs: Row,
    names: tuple[str, str],
    speed: str = BY_CLOCK,
    unit: str = "images/s",
    digits: int = 1,
    value: float | None = None,
    where: str = "",
) -> str:
    """`0.97 = ours 12.0 / pytorch 12.4 images/s`, and `inconclusive: ...` where it is.

    Args:
      names: of both, as printed.
      speed: what is compared, a property of `Row`: BY_CLOCK or BY_CORE.
      digits: of the speeds, after the point.
      value: the ratio, where it is not that of the medians.
      where: stands after the ratio.

    Raises:
      SystemExit: one of the two has no figure; its reason is the message.
    """
    mine, other = (
        figure(row, name, speed) for row, name in zip((ours, theirs), names, strict=True)
    )
    ratio = mine / other if value is None else value
    doubts = list(against((ours, theirs), names, speed))
    told = (
        f"{ratio:.2f}{where} = {names[0]} {mine:.{digits}f} / {names[1]} {other:.{digits}f} {unit}"
    )
    return told + (f", inconclusive: {', '.join(doubts)}" if doubts else "")


def figure(row: Row, name: str, speed: str) -> float:
    """A row's speed.

    Raises:
      SystemExit: it has none.
    """
    found = float(getattr(row, speed))
    if not math.isfinite(found):
        raise SystemExit(f"no ratio: {name}: {row.why or 'no time was taken'}")
    return found


def against(rows: Sequence[Row], names: Sequence[str], speed: str) -> Iterator[str]:
    """Of each row whose turns conclude nothing: `ours spreads by 40 %`."""
    for row, name in zip(rows, names, strict=True):
        doubt = doubt_of(row.cpu_seconds if speed == BY_CORE else row.seconds)
        if doubt:
            yield f"{name} {doubt}"
