"""Verification passes what is right and fails for each planted fault."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loaders
import pytest
import torch
from random_runs import (
    WIDTHS,
    Run,
    encoder_metadata,
    features_of,
    make_run,
    random_resnet,
    torchvision_resnet,
)
from safetensors.torch import save_file

from jaxhisto_export.verify import VerifyResult, verify

GOLDEN = ".golden.safetensors"


@pytest.fixture(scope="module")
def exports(run10: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good file of each layout."""
    folder = tmp_path_factory.mktemp("exports")
    run10.export("published", folder / "published.pth")
    run10.export("torchvision", folder / "torchvision.pth")
    return folder


@pytest.fixture
def good(exports: Path, tmp_path: Path) -> Path:
    """A good file in layout published, to be spoilt."""
    return shutil.copytree(exports, tmp_path / "copy") / "published.pth"


@pytest.fixture
def good_flat(exports: Path, tmp_path: Path) -> Path:
    """A good file in layout torchvision, to be spoilt."""
    return shutil.copytree(exports, tmp_path / "copy") / "torchvision.pth"


def _spoil(path: Path, change: Callable[[Any], Any]) -> VerifyResult:
    """Changes the loaded content (in place, or by what is returned) and verifies again."""
    content = torch.load(path, weights_only=True)
    changed = change(content)
    torch.save(content if changed is None else changed, path)
    return verify(path)


def _says(result: VerifyResult, text: str) -> bool:
    assert not result.ok
    assert all("\n" not in problem for problem in result.problems)
    return any(text in problem for problem in result.problems)


@pytest.mark.parametrize("layout", loaders.LAYOUTS)
def test_good_files_pass(layout: str, files: Path) -> None:
    result = verify(files / loaders.LAYOUTS[layout])
    assert result.problems == []
    assert result.ok
    text = "\n".join(result.lines)
    assert "strict load: 120 of 120 tensors matched in resnet18 of torchvision" in text
    assert "8 tiles of 48 px, largest difference" in text
    assert "18 of 18 fields" in text
    assert "conv1 looks random" in text


@pytest.mark.parametrize("layout", sorted(loaders.LAYOUTS.keys() - {"timm"}))
def test_one_golden_file_serves_a_whole_folder(
    layout: str, files: Path, run18: Run, tmp_path: Path
) -> None:
    name = loaders.LAYOUTS[layout]
    shutil.copy(files / name, tmp_path / name)
    shutil.copy(run18.golden, tmp_path / "golden.safetensors")
    result = verify(tmp_path / name)
    assert result.problems == []
    assert any("8 tiles of 48 px" in line for line in result.lines)


@pytest.mark.parametrize("layout", ["dsmil", "smp"])
def test_flat_layouts_whose_metadata_is_lost_are_told_so(
    layout: str, files: Path, tmp_path: Path
) -> None:
    state = torch.load(files / loaders.LAYOUTS[layout], weights_only=True)
    torch.save(dict(state), tmp_path / "bare.pth")
    result = verify(tmp_path / "bare.pth")
    assert any("keys: 12" in line and ", 0 others" in line for line in result.lines)
    assert _says(result, "no metadata")


def test_a_head_lost_on_the_way(files: Path, tmp_path: Path) -> None:
    state = torch.load(files / "dsmil.pth", weights_only=True)
    del state["fc.3.weight"], state["fc.3.bias"]
    torch.save(state, tmp_path / "less.pth")
    assert _says(verify(tmp_path / "less.pth"), "2 of 124 keys missing: `fc.3.weight`")


def test_an_encoder_without_a_projection_passes(run10: Run, tmp_path: Path) -> None:
    tensors = {k: v for k, v in run10.tensors.items() if not k.startswith("fc.")}
    path = tmp_path / "encoder.safetensors"
    save_file(tensors, path, encoder_metadata("resnet10", projection_width="0"))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    golden = {"tiles": torch.from_numpy(run10.tiles), "features": run10.features}
    save_file(golden, tmp_path / "golden.safetensors", {"encoder_sha256": digest})
    assert verify(path).problems == []


@pytest.mark.parametrize("layout", loaders.LAYOUTS)
def test_against_the_encoder_it_was_made_of(layout: str, files: Path, run18: Run) -> None:
    """Out and in again: not one bit of a weight or a counter is lost."""
    result = verify(files / loaders.LAYOUTS[layout], against=run18.encoder)
    assert result.problems == []
    kept = 124 if layout in ("published", "dsmil") else 120
    assert any(f"{kept} of {kept} shared tensors equal bit for bit" in x for x in result.lines)


