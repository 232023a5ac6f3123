"""Layout timm, read by the real timm, huggingface_hub and safetensors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import loaders
import numpy as np
import pytest
import timm
import torch
from random_runs import WIDTHS, Run, encoder_metadata, features_of, make_run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from jaxhisto_export import load_encoder
from jaxhisto_export.errors import ExportFileError
from jaxhisto_export.layouts import convert
from jaxhisto_export.verify import verify


@pytest.fixture
def folder(run10: Run, tmp_path: Path) -> Path:
    """A good folder, to be spoilt."""
    return run10.export("timm", tmp_path / "encoder")


@pytest.mark.parametrize("number", [16, 17, 20])
def test_the_table_is_what_happens(number: int, files: Path, run18: Run) -> None:
    measured = {
        layout: loaders.outcome(loaders.REAL[number], files / name, run18)
        for layout, name in loaders.LAYOUTS.items()
    }
    assert measured == loaders.table()[number]


def test_the_folder_tells_timm_how_to_feed_it(tmp_path: Path) -> None:
    """The transform that timm makes of config.json, on tiles, gives torchvision's features."""
    run = make_run(tmp_path / "run", "resnet10", seed=2, tile_px="48")
    network = timm.create_model(f"local-dir:{run.export('timm', tmp_path / 'out')}", True).eval()
    asked = timm.data.resolve_model_data_config(network)
    assert asked == {
        "input_size": [3, 48, 48],
        "interpolation": "bilinear",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    from PIL import Image

    transform = timm.data.create_transform(**asked)
    x = torch.stack([transform(Image.fromarray(tile)) for tile in run.tiles])
    with torch.inference_mode():
        torch.testing.assert_close(network(x), run.features, rtol=0, atol=1e-5)


def test_a_file_alone_leaves_timm_with_the_mean_of_imagenet(files: Path) -> None:
    """Loader 17 has the right weights, and nobody told it the normalisation: say so."""
    network = loaders.timm_file(files / "timm" / "model.safetensors")
    assert network.pretrained_cfg["mean"] == timm.data.IMAGENET_DEFAULT_MEAN
    assert "pretrained_cfg_overlay" in loaders.README.read_text("utf-8")


def test_mean_and_std_are_those_of_values_in_0_to_1(tmp_path: Path) -> None:
    """timm normalises 0..1; an encoder of -1..1 with mean 0 wants 0.5 of it."""
    run = make_run(
        tmp_path / "run",
        "resnet10",
        value_range="[-1.0, 1.0]",
        mean="[0.0, 0.0, 0.5]",
        std="[1.0, 1.0, 2.0]",
    )
    feeding = json.loads((run.export("timm", tmp_path / "out") / "config.json").read_text())
    assert feeding["pretrained_cfg"]["mean"] == [0.5, 0.5, 0.75]
    assert feeding["pretrained_cfg"]["std"] == [0.5, 0.5, 1.0]


def test_bgr_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "resnet10", channel_order="BGR")
    with pytest.raises(ExportFileError, match="wants BGR") as failure:
        run.export("timm", tmp_path / "out")
    assert "\n" not in str(failure.value)
    assert not (tmp_path / "out").exists()


def test_content(files: Path, run18: Run) -> None:
    folder = files / "timm"
    names = {"model.safetensors", "config.json", "golden.safetensors"}
    assert {p.name for p in folder.iterdir()} == names
    tensors = load_file(folder / "model.safetensors")
    backbone = {k: v for k, v in run18.tensors.items() if not k.startswith("fc.")}
    assert tensors.keys() == backbone.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in backbone.items())
    assert all(tensors[name].dtype == tensor.dtype for name, tensor in backbone.items())
    config = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert config["architecture"] == "resnet18"
    assert config["jaxhisto"]["data_hash"] == metadata["data_hash"] == "0" * 64
    assert config["jaxhisto"]["config"] == json.loads(metadata["config"])
    assert "license" not in config["pretrained_cfg"]


def test_the_licence_is_passed_on(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "resnet10", licence="CC-BY-4.0")
    out = run.export("timm", tmp_path / "out")
    assert timm.create_model(f"local-dir:{out}").pretrained_cfg["license"] == "CC-BY-4.0"


def test_same_encoder_same_bytes(files: Path, run18: Run, tmp_path: Path) -> None:
    again = run18.export("timm", tmp_path / "again")
    for path in (files / "timm").iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_from_the_hubs_cache_without_a_network(files: Path, run18: Run, tmp_path: Path) -> None:
    """The folder as a hub's download lies on disk, read by `hf-hub:` in offline mode."""
    commit = "0" * 40
    cached = tmp_path / "hub" / "models--someone--encoder"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    shutil.copytree(files / "timm", cached / "snapshots" / commit)
    np.save(tmp_path / "tiles.npy", run18.tiles)
    code = (
        "import sys, timm, torch, numpy\n"
        "net = timm.create_model('hf-hub:someone/encoder', pretrained=True).eval()\n"
        "x = torch.from_numpy(numpy.load(sys.argv[1])).permute(0, 3, 1, 2) / 255\n"
        "with torch.inference_mode(): numpy.save(sys.argv[2], net((x - 0.5) / 0.5).numpy())"
    )
    command = [sys.executable, "-c", code, tmp_path / "tiles.npy", tmp_path / "features.npy"]
    hub = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    subprocess.run(command, check=True, env={**os.environ, **hub, "OMP_NUM_THREADS": "1"})
    features = torch.from_numpy(np.load(tmp_path / "features.npy"))
    torch.testing.assert_close(features, run18.features, rtol=0, atol=1e-5)


