"""UNet files: strict, complete, and refused in one sentence where they are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxhisto import tensor_file, unet_weights, weights
from jaxhisto.errors import ExportError
from jaxhisto.models import unet

FEEDING = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "tile_px": 64}


@pytest.fixture(scope="module")
def trees() -> tuple[dict, dict]:
    return unet.init("resnet10", 2, seed=0)


@pytest.fixture
def metadata() -> dict[str, str]:
    return unet_weights.describe("resnet10", 2, ["no", "yes"], **FEEDING)


def test_all_mismatches_at_once(trees: tuple[dict, dict]) -> None:
    tensors = unet_weights.to_torch(*trees, "resnet10", steps=3)
    del tensors["decoder.blocks.0.conv1.1.running_var"]
    tensors["decoder.center.0.weight"] = tensors["segmentation_head.0.weight"]
    tensors["encoder.bn1.bias"] = tensors["encoder.bn1.bias"][:3]
    with pytest.raises(ExportError) as caught:
        unet_weights.from_torch(tensors, "resnet10", "unet.pth")
    said = str(caught.value)
    assert "unet.pth: 3 tensors do not fit a UNet of resnet10 with 2 classes" in said
    assert "decoder.blocks.0.conv1.1.running_var missing" in said
    assert "decoder.center.0.weight unexpected" in said
    assert "encoder.bn1.bias is (3,), not (64,)" in said


def test_trees_that_do_not_fit_their_metadata(
    trees: tuple[dict, dict], metadata: dict[str, str], tmp_path: Path
) -> None:
    for wrong in ({"classes": "3"}, {"arch": "resnet18"}):
        with pytest.raises(ExportError, match="tensors do not fit a UNet of"):
            unet_weights.write_unet(tmp_path / "unet.safetensors", *trees, metadata | wrong)
    none, stats = unet.init("resnet10", 2, seed=0, skips="none")
    with pytest.raises(ExportError, match="4 tensors do not fit a UNet"):
        unet_weights.write_unet(tmp_path / "unet.safetensors", none, stats, metadata)
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_is_no_unet_and_a_unet_no_encoder(
    trees: tuple[dict, dict], metadata: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "unet.safetensors"
    unet_weights.write_unet(path, *trees, metadata)
    with pytest.raises(ExportError, match="'jaxhisto-unet-1'"):
        weights.read_encoder(path)
    tensors, _ = tensor_file.read(path)
    tensor_file.write(path, tensors, metadata | {"format": weights.FORMAT})
    with pytest.raises(ExportError, match="'jaxhisto-unet-1' is needed"):
        unet_weights.read_unet(path)
    tensor_file.write(path, tensors, metadata | {"classes": "many"})
    with pytest.raises(ExportError, match="classes 'many'"):
        unet_weights.read_unet(path)


def test_metadata_is_checked_when_it_is_made() -> None:
    with pytest.raises(ExportError, match="are 1 for 2 classes"):
        unet_weights.describe("resnet10", 2, ["yes"], **FEEDING)
    with pytest.raises(ExportError, match="tile side 100 px: is no multiple of 32"):
        unet_weights.describe("resnet10", 2, None, **FEEDING | {"tile_px": 100})
