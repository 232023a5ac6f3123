"""A folder ready to upload: every layout, checksums that hold, a card whose code runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from random_runs import Run, make_run

from jaxhisto_export.bundle import write_bundle
from jaxhisto_export.errors import ExportFileError
from jaxhisto_export.model_card import card
from jaxhisto_export.verify import verify
from jaxhisto_export.weights_file import read_weights

STORY: dict[str, Any] = {
    "data": {
        "tiles": 966,
        "dropped": [{"name": "a.png", "reason": "empty"}],
        "summary": "966 tiles\n  /home/someone/her2st: folder, 966 images",
    },
    "losses": [[1, 4.8], [120, 2.5]],
    "environment": {"devices": ["cpu cpu"]},
    "scores": [
        {
            "rows": [
                {"encoder": "resnet18 step 120", "auc": [0.8, 0.9], "auc_mean": 0.85}
                | {"macro_f1_mean": 0.7}
            ]
        }
    ],
}
NAMES = {
    *("README.md", "SHA256SUMS", "config.json", "model.safetensors", "golden.safetensors"),
    *("published.ckpt", "dsmil.pth", "dsmil.pth.json", "torchvision.pth", "torchvision.pth.json"),
    *("smp.pth", "smp.pth.json", "encoder.onnx", "encoder.safetensors"),
}


@pytest.fixture(scope="module")
def bundle(run18: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("upload") / "encoder"
    write_bundle(run18.encoder, folder, run18.golden, STORY)
    return folder


def test_all_layouts_and_nothing_else(bundle: Path) -> None:
    assert {p.name for p in bundle.iterdir()} == NAMES
    assert [p.name for p in bundle.parent.iterdir()] == ["encoder"]


def test_checksums_hold(bundle: Path) -> None:
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=bundle, check=True)
    lines = (bundle / "SHA256SUMS").read_text().splitlines()
    assert {line.split("  ")[1] for line in lines} == NAMES - {"SHA256SUMS"}


@pytest.mark.parametrize(
    "name", ["published.ckpt", "dsmil.pth", "torchvision.pth", "smp.pth", "encoder.onnx", "."]
)
def test_every_file_verifies_with_the_one_golden_file(bundle: Path, name: str) -> None:
    result = verify(bundle / name)
    assert result.problems == []
    assert any("golden features: 8 tiles" in line for line in result.lines)


def test_the_front_matter_is_what_a_hub_reads(bundle: Path) -> None:
    data = ModelCard.load(bundle / "README.md").data.to_dict()
    assert data["license"] == "unknown"
    assert data["library_name"] == "timm"
    assert "simclr" in data["tags"]


def test_the_card_says_what_a_user_must_know(bundle: Path) -> None:
    text = (bundle / "README.md").read_text()
    for said in (
        "a classifier",
        "0.25 to 0.5 um/px",
        "H&E",
        "not checked",
        "966, dropped: 1",
        "| resnet18 step 120 | 0.850 | 0.800 to 0.900 | 0.700 |",
        "2.500 at 120",
        "not decided",
        "  her2st: folder, 966 images",
    ):
        assert said in text, said
    assert "someone" not in text


def test_the_card_says_what_was_checked_for_leakage_and_where(run18: Run, tmp_path: Path) -> None:
    none = {"images": 0, "pairs": 0, "ids": 0}
    counts = dict.fromkeys(("file", "pixels", "near", "part", "slide", "patient", "name"), none)
    clean = {"name": "bcss", "hash": "ab" * 32, "images": 268, "too_flat": 3, "counts": counts}
    found = {**counts, "near": {"images": 7, "pairs": 9}, "patient": {"ids": 2, "images": 40}}
    lymph = {**clean, "name": "lymph", "counts": found, "overlap": True}
    limits = {"distance_bits_of_63": 10, "correlation": 0.9, "parts": True}
    record = {"date": "2026-11-25T00:00:00+00:00", "thresholds": limits}
    checked = {**record, "against": [{**clean, "overlap": False}, lymph]}
    text = card(read_weights(run18.encoder).provenance, {**STORY, "leakage": [checked]}, [])
    first, second, rest = [line for line in text.splitlines() if line.startswith("- leakage")]
    assert "`bcss` (268 images, hash `abababababab`) on 2026-11-25: no overlap found" in first
    assert "3 images too flat to tell; hashes within 10 of 63 bits, correlation from 0.9" in first
    assert "`lymph`" in second
    assert "**overlap found**" in second
    assert "7 near-identical" in second
    assert "shared patients 2" in second
    assert "other test sets was **not checked**" in rest


def test_the_code_in_the_card_gives_the_golden_features(bundle: Path, run18: Run) -> None:
    """Runs each code block of the card in one child, in the folder, and compares features."""
    blocks = re.findall(r"```python\n(.*?)```", (bundle / "README.md").read_text(), re.DOTALL)
    torchvision_way, numpy_way, net, timm_net, session, any_file = blocks
    np.savez(bundle.parent / "truth.npz", tiles=run18.tiles, features=run18.features.numpy())
    script = f"""
import numpy as np
truth = np.load("../truth.npz")
tiles = truth["tiles"]
def close(features):
    assert np.abs(np.asarray(features) - truth["features"]).max() < 1e-5
{torchvision_way}
x = torch.stack([preprocess(tile) for tile in tiles])
{net}
with torch.inference_mode(): close(net(x))
{timm_net}
with torch.inference_mode(): close(net(x))
{numpy_way}
x = preprocess(tiles)
{session}
close(features)
tiles = torch.from_numpy(tiles)
{any_file.replace("FILE", "smp.pth")}
close(features.detach())
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=bundle, check=True)


def test_an_encoder_without_projection_leaves_two_layouts_out(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    run = make_run(tmp_path / "run", "resnet10")
    from random_runs import encoder_metadata

    headless = {k: v for k, v in load_file(run.encoder).items() if not k.startswith("fc.")}
    path = tmp_path / "headless.safetensors"
    save_file(headless, path, encoder_metadata("resnet10", projection_width="0"))
    write_bundle(path, tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert "torchvision.pth" in names
    assert not names & {"published.ckpt", "dsmil.pth"}
    assert "no head of any kind" in (tmp_path / "out" / "README.md").read_text()


def test_a_folder_that_is_there_is_replaced_only_by_force(run18: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(ExportFileError, match="exists, pass --force"):
        write_bundle(run18.encoder, out, run18.golden)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    with pytest.raises(ExportFileError, match=r"mine\.txt"):
        write_bundle(run18.encoder, out, run18.golden, force=True)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    (out / "mine.txt").rename(out / "README.md")
    write_bundle(run18.encoder, out, run18.golden, force=True)
    assert {p.name for p in out.iterdir()} == NAMES
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_damaged_encoder_leaves_nothing(run18: Run, tmp_path: Path) -> None:
    damaged = tmp_path / "encoder.safetensors"
    damaged.write_bytes(run18.encoder.read_bytes()[:-100])
    with pytest.raises(ExportFileError, match="not a whole safetensors"):
        write_bundle(damaged, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["encoder.safetensors"]


def test_torch_loads_with_weights_only(bundle: Path) -> None:
    for name in ("published.ckpt", "dsmil.pth", "torchvision.pth", "smp.pth"):
        torch.load(bundle / name, weights_only=True)
