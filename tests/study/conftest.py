"""A finished study that the tests of this folder look at."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_study import FEWER, changed, make_place, no_picture, run

from jaxhisto.study import run as study


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two classes, their mean in a CSV file, encoders, a finished study; read only."""
    place = make_place(tmp_path_factory.mktemp("study"))
    assert run(place / "two.toml", "--root", place, "--out", place / "whole") == 0
    return place


@pytest.fixture(scope="session")
def small(place: Path) -> Path:
    """The same with hand-made features alone, in the folder `small` of the place; read only."""
    file = changed(place, place / "small.toml", FEWER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "label_curves", no_picture)
        assert run(file, "--root", place, "--out", place / "small") == 0
    return file


@pytest.fixture
def no_figures(monkeypatch) -> None:
    """Figures are drawn in the study of `place` alone: they take most of a small study's time."""
    monkeypatch.setattr(study, "label_curves", no_picture)
