"""Layout onnx, checked by the real onnx and run by the real onnxruntime."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loaders
import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnxruntime
import pytest
import torch
from random_runs import WIDTHS, Run, features_of, make_run, torchvision_resnet
from safetensors.torch import load_file

from jaxhisto_export import load_encoder
from jaxhisto_export.errors import ExportFileError
from jaxhisto_export.layouts import convert
from jaxhisto_export.onnx_graph import read_onnx
from jaxhisto_export.verify import VerifyResult, verify

RIGHT = 1e-5  # of the largest feature


@pytest.fixture
def good(run10: Run, tmp_path: Path) -> Path:
    """A good file, to be spoilt."""
    return run10.export("onnx", tmp_path / "encoder.onnx")


def _run(path: Path, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(["features"], {session.get_inputs()[0].name: x})[0]


def _away(features: np.ndarray, truth: torch.Tensor) -> float:
    """Largest difference as a share of the largest feature."""
    return float(np.abs(features - truth.numpy()).max() / truth.abs().max())


def _normalised(tiles: np.ndarray) -> np.ndarray:
    return ((tiles.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.5).astype(np.float32)


def test_the_table_is_what_happens(files: Path, run18: Run) -> None:
    measured = {
        layout: loaders.outcome(loaders.runtime, files / name, run18)
        for layout, name in loaders.LAYOUTS.items()
    }
    assert measured == loaders.table()[22]


def test_features_are_torchvisions(files: Path, run18: Run) -> None:
    features = _run(files / "encoder.onnx", _normalised(run18.tiles))
    assert features.shape == (8, 512)
    assert _away(features, run18.features) < RIGHT


@pytest.mark.parametrize(("n", "height", "width"), [(1, 48, 48), (3, 33, 71), (2, 224, 160)])
def test_batch_height_and_width_are_free(n: int, height: int, width: int, run10: Run) -> None:
    path = run10.encoder.with_name(f"{n}.onnx")
    convert(run10.encoder, "onnx", path)
    tiles = np.random.default_rng(n).integers(0, 256, (n, height, width, 3), dtype=np.uint8)
    truth = features_of(load_encoder(run10.encoder).resnet, tiles)
    assert _away(_run(path, _normalised(tiles)), truth) < RIGHT


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("name", ["resnet10", "resnet50"])
def test_onnx_itself_accepts_the_graph(name: str, normalise: bool, tmp_path: Path) -> None:
    """Its checker with shape inference, which also proves the types."""
    run = make_run(tmp_path / "run", name)
    path = tmp_path / "encoder.onnx"
    convert(run.encoder, "onnx", path, normalise=normalise)
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path)
    assert (model.opset_import[0].version, model.ir_version) == (17, 8)
    dims = [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert dims == (["n", "height", "width", 3] if normalise else ["n", 3, "height", "width"])
    out = [d.dim_param or d.dim_value for d in model.graph.output[0].type.tensor_type.shape.dim]
    assert out == ["n", WIDTHS[name]]


def test_bytes_are_those_that_protobuf_would_write(good: Path) -> None:
    """The framing by hand loses and adds nothing: read and written again it is as long."""
    model = onnx.load(good)
    assert len(model.SerializeToString()) == good.stat().st_size


FEEDINGS: dict[str, dict[str, str]] = {
    "ours": {},
    "ImageNet": {"mean": "[0.485, 0.456, 0.406]", "std": "[0.229, 0.224, 0.225]"},
    "another range": {"value_range": "[-1.0, 1.0]", "mean": "[0.1, 0.0, 0.2]"},
    "bytes": {"value_range": "[0.0, 255.0]", "mean": "[128, 120, 110]", "std": "[60, 61, 62]"},
    "BGR": {"channel_order": "BGR", "mean": "[0.1, 0.2, 0.3]"},
}


@pytest.mark.parametrize("feeding", FEEDINGS)
def test_normalisation_inside_the_graph(feeding: str, tmp_path: Path) -> None:
    """Raw tiles in, and out comes what torchvision gives for tiles normalised in float64."""
    run = make_run(tmp_path / "run", "resnet10", seed=4, **FEEDINGS[feeding])
    path = tmp_path / "encoder.onnx"
    convert(run.encoder, "onnx", path, normalise=True)
    encoder = load_encoder(run.encoder)
    low, high = encoder.provenance["value_range"]
    tiles = run.tiles[..., ::-1] if feeding == "BGR" else run.tiles
    mean, std = encoder.provenance["mean"], encoder.provenance["std"]
    x = ((tiles / 255 * (high - low) + low - mean) / std).transpose(0, 3, 1, 2)
    network = torchvision_resnet("resnet10")
    network.load_state_dict({k: v for k, v in run.tensors.items() if not k.startswith("fc.")})
    with torch.inference_mode():
        truth = network.double()(torch.from_numpy(x.copy())).float()
    assert _away(_run(path, run.tiles), truth) < RIGHT


def test_weights_and_counters_come_back_bit_by_bit(files: Path, run18: Run) -> None:
    tensors, metadata = read_onnx(files / "encoder.onnx")
    backbone = {k: v for k, v in run18.tensors.items() if not k.startswith("fc.")}
    assert tensors.keys() == backbone.keys()
    for name, tensor in backbone.items():
        assert tensors[name].tobytes() == tensor.numpy().tobytes()
        assert tensors[name].dtype == tensor.numpy().dtype
        assert tensors[name].shape == tuple(tensor.shape)
    assert metadata["arch"] == "resnet18"
    assert metadata["mean"] == "[0.5, 0.5, 0.5]"
    assert "num_batches_tracked" not in metadata


def test_onnxruntime_has_nothing_to_say(good: Path) -> None:
    """No warning of an initialiser that no node uses, or of anything else."""
    code = (
        "import sys, onnxruntime as o\n"
        "options = o.SessionOptions(); options.log_severity_level = 1\n"
        "o.InferenceSession(sys.argv[1], options, providers=['CPUExecutionProvider'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, good], capture_output=True, text=True, check=True
    )
    assert "[W:" not in done.stderr
    assert "[E:" not in done.stderr


def test_same_encoder_same_bytes(good: Path, run10: Run, tmp_path: Path) -> None:
    again = run10.export("onnx", tmp_path / "again.onnx")
    assert again.read_bytes() == good.read_bytes()


@pytest.mark.parametrize("normalise", [False, True])
def test_verified_by_onnxruntime_too(normalise: bool, run10: Run, tmp_path: Path) -> None:
    path = tmp_path / "encoder.onnx"
    convert(run10.encoder, "onnx", path, run10.golden, normalise=normalise)
    result = verify(path)
    assert result.problems == []
    (line,) = [line for line in result.lines if "by onnxruntime" in line]
    assert float(line.split("difference ")[1].split()[0]) < RIGHT


def test_a_headless_encoder_is_enough(run10: Run, tmp_path: Path) -> None:
    from random_runs import encoder_metadata
    from safetensors.torch import save_file

    tensors = {k: v for k, v in load_file(run10.encoder).items() if not k.startswith("fc.")}
    path = tmp_path / "encoder.safetensors"
    save_file(tensors, path, encoder_metadata("resnet10", projection_width="0"))
    convert(path, "onnx", tmp_path / "encoder.onnx")
    read, _ = read_onnx(tmp_path / "encoder.onnx")
    assert read.keys() == tensors.keys()


def _spoil(path: Path, change: Callable[[Any], Any]) -> VerifyResult:
    model = onnx.load(path)
    change(model)
    path.write_bytes(model.SerializeToString())
    return verify(path)


def _skip_a_relu(model: Any) -> None:
    node = next(n for n in model.graph.node if n.name == "layer4.0.relu1")
    node.op_type = "Identity"


def _other_epsilon(model: Any) -> None:
    node = next(n for n in model.graph.node if n.name == "layer4.0.bn1.out")
    node.attribute[0].f = 1e-3


def _change_a_weight(model: Any) -> None:
    weight = next(t for t in model.graph.initializer if t.name == "layer4.0.conv1.weight")
    weight.raw_data = (onnx.numpy_helper.to_array(weight) * 1.1).astype("<f4").tobytes()


def _drop_a_weight(model: Any) -> None:
    del model.graph.initializer[3]


def _change_a_counter(model: Any) -> None:
    entry = next(e for e in model.metadata_props if e.key == "num_batches_tracked")
    entry.value = entry.value.replace("120", "121", 1)


def _drop_a_field(model: Any) -> None:
    index = [e.key for e in model.metadata_props].index("mpp_range")
    del model.metadata_props[index]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_skip_a_relu, "the graph is not the one that was exported"),
        (_skip_a_relu, "golden features differ"),
        (_other_epsilon, "the graph is not the one that was exported"),
        (_change_a_weight, "SHA-256 differs"),
        (_change_a_weight, "golden features differ"),
        (_drop_a_weight, "1 of 72 keys missing"),
        (_change_a_counter, "SHA-256 differs"),
        (_drop_a_field, "metadata lacks `mpp_range`"),
    ],
)
def test_planted_faults(change: Callable[[Any], Any], message: str, good: Path) -> None:
    result = _spoil(good, change)
    assert any(message in problem for problem in result.problems)
    assert all("\n" not in problem for problem in result.problems)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_truncated(share: float, good: Path) -> None:
    whole = good.read_bytes()
    good.write_bytes(whole[: int(share * len(whole))])
    (problem,) = verify(good).problems
    assert str(good) in problem
    assert "\n" not in problem


@pytest.mark.parametrize("seed", range(20))
def test_damaged_bytes_are_a_sentence_or_a_problem(seed: int, good: Path) -> None:
    content = bytearray(good.read_bytes())
    random = np.random.default_rng(seed)
    # Half of them in the structure, where a bit has most to say.
    edge = 4000 if seed % 2 else len(content)
    for at in random.integers(0, edge, 5):
        content[at] ^= 1 << int(random.integers(8))
    good.write_bytes(content)
    result = verify(good)
    assert result.problems
    assert all("\n" not in problem for problem in result.problems)


def _outside(tensor: Any) -> None:
    tensor.data_location = tensor.EXTERNAL
    tensor.ClearField("raw_data")
    for key, value in (("location", "/etc/passwd"), ("length", "64")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: _outside(m.graph.initializer[0]), "keeps weights in another file"),
        (lambda m: m.graph.ClearField("node"), "holds no graph"),
        (lambda m: m.graph.initializer[0].dims.append(1 << 40), "not a whole ONNX file"),
        (lambda m: setattr(m.metadata_props[-1], "value", "["), "not a whole ONNX file"),
        (lambda m: setattr(m.metadata_props[-1], "value", '{"a": "b"}'), "not a whole ONNX file"),
        (lambda m: setattr(m.metadata_props[-1], "value", "3"), "not a whole ONNX file"),
        (lambda m: setattr(m.metadata_props[-1], "value", '{"a": 1e400}'), "not a whole ONNX"),
    ],
)
def test_hostile_files_are_refused(change: Callable[[Any], Any], message: str, good: Path) -> None:
    model = onnx.load(good)
    change(model)
    good.write_bytes(model.SerializeToString())
    with pytest.raises(ExportFileError, match=message) as failure:
        read_onnx(good)
    assert str(failure.value).startswith(str(good))
    assert "\n" not in str(failure.value)


@pytest.mark.slow
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("name", sorted(WIDTHS))
def test_every_depth(name: str, normalise: bool, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", name, seed=11)
    path = tmp_path / "encoder.onnx"
    convert(run.encoder, "onnx", path, run.golden, normalise=normalise)
    x = run.tiles if normalise else _normalised(run.tiles)
    assert _away(_run(path, x), run.features) < RIGHT
    assert verify(path).problems == []
