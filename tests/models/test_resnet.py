"""The encoders against torchvision's, from the same weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchvision
from torchvision.models.resnet import BasicBlock

from jaxhisto import weights
from jaxhisto.config import ModelConfig
from jaxhisto.models import simclr
from jaxhisto.models.resnet import BatchNorm, Conv
from jaxhisto.pretrain.step import make_embed


def torch_simclr(arch: str) -> torch.nn.Module:
    """torchvision's network with the published head, and BatchNorm random in all it holds.

    The scales keep the features near those of trained networks: with PyTorch's initial scale of
    1, a ResNet101's grow to 500, where float32 itself is no finer than 3e-5.
    """
    torch.manual_seed(1)
    if arch == "resnet10":
        model = torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1])
    else:
        model = getattr(torchvision.models, arch)()
    d = model.fc.in_features
    model.fc = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(d, d), torch.nn.ReLU(), torch.nn.Linear(d, 128)
    )
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.8, 1.6)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.2, 0.6)
                module.bias.normal_(0, 0.1)
    return model


@pytest.mark.parametrize(
    "arch",
    [
        "resnet10",
        "resnet18",
        pytest.param("resnet34", marks=pytest.mark.slow),
        pytest.param("resnet50", marks=pytest.mark.slow),
        pytest.param("resnet101", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("side", [64, 75])
def test_features_are_torchvisions(arch: str, side: int) -> None:
    model = torch_simclr(arch).eval()
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    params, batch_stats = weights.from_torch(state, arch)
    images = np.random.default_rng(0).random((2, side, side, 3), dtype=np.float32)

    ours = make_embed(ModelConfig(name=arch))(params, batch_stats, images)

    model.fc = torch.nn.Identity()
    with torch.no_grad():
        theirs = model(torch.from_numpy((images - 0.5) / 0.5).permute(0, 3, 1, 2)).numpy()
    assert np.abs(theirs).max() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("arch", ["resnet10", "resnet50"])
def test_initial_weights_are_spread_as_torchvisions(arch: str) -> None:
    params, batch_stats = simclr.init(arch, 128, seed=3)
    ours = weights.to_torch(params, batch_stats, arch, steps=0)
    torch.manual_seed(0)
    theirs = torch_simclr(arch).state_dict()
    for name, tensor in theirs.items():
        if "running" in name or "num_batches" in name or tensor.ndim == 1:
            continue
        spread, expected = ours[name].std(), tensor.numpy().std()
        np.testing.assert_allclose(spread, expected, rtol=0.15, atol=1e-6, err_msg=name)
    assert set(np.unique(ours["layer1.0.bn2.weight"])) == {1.0}  # zero-gamma is off
    head, bound = ours["fc.1.weight"], ours["fc.1.weight"].shape[1] ** -0.5
    assert 0.99 * bound < np.abs(head).max() <= bound


def test_initial_weights_are_a_function_of_the_seed() -> None:
    first, again, other = (simclr.init("resnet10", 128, seed)[0] for seed in (0, 0, 1))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, again))
    kernels = [tree["encoder"]["conv1"]["kernel"] for tree in (first, other)]
    assert not np.array_equal(*kernels)


def test_batchnorm_keeps_pytorchs_statistics() -> None:
    x = np.random.default_rng(0).normal(3, 2, (4, 5, 5, 6)).astype(np.float32)
    ours, theirs = BatchNorm(6), torch.nn.BatchNorm2d(6)
    for _ in range(3):
        y = ours(x, train=True)
        expected = theirs(torch.from_numpy(x).permute(0, 3, 1, 2))
    np.testing.assert_allclose(y, expected.permute(0, 2, 3, 1).detach().numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours.mean[...], theirs.running_mean.numpy(), rtol=1e-6)
    np.testing.assert_allclose(ours.var[...], theirs.running_var.numpy(), rtol=1e-5)


def test_batchnorm_takes_its_statistics_in_float32() -> None:
    # In bfloat16 the sum over 20,000 values would stop growing at 256 times a value.
    x = jax.numpy.full((2, 100, 100, 1), 1.0, jax.numpy.bfloat16)
    norm = BatchNorm(1)
    y = norm(x, train=True)
    assert y.dtype == jax.numpy.bfloat16
    np.testing.assert_allclose(norm.mean[...], 0.1, rtol=1e-6)


@pytest.mark.parametrize("side", [1, 2, 3, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_small_maps_are_convolved_as_in_pytorch(side: int, stride: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, side, side, 5)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 5, 7)).astype(np.float32)
    conv = Conv(5, 7, 3, stride, jnp.float32)
    conv.kernel[...] = jnp.asarray(kernel)

    def loss(x: jax.Array) -> jax.Array:
        return (conv(x) ** 2).sum()

    images = torch.from_numpy(x).permute(0, 3, 1, 2).requires_grad_()
    weight = torch.from_numpy(kernel).permute(3, 2, 0, 1)
    theirs = torch.nn.functional.conv2d(images, weight, stride=stride, padding=1)
    (theirs**2).sum().backward()
    np.testing.assert_allclose(
        conv(jnp.asarray(x)), theirs.detach().permute(0, 2, 3, 1), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        jax.grad(loss)(jnp.asarray(x)), images.grad.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-4
    )
