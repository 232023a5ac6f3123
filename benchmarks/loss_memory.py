"""Memory of the dense and of the chunked NT-Xent, by batch and by devices, and their time.

    python benchmarks/loss_memory.py [--largest 65536 --devices 1 2 4 8 --chunk 1024
                                      --longest 5 --repeats 5 --json FILE]

Compiles loss and gradient for each batch and each number of devices, from shapes alone, and
reads what the compiler sets aside on each device: temporaries and results, without the
projections that go in. Nothing is run that would not fit. Both forms are timed by turns on one
device, up to the batch at which a call would take longer than --longest seconds. On CPU the
devices are simulated; on accelerators the counts above those present are left out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

SMALLEST, WIDTH, TEMPERATURE = 512, 128, 0.1
FORMS = ("dense", "chunked")
Table = dict[str, dict[str, dict[str, Any]]]  # form, devices, batch


def main() -> None:
    args = parse()
    # Read when jax starts; an accelerator's devices are as many as there are.
    devices = f"--xla_force_host_platform_device_count={max(args.devices)}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {devices}".strip()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    counts = sorted({1} | {count for count in args.devices if count <= len(jax.devices())})
    batches = [SMALLEST * 2**k for k in range((args.largest // SMALLEST).bit_length())]
    table: Table = {
        form: {
            str(count): {str(n): compiled(form, n, count, args.chunk) for n in batches}
            for count in counts
        }
        for form in FORMS
    }
    exponents = {form: {c: exponent(rows) for c, rows in table[form].items()} for form in FORMS}
    show_memory(table, exponents, batches)
    seconds = time_forms(args, batches, table)
    show_seconds(seconds)
    if args.json:
        what = {k: v for k, v in vars(args).items() if k != "json"}
        record = {"what": what | {"width": WIDTH, "temperature": TEMPERATURE}, "compiled": table}
        record |= {"exponents": exponents, "seconds": seconds} | origin()
        Path(args.json).write_text(compact(json.dumps(record, indent=1)) + "\n")
    last, first = str(batches[-1]), str(counts[0])
    dense, chunked = (table[form][first][last]["bytes"] for form in FORMS)
    print(
        f"ratio {dense / chunked:.1f} = dense {dense / 1e6:,.0f} / chunked {chunked / 1e6:,.0f} MB "
        f"a device (batch {last}, {first} device, {WIDTH} wide, {args.chunk} columns at a time; "
        f"grows as N^{exponents['dense'][first]:.2f} and N^{exponents['chunked'][first]:.2f})"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--largest", type=int, default=65536, help=f"batch, from {SMALLEST} on")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--chunk", type=int, default=1024, help="columns at a time")
    parser.add_argument("--longest", type=float, default=5.0, help="s of a call that is timed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="write the record there")
    args = parser.parse_args()
    if args.largest < SMALLEST:
        parser.error(f"--largest {args.largest}: the smallest batch is {SMALLEST}.")
    return args


def loss_of(form: str, chunk: int) -> Callable[[Any], Any]:
    """The compiled (N, 2, D) -> ((loss, metrics), gradient)."""
    import jax

    from jaxhisto.pretrain.loss import nt_xent

    columns = chunk if form == "chunked" else 0
    loss = partial(nt_xent, temperature=TEMPERATURE, chunk=columns)
    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def compiled(form: str, n: int, devices: int, chunk: int) -> dict[str, Any]:
    """Bytes on each device, and bytes that each receives of the others, by exchange."""
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from jaxhisto.distributed import make_mesh

    mesh = make_mesh(devices)
    z = jax.ShapeDtypeStruct((n, 2, WIDTH), np.float32, sharding=NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        program = loss_of(form, chunk).lower(z).compile()
    memory = program.memory_analysis()
    return {
        "bytes": memory.temp_size_in_bytes + memory.output_size_in_bytes,
        "received": received(program.as_text(), devices) if devices > 1 else {},
    }


def received(text: str, devices: int) -> dict[str, list[int]]:
    """Bytes that each collective of a compiled text brings to a device; all are float32."""
    out: dict[str, list[int]] = {}
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    for shape, name in re.findall(rf"= f32\[([\d,]*)\]\S* ({names})(?:-start|-done)?\(", text):
        elements = math.prod(int(side) for side in shape.split(",") if side)
        out.setdefault(name, []).append(elements * 4 * (devices - 1) // devices)
    return out


def exponent(rows: dict[str, Any]) -> float:
    """Slope of log bytes over log batch, by least squares; nan where there is one batch."""
    if len(rows) < 2:
        return math.nan
    x = np.log([int(n) for n in rows])
    y = np.log([row["bytes"] for row in rows.values()])
    return round(float(np.polyfit(x, y, 1)[0]), 3)


def show_memory(table: Table, exponents: dict[str, Any], batches: list[int]) -> None:
    print("MB on each device: temporaries and results of loss and gradient")
    columns = [(form, count) for form in FORMS for count in table[form]]
    print(f"{'batch':>8}" + "".join(f"{f'{form} x{count}':>14}" for form, count in columns))
    for n in batches:
        cells = (table[form][count][str(n)]["bytes"] / 1e6 for form, count in columns)
        print(f"{n:>8}" + "".join(f"{cell:>14,.1f}" for cell in cells))
    print(f"{'N^':>8}" + "".join(f"{exponents[form][c]:>14.2f}" for form, c in columns))
    for form, count in columns:
        found = table[form][count][str(batches[-1])]["received"]
        said = ", ".join(f"{name} {[b / 1e6 for b in sizes]} MB" for name, sizes in found.items())
        print(f"{form} x{count} receives at {batches[-1]}: {said or 'nothing'}")


def time_forms(
    args: argparse.Namespace, batches: list[int], table: Table
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each call by form and batch, by turns, on the first device."""
    seconds: dict[str, dict[str, list[float]]] = {form: {} for form in FORMS}
    room = memory_of_device()
    for n in batches:
        z = np.random.default_rng(0).normal(size=(n, 2, WIDTH)).astype(np.float32)
        runs = {}
        for form in FORMS:
            before = seconds[form].get(str(n // 2))
            # Twice the batch is four times the pairs.
            too_long = n > SMALLEST and (
                before is None or 4 * statistics.median(before) > args.longest
            )
            if not too_long and table[form]["1"][str(n)]["bytes"] < 0.8 * room:
                runs[form] = runner(form, args.chunk, z)
        for form, run in runs.items():
            run()
            seconds[form][str(n)] = []
        for _ in range(args.repeats):
            for form, run in runs.items():
                start = time.perf_counter()
                run()
                seconds[form][str(n)].append(time.perf_counter() - start)
    return seconds


def memory_of_device() -> float:
    """Bytes that the first device may use; on CPU what the machine has free."""
    import jax

    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def runner(form: str, chunk: int, z: np.ndarray) -> Callable[[], None]:
    import jax

    from jaxhisto.distributed import make_mesh, to_global

    mesh = make_mesh(1)
    placed, loss = to_global(z, mesh), loss_of(form, chunk)

    def run() -> None:
        with jax.set_mesh(mesh):
            jax.block_until_ready(loss(placed))

    return run


def show_seconds(seconds: dict[str, dict[str, list[float]]]) -> None:
    print("\nms of loss and gradient on one device, median")
    print(f"{'batch':>8}" + "".join(f"{form:>14}" for form in FORMS))
    for n in dict.fromkeys(n for form in FORMS for n in seconds[form]):
        medians = (
            f"{1e3 * statistics.median(seconds[form][n]):,.2f}" if n in seconds[form] else "-"
            for form in FORMS
        )
        print(f"{n:>8}" + "".join(f"{median:>14}" for median in medians))


def compact(text: str) -> str:
    """JSON with each list of numbers on one line."""
    return re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)


def origin() -> dict[str, Any]:
    """Device, versions and date of a record."""
    import jax
    import jaxlib

    return {
        "device": jax.devices()[0].device_kind,
        "machine": platform.platform(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    main()
