"""Device memory of the training step: at once, rematerialised, in micro-batches, and both.

    python benchmarks/step_memory.py [--models resnet18 --batches 64 512 4096
                                      --micro 64 --tile-px 224 --precision bf16 --json FILE]

Nothing is trained: the whole step, augmentation included, is compiled for arrays that do not
exist, and the compiler says what it would allocate: `temp` beside the arguments (weights,
optimizer state and the batch's uint8 tiles). On a CPU these are the CPU compiler's layouts
and temporaries, bfloat16 partly widened; an accelerator's are its own, so run it there for
its numbers. The exponent is the slope of log(temp) over log(batch).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

WAYS = ("at once", "remat", "accumulate", "both")


def main() -> None:
    args = parse()
    rows = []
    print(f"{'model':<10}{'way':<12}{'batch':>6}{'parts':>7}{'temp GB':>10}{'args GB':>10}")
    for model in args.models:
        for way in WAYS:
            for batch in args.batches:
                if way in ("accumulate", "both") and batch <= args.micro:
                    continue
                row = measured(args, model, way, batch)
                rows.append(row)
                print(
                    f"{model:<10}{way:<12}{batch:>6}{row['parts']:>7}"
                    f"{row['temp_bytes'] / 1e9:>10.2f}{row['argument_bytes'] / 1e9:>10.2f}",
                    flush=True,
                )
    exponents = {
        f"{model}, {way}": exponent([r for r in rows if (r["model"], r["way"]) == (model, way)])
        for model in args.models
        for way in WAYS
    }
    print("temp grows with the batch to the power of")
    for name, value in exponents.items():
        print(f"  {name:<24}{'-' if value is None else f'{value:.2f}':>6}")
    if args.json:
        record = {"what": vars(args), "rows": rows, "exponents": exponents} | origin()
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n")
    print(ratio(rows, args.models[-1], max(args.batches)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["resnet18"])
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 512, 4096])
    parser.add_argument("--micro", type=int, default=64, help="images in a micro-batch")
    parser.add_argument("--tile-px", type=int, default=224)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "f32"))
    parser.add_argument("--json", help="write the record there")
    return parser.parse_args()


def measured(args: argparse.Namespace, model: str, way: str, batch: int) -> dict[str, Any]:
    """What the compiled step of one device allocates, in bytes."""
    from jaxhisto.config import MemoryConfig, ModelConfig, PretrainConfig

    parts = batch // args.micro if way in ("accumulate", "both") else 1
    config = PretrainConfig(
        out="",
        batch_size=batch,
        tile_px=args.tile_px,
        precision=args.precision,
        # The same groups in every way: one training, four ways to carry it out.
        model=ModelConfig(name=model, bn_group=args.micro // 2),
        memory=MemoryConfig(
            remat="block" if way in ("remat", "both") else "none", accumulate=parts
        ),
    )
    start = time.perf_counter()
    memory = compiled(config).memory_analysis()
    return {
        "model": model,
        "way": way,
        "batch": batch,
        "parts": parts,
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "compile_s": round(time.perf_counter() - start, 1),
    }


def compiled(config: Any) -> Any:
    """The step for one device, from shapes alone."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from jaxhisto.distributed import make_mesh
    from jaxhisto.pretrain.step import init_state, make_train_step

    mesh = make_mesh(1)
    N, side = config.batch_size, config.tile_px

    def shaped(shape: tuple[int, ...], dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        state = init_state(config, 1000, 100, mesh)
        state = jax.tree.map(lambda leaf: shaped(leaf.shape, leaf.dtype, P()), state)
        tiles = shaped((N, side, side, 3), jnp.uint8, P("data"))
        sizes = shaped((N, 2), jnp.int32, P("data"))
        lowered = make_train_step(config, 1000, 100).lower(state, tiles, sizes)
        # What is allocated is settled before machine code is made: that may be of the worst.
        cpu = jax.default_backend() == "cpu"
        return lowered.compile({"xla_backend_optimization_level": 0} if cpu else None)


def exponent(rows: list[dict[str, Any]]) -> float | None:
    """Least-squares slope of log(temp) over log(batch); none of less than two batches."""
    if len(rows) < 2:
        return None
    x = [math.log(row["batch"]) for row in rows]
    y = [math.log(row["temp_bytes"]) for row in rows]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return slope / sum((a - mx) ** 2 for a in x)


def ratio(rows: list[dict[str, Any]], model: str, batch: int) -> str:
    """The last line: what the largest batch takes at once, over what it takes in parts."""
    found = {
        r["way"]: r["temp_bytes"] / 1e9 for r in rows if (r["model"], r["batch"]) == (model, batch)
    }
    least = min(found, key=found.__getitem__)
    return (
        f"ratio {found['at once'] / found[least]:.1f} = at once {found['at once']:.1f} / {least} "
        f"{found[least]:.1f} GB ({model}, batch {batch})"
    )


def origin() -> dict[str, Any]:
    """Device, versions and date of a record."""
    import jax

    from jaxhisto.runlog import environment

    note = "temporaries of this device's compiler and layouts; nothing was run"
    return {"note": note, "environment": environment([jax.devices()[0].device_kind])}


if __name__ == "__main__":
    main()
