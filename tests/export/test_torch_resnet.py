"""The torch module of a file, and the plain ResNet that stands in for torchvision's."""

from __future__ import annotations

from pathlib import Path

import loaders
import numpy as np
import pytest
import torch
from random_runs import WIDTHS, Run, make_run, random_resnet
from torchvision.models.resnet import ResNet

from jaxhisto_export import load_encoder
from jaxhisto_export.architecture import ARCHITECTURES
from jaxhisto_export.errors import ExportFileError
from jaxhisto_export.torch_resnet import PlainResNet, empty_resnet


@pytest.mark.parametrize(
    "name",
    [
        "resnet10",
        pytest.param("resnet18", marks=pytest.mark.slow),
        pytest.param("resnet34", marks=pytest.mark.slow),
        "resnet50",
        pytest.param("resnet101", marks=pytest.mark.slow),
    ],
)
def test_plain_resnet_is_torchvisions(name: str) -> None:
    theirs = random_resnet(name, seed=5)
    ours = PlainResNet(ARCHITECTURES[name]).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 50, 70, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(WIDTHS))
def test_torchvisions_resnet_is_taken_where_it_is(name: str) -> None:
    network, which = empty_resnet(ARCHITECTURES[name])
    assert isinstance(network, ResNet)
    assert which.startswith("torchvision 0.")
    assert len(network.state_dict()) == len(ARCHITECTURES[name].backbone())


@pytest.mark.parametrize("layout", loaders.LAYOUTS)
def test_features_are_those_of_the_network_exported(layout: str, files: Path, run18: Run) -> None:
    encoder = load_encoder(files / loaders.LAYOUTS[layout])
    assert not encoder.training
    with torch.inference_mode():
        ours = encoder.features(torch.from_numpy(run18.tiles))
    torch.testing.assert_close(ours, run18.features, rtol=0, atol=1e-5)


def test_an_encoder_of_a_run_loads_too(run18: Run) -> None:
    encoder = load_encoder(run18.encoder)
    assert encoder.provenance["tile_px"] == 64
    assert torch.equal(encoder.resnet.conv1.weight, run18.tensors["conv1.weight"])


def test_preprocessing_is_that_of_the_file(tmp_path: Path) -> None:
    """By hand: (RGB / 255 - mean) / std, channels first."""
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    run = make_run(tmp_path / "run", "resnet10", mean=str(mean), std=str(std))
    encoder = load_encoder(run.export("torchvision", tmp_path / "encoder.pth"))
    expected = ((run.tiles / 255 - mean) / std).transpose(0, 3, 1, 2)
    ours = encoder.preprocess(torch.from_numpy(run.tiles)).numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_state_dict_of_the_module_has_the_weights_alone(flat: Path) -> None:
    names = load_encoder(flat).state_dict()
    assert len(names) == 120
    assert all(name.startswith("resnet.") for name in names)


@pytest.mark.parametrize(
    "tiles", [torch.zeros(1, 8, 8, 3), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)]
)
def test_tiles_of_another_kind_are_refused(tiles: torch.Tensor, flat: Path) -> None:
    with pytest.raises(ValueError, match="uint8 RGB"):
        load_encoder(flat).features(tiles)


def test_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "imagenet.pth"
    torch.save(random_resnet("resnet10", 0).state_dict(), path)
    with pytest.raises(ExportFileError, match="metadata lacks `format`"):
        load_encoder(path)
