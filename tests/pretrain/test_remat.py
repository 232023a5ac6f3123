"""Rematerialisation: the same numbers, in less memory, with nothing sent twice.

It takes XLA's own convolutions, so that it is compared with a step that does.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from compiled_text import collectives

from jaxhisto.config import MemoryConfig, ModelConfig, OptimConfig, PretrainConfig
from jaxhisto.distributed import make_mesh, to_global
from jaxhisto.models.convolution import convolutions
from jaxhisto.pretrain.step import (
    compiler_options,
    init_state,
    make_loss_and_grads,
    make_train_step,
)

N, SIDE = 32, 32
PLAIN = PretrainConfig(
    out="run",
    batch_size=N,
    tile_px=SIDE,
    precision="f32",
    model=ModelConfig(name="resnet10"),
    optim=OptimConfig(rate=0.6, warmup_epochs=0.0),
)
REMAT = replace(PLAIN, memory=MemoryConfig(remat="block"))


def compiled(config: PretrainConfig, devices: int) -> tuple[Any, tuple]:
    views = np.random.default_rng(0).random((N, 2, SIDE, SIDE, 3), dtype=np.float32)
    mesh = make_mesh(devices)
    with jax.set_mesh(mesh):
        state = init_state(config, 50, 1.0, mesh)
        inputs = (state.params, state.batch_stats, to_global(views, mesh))
        lowered = jax.jit(make_loss_and_grads(config)).lower(*inputs)
        return lowered.compile(compiler_options=compiler_options(config)), inputs


def convolutions_in(program: Any) -> int:
    return len(re.findall(r" convolution\(", program.as_text()))


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_the_numbers_are_the_same_and_sent_once(devices: int) -> None:
    with convolutions("plain"):
        plain, inputs = compiled(PLAIN, devices)
    remat, _ = compiled(REMAT, devices)
    loss, metrics, stats, grads = jax.device_get(plain(*inputs))
    found = jax.device_get(remat(*inputs))
    assert found[0] == loss
    # The running statistics are bit for bit those of one update, not of two.
    for ours, theirs in ((found[1], metrics), (found[2], stats)):
        assert jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))
    size = max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads))
    errors = jax.tree.map(lambda a, b: np.abs(a - b).max() / size, found[3], grads)
    print("gradient:", max(jax.tree.leaves(errors)))
    assert max(jax.tree.leaves(errors)) < 1e-5

    assert convolutions_in(remat) > convolutions_in(plain)  # they are computed again indeed

    def sent(program: Any) -> dict[str, int]:
        total: dict[str, int] = {}
        for operation, size, _ in collectives(program.as_text()):
            total[operation] = total.get(operation, 0) + size
        return total

    print("sent:", sent(plain), sent(remat))
    assert sent(remat) == sent(plain)


@pytest.mark.slow
def test_the_step_keeps_less() -> None:
    """ResNet18, 16 images of 96 px."""

    def kept(config: PretrainConfig) -> int:
        mesh = make_mesh(1)
        with jax.set_mesh(mesh):
            state = init_state(config, 50, 1.0, mesh)
            batch = np.zeros((16, 96, 96, 3), np.uint8), np.full((16, 2), 96, np.int32)
            step = make_train_step(config, 50, 1.0).lower(state, *to_global(batch, mesh)).compile()
        return step.memory_analysis().temp_size_in_bytes

    model = ModelConfig(name="resnet18")
    plain, remat = (replace(c, model=model, batch_size=16, tile_px=96) for c in (PLAIN, REMAT))
    with convolutions("plain"):
        at_once = kept(plain)
    again = kept(remat)
    print("bytes:", at_once, again)
    assert again < 0.7 * at_once
