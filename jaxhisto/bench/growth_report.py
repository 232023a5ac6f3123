"""Growth for people: a table of exponents, what was not run, and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jaxhisto.bench.growth import QUANTITIES, value
from jaxhisto.bench.record import Record

HEAD = ("what", "over", "of", "exponent", "95 % interval", "fitted on", "at its end")
TIME, MEMORY = QUANTITIES
STYLE = {"loss, dense": ("C3", "s"), "loss, chunked": ("C0", "o"), "step": ("0.2", "^")}


def section(growth: Mapping[str, Any]) -> str:
    """The Markdown of `measure_growth`'s result."""
    lines = [
        "### Growth",
        "",
        "Exponents b of a x^b, by least squares of the logarithms; `at its end`: between the last "
        "two sizes. Time is measured; memory is what the compiler sets aside on a device for the "
        "program, arguments included, and known without running it. A size expected to take "
        f"longer than {growth['limit_s']:g} s a call, or that does not fit, is not run.",
        "",
        f"| {' | '.join(HEAD)} |",
        "|" + "---|" * len(HEAD),
    ]
    for series in growth["series"]:
        lines += [f"| {' | '.join(row)} |" for row in rows(series)]
    if growth.get("picture"):
        lines += ["", f"![Time and memory over batch, side and depth]({growth['picture']})"]
    missing = [line for series in growth["series"] for line in unmeasured(series)]
    if missing:
        lines += ["", *missing]
    return "\n".join([*lines, ""])


def rows(series: Mapping[str, Any]) -> Iterator[list[str]]:
    """A row for the time and one for the memory."""
    for quantity, name in QUANTITIES.items():
        fitted = series["fits"][quantity]
        cells = ["none, too few sizes", "", "", ""]
        if fitted:
            cells = [
                f"{fitted['exponent']:.2f}",
                f"{fitted['low']:.2f} to {fitted['high']:.2f}",
                f"{fitted['first']:,.0f} to {fitted['last']:,.0f}",
                f"{fitted['end']:.2f}",
            ]
        yield [series["what"], series["axis"], name, *cells]


def unmeasured(series: Mapping[str, Any]) -> Iterator[str]:
    """The sizes without a time, with the reason."""
    found = [entry for entry in series["sizes"] if entry.get("why")]
    if not found:
        return
    at = ", ".join(f"{k} {v}" for k, v in series["point"].items())
    said = "; ".join(f"{shown(entry['size'])}: {entry['why']}" for entry in found)
    yield f"- {series['what']} over {series['axis']} ({at}): {said}."


def shown(size: Any) -> str:
    """A size as people write it."""
    return f"{size:,}" if isinstance(size, int) else str(size)


def drawn(record: Record, path: Path) -> Record:
    """The record with the name of a picture of its growth, drawn at `path`; as it is where it has
    no growth, or matplotlib is not installed."""
    growth = record.more.get("growth")
    if not growth or not find_spec("matplotlib"):
        return record
    named = {**growth, "picture": draw(growth, path).name}
    return replace(record, more={**record.more, "growth": named})


def draw(growth: Mapping[str, Any], path: Path) -> Path:
    """Draws time and memory over each axis on logarithmic scales (needs the extra `plots`)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    axes_of = list(dict.fromkeys(series["axis"] for series in growth["series"]))
    figure = Figure(figsize=(4.2 * len(axes_of), 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(axes_of), squeeze=False)
    for column, axis in enumerate(axes_of):
        for row, quantity in enumerate(QUANTITIES):
            panel(grid[row, column], growth, axis, quantity)
    figure.savefig(path, dpi=110)
    return path


def panel(axes: Any, growth: Mapping[str, Any], axis: str, quantity: str) -> None:
    """One quantity over one axis: the sizes, and the fitted line."""
    from matplotlib.ticker import NullFormatter

    unit = 1.0 if quantity == TIME else 1e9
    ticks: dict[float, str] = {}
    for series in growth["series"]:
        if series["axis"] != axis:
            continue
        found = [(e["x"], value(e, quantity) / unit) for e in series["sizes"]]
        found = [(x, y) for x, y in found if y > 0]
        ticks |= {e["x"]: shown(e["size"]) for e in series["sizes"]}
        if not found:
            continue
        colour, marker = STYLE[series["what"]]
        fitted = series["fits"][quantity]
        said = f", x^{fitted['exponent']:.2f}" if fitted else ""
        x, y = zip(*found, strict=True)
        axes.plot(x, y, marker, color=colour, label=series["what"] + said, markersize=5)
        if fitted:
            axes.plot(x, line(x, y, fitted["exponent"]), color=colour, linewidth=0.9)
    axes.set(xscale="log", yscale="log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter("{x:g}")
    # Between powers of ten only where there would be no figure otherwise.
    axes.yaxis.set_minor_formatter("{x:g}" if high / low < 30 else NullFormatter())
    axes.tick_params(axis="y", which="both", labelsize=8)
    every = max(1, len(ticks) // 5)
    shown_ticks = sorted(ticks)[::every]
    axes.set_xticks(shown_ticks, [ticks[x] for x in shown_ticks], fontsize=8)
    axes.set_xticks([], minor=True)
    axes.set_xlabel({"batch": "batch, images", "tile_px": "side, px", "depth": "encoder"}[axis])
    axes.set_ylabel("s a call" if quantity == TIME else "GB planned on a device")
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def line(x: tuple[float, ...], y: tuple[float, ...], exponent: float) -> list[float]:
    """The fitted power through the centre of the points."""
    from math import exp, log

    mean = sum(log(b) - exponent * log(a) for a, b in zip(x, y, strict=True)) / len(x)
    return [exp(mean) * a**exponent for a in x]
