"""The supervised loop, on a network small enough to be looked through."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from jaxhisto.downstream.batches import Part, epoch_order, fitting_batch
from jaxhisto.downstream.learner import Learner
from jaxhisto.downstream.training import Fitted, adam, fit, weight_decay
from jaxhisto.errors import RunError
from jaxhisto.training_config import TrainingConfig

SIDE, CLASSES = 8, 2
PLAIN = TrainingConfig(
    epochs=3,
    batch=8,
    rate=0.01,
    weight_decay=0.1,
    devices=1,
    flips=False,
    rot90=False,
    jitter="none",
)
TURNED = replace(PLAIN, flips=True, rot90=True)


def features(params: Any, images: jax.Array, train: bool, stats: Any) -> tuple[jax.Array, Any]:
    """The mean colour, normalised by the batch as BatchNorm would, then a linear layer."""
    mean = images.mean((1, 2))
    centre = mean.mean(0) if train else stats["mean"]
    new = {"mean": 0.9 * stats["mean"] + 0.1 * centre} if train else stats
    # The turns of an image must not be lost in its mean.
    corner = images[:, 0, 0]
    return (mean + corner - centre[None]) @ params["kernel"] + params["bias"][None], new


def losses(params: Any, stats: Any, fixed: Any, images: jax.Array, targets: jax.Array) -> Any:
    logits, stats = features(params, images, True, stats)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets), stats


def outcome(params: Any, stats: Any, fixed: Any, images: jax.Array, targets: jax.Array) -> Any:
    logits, _ = features(params, images, False, stats)
    return {"logits": logits, "targets": targets}


def score(found: Any) -> dict[str, float]:
    right = found["logits"].argmax(-1) == found["targets"]
    return {"score": float(right.mean())}


def learner(**changes: Any) -> Learner:
    rng = np.random.default_rng(0)
    params = {
        "kernel": rng.normal(size=(3, CLASSES)).astype(np.float32),
        "bias": np.zeros(CLASSES, np.float32),
    }
    stats = {"mean": np.full(3, 0.5, np.float32)}
    return replace(Learner(params, stats, losses, outcome, score), **changes)


def part(n: int, first: int = 0) -> Part:
    """Images of two colours."""
    rng = np.random.default_rng(first)
    images = rng.integers(0, 200, (n, SIDE, SIDE, 3), np.uint8)
    labels = (np.arange(n) % CLASSES).astype(np.int32)
    images[labels == 1, ..., 0] += 50
    rows = np.arange(first, first + n)
    return Part(
        rows,
        lambda rows, epoch: (images[rows - first], labels[rows - first]),
        lambda row: f"i{row}",
    )


def run(
    out: Path, config: TrainingConfig = PLAIN, train: Part | None = None, **changes: Any
) -> Fitted:
    out.mkdir(exist_ok=True)
    tx = adam(config, "resnet18")
    trained = part(21) if train is None else train
    return fit(learner(**changes), trained, part(10, 100), tx, config, out, verb="segment")


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def hooked(hook: Callable[[int], None]) -> Part:
    """`part(21)`, with the number of the batch told to `hook` before it is read."""
    plain, count = part(21), iter(range(1000))

    def load(rows: Any, epoch: int) -> Any:
        hook(next(count))
        return plain.load(rows, epoch)

    return replace(plain, load=load)


def assert_same(a: Fitted, b: Fitted) -> None:
    assert (a.epoch, a.metrics, a.steps) == (b.epoch, b.metrics, b.steps)
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    jax.tree.map(np.testing.assert_array_equal, a.batch_stats, b.batch_stats)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Fitted, Path]:
    """A run that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole")
    return run(out, TURNED), out


def test_equals_a_loop_in_torch(tmp_path: Path) -> None:
    """torch.optim.Adam on the same batches; the last one's filling counts for the mean alone."""
    final: list[Any] = []
    run(tmp_path, score=lambda found: final.append(found) or {"score": float(len(final))})
    start, data = learner(), part(21)
    images, labels = data.load(data.rows, 0)
    mean = torch.tensor(images / 255).mean((1, 2)).double()
    corner = torch.tensor(images[:, 0, 0] / 255).double()
    kernel = torch.tensor(start.params["kernel"], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(CLASSES, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([kernel, bias], lr=0.01, weight_decay=0.1)
    running, sums = torch.full((3,), 0.5, dtype=torch.float64), []
    for epoch in range(3):
        total = 0.0
        for places, weights in zip(*epoch_order(0, epoch, 21, 8), strict=True):
            used = mean[places]
            running = 0.9 * running + 0.1 * used.mean(0)
            logits = (used + corner[places] - used.mean(0)) @ kernel + bias
            targets = torch.tensor(labels[places]).long()
            counted = int(weights.sum())
            loss = torch.nn.functional.cross_entropy(logits[:counted], targets[:counted])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * counted
        sums.append(total / 21)
    np.testing.assert_allclose([line["loss"] for line in lines(tmp_path)], sums, rtol=2e-6)
    seen = part(10, 100)
    pixels = torch.tensor(seen.load(seen.rows, 0)[0] / 255)
    logits = (pixels.mean((1, 2)) + pixels[:, 0, 0] - running) @ kernel + bias
    np.testing.assert_allclose(final[2]["logits"], logits.detach().numpy(), atol=2e-6)


def test_the_same_on_one_device_and_on_four(tmp_path: Path, whole: tuple[Fitted, Path]) -> None:
    four = run(tmp_path, replace(TURNED, devices=4))
    assert four.epoch == whole[0].epoch
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), four.params, whole[0].params
    )
    losses = ([line["loss"] for line in lines(out)] for out in (tmp_path, whole[1]))
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_killed_and_started_again_ends_the_same(tmp_path: Path, whole: tuple[Fitted, Path]) -> None:
    def kill(batch: int) -> None:
        if batch == 4:
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        run(tmp_path, TURNED, hooked(kill))
    assert_same(run(tmp_path, TURNED), whole[0])
    assert [line["epoch"] for line in lines(tmp_path)] == [1, 2, 3]
    for ours, theirs in zip(lines(tmp_path), lines(whole[1]), strict=True):
        assert (ours["loss"], ours["step"]) == (theirs["loss"], theirs["step"])


