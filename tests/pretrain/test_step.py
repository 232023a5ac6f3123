"""The training step against PyTorch's, and against itself on another number of devices."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jax.sharding import PartitionSpec as P
from torchvision.models.resnet import BasicBlock, ResNet

from jaxhisto import weights
from jaxhisto.config import ModelConfig, OptimConfig, PretrainConfig
from jaxhisto.distributed import make_mesh, to_global
from jaxhisto.pretrain import step as step_module
from jaxhisto.pretrain.loss import nt_xent
from jaxhisto.pretrain.step import (
    TrainState,
    init_state,
    make_embed,
    make_loss_and_grads,
    make_train_step,
    replicate,
)

N, SIDE, STEPS = 16, 32, 50
PARAMETERS = 3 * 12 + 4  # 12 convolutions with a BatchNorm each, two linear layers
# The paper's peak rate at N = 512 from the first step on.
CONFIG = PretrainConfig(
    out="run",
    batch_size=N,
    tile_px=SIDE,
    precision="f32",
    model=ModelConfig(name="resnet10"),
    optim=OptimConfig(rate=0.6, warmup_epochs=0.0),
)
Step = Callable[..., tuple[TrainState, dict[str, jax.Array]]]


def make_batch(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tiles of unlike colour, the last ones smaller than the canvas."""
    rng = np.random.default_rng(seed)
    colour = rng.uniform(40, 215, (N, 1, 1, 3))
    tiles = np.clip(colour + rng.normal(0, 30, (N, 48, 48, 3)), 0, 255).astype(np.uint8)
    sizes = np.full((N, 2), 48, np.int32)
    sizes[-4:] = 40
    tiles[-4:, 40:] = 0
    tiles[-4:, :, 40:] = 0
    return tiles, sizes


@pytest.fixture(scope="module")
def batch() -> tuple[np.ndarray, np.ndarray]:
    return make_batch(0)


def compile_step(devices: int, batch: tuple[np.ndarray, np.ndarray]) -> Any:
    mesh = make_mesh(devices)
    with jax.set_mesh(mesh):
        state = init_state(CONFIG, STEPS, 1.0, mesh)
        return make_train_step(CONFIG, STEPS, 1.0).lower(state, *to_global(batch, mesh)).compile()


@pytest.fixture(scope="module")
def on_one(batch: tuple[np.ndarray, np.ndarray]) -> Any:
    return compile_step(1, batch)


@pytest.fixture(scope="module")
def on_four(batch: tuple[np.ndarray, np.ndarray]) -> Any:
    return compile_step(4, batch)


def updates(state: TrainState, metrics: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """The loss, and the update of each tensor (LARS's momentum holds it, rate inside)."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(state.opt_state))
    found = {jax.tree_util.keystr(path): leaf for path, leaf in leaves if leaf.ndim}
    assert len(found) == PARAMETERS
    return found | {"loss": jax.device_get(metrics["loss"])}


def disagreement(one: Step, four: Step) -> tuple[float, str]:
    """The largest difference in loss or an update between 1 and 4 devices, over its norm.

    Median of three batches: in about one batch of eight the input of some ReLU rounds to the
    other side of 0, and updates differ by 1e-3; what is wrong with the code shows in all three.
    """
    return sorted(largest_difference(one, four, make_batch(seed)) for seed in range(3))[1]


def largest_difference(
    one: Step, four: Step, batch: tuple[np.ndarray, np.ndarray]
) -> tuple[float, str]:
    """Of five steps along the path of the one device, each taken by both from the same state."""
    meshes = [make_mesh(devices) for devices in (1, 4)]
    worst = (0.0, "")
    with jax.set_mesh(meshes[0]):
        state = jax.device_get(init_state(CONFIG, STEPS, 1.0, meshes[0]))
    for _ in range(5):
        results = []
        for step, mesh in zip((one, four), meshes, strict=True):
            with jax.set_mesh(mesh):
                new, metrics = step(replicate(state, mesh), *to_global(batch, mesh))
                results.append((jax.device_get(new), updates(new, metrics)))
        (state, ours), (_, theirs) = results
        for name, value in ours.items():
            error = np.linalg.norm((value - theirs[name]).ravel()) / np.linalg.norm(value.ravel())
            worst = max(worst, (float(error), name))
    return worst


def test_devices_do_not_change_the_training(on_one: Step, on_four: Step) -> None:
    error, where = disagreement(on_one, on_four)
    print("devices:", error, where)
    assert error < 1e-4, where


@pytest.mark.slow
def test_that_comparison_sees_negatives_of_the_own_device_only(
    on_one: Step, batch: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_own_device(z: jax.Array, temperature: float, chunk: int) -> tuple[jax.Array, dict]:
        z = jax.reshard(z, P())
        shards = z.reshape(jax.sharding.get_abstract_mesh().size, -1, *z.shape[1:])
        losses, metrics = jax.vmap(lambda z: nt_xent(z, temperature, chunk))(shards)
        return losses.mean(), jax.tree.map(jnp.mean, metrics)

    monkeypatch.setattr(step_module, "nt_xent", of_own_device)
    error, where = disagreement(on_one, compile_step(4, batch))
    print("planted:", error, where)
    assert error > 1e-2, where


def test_the_step_exchanges_samples_once(on_four: Any) -> None:
    text = on_four.as_text()

    def count(operation: str) -> int:
        return len(re.findall(rf"= \S.* {operation}(?:-start)?\(", text))

    assert count("all-reduce") > 0  # the pattern finds what is there
    assert count("all-gather") == 1
    assert count("all-to-all") == 0
    assert count("collective-permute") == 0


def test_the_state_before_the_first_step_is_the_same_everywhere() -> None:
    one, four = (init_state(CONFIG, STEPS, 1.0, make_mesh(n)) for n in (1, 4))
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), one, four))
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(four))
    assert (one.step.dtype, int(one.step)) == (jnp.int32, 0)


def test_metrics_are_float32_scalars(on_one: Step, batch: tuple[np.ndarray, np.ndarray]) -> None:
    mesh = make_mesh(1)
    with jax.set_mesh(mesh):
        state, metrics = on_one(init_state(CONFIG, STEPS, 1.0, mesh), *to_global(batch, mesh))
    assert metrics.pop("trust_norms").shape == (3, PARAMETERS)
    of_update = {"rate", "grad_norm", "state_norm"}
    assert set(metrics) == of_update | {"loss", "pos_sim", "neg_sim", "accuracy"}
    assert {(m.dtype.name, m.shape) for m in metrics.values()} == {("float32", ())}
    assert float(metrics["rate"]) == pytest.approx(0.6)
    assert int(state.step) == 1


def test_views_are_a_function_of_the_step(
    on_one: Step, batch: tuple[np.ndarray, np.ndarray]
) -> None:
    mesh = make_mesh(1)

    def loss_at(step: int) -> float:
        state = init_state(CONFIG, STEPS, 1.0, mesh)
        state = replace(state, step=replicate(np.int32(step), mesh))
        return float(on_one(state, *to_global(batch, mesh))[1]["loss"])

    with jax.set_mesh(mesh):
        assert loss_at(0) == loss_at(0) != loss_at(1)


def torch_twin(state: TrainState) -> torch.nn.Module:
    """torchvision's ResNet with the published head and the same weights."""
    model = ResNet(BasicBlock, [1, 1, 1, 1])
    model.fc = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 128)
    )
    tensors = weights.to_torch(state.params, state.batch_stats, "resnet10", steps=0)
    model.load_state_dict({n: torch.from_numpy(t.copy()) for n, t in tensors.items()})
    return model.train()


