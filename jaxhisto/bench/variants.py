"""The whole step in other forms, by turns with the plain one: which of them are quicker here.

A variant changes how a step is computed and nothing that is learnt, so options of fast math are
none. The names of XLA's options are those of jaxlib 0.10; what an XLA does not take becomes a row
that says so. (GPU: https://docs.jax.dev/en/latest/gpu_performance_tips.html and `XLA_FLAGS=--help`;
TPU: what MaxText sets for data parallelism.)
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from jaxhisto.bench import memory
from jaxhisto.bench.child import OutOfMemory, ask
from jaxhisto.bench.record import OURS, Row, find, row_from_json
from jaxhisto.errors import RunError

LEAST = 0.02
"""By which the slowest turn of a variant must be ahead of the plain step's fastest to be kept."""
PLAIN = "the plain step"


@dataclass(frozen=True)
class Variant:
    """A form of the step.

    Attributes:
      name: in the report.
      stem, xla: as in `StepConfig`.
      forms: of the other convolutions, as `convolution.convolutions` takes it.
    """

    name: str
    stem: str = "plain"
    xla: tuple[str, ...] = ()
    forms: str = "auto"

    @property
    def flags(self) -> str:
        """What sets it in `jaxhisto pretrain`; empty where nothing does."""
        if self.forms != "auto":
            return ""
        stem = [] if self.stem == "plain" else [f"--step.stem {self.stem}"]
        return " ".join([*stem, *(["--step.xla", *self.xla] if self.xla else [])])


HIDE = "xla_gpu_enable_latency_hiding_scheduler=true"
SUMS = "xla_gpu_all_reduce_combine_threshold_bytes"
BUFFERS = "xla_gpu_enable_command_buffer"

EVERYWHERE = (Variant("stem by space-to-depth", "space_to_depth"),)
ON = {
    "cpu": (
        Variant("XLA's own convolutions alone", forms="plain"),
        Variant("oneDNN's products", xla=("xla_cpu_use_onednn=true",)),
        Variant("no XNNPACK", xla=("xla_cpu_use_xnnpack=false",)),
        Variant("vectors of 512 bits", xla=("xla_cpu_prefer_vector_width=512",)),
        Variant(
            "schedule for concurrency",
            xla=("xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_CONCURRENCY_OPTIMIZED",),
        ),
        Variant(
            "schedule for memory",
            xla=("xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",),
        ),
    ),
    "gpu": (
        Variant("latency-hiding scheduler", xla=(HIDE,)),
        Variant("no autotuning", xla=("xla_gpu_autotune_level=0",)),
        Variant("all tilings tried", xla=("xla_gpu_exhaustive_tiling_search=true",)),
        Variant("no Triton products", xla=("xla_gpu_enable_triton_gemm=false",)),
        Variant("Triton where it looks faster", xla=("xla_gpu_triton_gemm_any=false",)),
        Variant("products by cuBLASLt", xla=("xla_gpu_enable_cublaslt=true",)),
        Variant("convolutions in NHWC", xla=("xla_gpu_force_conv_nhwc=true",)),
        Variant("convolutions in NCHW", xla=("xla_gpu_force_conv_nchw=true",)),
        Variant("no command buffers", xla=(f"{BUFFERS}=",)),
        Variant("command buffers from one command", xla=("xla_gpu_graph_min_graph_size=1",)),
    ),
    "tpu": (
        Variant("latency-hiding scheduler", xla=("xla_tpu_enable_latency_hiding_scheduler=true",)),
        Variant("32 MB of vector memory", xla=("xla_tpu_scoped_vmem_limit_kib=32768",)),
        Variant("64 MB of vector memory", xla=("xla_tpu_scoped_vmem_limit_kib=65536",)),
    ),
}
SEVERAL = {
    "gpu": (
        Variant("pipelined sums", xla=(HIDE, "xla_gpu_enable_pipelined_all_reduce=true")),
        Variant("gradients in one sum", xla=(HIDE, f"{SUMS}=1073741824")),
        Variant("gradients by 4 MB", xla=(HIDE, f"{SUMS}=4194304")),
        Variant(
            "collectives in command buffers",
            xla=(f"{BUFFERS}=FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,COLLECTIVES",),
        ),
    ),
    "tpu": (
        Variant(
            "sums for data parallelism",
            xla=(
                "xla_tpu_enable_data_parallel_all_reduce_opt=true",
                "xla_tpu_data_parallel_opt_different_sized_ops=true",
            ),
        ),
        Variant(
            "collectives fused and overlapped",
            xla=(
                "xla_tpu_enable_async_collective_fusion=true",
                "xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
                "xla_tpu_enable_async_collective_fusion_multiple_steps=true",
                "xla_tpu_overlap_compute_collective_tc=true",
                "xla_enable_async_all_gather=true",
            ),
        ),
    ),
}


