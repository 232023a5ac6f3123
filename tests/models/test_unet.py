"""The UNets against segmentation_models_pytorch's, from the same weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from segmentation_models_pytorch.base import initialization
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder

from jaxhisto import unet_weights
from jaxhisto.distributed import make_mesh, to_global
from jaxhisto.errors import ConfigError
from jaxhisto.models import simclr, unet
from jaxhisto.pretrain.step import replicate

CLASSES = 3
DEPTHS = [
    "resnet18",
    *(pytest.param(f"resnet{n}", marks=pytest.mark.slow) for n in (34, 50, 101)),
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small are five times slower where threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def torch_unet(arch: str, classes: int = CLASSES) -> torch.nn.Module:
    """smp's UNet."""
    torch.manual_seed(1)
    return randomised(smp.Unet(arch, encoder_weights=None, classes=classes))


def randomised(model: torch.nn.Module, bias: float = 0.0) -> torch.nn.Module:
    """BatchNorm random in all it holds, its scales near those of trained networks.

    `bias` is in units of the scale: at 3 a few ReLUs in a thousand are off. The last norm of a
    residual block gets a third of it: blocks add up, and a mean far above the deviation costs
    our one-pass variance its digits.
    """
    torch.manual_seed(1)
    blocks = [block for block in model.modules() if hasattr(block, "bn2")]
    last = {block.bn3 if hasattr(block, "bn3") else block.bn2 for block in blocks}
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                shift = bias / 3 if module in last else bias
                # Smaller in the decoder too, nothing of the image would reach the logits.
                low, high = (0.2, 0.6) if name.startswith("encoder") else (0.9, 1.3)
                module.weight.uniform_(low, high)
                module.bias.copy_(module.weight * (0.3 * torch.randn_like(module.bias) + shift))
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.8, 1.2)
    return model


def trees(model: torch.nn.Module, arch: str, skips: unet.Skips = "all") -> tuple[dict, dict]:
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return unet_weights.from_torch(state, arch, skips=skips)


