"""The loader table of the README, cell by cell, on files of the real conversion."""

from __future__ import annotations

from pathlib import Path

import loaders
import pytest
import torch
from random_runs import Run

LOADERS = loaders.RESTATED | loaders.REAL
IN_OTHER_FILES = {16, 17, 20, 22}  # test_timm.py, test_onnx.py


# A PyTorch that reads safetensors in torch.load is newer than the oldest that is supported.
TORCH_LOAD_ROWS = {12, 18, 19}


def _torch_loads_safetensors(path: Path) -> bool:
    try:
        torch.load(path, weights_only=True)
    except Exception:  # of whatever kind
        return False
    return True


def test_the_table_has_a_row_for_each_loader() -> None:
    assert sorted(loaders.table()) == sorted(LOADERS) == list(range(1, 24))


@pytest.mark.parametrize("number", sorted(LOADERS.keys() - IN_OTHER_FILES))
def test_the_table_is_what_happens(number: int, files: Path, run18: Run) -> None:
    measured = {
        layout: loaders.outcome(LOADERS[number], files / name, run18)
        for layout, name in loaders.LAYOUTS.items()
    }
    expected = loaders.table()[number]
    if number in TORCH_LOAD_ROWS and not _torch_loads_safetensors(
        files / "timm" / "model.safetensors"
    ):
        expected["timm"] = "no"
    assert measured == expected


def test_every_layout_has_a_loader_that_takes_it() -> None:
    for layout in loaders.LAYOUTS:
        assert any(row[layout] == "yes" for row in loaders.table().values())


def test_published_layout_at_224_px_gives_7_by_7(files: Path) -> None:
    """Loader 7 keeps the map before pooling."""
    network = loaders.triplex(files / "published.pth")
    with torch.inference_mode():
        assert network(torch.zeros(1, 3, 224, 224)).shape == (1, 512, 7, 7)


def test_published_state_alone_serves_loaders_by_position(
    files: Path, run18: Run, tmp_path: Path
) -> None:
    state = torch.load(files / "published.pth", weights_only=True)["state_dict"]
    torch.save(state, tmp_path / "state.pth")
    assert loaders.outcome(loaders.by_position, tmp_path / "state.pth", run18) == "yes"
