"""N devices against one: the proof behind `jaxhisto doctor --pod`.

The same five LARS steps, at the paper's peak rate from the first one, in float32, each from the
same state, by the real training step: once on all devices of all processes, once on one device
of each process. Loss, gradient, BatchNorm statistics and update must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jaxhisto.config import ModelConfig, OptimConfig, PretrainConfig
from jaxhisto.console import say
from jaxhisto.distributed import exchange, held_together, make_mesh, to_global
from jaxhisto.pretrain.step import TrainState, init_state, make_train_step, replicate

STEPS, BATCHES, SCHEDULE = 5, 5, 50
SIDE, TILE = 32, 48
TOLERANCE = {
    "loss": 1e-5,
    "gradient": 1e-4,
    "BatchNorm statistics": 1e-5,
    "update": 1e-4,
}
"""Largest difference over the norm of the one-device value, tensor by tensor: float32 sums in
another order. What is wrong with the code is off by 1e-2 and more."""

Outcome = dict[str, dict[str, np.ndarray]]
Probe = Callable[..., tuple[TrainState, dict[str, Any]]]


@dataclass(frozen=True)
class Difference:
    """How far N devices are from one in one quantity: relative to its norm, and where."""

    error: float
    where: str


def prove(devices: int = 0) -> int:
    """Prints what the devices agree on and what not; returns 1 if anything differs.

    Raises:
      RunError: fewer devices than asked for, or processes with unlike shares.
    """
    mesh = make_mesh(devices)
    with held_together():
        failed = [line for line in exchanges(mesh) if line.startswith("FAIL")]
        failed += table(gathered(compare(mesh)))
    say(
        f"{mesh.size} devices train as one does"
        if not failed
        else f"to mend: {len(failed)} lines above; do not train on these devices together."
    )
    return 1 if failed else 0


def exchanges(mesh: Mesh) -> Iterator[str]:
    """Each kind of exchange between devices, on numbers whose result is known."""
    n = mesh.size
    say(f"{n} x {mesh.devices.flat[0].device_kind} in {jax.process_count()} process(es)")
    processes = [int(text) for text in exchange(str(jax.process_index()))]
    with jax.set_mesh(mesh):
        share = n // jax.process_count()
        first = jax.process_index() * share
        rows = to_global(np.arange(first, first + share, dtype=np.float32), mesh)
        everywhere = jax.jit(lambda x: jax.reshard(x, P()))(rows)
        total = jax.jit(lambda x: x.sum())(rows)
    checks = {
        "processes in order": processes == list(range(jax.process_count())),
        "all-gather": np.array_equal(np.asarray(everywhere), np.arange(n)),
        "all-reduce": float(total) == n * (n - 1) / 2,
    }
    for name, well in checks.items():
        line = f"{'ok  ' if well else 'FAIL'}  {name}"
        say(line)
        yield line


def table(found: dict[str, Difference]) -> list[str]:
    """Prints a line a quantity; returns those that failed."""
    say(f"      {'largest difference':<24}{'of its norm':>12}{'tolerance':>12}  where")
    failed = []
    for name, tolerance in TOLERANCE.items():
        # Not `error > tolerance`: what is no number fails too.
        well = found[name].error <= tolerance
        verdict = "ok  " if well else "FAIL"
        line = f"{verdict}  {name:<24}{found[name].error:>12.1e}{tolerance:>12.0e}  "
        say(line + found[name].where)
        failed += [] if well else [line]
    return failed


def gathered(own: dict[str, Difference]) -> dict[str, Difference]:
    """The worst of all processes, each of which compares with a device of its own."""
    worst = {}
    for name, difference in own.items():
        texts = exchange(f"{difference.error!r} {difference.where}")
        split = [text.partition(" ") for text in texts]
        seen = [f", seen by process {p}" if len(texts) > 1 else "" for p in range(len(texts))]
        found = [
            Difference(float(error), where + by)
            for (error, _, where), by in zip(split, seen, strict=True)
        ]
        worst[name] = max(found, key=badness)
    return worst


def compare(
    mesh: Mesh, make_probe: Callable[[PretrainConfig], Probe] | None = None
) -> dict[str, Difference]:
    """The differences between the mesh and this process's first device.

    Each is the worst of five steps, and of each step the median of five batches: in about one of
    forty steps the input of some ReLU rounds to the other side of 0, and gradients differ by 1e-3.
    What is wrong with the code is so in every batch.

    Args:
      mesh: all devices, of all processes.
      make_probe: makes what runs on the mesh; none: the real step.
    """
    config = settings(max(16, 4 * mesh.size) // mesh.size * mesh.size)
    alone = Mesh(np.array(jax.local_devices()[:1]), ("data",), axis_types=(AxisType.Explicit,))
    one, many = probe(config), (make_probe or probe)(config)
    batches = [
        differences(config, (one, alone), (many, mesh), make_batch(config.batch_size, seed))
        for seed in range(BATCHES)
    ]
    return {
        name: max((median([batch[name] for batch in step]) for step in zip(*batches, strict=True)),
                  key=badness)
        for name in TOLERANCE
    }  # fmt: skip


def settings(batch_size: int) -> PretrainConfig:
    """A small encoder at the peak rate that the paper has at a batch of 512, from the start."""
    return PretrainConfig(
        out="",
        batch_size=batch_size,
        tile_px=SIDE,
        precision="f32",
        model=ModelConfig(name="resnet10"),
        optim=OptimConfig(rate=0.6, warmup_epochs=0.0),
    )


def make_batch(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, 48, 48, 3) uint8 tiles of unlike colour, the last four smaller, and their sizes."""
    rng = np.random.default_rng(seed)
    colour = rng.uniform(40, 215, (n, 1, 1, 3))
    tiles = np.clip(colour + rng.normal(0, 30, (n, TILE, TILE, 3)), 0, 255).astype(np.uint8)
    sizes = np.full((n, 2), TILE, np.int32)
    sizes[-4:] = small = TILE - 8
    tiles[-4:, small:] = 0
    tiles[-4:, :, small:] = 0
    return tiles, sizes


