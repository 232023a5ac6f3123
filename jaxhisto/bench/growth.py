"""How time and memory of a step grow with the batch, the side and the depth: fitted exponents.

A series is one thing measured over one axis. Memory is what the compiler sets aside for the
compiled program on each device (temporaries, results and arguments), known without running it,
so also at sizes that do not fit; time is measured where a size fits and is expected to take no
longer than a limit. Each series has a process of its own: what runs out of memory ends with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jaxhisto.bench import memory
from jaxhisto.bench.child import OutOfMemory, ask
from jaxhisto.bench.runner import FAILED, told
from jaxhisto.console import say
from jaxhisto.errors import JaxhistoError

BATCHES = tuple(64 << k for k in range(9))
"""64 to 16,384."""
SIDES = (32, 64, 96, 128, 160, 192, 224)
MODELS = ("resnet18", "resnet34", "resnet50", "resnet101")
DEPTHS = {"resnet10": 10, "resnet18": 18, "resnet34": 34, "resnet50": 50, "resnet101": 101}
LEAST = 3
"""Sizes that a fit needs: through two points goes every power."""
CONFIDENCE = 0.95
QUANTITIES = {"seconds": "time", "planned_bytes": "memory"}


@dataclass(frozen=True)
class Series:
    """One thing over one axis.

    Attributes:
      what: `step`, or the loss alone: `loss, dense`, `loss, chunked`.
      axis: batch, tile_px or depth.
      sizes: on the axis; of depth the encoders' names.
      point: what the other settings are: model, tile_px, batch, precision, devices.
    """

    what: str
    axis: str
    sizes: tuple[Any, ...]
    point: Mapping[str, Any]


@dataclass(frozen=True)
class Fit:
    """y = a x^b by least squares of the logarithms.

    Attributes:
      exponent: b. low, high: its 95 % confidence interval, if the scatter about the line is noise.
      first, last: the range it was fitted on. count: of sizes.
      end: the exponent between the last two sizes, where the asymptote is nearest.
    """

    exponent: float
    low: float
    high: float
    first: float
    last: float
    count: int
    end: float


def fit(x: Sequence[float], y: Sequence[float]) -> Fit | None:
    """The power by which y grows with x; None of fewer than LEAST sizes."""
    points = sorted((a, b) for a, b in zip(x, y, strict=True) if b > 0)
    if len({a for a, _ in points}) < LEAST:
        return None
    u, v = ([math.log(p[i]) for p in points] for i in range(2))
    n = len(points)
    mean_u, mean_v = sum(u) / n, sum(v) / n
    spread = sum((a - mean_u) ** 2 for a in u)
    slope = sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True)) / spread
    left = sum((b - mean_v - slope * (a - mean_u)) ** 2 for a, b in zip(u, v, strict=True))
    wide = student(n - 2) * math.sqrt(left / (n - 2) / spread)
    end = (v[-1] - v[-2]) / (u[-1] - u[-2]) if u[-1] > u[-2] else math.nan
    first, last = points[0][0], points[-1][0]
    return Fit(slope, slope - wide, slope + wide, first, last, n, end)


def student(freedom: int) -> float:
    """Student's t that CONFIDENCE of the draws stay within, both ways."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


def series_of(
    point: Mapping[str, Any],
    batches: Sequence[int] = BATCHES,
    sides: Sequence[int] = SIDES,
    models: Sequence[str] = MODELS,
) -> tuple[Series, ...]:
    """What is measured around a setting: the loss and the step over the batch, the step over
    the side and over the depth."""
    return (
        Series("loss, dense", "batch", tuple(sorted(batches)), point),
        Series("loss, chunked", "batch", tuple(sorted(batches)), point),
        Series("step", "batch", tuple(sorted(batches)), point),
        Series("step", "tile_px", tuple(sorted(sides)), point),
        Series("step", "depth", tuple(sorted(models, key=DEPTHS.__getitem__)), point),
    )


