"""`verify --against`: the same weights in another file, or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from random_runs import Run, make_run

from jaxhisto_export.against import compare
from jaxhisto_export.verify import VerifyResult


def compared(path: Path, other: Path) -> VerifyResult:
    result = VerifyResult(path)
    compare(path, other, result)
    return result


@pytest.mark.parametrize("fixture", ["flat", "flat_with_fc", "published"])
def test_layouts_of_one_encoder_agree(
    fixture: str, run18: Run, request: pytest.FixtureRequest
) -> None:
    result = compared(request.getfixturevalue(fixture), run18.encoder)
    assert result.ok, result.problems
    assert "120 of 120 shared" in result.lines[0] or "124 of 124 shared" in result.lines[0]


def test_a_projection_in_one_alone_is_said(published: Path, flat: Path) -> None:
    result = compared(flat, published)
    assert result.ok
    assert "only the second file holds its projection, 4 tensors" in result.lines[1]


def test_one_changed_bit_is_named(flat: Path, published: Path, tmp_path: Path) -> None:
    state = torch.load(flat, weights_only=True)
    state["layer2.0.conv1.weight"].view(torch.int32)[0, 0, 0, 0] ^= 1
    torch.save(state, tmp_path / "changed.pth")
    result = compared(tmp_path / "changed.pth", published)
    assert len(result.problems) == 1
    assert "1 of 120 tensors differ" in result.problems[0]
    assert "`layer2.0.conv1.weight`" in result.problems[0]


def test_another_depth_and_no_file_at_all(run18: Run, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", "resnet10")
    assert "a resnet18" in compared(run18.encoder, other.encoder).problems[0]
    missing = compared(run18.encoder, tmp_path / "none.pth").problems
    assert len(missing) == 1
    assert "none.pth" in missing[0]


def test_another_mean_is_a_problem(run18: Run, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", mean="[0.1, 0.2, 0.3]")
    result = compared(run18.encoder, other.encoder)
    assert len(result.problems) == 1
    assert "wants mean" in result.problems[0]
