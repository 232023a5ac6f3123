"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from random_runs import Run

from jaxhisto import unet_weights
from jaxhisto.models import unet
from jaxhisto_export.layouts import convert

README = Path(__file__).parents[2] / "export" / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def folder(run18: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the README names."""
    folder = tmp_path_factory.mktemp("readme")
    run18.export("torchvision", folder / "encoder.pth")
    run18.export("published", folder / "published.pth")
    run18.export("timm", folder / "encoder")
    run18.export("smp", folder / "smp.pth")
    convert(run18.encoder, "onnx", folder / "normalising.onnx", normalise=True)
    about = unet_weights.describe("resnet18", 2, None, mean=[0.5] * 3, std=[0.5] * 3, tile_px=64)
    params, stats = unet.init("resnet18", 2, seed=0)
    unet_weights.write_unet(folder / "unet.safetensors", params, stats, about)
    convert(folder / "unet.safetensors", "smp", folder / "unet.pth")
    return folder


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_readme_code_runs(number: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    scope: dict[str, object] = {}
    exec(compile(BLOCKS[number], README.name, "exec"), scope)
    if "features" in scope:
        assert scope["features"].shape == (8, 512)
    if "logits" in scope:
        assert scope["logits"].shape == (8, 2, 64, 64)


def test_there_is_code_for_each_layout() -> None:
    assert len(BLOCKS) == 8