def measure_growth(
    series: Sequence[Series],
    repeats: int = 3,
    limit_s: float = 30.0,
    env: Mapping[str, str] | None = None,
    write: Callable[[dict[str, Any]], None] = lambda growth: None,
    log: str = "",
) -> dict[str, Any]:
    """Measures each series and fits it.

    Args:
      series: from `series_of`.
      repeats: turns of a size that count; one before them does not.
      limit_s: longest turn that is run; sizes expected to take longer are recorded as such.
      env: of the processes that measure. log: where their tracebacks go.
      write: takes what is returned, as far as it is measured, after each series.

    Returns:
      {"limit_s", "repeats", "series": [{what, axis, point, sizes: entries, fits}]}; an entry is
      as `growth_child.entries` makes it, a fit of `seconds` and of `planned_bytes` as `Fit`.
    """
    found: list[dict[str, Any]] = []
    growth = {"limit_s": limit_s, "repeats": repeats, "series": found}
    for one in series:
        entries = list(measured(one, repeats, limit_s, env, log))
        named = {"what": one.what, "axis": one.axis, "point": others(one), "sizes": entries}
        found.append(named | {"fits": fits_of(entries)})
        for line in lines_of(found[-1]):
            say(line)
        write(growth)
    return growth


def others(series: Series) -> dict[str, Any]:
    """The settings that stay the same along a series."""
    moving = {"depth": "model"}.get(series.axis, series.axis)
    kept = {"batch", "devices"} if series.what.startswith("loss") else set(series.point)
    return {k: v for k, v in series.point.items() if k != moving and k in kept}


def measured(
    series: Series,
    repeats: int,
    limit_s: float,
    env: Mapping[str, str] | None = None,
    log: str = "",
) -> Iterator[dict[str, Any]]:
    """The entries of a series; the size at which its process ended is out of memory or failed, and
    what comes after it was not tried."""
    job = {"what": "growth", "series": asdict(series), "repeats": repeats, "limit_s": limit_s,
           "log": log}  # fmt: skip
    done = 0
    try:
        for answer in ask(job, env):
            if "entry" in answer:
                done += 1
                yield answer["entry"]
        return
    except OutOfMemory:
        ended = memory.OUT
    except JaxhistoError as error:
        ended = FAILED + told(error)
    for i, size in enumerate(series.sizes[done:]):
        why = ended if i == 0 else f"not run: {ended.partition(': ')[0]} at {series.sizes[done]}"
        yield {"size": size, "x": place(series.axis, size), "why": why}


def place(axis: str, size: Any) -> float:
    """Where a size lies on its axis: an encoder at its number of layers."""
    return float(DEPTHS[size] if axis == "depth" else size)


def fits_of(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A fit of the time and of the memory over those sizes that have it."""
    fits = {}
    for quantity in QUANTITIES:
        found = [(e["x"], value(e, quantity)) for e in entries if value(e, quantity)]
        fitted = fit([x for x, _ in found], [y for _, y in found])
        fits[quantity] = asdict(fitted) if fitted else None
    return fits


def value(entry: Mapping[str, Any], quantity: str) -> float:
    """Of an entry, the median of its times; 0 where there is none."""
    from statistics import median

    got = entry.get(quantity)
    return float(median(got) if isinstance(got, list) and got else got or 0.0)


def lines_of(series: Mapping[str, Any]) -> Iterator[str]:
    """What was found, for the terminal."""
    for quantity, name in QUANTITIES.items():
        fitted = series["fits"][quantity]
        head = f"{series['what']}, {name} over {series['axis']}"
        if fitted is None:
            yield f"{head}: no exponent, fewer than {LEAST} sizes"
        else:
            yield f"{head}: exponent {worded(fitted)}"


def worded(fitted: Mapping[str, float]) -> str:
    """An exponent with its interval and its range."""
    return (
        f"{fitted['exponent']:.2f} ({fitted['low']:.2f} to {fitted['high']:.2f}) on "
        f"{fitted['first']:,.0f} to {fitted['last']:,.0f}, {fitted['end']:.2f} at its end"
    )
