"""Exported files that the tests of this folder only read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import loaders
import pytest
import torch
from random_runs import Run, make_run


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small are five times slower where threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def run18(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A ResNet18 run."""
    return make_run(tmp_path_factory.mktemp("run18"))


@pytest.fixture(scope="session")
def published(run18: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its file in layout published; read only."""
    return run18.export("published", tmp_path_factory.mktemp("published") / "encoder.pth")


@pytest.fixture(scope="session")
def flat(run18: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its file in layout torchvision without fc; read only."""
    return run18.export("torchvision", tmp_path_factory.mktemp("flat") / "encoder.pth")


@pytest.fixture(scope="session")
def flat_with_fc(run18: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its file in layout torchvision with the zero 1000-way fc; read only."""
    return run18.export("torchvision", tmp_path_factory.mktemp("fc") / "encoder.pth", fc="zero")


@pytest.fixture(scope="session")
def run10(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A small run, for the many faults."""
    return make_run(tmp_path_factory.mktemp("run10"), "resnet10", seed=7)


@pytest.fixture(scope="session")
def files(run18: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every layout of one encoder; read only."""
    return loaders.write_all(run18, tmp_path_factory.mktemp("layouts"))
