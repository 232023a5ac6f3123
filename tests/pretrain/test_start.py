"""Pretraining that starts from an encoder instead of random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxhisto import weights
from jaxhisto.config import ModelConfig, PretrainConfig
from jaxhisto.distributed import make_mesh
from jaxhisto.errors import RunError
from jaxhisto.models import simclr
from jaxhisto.pretrain.start import starting_weights
from jaxhisto.pretrain.step import init_state

CONFIG = PretrainConfig(out="run", model=ModelConfig(name="resnet10"))


@pytest.fixture(scope="module")
def trees() -> tuple[dict, dict]:
    return simclr.init("resnet10", 128, seed=9)


@pytest.fixture(scope="module")
def encoder(trees: tuple[dict, dict], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    weights.write_encoder(path, *trees, weights.describe(CONFIG, step=0, data_hash="none"))
    return path


def begun(config: PretrainConfig, encoder: Path) -> tuple[dict, dict]:
    """The trees of the state before the first step."""
    config = replace(config, init=str(encoder))
    state = init_state(config, 10, 1.0, make_mesh(1), starting_weights(config))
    return jax.device_get((state.params, state.batch_stats))


def equal(a: dict, b: dict) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_without_one_the_seed_decides() -> None:
    assert starting_weights(CONFIG) is None


def test_all_of_the_encoder_is_taken(encoder: Path, trees: tuple[dict, dict]) -> None:
    assert equal(begun(CONFIG, encoder), trees)


def test_a_projection_of_another_width_is_drawn_anew(
    encoder: Path, trees: tuple[dict, dict]
) -> None:
    config = replace(CONFIG, model=replace(CONFIG.model, projection=64))
    params, stats = begun(config, encoder)
    assert equal({"encoder": params["encoder"]}, {"encoder": trees[0]["encoder"]})
    assert equal(stats, trees[1])
    seeds, _ = simclr.init("resnet10", 64, seed=0)
    assert equal(params["projection"], seeds["projection"])


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (ModelConfig(name="resnet18"), "is a resnet10, where the run trains a resnet18; pass"),
        (ModelConfig(name="resnet10", mean=(0.4, 0.5, 0.5)), r"pass --model\.mean 0\.5 0\.5 0\.5"),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused(
    encoder: Path, model: ModelConfig, sentence: str
) -> None:
    with pytest.raises(RunError, match=sentence):
        starting_weights(replace(CONFIG, model=model, init=str(encoder)))
