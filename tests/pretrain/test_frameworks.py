"""A training step here and one in PyTorch, from one exported file, for every depth."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

from jaxhisto import weights
from jaxhisto.config import ModelConfig, OptimConfig, PretrainConfig
from jaxhisto.distributed import make_mesh, to_global
from jaxhisto.models import simclr
from jaxhisto.pretrain.step import make_loss_and_grads, replicate
from jaxhisto_export.layouts import convert

N, SIDE, TEMPERATURE = 8, 64, 0.5
DEPTHS = ["resnet18", "resnet34", "resnet50", "resnet101"]


def exported(arch: str, folder: Path) -> tuple[dict, dict, Path]:
    """Initial weights, and the published file that carries them."""
    config = PretrainConfig(out="run", model=ModelConfig(name=arch))
    params, stats = simclr.init(arch, 128, seed=3)
    encoder = folder / "encoder.safetensors"
    weights.write_encoder(
        encoder, params, stats, weights.describe(config, step=0, data_hash="none")
    )
    convert(encoder, "published", folder / "published.ckpt")
    return params, stats, folder / "published.ckpt"


def in_pytorch(arch: str, file: Path) -> torch.nn.Module:
    """torchvision's ResNet with the published head, from the file."""
    model = getattr(torchvision.models, arch)(weights=None)
    width = model.fc.in_features
    model.fc = torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(width, width),
        torch.nn.ReLU(),
        torch.nn.Linear(width, 128),
    )
    state = torch.load(file, weights_only=True)["state_dict"]
    model.load_state_dict({k.removeprefix("model.resnet."): v for k, v in state.items()})
    return model.train()


def nt_xent(z: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each view against all others; the views of an image are neighbours."""
    z = F.normalize(z, dim=1)
    logits = (z @ z.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z)) ^ 1)


def taken(model: torch.nn.Module, images: torch.Tensor) -> tuple[float, dict, dict]:
    """(loss, gradients, buffers) of a step in PyTorch, in the model's precision."""
    loss = nt_xent(model((images.to(model.conv1.weight.dtype) - 0.5) / 0.5))
    loss.backward()
    gradients = {name: p.grad.double().numpy() for name, p in model.named_parameters()}
    return loss.item(), gradients, {name: b.numpy() for name, b in model.named_buffers()}


def error(ours: dict, truth: dict) -> float:
    """Norm of the difference over the norm, over all tensors of the truth."""
    squares = [[((ours[n] - t) ** 2).sum(), (t**2).sum()] for n, t in truth.items()]
    difference, norm = np.sqrt(np.sum(squares, axis=0))
    return float(difference / norm)


@pytest.mark.slow
@pytest.mark.parametrize("arch", DEPTHS)
def test_one_step_from_an_exported_file(arch: str, tmp_path: Path) -> None:
    """Our float32 is as near to PyTorch's float64 as PyTorch's own float32 is.

    At the start of training, gradients of a deep network with BatchNorm over few images are
    ill-conditioned: a ReLU that float32 tips to the other side moves them by percents.
    """
    params, stats, file = exported(arch, tmp_path)
    # Smooth images: white noise gives more ReLUs that hang at 0.
    coarse = np.random.default_rng(0).random((2 * N, 3, 6, 6))
    images = F.interpolate(torch.from_numpy(coarse), SIDE, mode="bicubic").clamp(0, 1)
    loss64, truth, buffers = taken(in_pytorch(arch, file).double(), images)
    loss32, theirs, _ = taken(in_pytorch(arch, file), images)

    views = images.permute(0, 2, 3, 1).reshape(N, 2, SIDE, SIDE, 3).float().numpy()
    config = PretrainConfig(
        out="run",
        precision="f32",
        model=ModelConfig(name=arch),
        optim=OptimConfig(temperature=TEMPERATURE),
    )
    mesh = make_mesh(1)
    with jax.set_mesh(mesh), jax.default_matmul_precision("float32"):
        loss, _, new_stats, grads = jax.jit(make_loss_and_grads(config))(
            replicate(params, mesh), replicate(stats, mesh), to_global(views, mesh)
        )
    ours = weights.to_torch(grads, new_stats, arch, steps=1)
    print(arch, "loss", float(loss) / loss64 - 1, "PyTorch's", loss32 / loss64 - 1)
    print(arch, "gradient", error(ours, truth), "PyTorch's", error(theirs, truth))
    assert float(loss) == pytest.approx(loss64, rel=1e-5)
    assert error(ours, truth) < max(1e-4, 3 * error(theirs, truth))
    for name, buffer in buffers.items():
        if name.endswith("num_batches_tracked"):
            assert ours[name] == buffer == 1
        else:
            difference = np.abs(ours[name] - buffer).max() / np.abs(buffer).max()
            assert difference < 1e-4, name
