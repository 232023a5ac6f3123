"""What is no ResNet of ours, or not a whole one, is refused in a sentence that says so."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pytest
import timm
import torch
from foreign_states import State, assert_same, refusal, saved, under
from random_runs import Run, random_resnet, torchvision_resnet
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import densenet121, resnet, vision_transformer

from jaxhisto_export.errors import ExportFileError
from jaxhisto_export.foreign import read_foreign


@pytest.fixture(scope="module")
def state() -> State:
    """Of a headless resnet10 with random statistics."""
    return random_resnet("resnet10", seed=5).state_dict()


def changed(**tensors: Tensor | None) -> Callable[[State], State]:
    def change(state: State) -> State:
        merged = {**state, **{name.replace("__", "."): t for name, t in tensors.items()}}
        return {name: tensor for name, tensor in merged.items() if tensor is not None}

    return change


def without(part: str) -> Callable[[State], State]:
    return lambda state: {k: v for k, v in state.items() if part not in k}


def no_norms(state: State) -> State:
    """InstanceNorm2d has no tensors at all."""
    return {k: v for k, v in state.items() if v.ndim == 4}


REFUSED: dict[str, tuple[Callable[[State], Any], str]] = {
    "group norm": (lambda s: without("num_")(without("running_")(s)), "GroupNorm"),
    "instance norm": (no_norms, "InstanceNorm"),
    "one channel": (changed(conv1__weight=torch.zeros(64, 1, 7, 7)), "1 input channels"),
    "small stem": (changed(conv1__weight=torch.zeros(64, 3, 3, 3)), "(64, 3, 3, 3), not"),
    "deep stem": (
        lambda s: {"conv1.0.weight": torch.zeros(3), **without("conv1.weight")(s)},
        "deep stem",
    ),
    "missing": (changed(layer2__0__bn2__bias=None), "lacks 1 tensors of a resnet10: `layer2.0.bn2"),
    "extra": (changed(layer2__0__se__weight=torch.zeros(3)), "`layer2.0.se.weight`"),
    "mis-shaped": (changed(bn1__bias=torch.zeros(63)), "`bn1.bias` is (63,), not (64,)"),
    "not a number": (changed(bn1__bias=torch.full((64,), torch.nan)), "NaN or infinity in `bn1"),
    "infinite": (changed(bn1__bias=torch.full((64,), torch.inf)), "NaN or infinity in `bn1.bias`"),
    "too large": (changed(bn1__bias=torch.full((64,), 1e300, dtype=torch.float64)), "infinity"),
    "integers": (changed(bn1__bias=torch.zeros(64, dtype=torch.int64)), "as int64"),
    "complex": (changed(bn1__bias=torch.zeros(64, dtype=torch.complex64)), "as complex64"),
    "float8": (changed(bn1__bias=torch.zeros(64).to(torch.float8_e5m2)), "as float8_e5m2"),
    "half a count": (changed(bn1__num_batches_tracked=torch.tensor(0.5)), "not a count"),
    "negative count": (changed(bn1__num_batches_tracked=torch.tensor(-1)), "not a count"),
    "two networks": (lambda s: under("a.", s) | under("b.", s), "several ResNets, under `a.` and"),
    "module": (lambda s: torchvision_resnet("resnet10"), "torchvision.models.resnet.ResNet, save"),
    "module in a dict": (lambda s: {"model": torchvision_resnet("resnet10")}, "a pickled torch"),
    "no tensors": (lambda s: {"epoch": 3}, "holds no tensors"),
    "number": (lambda s: 3, "holds no tensors"),
    "other names": (lambda s: {"a\nb": torch.zeros(3)}, "but `a?b`"),
    "half a head": (
        lambda s: under("model.resnet.", {**s, "fc.1.weight": torch.zeros(512, 512)}),
        "projection head",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, state: State, name: str) -> None:
    change, said = REFUSED[name]
    assert said in refusal(saved(tmp_path, change(state)))


def empty(make: Callable[[], nn.Module]) -> State:
    """Names and shapes of a network, as float16 zeros, without waiting for its weights."""
    with torch.device("meta"):
        state = make().state_dict()
    return {name: torch.zeros(tensor.shape, dtype=torch.float16) for name, tensor in state.items()}


OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "resnet152": (resnet.resnet152, "(3, 8, 36, 3) blocks"),
    "resnext50": (resnet.resnext50_32x4d, "a ResNeXt"),
    "wide": (resnet.wide_resnet50_2, "a wide ResNet"),
    "densenet": (densenet121, "a DenseNet"),
    "vit": (
        lambda: vision_transformer.VisionTransformer(32, 16, 2, 2, 64, 64),
        "a transformer",
    ),
    "timm vit": (lambda: timm.create_model("vit_tiny_patch16_224"), "a transformer"),
    "timm swin": (lambda: timm.create_model("swin_tiny_patch4_window7_224"), "a transformer"),
    "timm resnet18d": (lambda: timm.create_model("resnet18d"), "a deep stem"),
    "timm v2": (lambda: timm.create_model("resnetv2_50x1_bit"), "ResNet v2"),
    "timm seresnet": (lambda: timm.create_model("legacy_seresnet18"), "squeeze"),
    "timm efficientnet": (lambda: timm.create_model("efficientnet_b0"), "an EfficientNet"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_are_refused_by_name(tmp_path: Path, name: str) -> None:
    make, said = OTHERS[name]
    assert said in refusal(saved(tmp_path, {"state_dict": under("module.", empty(make))}))


def test_another_depth_than_asked_for(tmp_path: Path, state: State) -> None:
    path = saved(tmp_path, state)
    assert "is a resnet10, not the resnet50 asked for" in refusal(path, "resnet50")
    assert "give one of resnet10, resnet18" in refusal(path, "vit")


def test_no_such_file_and_folders(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "absent.pth")
    assert "holds no model.safetensors" in refusal(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"no")
    assert "not a safetensors file" in refusal(tmp_path / "a.safetensors")
    (tmp_path / "b.onnx").write_bytes(b"\x08\x08" + bytes(30))
    assert "ONNX" in refusal(tmp_path / "b.onnx")


def test_metadata_that_contains_itself_is_refused(tmp_path: Path, run10: Run) -> None:
    endless: dict[str, Any] = {}
    endless["config"] = endless
    wide: list[Any] = [1]
    for _ in range(100):
        wide = [wide] * 10
    for config in (endless, wide):
        content = {"state_dict": run10.tensors, "format": "jaxhisto-published-1", "config": config}
        start = time.process_time()
        assert "metadata" in refusal(saved(tmp_path, content))
        assert time.process_time() - start < 2


def test_attacks_beside_good_weights_do_nothing(tmp_path: Path, state: State) -> None:
    marker = tmp_path / "marker"
    content = {"state_dict": state, "hyper_parameters": hostile.calls(marker)}
    assert_same(read_foreign(saved(tmp_path, content)), state)
    assert not marker.exists()


@pytest.mark.parametrize("name", [*hostile.bombs(), *hostile.tensor_bombs()])
def test_bombs_are_refused(tmp_path: Path, name: str) -> None:
    program = (hostile.bombs() | hostile.tensor_bombs())[name]
    path = tmp_path / "file.pth"
    path.write_bytes(hostile.zip_of(program, {"data/0": bytes(16)}))
    start = time.process_time()
    refusal(path)
    assert time.process_time() - start < 2


@pytest.mark.parametrize("form", ["checkpoint", "safetensors", "legacy"])
def test_fuzzed(tmp_path: Path, state: State, form: str) -> None:
    """Flips, cuts and zeroed runs of a good file: read as it was, refused, or, where the format
    has no checksum, read with the same names, shapes and types."""
    path = tmp_path / "file"
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "checkpoint")
    whole, random = path.read_bytes(), np.random.default_rng(0)
    ends = len(whole) if form == "checkpoint" else 8000  # where anything but weights is
    refused = sentences = 0
    for number in range(60):
        at = int(random.integers(ends)) if number % 3 else len(whole) - int(random.integers(4000))
        with path.open("r+b") as file:
            if number % 10 == 0:
                file.truncate(at)
            else:
                file.seek(at)
                file.write(
                    bytes([whole[at] ^ 1 << int(random.integers(8))]) if number % 2 else b"\0" * 9
                )
        start = time.process_time()
        try:
            found = read_foreign(path)
        except ExportFileError as error:
            refused += len(str(error).splitlines())  # 1
            sentences += 1
        else:
            assert list(found.tensors) == list(state)
            for name, tensor in state.items():
                array = found.tensors[name]
                assert (array.shape, array.dtype.name) == (
                    tuple(tensor.shape),
                    str(tensor.dtype)[6:],
                )
                if form == "checkpoint":
                    np.testing.assert_array_equal(array, tensor.numpy())
        assert time.process_time() - start < 2
        path.write_bytes(whole)
    assert refused == sentences > 5
