"""Which public loader takes which layout; its behaviour, on files of the real conversion."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import loaders
import pytest
import torch
from random_runs import Run, features_of
from torch import nn

Loader = Callable[[Path], nn.Module]


def _close(network: nn.Module, run: Run) -> bool:
    """Whether the network gives the features of the network that was exported."""
    return torch.allclose(features_of(network, run.tiles), run.features, rtol=0, atol=1e-5)


@pytest.mark.parametrize("number", sorted(loaders.PUBLISHED))
def test_published_layout_loads(number: int, published: Path, run18: Run) -> None:
    assert _close(loaders.PUBLISHED[number](published), run18)


def test_published_layout_gives_a_map(published: Path, run18: Run) -> None:
    """Loader 7 keeps the map before pooling; its mean is the feature."""
    maps = features_of(loaders.triplex(published), run18.tiles)
    assert maps.shape == (8, 512, 2, 2)
    torch.testing.assert_close(maps.mean((2, 3)), run18.features, rtol=0, atol=1e-5)


def test_published_layout_at_224_px_gives_7_by_7(published: Path) -> None:
    with torch.inference_mode():
        assert loaders.triplex(published)(torch.zeros(1, 3, 224, 224)).shape == (1, 512, 7, 7)


def test_flat_layout_loads_without_fc(flat: Path, run18: Run) -> None:
    assert _close(loaders.flat_headless(flat), run18)


def test_flat_layout_loads_with_zero_fc(flat_with_fc: Path, run18: Run) -> None:
    assert _close(loaders.flat_full(flat_with_fc), run18)


@pytest.mark.parametrize(
    ("loader", "fixture"),
    [(loaders.flat_full, "flat"), (loaders.flat_headless, "flat_with_fc")],
)
def test_the_other_fc_fails_loudly(
    loader: Loader, fixture: str, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(RuntimeError, match=r"fc\.weight"):
        loader(request.getfixturevalue(fixture))


def test_flat_loaders_refuse_the_published_layout(published: Path) -> None:
    with pytest.raises(RuntimeError, match="state_dict"):
        loaders.flat_headless(published)


@pytest.mark.parametrize("fixture", ["published", "flat", "flat_with_fc"])
def test_a_loader_that_pins_one_file_takes_no_other(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(ValueError, match="not the file"):
        loaders.marugoto(request.getfixturevalue(fixture))


def test_a_loader_by_position_needs_the_head_last(published: Path, flat: Path, run18: Run) -> None:
    """Loader 14: our order serves it; the flat file, headless, silently loses a BatchNorm."""
    head_last = torch.load(published, weights_only=True)["state_dict"]
    assert _close(loaders.by_position(head_last), run18)
    headless = torch.load(flat, weights_only=True)
    assert not _close(loaders.by_position(headless), run18)


@pytest.mark.parametrize("fixture", ["published", "flat", "flat_with_fc"])
def test_no_file_is_a_pickled_module(fixture: str, request: pytest.FixtureRequest) -> None:
    with pytest.raises(TypeError, match="not a module"):
        loaders.pickled_module(request.getfixturevalue(fixture))
