"""Names and layout between our trees and PyTorch, and the file between them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torchvision
from safetensors import safe_open
from safetensors.numpy import load_file, save

from jaxhisto import tensor_file, weights
from jaxhisto.config import ModelConfig, PretrainConfig
from jaxhisto.errors import ExportError
from jaxhisto.models import simclr
from jaxhisto.settings import from_json

HEAD = {
    "fc.1.weight": (512, 512),
    "fc.1.bias": (512,),
    "fc.3.weight": (128, 512),
    "fc.3.bias": (128,),
}


@pytest.fixture(scope="module")
def trees() -> tuple[dict, dict]:
    return simclr.init("resnet10", 128, seed=0)


@pytest.fixture(scope="module")
def metadata() -> dict[str, str]:
    config = PretrainConfig(out="run", model=ModelConfig(name="resnet10"))
    return weights.describe(config, step=7, data_hash="sha256:0", mpp_range=(0.25, 0.5))


@pytest.mark.parametrize(
    ("arch", "keys"), [("resnet18", 124), ("resnet34", 220), ("resnet50", 322), ("resnet101", 628)]
)
def test_names_and_shapes_are_torchvisions(arch: str, keys: int) -> None:
    params, batch_stats = simclr.init(arch, 128, seed=0)
    ours = weights.to_torch(params, batch_stats, arch, steps=5)
    theirs = getattr(torchvision.models, arch)().state_dict()
    shapes = {n: tuple(t.shape) for n, t in theirs.items() if not n.startswith("fc.")}
    assert {n: t.shape for n, t in ours.items() if not n.startswith("fc.")} == shapes
    assert len(ours) == keys
    counters = [t for n, t in ours.items() if n.endswith("num_batches_tracked")]
    assert {(t.dtype.name, int(t)) for t in counters} == {("int64", 5)}
    assert {t.dtype.name for t in ours.values()} == {"float32", "int64"}


def test_both_directions_undo_each_other(trees: tuple[dict, dict]) -> None:
    there = weights.to_torch(*trees, "resnet10", steps=1)
    assert {n: t.shape for n, t in there.items() if n.startswith("fc.")} == HEAD
    back = weights.from_torch(there, "resnet10")
    assert jax.tree.all(jax.tree.map(np.array_equal, trees, back))


def test_every_mismatch_is_named_at_once(trees: tuple[dict, dict]) -> None:
    tensors = weights.to_torch(*trees, "resnet10", steps=1)
    del tensors["layer1.0.conv1.weight"]
    tensors["module.bn1.weight"] = np.zeros(64, np.float32)
    tensors["conv1.weight"] = np.zeros((64, 1, 7, 7), np.float32)
    with pytest.raises(ExportError) as error:
        weights.from_torch(tensors, "resnet10", "old.pt")
    for part in (
        "old.pt: 3 tensors",
        "layer1.0.conv1.weight missing",
        "module.bn1.weight unexpected",
        "conv1.weight is (64, 1, 7, 7), not (64, 3, 7, 7)",
    ):
        assert part in str(error.value)
    with pytest.raises(ExportError, match="do not fit resnet18"):
        weights.to_torch(*trees, "resnet18", steps=1)


def test_a_file_holds_names_head_and_origin(
    tmp_path: Path, trees: tuple[dict, dict], metadata: dict[str, str]
) -> None:
    path = tmp_path / "encoder.safetensors"
    digest = weights.write_encoder(path, *trees, metadata)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [p.name for p in tmp_path.iterdir()] == ["encoder.safetensors"]
    tensors = load_file(path)
    assert set(HEAD) <= set(tensors)
    assert int(tensors["bn1.num_batches_tracked"]) == 7
    with safe_open(path, framework="numpy") as file:
        stated = file.metadata()
    assert stated["arch"] == "resnet10"
    assert json.loads(stated["mean"]) == [0.5, 0.5, 0.5]
    assert json.loads(stated["mpp_range"]) == [0.25, 0.5]
    assert json.loads(stated["stains"]) is None
    assert from_json(PretrainConfig, stated["config"]).model.name == "resnet10"

    params, batch_stats, again = weights.read_encoder(path)
    assert jax.tree.all(jax.tree.map(np.array_equal, trees, (params, batch_stats)))
    assert again == metadata


def test_equal_content_gives_equal_bytes_that_the_library_would_write(tmp_path: Path) -> None:
    tensors = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "a": np.asarray(7, np.int64),
        "c": np.arange(5, dtype=np.uint8),
    }
    tensor_file.write(tmp_path / "ours", tensors, {"said": "µm"})
    whole = {name: t.copy(order="C") for name, t in tensors.items()}
    assert (tmp_path / "ours").read_bytes() == save(whole, {"said": "µm"})


def test_an_encoder_may_lack_the_projection(
    tmp_path: Path, trees: tuple[dict, dict], metadata: dict[str, str]
) -> None:
    params, stats = trees
    headless = {"encoder": params["encoder"]}
    path = tmp_path / "encoder.safetensors"
    weights.write_encoder(path, headless, stats, metadata | {"projection_width": "0"})
    assert not [name for name in load_file(path) if name.startswith("fc.")]
    again, _, _ = weights.read_encoder(path)
    assert again.keys() == {"encoder"}


def test_a_projection_that_the_metadata_promises_must_be_there(
    tmp_path: Path, trees: tuple[dict, dict], metadata: dict[str, str]
) -> None:
    params, stats = trees
    path = tmp_path / "encoder.safetensors"
    weights.write_encoder(path, {"encoder": params["encoder"]}, stats, metadata)
    with pytest.raises(ExportError, match=r"fc\.1\.weight missing"):
        weights.read_encoder(path)


def test_what_is_no_encoder_is_refused(
    tmp_path: Path, trees: tuple[dict, dict], metadata: dict[str, str]
) -> None:
    path = tmp_path / "encoder.safetensors"
    with pytest.raises(ExportError, match=r"encoder\.safetensors: not a readable"):
        weights.read_encoder(path)
    weights.write_encoder(path, *trees, metadata)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ExportError, match="not a readable safetensors file"):
        weights.read_encoder(path)
    weights.write_golden(path, np.zeros((8, 4, 4, 3)), np.zeros((8, 512)), "0")
    with pytest.raises(ExportError, match="'jaxhisto-encoder-1' is needed"):
        weights.read_encoder(path)


def test_a_file_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, trees: tuple[dict, dict], metadata: dict[str, str]
) -> None:
    with pytest.raises(ExportError, match="cannot be written"):
        weights.write_encoder(tmp_path / "absent" / "e.safetensors", *trees, metadata)
    (tmp_path / "e.safetensors").mkdir()
    with pytest.raises(ExportError, match="cannot be written"):
        weights.write_encoder(tmp_path / "e.safetensors", *trees, metadata)
    assert [p.name for p in tmp_path.iterdir()] == ["e.safetensors"]