def smooth(n: int, height: int, width: int) -> np.ndarray:
    """(n, height, width, 3) float64 in -1..1: white noise gives more ReLUs that hang at 0."""
    coarse = np.random.default_rng(0).random((n, 3, height // 8, width // 8))
    fine = F.interpolate(torch.from_numpy(coarse), (height, width), mode="bicubic")
    return (2 * fine.clamp(0, 1) - 1).permute(0, 2, 3, 1).numpy()


def masks_of(images: np.ndarray) -> np.ndarray:
    """(n, H, W) int32 in 0..2: by the brightest channel."""
    return images.argmax(-1).astype(np.int32)


def as_torch(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize("arch", DEPTHS)
def test_logits_are_smps(arch: str) -> None:
    model = torch_unet(arch).eval()
    params, stats = trees(model, arch)
    graphdef, _, _ = unet.structure(arch, CLASSES)
    run = jax.jit(lambda p, s, x: unet.apply(graphdef, p, s, x, train=False))
    images = smooth(2, 64, 96).astype(np.float32)

    ours, after = run(params, stats, images)

    with torch.no_grad():
        theirs = model(as_torch(images)).permute(0, 2, 3, 1).numpy()
    assert ours.dtype == jnp.float32
    assert share(ours, theirs) < 1e-4
    print(arch, "logits", np.abs(theirs).max(), "largest difference", share(ours, theirs))
    assert jax.tree.all(jax.tree.map(np.array_equal, after, stats))


def share(ours: jax.Array, theirs: np.ndarray) -> float:
    """The largest difference of (N, H, W, classes) as a share of the largest value."""
    assert theirs.std(axis=(0, 1, 2)).min() > 0.03 * np.abs(theirs).max()  # the image is in it
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def torch_step(model: torch.nn.Module, images: np.ndarray) -> tuple[float, dict, dict]:
    """(loss, gradients, buffers) of a training step in PyTorch, in the model's precision."""
    model.train()
    dtype = model.segmentation_head[0].weight.dtype
    logits = model(as_torch(images).to(dtype))
    loss = F.cross_entropy(logits, torch.from_numpy(masks_of(images)).long())
    loss.backward()
    gradients = {name: p.grad.double().numpy() for name, p in model.named_parameters()}
    return loss.item(), gradients, {name: b.numpy() for name, b in model.named_buffers()}


def loss_and_grads(arch: str) -> Callable[..., tuple]:
    graphdef, _, _ = unet.structure(arch, CLASSES)

    def loss_of(params: dict, stats: dict, x: jax.Array, mask: jax.Array) -> tuple:
        logits, stats = unet.apply(graphdef, params, stats, x, train=True)
        loss = optax.softmax_cross_entropy(logits, jax.nn.one_hot(mask, CLASSES))
        return loss.mean(), stats

    return jax.jit(jax.value_and_grad(loss_of, has_aux=True))


def error(ours: dict, truth: dict) -> float:
    """Norm of the difference over the norm, over all tensors of the truth."""
    squares = [[((ours[n] - t) ** 2).sum(), (t**2).sum()] for n, t in truth.items()]
    difference, norm = np.sqrt(np.sum(squares, axis=0))
    return float(difference / norm)


@pytest.mark.parametrize("arch", DEPTHS)
def test_a_training_step_is_smps(arch: str) -> None:
    """Our float32 is as near to PyTorch's float64 as PyTorch's own float32 is.

    With most ReLUs on: of a million inputs around 0 one is within rounding of it, and a single
    ReLU that float32 tips to the other side moves all gradients before it by 3e-3.
    """
    images = smooth(4, 64, 64)
    model = randomised(torch_unet(arch), bias=3.0)
    params, stats = trees(model, arch)
    loss32, theirs, _ = torch_step(copy.deepcopy(model), images)
    loss64, truth, buffers = torch_step(model.double(), images)

    (loss, after), grads = loss_and_grads(arch)(
        params, stats, images.astype(np.float32), masks_of(images)
    )

    ours = unet_weights.to_torch(grads, after, arch, steps=1)
    spread = [
        np.abs(ours[n] - b).max() / np.abs(b).max() for n, b in buffers.items() if "running" in n
    ]
    print(arch, "loss", float(loss) / loss64 - 1, "PyTorch's", loss32 / loss64 - 1)
    print(arch, "gradient", error(ours, truth), "PyTorch's", error(theirs, truth))
    print(arch, "statistics", max(spread))
    assert float(loss) == pytest.approx(loss64, rel=1e-5)
    assert error(ours, truth) < max(1e-4, 3 * error(theirs, truth))
    assert max(spread) < 1e-4
    assert all(ours[n] == b == 1 for n, b in buffers.items() if "num_batches" in n)


def mostly_on(path: tuple, leaf: np.ndarray) -> np.ndarray:
    """BatchNorm's biases at 3 times its scale of 1, for the reason above."""
    names = [key.key for key in path]
    return leaf + 3.0 if names[-1] == "bias" and "segmentation_head" not in names else leaf


@pytest.mark.slow
def test_one_truth_on_one_and_four_devices() -> None:
    images = smooth(8, 32, 32).astype(np.float32)
    params, stats = unet.init("resnet10", CLASSES, seed=0)
    params = jax.tree.map_with_path(mostly_on, params)
    results = []
    for devices in (1, 4):
        mesh = make_mesh(devices)
        with jax.set_mesh(mesh):
            step = loss_and_grads("resnet10")
            arguments = [replicate(params, mesh), replicate(stats, mesh)]
            arguments += [to_global(images, mesh), to_global(masks_of(images), mesh)]
            compiled = step.lower(*arguments).compile()
            assert not re.search("all-to-all|all-gather", compiled.as_text())
            (loss, after), grads = compiled(*arguments)
            assert all(g.sharding.is_fully_replicated for g in jax.tree.leaves(grads))
            results.append((float(loss), jax.device_get(grads), jax.device_get(after)))
    (loss, grads, after), (loss4, grads4, after4) = results
    assert loss4 == pytest.approx(loss, rel=1e-5)
    for one, four in ((grads, grads4), (after, after4)):
        flat = [np.concatenate([x.ravel() for x in jax.tree.leaves(t)]) for t in (one, four)]
        assert np.linalg.norm(flat[1] - flat[0]) < 1e-4 * np.linalg.norm(flat[0])


def test_without_skips_it_is_smps_decoder_of_empty_maps() -> None:
    """smp's decoder whose maps but the deepest have no channel is the same network."""
    model = torch_unet("resnet18")
    model.decoder = UnetDecoder([3, 0, 0, 0, 0, 512], unet.DECODER_WIDTHS)
    initialization.initialize_decoder(model.decoder)
    randomised(model.decoder)
    params, stats = trees(model.eval(), "resnet18", "none")
    graphdef, _, _ = unet.structure("resnet18", CLASSES, "none")
    images = smooth(2, 64, 64).astype(np.float32)

    ours, _ = jax.jit(lambda p, s, x: unet.apply(graphdef, p, s, x, train=False))(
        params, stats, images
    )

    with torch.no_grad():
        maps = model.encoder(as_torch(images))
        empty = [m if i in (0, 5) else m[:, :0] for i, m in enumerate(maps)]
        theirs = model.segmentation_head(model.decoder(empty)).permute(0, 2, 3, 1).numpy()
    assert share(ours, theirs) < 1e-4


def test_upsampling_is_pytorchs_nearest() -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    theirs = F.interpolate(as_torch(x), scale_factor=2, mode="nearest").permute(0, 2, 3, 1)
    np.testing.assert_array_equal(unet.upsample(jnp.asarray(x)), theirs.numpy())


def test_initial_weights_are_spread_as_smps() -> None:
    torch.manual_seed(0)
    model = smp.Unet("resnet18", encoder_weights=None, classes=40)
    initialization.initialize_decoder(model.decoder)
    theirs = model.state_dict()
    ours = unet_weights.to_torch(*unet.init("resnet18", 40, seed=3), "resnet18", steps=0)
    assert {n: t.shape for n, t in ours.items()} == {n: tuple(t.shape) for n, t in theirs.items()}
    for name, tensor in theirs.items():
        expected = tensor.double().numpy()
        if expected.ndim < 4:
            np.testing.assert_array_equal(ours[name], expected, err_msg=name)
            continue
        # Four standard deviations of the difference of two samples' deviations, and more.
        spread, bound = (4 / expected.size**0.5, 20 / expected.size)
        assert ours[name].std() == pytest.approx(expected.std(), rel=spread), name
        if not name.startswith("encoder."):  # uniform: its ends say so
            assert np.abs(ours[name]).max() == pytest.approx(np.abs(expected).max(), rel=bound)


def test_the_encoder_begins_as_the_pretrainings() -> None:
    ours, _ = unet.init("resnet10", CLASSES, seed=4)
    theirs, _ = simclr.init("resnet10", 128, seed=4)
    assert jax.tree.all(jax.tree.map(np.array_equal, ours["encoder"], theirs["encoder"]))


def test_bfloat16_stays_near_float32_and_ends_in_it() -> None:
    params, stats = unet.init("resnet10", CLASSES, seed=0)
    images = smooth(2, 64, 64).astype(np.float32)
    logits = []
    for dtype in (jnp.float32, jnp.bfloat16):
        graphdef, _, _ = unet.structure("resnet10", CLASSES, "all", dtype)
        out, after = jax.jit(lambda p, s, x, g=graphdef: unet.apply(g, p, s, x, train=True))(
            params, stats, images
        )
        assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {np.dtype(np.float32)}
        assert out.dtype == jnp.float32
        logits.append(np.asarray(out))
    assert 1e-4 < share(logits[1], logits[0]) < 0.1


@pytest.mark.parametrize("shape", [(1, 64, 48, 3), (1, 100, 64, 3), (1, 0, 32, 3)])
def test_sides_that_are_no_multiples_of_32_are_refused(shape: tuple[int, ...]) -> None:
    graphdef, params, stats = unet.structure("resnet10", CLASSES)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    with pytest.raises(ConfigError, match="multiples of 32"):
        jax.eval_shape(lambda p, s, x: unet.apply(graphdef, p, s, x, train=True), params, stats, x)