@pytest.mark.parametrize("inside", ["", "model.safetensors"])
def test_verified_as_a_folder_and_as_a_file(inside: str, folder: Path) -> None:
    result = verify(folder / inside)
    assert result.problems == []
    assert any("layout timm, resnet10" in line for line in result.lines)
    assert any("8 tiles of 48 px, largest difference" in line for line in result.lines)
    assert any("18 of 18 fields" in line for line in result.lines)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["pretrained_cfg"].update(mean=[0.485, 0.456, 0.406]), "`pretrained_cfg.mean`"),
        (lambda c: c["pretrained_cfg"].pop("std"), "`pretrained_cfg.std`"),
        (lambda c: c.update(pretrained_cfg=3), "`pretrained_cfg.mean`"),
        (lambda c: c.update(architecture="resnet50"), "`architecture`"),
        (lambda c: c["jaxhisto"].update(step=121), "`jaxhisto`"),
    ],
)
def test_a_config_that_contradicts(change: Any, message: str, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    result = verify(folder)
    assert len(result.problems) == 1
    assert result.problems[0].startswith("config.json contradicts")
    assert message in result.problems[0]


def test_further_keys_of_the_user_are_no_problem(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["tags"] = config["pretrained_cfg"]["description"] = "mine"
    (folder / "config.json").write_text(json.dumps(config))
    assert verify(folder).ok


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b'{"a": "' + b"a" * (1 << 20) + b'"}']
)
def test_a_config_that_is_none(content: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(content)
    (problem,) = verify(folder).problems
    assert "config.json" in problem
    assert "\n" not in problem


def test_a_config_that_is_missing(folder: Path) -> None:
    (folder / "config.json").unlink()
    (problem,) = verify(folder).problems
    assert "config.json: there is no such file" in problem


def test_a_changed_weight(folder: Path) -> None:
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors["layer2.0.conv1.weight"] += 0.01
    save_file(tensors, path, metadata)
    problems = verify(folder).problems
    assert any("SHA-256 differs" in problem for problem in problems)
    assert any("golden features differ" in problem for problem in problems)


def test_a_folder_that_is_there_is_replaced_only_by_force(folder: Path, run10: Run) -> None:
    (folder / "README.md").write_text("card")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ExportFileError, match="exists, pass --force"):
        convert(run10.encoder, "timm", folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    convert(run10.encoder, "timm", folder, force=True)
    assert {p.name for p in folder.iterdir()} == {"model.safetensors", "config.json"}
    assert [p.name for p in folder.parent.iterdir()] == ["encoder"]


def test_a_folder_with_other_things_in_it_is_never_deleted(folder: Path, run10: Run) -> None:
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(ExportFileError, match=r"holds other things \(`thesis.tex`\)"):
        convert(run10.encoder, "timm", folder, force=True)
    assert (folder / "thesis.tex").read_text() == "years of work"
    assert [p.name for p in folder.parent.iterdir()] == ["encoder"]


def test_a_link_to_a_folder_stays_a_link(folder: Path, run10: Run) -> None:
    link = folder.with_name("link")
    link.symlink_to(folder)
    convert(run10.encoder, "timm", link, run10.golden, force=True)
    assert link.is_symlink()
    assert verify(link).ok


def test_the_folder_one_stands_in(
    folder: Path, run10: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = run10.encoder.resolve()
    monkeypatch.chdir(folder)
    convert(encoder, "timm", ".", force=True)
    assert {p.name for p in folder.iterdir()} == {"model.safetensors", "config.json"}


def test_a_full_disk_leaves_the_earlier_folder(folder: Path, run10: Run) -> None:
    """A file-size limit of the process stands for the full disk."""
    import resource
    import signal

    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(ExportFileError, match="cannot be written"):
            convert(run10.encoder, "timm", folder, run10.golden, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["encoder"]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(WIDTHS))
def test_every_depth(name: str, tmp_path: Path) -> None:
    """timm's network, and segmentation_models_pytorch's, against torchvision's features."""
    import segmentation_models_pytorch as smp

    run = make_run(tmp_path / "run", name, seed=11)
    folder = run.export("timm", tmp_path / "timm")
    flat = run.export("smp", tmp_path / "smp.pth")
    networks = [timm.create_model(f"local-dir:{folder}", pretrained=True).eval()]
    if name != "resnet10":  # which smp has not
        encoder = smp.Unet(name, encoder_weights=None).encoder
        encoder.load_state_dict(torch.load(flat, weights_only=True), strict=True)
        networks.append(encoder.eval())
    for network in networks:
        assert loaders.difference(network, run) < 1e-5
    assert verify(folder).problems == []
    ours = load_encoder(folder).resnet
    assert torch.equal(features_of(ours, run.tiles), run.features)


def test_the_encoder_and_its_golden_tiles_may_have_any_name(run10: Run, tmp_path: Path) -> None:
    tensors = load_file(run10.encoder)
    path = tmp_path / "mine.safetensors"
    save_file(tensors, path, encoder_metadata("resnet10"))
    convert(path, "timm", tmp_path / "out")
    assert [p for p in verify(tmp_path / "out").problems if "not compared" not in p] == []