def test_stopped_within_an_epoch_and_started_again(
    tmp_path: Path, whole: tuple[Fitted, Path]
) -> None:
    def ask(batch: int) -> None:
        if batch == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunError, match=r"stopped at step \d of 9") as stopped:
        run(tmp_path, TURNED, hooked(ask))
    assert stopped.value.exit_code == 75
    assert_same(run(tmp_path, TURNED), whole[0])
    assert [line["epoch"] for line in lines(tmp_path)] == [1, 2, 3]


def test_a_finished_run_trains_no_more(tmp_path: Path, whole: tuple[Fitted, Path]) -> None:
    def never(batch: int) -> None:
        raise AssertionError("trained again")

    assert_same(run(whole[1], TURNED, hooked(never)), whole[0])


def test_other_data_is_no_resume(tmp_path: Path, whole: tuple[Fitted, Path]) -> None:
    tx = adam(TURNED, "resnet18")
    with pytest.raises(RunError, match="split"):
        fit(
            learner(),
            part(21),
            part(10, 100),
            tx,
            TURNED,
            whole[1],
            verb="segment",
            facts={"split": "another"},
        )


@pytest.mark.parametrize(("scores", "epoch"), [((0.1, 0.9, 0.5), 2), ((0.4, 0.4, 0.4), 1)])
def test_the_earliest_best_epoch_is_taken(
    tmp_path: Path, scores: tuple[float, ...], epoch: int
) -> None:
    seen: list[Any] = []

    def scripted(found: Any) -> dict[str, float]:
        seen.append(found["logits"])
        return {"score": scores[len(seen) - 1] if len(seen) <= 3 else scores[epoch - 1]}

    done = run(tmp_path, score=scripted)
    assert done.epoch == epoch
    np.testing.assert_array_equal(seen[3], seen[epoch - 1])  # the weights that are handed out
    assert not np.array_equal(seen[3], seen[2])


@pytest.mark.slow
def test_patience(tmp_path: Path) -> None:
    scores = iter((0.1, 0.9, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5))
    config = replace(PLAIN, epochs=50, patience=2)
    done = run(tmp_path, config, score=lambda found: {"score": next(scores)})
    assert (done.epoch, done.epochs) == (2, 4)


def test_a_loss_that_is_not_finite_names_epoch_and_images(tmp_path: Path) -> None:
    def poisoned(params: Any, stats: Any, fixed: Any, images: jax.Array, targets: jax.Array) -> Any:
        values, stats = losses(params, stats, fixed, images, targets)
        return jnp.where(targets == 7, jnp.nan, values), stats

    plain = part(21)

    def load(rows: Any, epoch: int) -> Any:
        images, labels = plain.load(rows, epoch)
        return images, np.where((rows == 5) & (epoch == 1), 7, labels).astype(np.int32)

    with pytest.raises(RunError, match=r"the loss is nan in epoch 2, batch \d, of i\d+, ") as error:
        run(tmp_path, train=replace(plain, load=load), loss_of=poisoned)
    batch = int(str(error.value).split("batch ")[1].split(",")[0]) - 1
    assert 5 in epoch_order(0, 1, 21, 8)[0][batch]


def test_a_part_without_images(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no images to train on"):
        run(tmp_path, train=part(0))


@pytest.mark.parametrize("n", [1, 7, 8, 9, 21])
def test_an_epoch_takes_each_image_once(n: int) -> None:
    places, weights = epoch_order(3, 1, n, 8)
    assert places.shape == weights.shape == (-(-n // 8), 8)
    assert sorted(places[weights == 1]) == list(range(n))
    assert not np.array_equal(epoch_order(3, 2, 21, 8)[0], epoch_order(3, 1, 21, 8)[0])


@pytest.mark.parametrize(
    ("images", "devices", "batch"),
    [(64, 4, 32), (13, 1, 8), (13, 4, 8), (5, 1, 8), (5, 4, 8), (5, 16, 16)],
)
def test_few_images_lower_the_batch(
    images: int, devices: int, batch: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fitting_batch(32, images, devices) == batch
    said = f"batch of {batch} instead of 32: there are {images} images" * (images < 32)
    assert said in capsys.readouterr().out
    assert fitting_batch(4, 3, 1) == fitting_batch(4, 3, 4) == 4
    assert capsys.readouterr().out == ""


def test_a_batch_that_devices_cannot_share() -> None:
    with pytest.raises(RunError, match="4 devices cannot share"):
        fitting_batch(30, 64, 4)


def test_the_papers_weight_decay() -> None:
    decays = [
        weight_decay(TrainingConfig(), arch) for arch in ("resnet18", "resnet34", "resnet101")
    ]
    assert decays == [1e-5, 1e-4, 1e-4]
    assert weight_decay(PLAIN, "resnet34") == 0.1