def test_the_encoder_of_a_run_passes(run18: Run) -> None:
    assert verify(run18.encoder).problems == []


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(WIDTHS))
def test_every_depth_passes(name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", name, seed=11)
    files = loaders.write_all(run, tmp_path / "files")
    for file in loaders.LAYOUTS.values():
        result = verify(files / file)
        assert result.problems == []
        # As good as float32 is, and so far below the tolerance.
        line = next(line for line in result.lines if line.startswith("golden"))
        assert float(line.split("difference ")[1].split()[0]) < 1e-5


def test_trained_conv1_is_not_called_random(good_flat: Path) -> None:
    def change(state: Any) -> None:
        state["conv1.weight"].mul_(12)

    result = _spoil(good_flat, change)
    assert any("conv1: norm 29." in line for line in result.lines)
    assert not any("looks random" in line for line in result.lines)


def test_one_changed_weight(good: Path) -> None:
    def change(content: Any) -> None:
        content["state_dict"]["model.resnet.layer2.0.conv1.weight"].add_(0.01)

    result = _spoil(good, change)
    assert _says(result, "SHA-256 differs")
    assert _says(result, "golden features differ")


def test_one_changed_bit_where_features_do_not_show_it(good: Path) -> None:
    """The head and the counters stand behind the features."""

    def change(content: Any) -> None:
        content["state_dict"]["model.resnet.fc.3.bias"][0] += 1e-7

    assert _says(_spoil(good, change), "SHA-256 differs")


def test_changed_weight_with_its_hash_forged(good: Path) -> None:
    """The features alone catch it: the tolerance is no blind spot."""
    from jaxhisto_export.weights_file import tensors_sha256

    def change(content: Any) -> None:
        content["state_dict"]["model.resnet.layer4.0.bn2.weight"].mul_(1.01)
        content["tensors_sha256"] = tensors_sha256(content["state_dict"])

    result = _spoil(good, change)
    assert _says(result, "golden features differ")
    assert len(result.problems) == 1


def test_other_normalisation_in_the_metadata(good: Path) -> None:
    """ImageNet's mean and std instead of 0.5 are caught by the features."""

    def change(content: Any) -> None:
        content["mean"], content["std"] = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

    assert _says(_spoil(good, change), "golden features differ")


def test_missing_and_extra_keys_are_both_listed(good: Path) -> None:
    def change(content: Any) -> None:
        state = content["state_dict"]
        del state["model.resnet.bn1.weight"], state["model.resnet.layer1.0.conv2.weight"]
        state["model.resnet.fc.weight"] = torch.zeros(1000, 512)

    result = _spoil(good, change)
    assert _says(result, "2 of 76 keys missing: `model.resnet.bn1.weight`")
    assert _says(result, "1 keys that do not belong there: `model.resnet.fc.weight`")
    assert _says(result, "does not load strictly: 70 of 72")


def test_head_missing(good: Path) -> None:
    def change(content: Any) -> None:
        del content["state_dict"]["model.resnet.fc.3.bias"]

    assert _says(_spoil(good, change), "1 of 76 keys missing: `model.resnet.fc.3.bias`")


def test_data_parallel_prefix(good: Path) -> None:
    def change(content: Any) -> None:
        state = content["state_dict"]
        content["state_dict"] = {f"module.{key}": value for key, value in state.items()}

    assert _says(_spoil(good, change), "76 keys start with `module.`")


def test_order_of_the_keys(good: Path) -> None:
    def change(content: Any) -> None:
        content["state_dict"].move_to_end("model.resnet.conv1.weight")

    assert _says(_spoil(good, change), "not in torchvision's order")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(32), "has shape (32,), not (64,)"),
        (torch.zeros(64, dtype=torch.float64), "is torch.float64, not torch.float32"),
        (torch.full((64,), float("inf")), "holds NaN or infinity"),
    ],
)
def test_tensor_of_another_kind(tensor: torch.Tensor, message: str, good_flat: Path) -> None:
    def change(state: Any) -> None:
        state["bn1.bias"] = tensor

    assert _says(_spoil(good_flat, change), f"`bn1.bias` {message}")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_truncated_file(share: float, good: Path) -> None:
    whole = good.read_bytes()
    good.write_bytes(whole[: int(share * len(whole))])
    result = verify(good)
    assert _says(result, "not a whole PyTorch checkpoint")
    assert len(result.problems) == 1