def probe(config: PretrainConfig) -> Probe:
    """The real training step, which hands out the gradient too."""
    return make_train_step(config, SCHEDULE, 1.0, with_gradient=True)


def differences(
    config: PretrainConfig,
    alone: tuple[Probe, Mesh],
    together: tuple[Probe, Mesh],
    batch: tuple[np.ndarray, np.ndarray],
) -> list[dict[str, Difference]]:
    """The largest differences at each of five steps along the path of process 0's one device."""
    with jax.set_mesh(alone[1]):
        state = jax.device_get(init_state(config, SCHEDULE, 1.0, alone[1]))
    share = config.batch_size // jax.process_count()
    first = jax.process_index() * share
    rows = tuple(array[first : first + share] for array in batch)
    steps = []
    for step in range(STEPS):
        worst = dict.fromkeys(TOLERANCE, Difference(0.0, "nowhere"))
        after, ours = outcome(*alone, state, batch)
        _, theirs = outcome(*together, state, rows)
        for name, tensors in ours.items():
            for key, value in tensors.items():
                error = relative(value, theirs[name][key])
                found = Difference(error, f"step {step + 1} {key}".strip())
                worst[name] = max(worst[name], found, key=badness)
        # Two hosts' devices may round differently; all go on from the same state.
        state = multihost_utils.broadcast_one_to_all(after)
        steps.append(worst)
    return steps


def outcome(step: Probe, mesh: Mesh, state: Any, rows: Any) -> tuple[Any, Outcome]:
    """The state after one step on the mesh, and what is compared of it, on the host."""
    with jax.set_mesh(mesh):
        new, metrics = step(replicate(state, mesh), *to_global(rows, mesh))
    new, loss, gradient = (host(tree) for tree in (new, metrics["loss"], metrics["gradient"]))
    # LARS's momentum is the update, rate included; it is the only state with axes.
    momentum = {key: leaf for key, leaf in named(new.opt_state).items() if np.ndim(leaf)}
    return new, {
        "loss": {"": loss},
        "gradient": named(gradient),
        "BatchNorm statistics": named(new.batch_stats),
        "update": momentum,
    }


def host(tree: Any) -> Any:
    """A tree of arrays that are the same on every device, as this process's copy."""
    return jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), tree)


def named(tree: Any) -> dict[str, np.ndarray]:
    """The tensors of a tree, by dotted name."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """|ours - theirs| over |ours|."""
    difference = np.linalg.norm(np.ravel(ours - theirs))
    return float(difference / max(np.linalg.norm(np.ravel(ours)), np.finfo(np.float32).tiny))


def median(found: list[Difference]) -> Difference:
    """The middle one by error; what is no number counts as the largest."""
    return sorted(found, key=badness)[len(found) // 2]


def badness(difference: Difference) -> float:
    """For comparing: what is no number is the worst there is."""
    return float("inf") if np.isnan(difference.error) else difference.error
