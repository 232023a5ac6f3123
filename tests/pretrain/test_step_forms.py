"""What `--step` changes in a step: how it is computed, and nothing that is learnt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from jaxhisto.config import MemoryConfig, ModelConfig, OptimConfig, PretrainConfig, StepConfig
from jaxhisto.distributed import make_mesh, to_global
from jaxhisto.errors import ConfigError
from jaxhisto.pretrain.step import (
    compiler_options,
    init_state,
    make_loss_and_grads,
    make_train_step,
)
from jaxhisto.pretrain.xla import check_options, parsed

N, SIDE = 8, 32
CONFIG = PretrainConfig(
    out="run",
    batch_size=N,
    tile_px=SIDE,
    precision="f32",
    model=ModelConfig(name="resnet10"),
    optim=OptimConfig(rate=0.6, warmup_epochs=0.0),
)
FOLDED = replace(CONFIG, step=StepConfig(stem="space_to_depth"))


def one_step(config: PretrainConfig, devices: int) -> tuple[Any, Any]:
    """(state, metrics with the gradient) after the first step."""
    rng = np.random.default_rng(0)
    batch = rng.integers(0, 256, (N, SIDE, SIDE, 3), np.uint8), np.full((N, 2), SIDE, np.int32)
    mesh = make_mesh(devices)
    with jax.set_mesh(mesh):
        step = make_train_step(config, 50, 1.0, with_gradient=True)
        found = step(init_state(config, 50, 1.0, mesh), *to_global(batch, mesh))
        return jax.device_get(found)


@pytest.fixture(scope="module")
def plainly() -> Any:
    return one_step(CONFIG, 1)


def off(ours: Any, theirs: Any) -> float:
    """The largest difference of a tensor, over its norm."""
    errors = jax.tree.map(
        lambda a, b: float(np.linalg.norm(np.ravel(a - b)) / np.linalg.norm(np.ravel(b))),
        ours,
        theirs,
    )
    return max(jax.tree.leaves(errors))


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_a_step_gives_the_same_loss_and_gradient(plainly: Any, devices: int) -> None:
    (state, metrics), (expected, expected_metrics) = one_step(FOLDED, devices), plainly
    assert metrics["loss"] == pytest.approx(expected_metrics["loss"], rel=1e-5)
    assert off(metrics["gradient"], expected_metrics["gradient"]) < 1e-3
    assert off(state.batch_stats, expected.batch_stats) < 1e-5
    assert state.params["encoder"]["conv1"]["kernel"].shape == (7, 7, 3, 64)
    assert jax.tree.structure(state) == jax.tree.structure(expected)


def test_in_bfloat16_the_step_holds_the_folded_convolution() -> None:
    config, mesh = replace(FOLDED, precision="bf16"), make_mesh(4)
    views = np.zeros((N, 2, SIDE, SIDE, 3), np.float32)
    with jax.set_mesh(mesh):
        state = init_state(config, 50, 1.0, mesh)
        args = (state.params, state.batch_stats, to_global(views, mesh))
        text = jax.jit(make_loss_and_grads(config)).lower(*args).as_text()
    assert "tensor<4x4x12x64xbf16>" in text


def test_options_by_hand() -> None:
    given = ("xla_a=true", "xla_b=False", "xla_c=3", "xla_d=X,Y=1", "xla_e=")
    assert parsed(given) == {
        "xla_a": True, "xla_b": False, "xla_c": "3", "xla_d": "X,Y=1", "xla_e": "",
    }  # fmt: skip
    assert compiler_options(CONFIG) == {}
    remat = replace(CONFIG, memory=MemoryConfig(remat="block"))
    own = {"xla_disable_hlo_passes": "cse_barrier_expander"}
    assert compiler_options(remat) == own
    # What keeps a recomputation from being merged stays, whatever else is left out.
    more = replace(remat, step=StepConfig(xla=("xla_disable_hlo_passes=algsimp", "xla_c=3")))
    assert compiler_options(more) == {
        "xla_disable_hlo_passes": "cse_barrier_expander,algsimp", "xla_c": "3",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("xla_gpu_autotune_level",), "is no NAME=VALUE of an XLA option"),
        (("--xla_gpu_autotune_level=4",), "without dashes"),
        (("xla_cpu_max_isa=A B",), "without dashes and spaces"),
        (("jax_enable_x64=true",), "is no NAME=VALUE"),
        (("xla_a=1", "xla_a=2"), "xla_a is given twice; keep one"),
        (("xla_gpu_no_such_thing=1",), "No such compile option: 'xla_gpu_no_such_thing'"),
        (("xla_gpu_autotune_level=high",), "'high' is not a valid int32 value"),
        (("xla_cpu_multi_thread_eigen=maybe",), "'maybe' is not a valid bool value"),
    ],
)
def test_options_that_are_none_are_one_sentence(given: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_options(given)
    text = str(refused.value)
    assert said in text
    assert text.startswith("--step.xla")
    assert text.endswith(".")
    assert "\n" not in text


def test_options_that_xla_knows_pass() -> None:
    check_options(())
    check_options(("xla_gpu_enable_latency_hiding_scheduler=true", "xla_gpu_autotune_level=4"))
