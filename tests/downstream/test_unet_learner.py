"""A UNet's loss, counts and frozen encoder against PyTorch's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from sklearn.metrics import confusion_matrix

from jaxhisto import unet_weights
from jaxhisto.distributed import make_mesh
from jaxhisto.downstream.encoders import Encoder
from jaxhisto.downstream.pixel_scores import IGNORED
from jaxhisto.downstream.unet_learner import count_pixels, pixel_losses, unet_learner
from jaxhisto.models import unet

C = 3


@pytest.fixture(scope="module")
def logits_and_masks() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    masks = rng.integers(0, C, (4, 16, 16), np.uint8)
    masks[1, :5], masks[2] = IGNORED, IGNORED
    return rng.normal(size=(4, 16, 16, C)).astype(np.float32), masks


def test_the_loss_is_torchs(logits_and_masks: tuple[np.ndarray, np.ndarray]) -> None:
    logits, masks = logits_and_masks
    ours = np.asarray(pixel_losses(jnp.asarray(logits), jnp.asarray(masks)))
    for i in (0, 1, 3):
        theirs = torch.nn.functional.cross_entropy(
            torch.tensor(logits[i : i + 1]).permute(0, 3, 1, 2),
            torch.tensor(masks[i : i + 1]).long(),
            ignore_index=IGNORED,
        )
        assert ours[i] == pytest.approx(theirs.item(), rel=1e-6)
    assert ours[2] == 0  # no pixel of it counts


def test_the_counts_are_scikit_learns(logits_and_masks: tuple[np.ndarray, np.ndarray]) -> None:
    logits, masks = logits_and_masks
    ours = np.asarray(count_pixels(jnp.asarray(logits), jnp.asarray(masks)))
    for counts, image, mask in zip(ours, logits, masks, strict=True):
        kept = mask != IGNORED
        found = image.argmax(-1)[kept]
        expected = np.zeros((C, C), int)
        if kept.any():
            expected = confusion_matrix(mask[kept], found, labels=range(C))
        np.testing.assert_array_equal(counts, expected)


@pytest.mark.slow
def test_a_frozen_encoder_is_smps_in_evaluation_mode() -> None:
    torch.manual_seed(0)
    model = smp.Unet("resnet18", encoder_weights=None, classes=C)
    with torch.no_grad():
        for module in model.encoder.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.8, 1.2)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    params, stats = unet_weights.from_torch(state, "resnet18")
    encoder = Encoder(
        "e", "resnet18", "0", (0.5,) * 3, (0.25,) * 3, 64, params={"encoder": params["encoder"]},
        batch_stats={"encoder": stats["encoder"]},
    )  # fmt: skip
    learner = unet_learner(encoder, C, 0, freeze=True)
    assert set(learner.params) == {"decoder", "segmentation_head"}
    # The decoder of smp too, to compare the loss and its gradient.
    trained = {name: params[name] for name in learner.params}
    images = np.random.default_rng(1).random((2, 64, 64, 3)).astype(np.float32)
    masks = np.random.default_rng(2).integers(0, C, (2, 64, 64), np.uint8)

    running = jax.tree.map(jnp.asarray, {"decoder": stats["decoder"]})
    fixed = jax.tree.map(jnp.asarray, learner.fixed)

    def loss(params: dict) -> tuple[jax.Array, dict]:
        losses, after = learner.loss_of(
            params, running, fixed, jnp.asarray(images), jnp.asarray(masks)
        )
        return losses.mean(), after

    with jax.set_mesh(make_mesh(1)), jax.default_matmul_precision("float32"):
        (ours, after), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(trained)
    model.train()
    model.encoder.eval()
    x = torch.tensor((images - 0.5) / 0.25).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.cross_entropy(model(x), torch.tensor(masks).long())
    theirs.backward()
    assert float(ours) == pytest.approx(theirs.item(), rel=1e-5)
    assert set(after) == {"decoder"}
    head = model.segmentation_head[0].weight.grad.numpy().transpose(2, 3, 1, 0)
    np.testing.assert_allclose(grads["segmentation_head"]["0"]["kernel"], head, atol=2e-5)


@pytest.mark.slow
def test_the_encoder_that_was_given_is_what_it_starts_from() -> None:
    params, stats = unet.init("resnet10", C, seed=5)
    marked = jax.tree.map(lambda leaf: leaf + 1, params["encoder"])
    encoder = Encoder(
        "e", "resnet10", "0", (0.5,) * 3, (0.5,) * 3, 64, params={"encoder": marked},
        batch_stats={"encoder": stats["encoder"]},
    )  # fmt: skip
    for freeze in (False, True):
        learner = unet_learner(encoder, C, 5, freeze=freeze)
        held = learner.fixed["params"] if freeze else learner.params
        jax.tree.map(np.testing.assert_array_equal, held["encoder"], marked)
        jax.tree.map(np.testing.assert_array_equal, learner.params["decoder"], params["decoder"])
