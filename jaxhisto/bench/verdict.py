"""What bounds training: input, products, memory or communication, with the number that says so."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from jaxhisto.bench import flops
from jaxhisto.bench.record import OURS, Record, Row, find

TOLD = 0.1
"""Share by which training from a store may be slower than on tiles that are there; above, it is
bound by its input."""
MOST = 0.5
"""Share of the step that its bound takes; below, the machine's limits are not what holds it up."""
KEYS = ("model", "tile_px", "batch", "precision", "devices", "threads")


def verdicts(record: Record) -> dict[str, Any]:
    """{"of": a verdict for each step and each pipeline of ours}; see `of_step`, `of_pipeline`."""
    found = []
    for row in record.rows:
        if row.who != OURS or not row.seconds:
            continue
        if row.stage == "step" and "beside" not in row.settings:
            found.append(of_step(row, record))
        elif row.stage == "pipeline":
            found.append(of_pipeline(row, record))
    return {"of": found}


def of_step(step: Row, record: Record) -> dict[str, Any]:
    """Which of three takes most of a step on tiles that are there.

    compute: its operations, at the measured peak of matrix products; memory: the bytes that its
    compiled program moves, at the measured bandwidth; communication: the step's collectives
    alone, as measured. Each alone would take that share of the step if nothing else were to do;
    the largest names the bound.

    Returns:
      settings, bound, says, shares {"compute", "memory", "communication"}, floor_s (what the
      counted operations need at least on this machine, see `floor_of`), floor_share, augment_share.
    """
    settings = {key: step.settings[key] for key in KEYS if key in step.settings}
    shares = dict(shares_of(step, record))
    floor = floor_of(step, record)
    augment = find(record.rows, "augment", **same(settings, ("tile_px", "batch", "devices")))
    verdict: dict[str, Any] = {
        "settings": settings,
        "shares": shares,
        "floor_s": floor,
        "floor_share": floor * calls_of(step) / step.median if floor else None,
        "augment_share": augment.median / step.median if augment and augment.seconds else None,
    }
    if not shares:
        return verdict | {"bound": "", "says": "no verdict: peaks were not measured"}
    bound = max(shares, key=lambda name: shares[name])
    others = ", ".join(f"{WHAT[n]} {share:.0%}" for n, share in shares.items() if n != bound)
    says = f"{bound}-bound: {WHAT[bound]} {shares[bound]:.0%} of the step ({others})"
    of_work = shares[bound]
    if record.machine.get("platform") == "cpu" and (worked := core_seconds(step)):
        of_work *= step.median / worked
        says += f", {of_work:.0%} of the time that its cores worked"
    if of_work < MOST:
        says += "; most of it is lost to kernels that stay below both"
    return verdict | {"bound": bound, "says": doubted(says, step)}


WHAT = {
    "compute": "products at the machine's peak would take",
    "memory": "traffic at its bandwidth",
    "communication": "collectives alone",
}


def core_seconds(row: Row) -> float:
    """Seconds that each core of a CPU worked for a repeat; 0 where not known.

    Less than the clock's where other programs had the cores too.
    """
    worked = statistics.median(row.cpu_seconds) if row.cpu_seconds else 0.0
    return worked / row.settings.get("threads", 1)


def shares_of(step: Row, record: Record) -> Iterator[tuple[str, float]]:
    """(bound, share of the step) of those that are known."""
    peak, width = peaks_of(step, record)
    if peak and step.flops:
        yield "compute", step.flops / peak / step.median
    if width and step.bytes:
        yield "memory", step.bytes / width / step.median
    sent = find(record.rows, "communication", **same(step.settings, KEYS))
    if sent is not None and sent.seconds:
        yield "communication", sent.median / step.median


def peaks_of(row: Row, record: Record) -> tuple[float, float]:
    """(FLOP/s, bytes/s) of all devices that a row used, as measured; 0 where not known.

    Several devices of one CPU share its cores, so that they have its peak together.
    """
    peaks = record.machine.get("peaks") or {}
    many = 1 if record.machine.get("platform") == "cpu" else row.settings.get("devices", 1)
    tflops = peaks.get("tflops", {}).get(row.settings.get("precision", "f32"), 0.0)
    return many * tflops * 1e12, many * peaks.get("gb_per_s", 0.0) * 1e9


def floor_of(step: Row, record: Record) -> float | None:
    """Seconds that the step's operations, as they are counted, take at least; None: not known.

    No program that does those products is quicker on this machine. Forms that need fewer of them
    (Winograd) may pass it. The longer of its operations at the peak and of `flops.least_bytes` at
    the bandwidth.
    """
    peak, width = peaks_of(step, record)
    if not (peak and width and step.flops):
        return None
    of = step.settings
    moved = flops.least_bytes(of["model"], of["tile_px"], of["batch"], of["precision"])
    return max(step.flops / calls_of(step) / peak, moved / width)


def calls_of(row: Row) -> float:
    """Calls of a turn: on an accelerator more than one, with one wait at their end."""
    return row.images / row.settings["batch"] if row.images else 1.0


def of_pipeline(row: Row, record: Record) -> dict[str, Any]:
    """Whether training from a store waits for it: its speed beside the step's on tiles there.

    Returns:
      settings (with cache and data), bound, says, share (of the step's speed), as far as known.
    """
    settings = {k: row.settings[k] for k in (*KEYS, "cache", "data") if k in row.settings}
    keys = same(row.settings, KEYS)
    step = find(record.rows, "step", beside="pipeline", **keys) or find(record.rows, "step", **keys)
    if step is None or not step.seconds:
        return {"settings": settings, "bound": "", "says": "no verdict: the step has no figure"}
    share = row.images_per_s / step.images_per_s
    read = find(record.rows, "read", **same(row.settings, ("tile_px", "batch", "threads", "data")))
    reading = f", reading alone {read.images_per_s:,.0f}" if read and read.seconds else ""
    figures = (
        f"{row.images_per_s:,.1f} images/s where the step on tiles that are there takes "
        f"{step.images_per_s:,.1f}{reading}"
    )
    bound, says = "input", f"input-bound: {1 - share:.0%} is lost to the input, {figures}"
    if share >= 1 - TOLD:
        alone = find(record.rows, "step", beside=None, **keys)
        bound = of_step(alone, record)["bound"] if alone and alone.seconds else ""
        as_step = f" ({bound}-bound, as the step)" if bound else ""
        says = f"not input-bound{as_step}: {figures}"
    return {"settings": settings, "bound": bound, "share": share, "says": doubted(says, row, step)}


def doubted(says: str, *rows: Row) -> str:
    """The sentence, or what stands against it: rows that conclude nothing."""
    noisy = [f"{row.stage} {row.doubt}" for row in rows if row.doubt]
    return f"inconclusive ({', '.join(noisy)}), at face value {says}" if noisy else says


def same(settings: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Those of the names that a row's settings hold."""
    return {name: settings[name] for name in names if name in settings}