def torch_nt_xent(z: torch.Tensor, temperature: float) -> torch.Tensor:
    """Cross entropy of each view against all others; the views of an image are neighbours."""
    z = F.normalize(z, dim=1)
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z)) ^ 1)


def test_one_step_is_pytorchs() -> None:
    mesh = make_mesh(1)
    views = np.random.default_rng(0).random((N, 2, SIDE, SIDE, 3), dtype=np.float32)
    state = init_state(CONFIG, STEPS, 1.0, mesh)
    with jax.set_mesh(mesh):
        loss_and_grads = jax.jit(make_loss_and_grads(CONFIG))
        loss, _, batch_stats, grads = loss_and_grads(
            state.params, state.batch_stats, to_global(views, mesh)
        )

    model = torch_twin(state)
    images = torch.from_numpy((views.reshape(-1, SIDE, SIDE, 3) - 0.5) / 0.5).permute(0, 3, 1, 2)
    expected = torch_nt_xent(model(images), CONFIG.optim.temperature)
    expected.backward()

    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    ours = weights.to_torch(grads, batch_stats, "resnet10", steps=1)
    named = dict(model.named_parameters())
    assert len(named) == PARAMETERS
    for name, parameter in named.items():
        theirs = parameter.grad.numpy()
        error = np.linalg.norm(ours[name] - theirs) / np.linalg.norm(theirs)
        assert error < 1e-3, name
    for name, buffer in model.named_buffers():
        np.testing.assert_allclose(ours[name], buffer.numpy(), rtol=1e-4, atol=1e-5, err_msg=name)


def test_bfloat16_stays_near_float32_and_float32_outside_the_convolutions() -> None:
    mesh = make_mesh(1)
    views = np.random.default_rng(0).random((N, 2, SIDE, SIDE, 3), dtype=np.float32)
    state = init_state(CONFIG, STEPS, 1.0, mesh)
    half = PretrainConfig(
        out="run", batch_size=N, tile_px=SIDE, model=CONFIG.model, optim=CONFIG.optim
    )
    assert half.precision == "bf16"
    with jax.set_mesh(mesh):
        placed = to_global(views, mesh)
        out = jax.eval_shape(make_loss_and_grads(half), state.params, state.batch_stats, placed)
        text = (
            jax.jit(make_loss_and_grads(half))
            .lower(state.params, state.batch_stats, placed)
            .as_text()
        )
    assert {leaf.dtype.name for leaf in jax.tree.leaves(out)} == {"float32"}
    convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert convolutions
    assert all("bf16" in line and "xf32>" not in line for line in convolutions)


def test_embed_uses_running_statistics() -> None:
    state = init_state(CONFIG, STEPS, 1.0, make_mesh(1))
    images = np.random.default_rng(0).random((4, SIDE, SIDE, 3), dtype=np.float32)
    embed = make_embed(CONFIG.model)
    together = embed(state.params, state.batch_stats, images)
    assert (together.shape, together.dtype) == ((4, 512), jnp.float32)
    alone = embed(state.params, state.batch_stats, images[:1])
    np.testing.assert_allclose(together[:1], alone, rtol=1e-4, atol=1e-5)
