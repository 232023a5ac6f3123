"""A trained UNet in segmentation_models_pytorch: the same network, and faults that do not pass."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import segmentation_models_pytorch as smp
import torch
from safetensors import safe_open

from jaxhisto import unet_weights
from jaxhisto.cli import main
from jaxhisto.golden import golden_tiles
from jaxhisto.models import unet
from jaxhisto_export.__main__ import main as export_main
from jaxhisto_export.architecture import ARCHITECTURES
from jaxhisto_export.verify import VerifyResult, verify

NAMES = ["background", "nucleus", "stroma"]
pytestmark = pytest.mark.slow  # a UNet is trained for it

MEAN, STD = (0.7, 0.5, 0.6), (0.2, 0.25, 0.22)
GOLDEN = ".golden.safetensors"


def tiles_and_masks(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Synthetic H&E (8, side, side, 3) uint8, and what is violet (1) and pink (2) in it."""
    tiles = golden_tiles(side)
    red, green, _ = (tiles[..., i].astype(int) for i in range(3))
    return tiles, np.where(red < 150, 1, np.where(green < 170, 2, 0)).astype(np.int32)


def trained(arch: str, side: int, steps: int, seed: int = 0) -> tuple[dict, dict, list[float]]:
    """(params, batch_stats, losses) after a few steps of Adam on whole masks."""
    tiles, masks = tiles_and_masks(side)
    images = (tiles.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    graphdef, _, _ = unet.structure(arch, len(NAMES))
    params, stats = unet.init(arch, len(NAMES), seed)
    tx = optax.adam(3e-3)

    @jax.jit
    def step(params: dict, stats: dict, memory: Any) -> tuple:
        def loss_of(params: dict) -> tuple[jax.Array, dict]:
            logits, new = unet.apply(graphdef, params, stats, jnp.asarray(images), train=True)
            wanted = jax.nn.one_hot(masks, len(NAMES))
            return optax.softmax_cross_entropy(logits, wanted).mean(), new

        (loss, new), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        with jax.numpy_dtype_promotion("standard"):  # optax's Adam
            updates, memory = tx.update(grads, memory, params)
        return optax.apply_updates(params, updates), new, memory, loss

    memory, losses = tx.init(params), []
    for _ in range(steps):
        params, stats, memory, loss = step(params, stats, memory)
        losses.append(float(loss))
    # The statistics as they stand after many more passes over the same batch.
    _, tenth = jax.jit(lambda p, s: unet.apply(graphdef, p, s, jnp.asarray(images), train=True))(
        params, jax.tree.map(jnp.zeros_like, stats)
    )
    return jax.device_get(params), jax.tree.map(lambda x: np.asarray(10 * x), tenth), losses


@dataclass(frozen=True)
class Trained:
    """unet.safetensors in a folder of its own, and the tree it was made of."""

    file: Path
    params: dict
    stats: dict

    @property
    def golden(self) -> Path:
        return self.file.with_name(self.file.name + GOLDEN)


def write(folder: Path, arch: str, params: dict, stats: dict, **changes: Any) -> Trained:
    about = {"mean": MEAN, "std": STD, "tile_px": 64, "mpp_range": (0.5, 0.5), "stains": ["H&E"]}
    about |= {"data_hash": "sha256:0", "step": 6, "config": '{"rate": 0.003}', "licence": "CC0-1.0"}
    metadata = unet_weights.describe(arch, len(NAMES), NAMES, **{**about, **changes})
    folder.mkdir(parents=True, exist_ok=True)
    made = Trained(folder / "unet.safetensors", params, stats)
    digest = unet_weights.write_unet(made.file, params, stats, metadata)
    assert digest == hashlib.sha256(made.file.read_bytes()).hexdigest()
    unet_weights.write_golden(made.golden, params, stats, metadata, digest)
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A UNet of a resnet18, trained for six steps; read only."""
    params, stats, losses = trained("resnet18", side=64, steps=6)
    assert losses[-1] < 0.8 * losses[0]
    return write(tmp_path_factory.mktemp("unet"), "resnet18", params, stats)


@pytest.fixture(scope="module")
def exported(made: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its file in layout smp, by the command line; read only."""
    out = tmp_path_factory.mktemp("smp") / "unet.pth"
    assert main(["export", str(made.file), "--layout", "smp", "--out", str(out)]) == 0
    return out


@pytest.fixture
def good(exported: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    return shutil.copytree(exported.parent, tmp_path / "copy") / exported.name


def loaded(path: Path, arch: str = "resnet18") -> torch.nn.Module:
    network = smp.Unet(arch, encoder_weights=None, classes=len(NAMES))
    network.load_state_dict(torch.load(path, weights_only=True), strict=True)
    return network.eval()


def logits_there(network: torch.nn.Module, tiles: np.ndarray) -> np.ndarray:
    x = torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (MEAN, STD))
    with torch.inference_mode():
        return network((x - mean) / std).numpy()


def logits_here(made: Trained, arch: str, tiles: np.ndarray) -> np.ndarray:
    images = (tiles.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    graphdef, _, _ = unet.structure(arch, len(NAMES))
    run = jax.jit(lambda p, s, x: unet.apply(graphdef, p, s, x, train=False)[0])
    return np.asarray(run(made.params, made.stats, images)).transpose(0, 3, 1, 2)


def says(result: VerifyResult, text: str) -> bool:
    assert not result.ok
    assert all("\n" not in problem for problem in result.problems)
    return any(text in problem for problem in result.problems)


def test_smp_takes_it_strictly_and_gives_the_same_logits(made: Trained, exported: Path) -> None:
    tiles, masks = tiles_and_masks(64)
    theirs, ours = logits_there(loaded(exported), tiles), logits_here(made, "resnet18", tiles)
    assert np.abs(theirs).max() > 0.5
    difference = np.abs(ours - theirs).max()
    print("logits up to", np.abs(theirs).max(), "largest difference", difference)
    assert difference < 1e-4
    assert theirs.shape == (8, len(NAMES), *masks.shape[1:])


def test_what_the_file_says(made: Trained, exported: Path) -> None:
    state = torch.load(exported, weights_only=True)
    said = state._metadata["jaxhisto"]
    assert said == json.loads(exported.with_name("unet.pth.json").read_text())
    assert said["format"] == "jaxhisto-smp-unet-1"
    assert (said["architecture"], said["arch"]) == ("unet", "resnet18")
    assert (said["classes"], said["class_names"]) == (3, NAMES)
    assert (tuple(said["mean"]), tuple(said["std"])) == (MEAN, STD)
    assert (said["tile_px"], said["mpp_range"], said["step"]) == (64, [0.5, 0.5], 6)
    assert (said["config"], said["licence"]) == ({"rate": 0.003}, "CC0-1.0")
    assert said["unet_sha256"] == hashlib.sha256(made.file.read_bytes()).hexdigest()
    assert list(state) == list(smp.Unet("resnet18", encoder_weights=None).state_dict())


def test_verify_passes_and_says_what_it_did(
    made: Trained, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, fields in ((exported, 20), (made.file, 18)):
        assert main(["verify", str(path)]) == 0
        assert export_main(["verify", str(path)]) == 0
        out = capsys.readouterr().out
        assert "keys: 182 of 182 expected, 0 others" in out
        assert f"metadata: {fields} of {fields} fields; classes 3, class_names ['back" in out
        assert "strict load: 182 of 182 tensors matched in the Unet of resnet18 of segm" in out
        assert "golden logits: 8 tiles of 64 px, largest difference" in out
        assert "of the largest logit" in out
        assert "decoder looks random" not in out


def test_convert_by_itself_gives_the_same_file(
    made: Trained, exported: Path, tmp_path: Path
) -> None:
    out = tmp_path / "unet.pth"
    assert export_main(["convert", str(made.file), "--layout", "smp", "--out", str(out)]) == 0
    for name in ("unet.pth", "unet.pth.json", "unet.pth" + GOLDEN):
        assert (tmp_path / name).read_bytes() == exported.with_name(name).read_bytes()


def test_a_folder_with_a_unet_is_enough(made: Trained, exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "unet.pth"
    assert main(["export", str(made.file.parent), "--layout", "smp", "--out", str(out)]) == 0
    assert out.read_bytes() == exported.read_bytes()


@pytest.mark.parametrize("layout", ["published", "torchvision", "dsmil", "timm", "onnx"])
def test_other_layouts_are_refused(
    layout: str, made: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / ("out.onnx" if layout == "onnx" else "out")
    assert main(["export", str(made.file), "--layout", layout, "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert said.endswith(f"is a UNet, which layout {layout} has no place for, take layout smp.\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [["--bundle"], ["--card", "--layout", "smp", "--out"]])
def test_no_bundle_and_no_card(
    flags: list[str], made: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(made.file), *flags, str(tmp_path / "out")]) == 1
    assert "is of layout unet, give RUN/encoder.safetensors" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def without(name: str) -> Callable[[Any], None]:
    return lambda state: state.pop(name)


def put(name: str, tensor: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
    def change(state: Any) -> None:
        state[name] = tensor(state[name])

    return change


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[0] = torch.nan
    return tensor


def no_metadata(state: Any) -> None:
    del state._metadata["jaxhisto"]


def four_classes(state: Any) -> None:
    state._metadata["jaxhisto"]["classes"] = 4


def reordered(state: Any) -> None:
    state.move_to_end("encoder.conv1.weight")


BIAS = "segmentation_head.0.bias"
FAULTS: dict[str, tuple[Callable[[Any], None], str]] = {
    "missing": (without(BIAS), f"1 of 182 keys missing: `{BIAS}`"),
    "headless": (without("segmentation_head.0.weight"), "1 of 182 keys missing"),
    "no counter": (without("decoder.blocks.4.conv2.1.num_batches_tracked"), "keys missing"),
    "encoder": (without("encoder.layer3.1.bn2.running_var"), "keys missing: `encoder.layer3.1"),
    "shape": (put(BIAS, lambda t: t[:2]), f"`{BIAS}` has shape (2,), not (3,)"),
    "type": (put(BIAS, lambda t: t.half()), f"`{BIAS}` is torch.float16"),
    "NaN": (put("decoder.blocks.2.conv1.0.weight", with_nan), "blocks.2.conv1.0.weight` holds NaN"),
    "changed": (put(BIAS, lambda t: t + 0.01), "golden logits differ by"),
    "a little": (put(BIAS, lambda t: t + 1e-7), "a tensor was changed since the export"),
    "silent": (no_metadata, "no metadata"),
    "classes": (four_classes, "`segmentation_head.0.weight` has shape (3, 16, 3, 3), not (4, 16"),
    "order": (reordered, "the keys are not in smp's order, from `encoder.bn1.weight` on"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_fail(fault: str, good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, text = FAULTS[fault]
    state = torch.load(good, weights_only=True)
    change(state)
    torch.save(state, good)
    assert says(verify(good), text)
    assert main(["verify", str(good)]) == 1
    assert text in capsys.readouterr().err


def test_a_truncated_file_fails(good: Path) -> None:
    good.write_bytes(good.read_bytes()[:-1000])
    assert says(verify(good), "not a whole PyTorch checkpoint")


def test_golden_logits_of_others_and_none(good: Path, made: Trained) -> None:
    golden = good.with_name(good.name + GOLDEN)
    with safe_open(golden, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in ("tiles", "logits")}
    unet_weights.tensor_file.write(golden, tensors, {"unet_sha256": "0" * 64})
    assert says(verify(good), "holds the golden logits of other weights")
    golden.unlink()
    assert says(verify(good), "so logits were not compared")


def test_without_smp_the_rest_is_checked(
    good: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    assert export_main(["verify", str(good)]) == 0
    out = capsys.readouterr().out
    assert "not installed (pip install segmentation-models-pytorch)" in out
    assert "golden logits: not compared" in out
    state = torch.load(good, weights_only=True)
    put(BIAS, lambda t: t + 1e-7)(state)
    torch.save(state, good)
    assert says(verify(good), "a tensor was changed")


def test_a_golden_file_of_another_unet_is_refused(made: Trained, tmp_path: Path) -> None:
    other = write(tmp_path / "other", "resnet18", made.params, made.stats, step=7)
    asked = ["convert", str(made.file), "--layout", "smp", "--out", str(tmp_path / "out.pth")]
    assert export_main([*asked, "--golden", str(other.golden)]) == 1
    assert not (tmp_path / "out.pth").exists()


def test_reads_back_what_it_wrote(made: Trained) -> None:
    params, stats, metadata = unet_weights.read_unet(made.file)
    assert jax.tree.all(jax.tree.map(np.array_equal, (params, stats), (made.params, made.stats)))
    assert metadata["format"] == "jaxhisto-unet-1"


@pytest.mark.parametrize(
    ("arch", "classes"), [("resnet18", 1), ("resnet34", 2), ("resnet50", 5), ("resnet101", 1)]
)
def test_names_and_shapes_are_smps(arch: str, classes: int) -> None:
    with torch.device("meta"):
        theirs = smp.Unet(arch, encoder_weights=None, classes=classes).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    listed = ARCHITECTURES[arch].unet(classes)
    assert list(listed.items()) == list(shapes.items())
    table = unet_weights.table(arch, classes)
    counters = {name for name in shapes if name.endswith("num_batches_tracked")}
    assert {n: e.torch_shape for n, e in table.items()} == {
        n: s for n, s in shapes.items() if n not in counters
    }


def as_in_trained(path: tuple, leaf: np.ndarray) -> np.ndarray:
    """BatchNorm's numbers of a size that keeps an untrained ResNet101 well-conditioned.

    With the statistics of a batch of eight, PyTorch's own float32 is 1.2e-4 from its float64;
    with scales this small in the decoder too, nothing of the image would reach the logits.
    """
    rng = np.random.default_rng(leaf.size)
    scale = (0.2, 0.6) if path[0].key == "encoder" else (0.9, 1.3)
    span = {"scale": scale, "mean": (-0.1, 0.1), "var": (0.8, 1.2)}.get(path[-1].key)
    return leaf if span is None else rng.uniform(*span, leaf.shape).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet34", "resnet50", "resnet101"])
def test_every_depth(arch: str, tmp_path: Path) -> None:
    params, stats = (
        jax.tree.map_with_path(as_in_trained, tree) for tree in unet.init(arch, len(NAMES), seed=0)
    )
    made = write(tmp_path, arch, params, stats, tile_px=32)
    out = tmp_path / "unet.pth"
    assert main(["export", str(made.file), "--layout", "smp", "--out", str(out)]) == 0
    result = verify(out)
    assert result.problems == []
    tiles = golden_tiles(64)
    theirs, ours = logits_there(loaded(out, arch), tiles), logits_here(made, arch, tiles)
    assert theirs.std(axis=(0, 2, 3)).min() > 0.05 * np.abs(theirs).max()
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()