def variants_of(platform: str, devices: int, given: Sequence[str] = ()) -> tuple[Variant, ...]:
    """What is tried on a platform; with `given`, those options together as one more."""
    several = SEVERAL.get(platform, ()) if devices > 1 else ()
    own = (Variant("as given", xla=tuple(given)),) if given else ()
    return (*EVERYWHERE, *ON.get(platform, ()), *several, *own)


def measured(
    point: Mapping[str, Any],
    variants: Sequence[Variant],
    steps: int,
    repeats: int,
    env: Mapping[str, str] | None = None,
) -> Iterator[str | Row]:
    """Lines of progress and rows: the plain step's, then of each variant the plain one's, which
    took turns with it, and its own.

    A variant at which the process ends (XLA's compiler may abort) gets a row that says so, and
    the others go on in a new process.

    Raises:
      RunError: the plain step itself cannot be measured.
    """
    left, begun = list(variants), False
    while left or not begun:
        job = {
            "what": "variants",
            "point": dict(point),
            "variants": [asdict(v) for v in left],
            "steps": steps,
            "repeats": repeats,
            "first": not begun,
        }
        try:
            for answer in ask(job, env):
                if "say" in answer:
                    yield str(answer["say"])
                    continue
                row = row_from_json(answer["row"])
                begun = True
                if row.why and "variant" not in row.settings:  # the plain step does not fit
                    yield row
                    return
                if "variant" in row.settings:
                    left.pop(0)
                yield row
            return
        except OutOfMemory:
            why = memory.OUT
        except RunError as error:
            if not begun:
                raise
            why = str(error).partition(";")[0]
        if not begun:
            yield Row("step", OURS, dict(point), why=why)
            return
        if not left:
            return
        failed = left.pop(0)
        yield Row("step", OURS, dict(point) | settings_of(failed), why=why)


def settings_of(variant: Variant) -> dict[str, str]:
    """What its row says of it, beside the settings of the point."""
    return {"variant": variant.name, "flags": variant.flags, "beside": PLAIN}


def outcome(plain: Row | None, row: Row, on_cpu: bool) -> str:
    """Whether a variant is worth setting, of the turns that it took with the plain step.

    By the clock; on a CPU, where that is inconclusive, by the seconds that its cores worked.
    """
    if row.why or plain is None or not plain.seconds:
        return "no figure"
    if row.conclusive and plain.conclusive:
        return judged(plain.seconds, row.seconds)
    worked = [replace(r, seconds=r.cpu_seconds) for r in (plain, row)]
    if on_cpu and all(r.conclusive for r in worked):
        return f"{judged(*(r.seconds for r in worked))}, by core s"
    return "inconclusive"


def judged(plain: Sequence[float], ours: Sequence[float]) -> str:
    """What two series of turns say: whether they lie apart by LEAST."""
    if max(ours) <= (1 - LEAST) * min(plain):
        return "yes"
    if max(plain) <= (1 - LEAST) * min(ours):
        return "no, slower"
    return "no, not beyond the spread"


def plain_of(row: Row, rows: tuple[Row, ...]) -> Row | None:
    """The plain step's row of the turns that a variant took."""
    same = {k: v for k, v in row.settings.items() if k not in ("variant", "flags", "loss")}
    return find(rows, "step", OURS, **same | {"beside": row.settings["variant"]})


HEAD = ("setting", "variant", "kept", "time / plain", "s, median", "plain, s", "spread",
        "plain's spread", "by core s", "loss off by", "set by")  # fmt: skip


def cells(row: Row, rows: tuple[Row, ...], at: str, on_cpu: bool) -> list[str]:
    """A line of the report's table, as `HEAD`."""
    name, flags = row.settings["variant"], row.settings["flags"]
    set_by, plain = f"`{flags}`" if flags else "", plain_of(row, rows)
    kept = outcome(plain, row, on_cpu)
    if row.why or plain is None or not plain.seconds:
        return [at, name, f"{kept}: {row.why}" if row.why else kept, *[""] * 7, set_by]
    return [
        at,
        name,
        kept,
        f"{row.median / plain.median:.3f}",
        f"{row.median:.4g}",
        f"{plain.median:.4g}",
        f"{row.spread:.0%}",
        f"{plain.spread:.0%}",
        ratio(row.cpu_seconds, plain.cpu_seconds) if on_cpu else "",
        loss_off(plain, row),
        set_by,
    ]


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Of two medians; empty where one is not known."""
    if not (ours and theirs and statistics.median(theirs) > 0):
        return ""
    return f"{statistics.median(ours) / statistics.median(theirs):.3f}"


def loss_off(plain: Row, row: Row) -> str:
    """The difference between the losses after the same steps, over the plain one."""
    ours, theirs = (float(r.settings.get("loss", math.nan)) for r in (row, plain))
    off = abs(ours - theirs) / abs(theirs)
    return f"{off:.0e}" if math.isfinite(off) else "not finite"