def test_flipped_byte_in_the_weights(good: Path) -> None:
    content = bytearray(good.read_bytes())
    content[len(content) // 2] ^= 0xFF
    good.write_bytes(content)
    assert not verify(good).ok


@pytest.mark.parametrize("content", [b"", b"\x89PNG", b"hello" * 1000])
def test_no_checkpoint_at_all(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    assert _says(verify(path), "not a whole PyTorch checkpoint")


@pytest.mark.parametrize("content", [[1, 2], {}, {"state_dict": {}}, {"epoch": 3}])
def test_checkpoint_without_tensors(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save(content, path)
    assert _says(verify(path), "state dict")


def test_no_such_file(tmp_path: Path) -> None:
    assert _says(verify(tmp_path / "nothing.pth"), "no such file")
    assert _says(verify(tmp_path), "no such file")


class _Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_pickles_are_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "it_ran"
    torch.save({"state_dict": _Hostile(marker)}, tmp_path / "hostile.pth")
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps(_Hostile(marker)))
    for name in ("hostile.pth", "bare.pkl"):
        assert _says(verify(tmp_path / name), "not a whole PyTorch checkpoint of tensors alone")
    assert not marker.exists()


def test_golden_tiles_missing(good: Path) -> None:
    good.with_name(good.name + GOLDEN).unlink()
    assert _says(verify(good), "features were not compared")


def test_golden_features_of_other_weights(good: Path, run10: Run, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", "resnet10", seed=8)
    shutil.copy(other.golden, good.with_name(good.name + GOLDEN))
    result = verify(good)
    assert _says(result, "holds the golden features of other weights")
    assert _says(result, "golden features differ")


def test_golden_features_that_say_nothing(good: Path, run10: Run) -> None:
    """All zero, or of another width, is no comparison."""
    beside = good.with_name(good.name + GOLDEN)
    digest = {"encoder_sha256": torch.load(good, weights_only=True)["encoder_sha256"]}
    tiles = torch.from_numpy(run10.tiles)
    for features in (torch.zeros(8, 512), torch.ones(8, 2048)):
        save_file({"tiles": tiles, "features": features}, beside, digest)
        assert _says(verify(good), "cannot be compared")
    save_file({"features": torch.ones(8, 512)}, beside, digest)
    assert _says(verify(good), "holds no golden tiles")
    beside.write_bytes(beside.read_bytes()[:-5])
    assert _says(verify(good), "not a whole safetensors file")


def test_metadata_lost(good_flat: Path) -> None:
    """A state dict that went through a module and torch.save again."""
    network = torchvision_resnet("resnet10")
    network.load_state_dict(torch.load(good_flat, weights_only=True))
    torch.save(network.state_dict(), good_flat)
    assert _says(verify(good_flat), "no metadata")


def test_metadata_incomplete_is_listed_field_by_field(good: Path) -> None:
    def change(content: Any) -> None:
        del content["mpp_range"]
        content["mean"] = torch.zeros(3)
        content["arch"] = ["resnet10"]

    result = _spoil(good, change)
    assert _says(result, "metadata lacks `mpp_range`")
    assert _says(result, "metadata `mean` is")
    assert _says(result, "metadata `arch` is")


def test_metadata_of_another_depth(good: Path) -> None:
    def change(content: Any) -> None:
        content["arch"] = "resnet18"

    assert _says(_spoil(good, change), "says resnet18, the tensors are a resnet10")


def test_sidecar(good_flat: Path) -> None:
    sidecar = good_flat.with_name(good_flat.name + ".json")
    sidecar.write_text(sidecar.read_text().replace('"step": 120', '"step": 121'))
    assert _says(verify(good_flat), "contradicts")
    sidecar.write_text("{")
    assert _says(verify(good_flat), "cannot be read as JSON")
    sidecar.unlink()
    assert verify(good_flat).ok


def test_torchvisions_own_file_is_told_what_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "resnet10.pth"
    torch.save(random_resnet("resnet10", 0).state_dict(), path)
    result = verify(path)
    assert any("72 of 72 tensors matched" in line for line in result.lines)
    assert len(result.problems) == 2
    assert _says(result, "no metadata")
    assert _says(result, "features were not compared")


def test_tolerance_is_far_above_rounding_and_far_below_faults(run10: Run) -> None:
    """The figures that verify.py names for its tolerance."""
    network = random_resnet("resnet10", seed=7)
    largest = run10.features.abs().max()
    double = torch.from_numpy(run10.tiles).permute(0, 3, 1, 2).double() / 255
    with torch.inference_mode():
        exact = network.double()((double - 0.5) / 0.5)
    rounding = (exact - run10.features).abs().max() / largest
    network = random_resnet("resnet10", seed=7)
    with torch.inference_mode():
        x = torch.from_numpy(run10.tiles).permute(0, 3, 1, 2).float() / 255
        mean = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)
        fault = (network((x - mean) / std) - run10.features).abs().max() / largest
    assert rounding < 1e-5
    assert fault > 1e-2
    assert torch.equal(features_of(network, run10.tiles), run10.features)
