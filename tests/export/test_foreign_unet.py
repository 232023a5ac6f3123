"""Whole UNets of segmentation_models_pytorch, read as they are, as encoders, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from safetensors import safe_open
from torch import nn

from jaxhisto import tensor_file, unet_weights, weights
from jaxhisto.cli import main
from jaxhisto.errors import ExportError
from jaxhisto_export.errors import ExportFileError
from jaxhisto_export.foreign import read_foreign
from jaxhisto_export.verify import verify

IMAGENET = ["--mean", "0.485", "0.456", "0.406", "--std", "0.229", "0.224", "0.225"]
SMALL = [*IMAGENET, "--tile-px", "32"]  # of the golden tiles too


def real_unet(arch: str = "resnet18", **settings: object) -> nn.Module:
    """smp's own, with statistics away from their defaults."""
    torch.manual_seed(0)
    model = smp.Unet(arch, encoder_weights=None, **{"classes": 2, **settings})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.fill_(7)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return real_unet()


@pytest.fixture(scope="module")
def file(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its state dict, saved as people save it; read only."""
    path = tmp_path_factory.mktemp("theirs") / "best_model.pth"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def imported(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """unet.safetensors that `jaxhisto import` made of it; read only."""
    folder = tmp_path_factory.mktemp("imported")
    names = ["--class-names", "other", "nucleus"]
    assert main(["import", str(file), "--out", str(folder), *SMALL, *names]) == 0
    assert sorted(p.name for p in folder.iterdir()) == [
        "unet.safetensors",
        "unet.safetensors.golden.safetensors",
    ]
    return folder / "unet.safetensors"


def saved(folder: Path, state: object) -> Path:
    path = folder / "unet.pth"
    torch.save(state, path)
    return path


def test_a_real_unet_comes_in(model: nn.Module, imported: Path, file: Path) -> None:
    assert verify(imported).problems == []  # golden logits of JAX, in the real smp.Unet
    params, stats, metadata = unet_weights.read_unet(imported)
    theirs = model.state_dict()
    for name, tensor in unet_weights.to_torch(params, stats, "resnet18", steps=7).items():
        np.testing.assert_array_equal(tensor, theirs[name].numpy(), err_msg=name)
    assert (metadata["classes"], metadata["class_names"]) == ("2", '["other", "nucleus"]')
    assert metadata["mean"] == "[0.485, 0.456, 0.406]"
    source = json.loads(metadata["source"])
    assert source["file"] == "best_model.pth"
    assert source["recognised"] == "PyTorch file, Unet of segmentation_models_pytorch, 2 classes"


def test_out_and_in_again_is_bit_identical(
    model: nn.Module, imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "unet.pth"
    assert main(["export", str(imported.parent), "--layout", "smp", "--out", str(out)]) == 0
    back = tmp_path / "back"
    assert main(["import", str(out), "--out", str(back)]) == 0
    again, first = tensor_file.read(back / "unet.safetensors"), tensor_file.read(imported)
    assert again[1] == first[1]
    for name, tensor in model.state_dict().items():
        assert again[0][name].tobytes() == first[0][name].tobytes() == tensor.numpy().tobytes()
    capsys.readouterr()
    assert main(["verify", str(out), "--against", str(back / "unet.safetensors")]) == 0
    assert "182 of 182 shared tensors equal bit for bit" in capsys.readouterr().out


def test_a_difference_in_the_decoder_is_found(
    model: nn.Module, imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = model.state_dict()
    state["decoder.blocks.3.conv2.1.bias"] = state["decoder.blocks.3.conv2.1.bias"] + 1
    other = saved(tmp_path, state)
    assert main(["verify", str(imported), "--against", str(other)]) == 1
    assert "the most `decoder.blocks.3.conv2.1.bias`" in capsys.readouterr().err


def test_its_encoder_alone(
    model: nn.Module, imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "encoder"
    assert main(["import", str(imported), "--part", "encoder", "--out", str(folder)]) == 0
    assert "`decoder` (60 tensors) left out" in capsys.readouterr().out
    encoder = folder / "encoder.safetensors"
    assert verify(encoder).problems == []
    tensors, metadata = tensor_file.read(encoder)
    for name, tensor in model.encoder.state_dict().items():
        assert tensors[name].tobytes() == tensor.numpy().tobytes()
    assert (metadata["feature_width"], metadata["projection_width"]) == ("512", "0")
    assert "classes" not in metadata
    weights.read_encoder(encoder)
    assert main(["verify", str(encoder), "--against", str(imported)]) == 0
    assert "only one of the files is a UNet, encoders are compared" in capsys.readouterr().out


def test_a_unet_given_for_an_encoder_says_how_to_take_it(imported: Path) -> None:
    with pytest.raises(ExportError, match="--part encoder --out DIR` takes the encoder out"):
        weights.read_encoder(imported)


def test_wrapped_by_lightning_and_data_parallel(model: nn.Module, tmp_path: Path) -> None:
    state = {f"model.module.{k}": v for k, v in model.state_dict().items()}
    path = saved(tmp_path, {"state_dict": {**state, "loss.weight": torch.ones(2)}, "epoch": 3})
    found = read_foreign(path, part="")
    assert (found.architecture.name, found.classes) == ("resnet18", 2)
    assert list(found.tensors) == list(model.state_dict())
    assert any("`state_dict.loss` (1 tensors) left out" in note for note in found.notes)


def test_smps_own_folder(model: nn.Module, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "hub")
    found = read_foreign(tmp_path / "hub", part="unet")
    assert (found.classes, len(found.tensors)) == (2, 182)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "attention": (
        lambda: real_unet(decoder_attention_type="scse"),
        "tensors that the default Unet has not: `decoder.blocks.0.attention1.attention.cSE",
    ),
    "narrow": (
        lambda: real_unet(decoder_channels=(128, 64, 32, 16, 8)),
        "tensors of another shape: `decoder.blocks.0.conv1.0.weight` is (128, 768, 3, 3), not",
    ),
    "no norm": (
        lambda: real_unet(decoder_use_norm=False),
        "tensors that the default Unet has not: `decoder.blocks.0.conv1.0.bias`",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_unets_are_named(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build, text = REFUSED[kind]
    path, out = saved(tmp_path, build().state_dict()), tmp_path / "out"
    assert main(["import", str(path), "--out", str(out), *IMAGENET]) == 1
    said = capsys.readouterr().err
    assert text in said
    assert said.endswith("import its encoder with --part encoder.\n")
    assert said.count("\n") == 1
    assert not out.exists()
    assert read_foreign(path).projection == 0


def test_an_auxiliary_head_is_left_out_and_said(tmp_path: Path) -> None:
    path = saved(tmp_path, real_unet(aux_params={"classes": 4}).state_dict())
    found = read_foreign(path, part="")
    assert found.classes == 2
    assert "`classification_head` (2 tensors) left out" in found.notes


@pytest.mark.parametrize(
    "build", [smp.UnetPlusPlus, smp.FPN, smp.Linknet, smp.DeepLabV3Plus], ids=lambda b: b.__name__
)
def test_other_networks_are_encoders(build: Callable[..., nn.Module], tmp_path: Path) -> None:
    path = saved(tmp_path, build("resnet18", encoder_weights=None).state_dict())
    assert read_foreign(path, part="").classes == 0
    with pytest.raises(ExportFileError, match="holds no Unet of segmentation_models_pytorch"):
        read_foreign(path, part="unet")


@pytest.mark.parametrize("name", ["segmentation_head.0.bias", "decoder.blocks.2.conv2.0.weight"])
def test_incomplete_ones_are_refused(name: str, model: nn.Module, tmp_path: Path) -> None:
    state = model.state_dict()
    del state[name]
    with pytest.raises(ExportFileError, match=f"lacks 1 tensors of a Unet: `{name}`"):
        read_foreign(saved(tmp_path, state), part="")


def test_a_file_of_ours_that_lies_about_its_classes(imported: Path, tmp_path: Path) -> None:
    tensors, metadata = tensor_file.read(imported)
    path = tmp_path / "unet.safetensors"
    for wrong, said in (
        ({"classes": "3", "class_names": "null"}, "says that it has 3 classes, and has 2"),
        ({"classes": "3"}, "`class_names` are 2 for 3 classes"),
        ({"tile_px": "100"}, "`tile_px` is '100', not side of a training tile"),
        ({"arch": "resnet34"}, "says that it is a resnet34"),
    ):
        tensor_file.write(path, tensors, metadata | wrong)
        with pytest.raises(ExportFileError, match=said):
            read_foreign(path, part="")
        assert not verify(path).ok


def test_flags_that_do_not_fit(
    imported: Path, model: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert main(["import", str(imported), *out, "--class-names", "a", "b"]) == 1
    assert "leave --class-names out" in capsys.readouterr().err
    plain = saved(tmp_path, model.encoder.state_dict())
    assert main(["import", str(plain), *out, *IMAGENET, "--class-names", "a"]) == 2
    assert "an encoder, which has no classes" in capsys.readouterr().err
    assert main(["import", str(plain), *out, *IMAGENET, "--part", "unet"]) == 1
    assert "import it without --part unet" in capsys.readouterr().err
    with safe_open(imported, framework="numpy") as file:
        assert file.metadata()["source"]
    assert main(["import", str(imported), "--out", str(imported.parent)]) == 1
    assert "pass --force" in capsys.readouterr().err
