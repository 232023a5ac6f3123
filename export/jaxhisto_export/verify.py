"""Check an exported file: keys, values, a strict load, golden features, metadata.

Whatever is wrong is listed at once; nothing is repaired and nothing is guessed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from jaxhisto_export.errors import ExportFileError
from jaxhisto_export.onnx_graph import graph_problems, run_graph
from jaxhisto_export.provenance import ENCODER_FIELDS, EXPORT_FIELDS, problems
from jaxhisto_export.timm_folder import config_problems
from jaxhisto_export.torch_resnet import Encoder, empty_resnet
from jaxhisto_export.weights_file import (
    FLAT,
    WeightsFile,
    expected_shapes,
    file_sha256,
    read_safetensors,
    read_weights,
    sidecar_beside,
    tensor_problems,
    tensors_sha256,
)

# Largest difference of a feature, as a share of the largest golden feature: a share, because
# features of another scale round at that scale. JAX and torch differ by less than 1e-6 (they
# sum in another order), which leaves room for other processors; mean and std of ImageNet
# instead of 0.5, the least of the usual mistakes, moves features by more than 1e-2.
TOLERANCE = 1e-4

# L2 norms of conv1.weight. The first is as reported, not measured here.
CONV1_PUBLISHED = 29.24
CONV1_IMAGENET = 12.58
# He initialisation, fan-out: 9408 weights of variance 2 / (64 * 49). Its norm scatters by
# 0.018, and 3 percent is four times that.
CONV1_RANDOM = 2.449
CONV1_RANDOM_WITHIN = 0.03


@dataclass
class VerifyResult:
    """What was checked, and what is wrong."""

    path: Path
    lines: list[str] = field(default_factory=list)
    """One line a check, for a person."""
    problems: list[str] = field(default_factory=list)
    """One sentence each; empty if the file is what it says it is."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(path: str | Path, against: str | Path | None = None) -> VerifyResult:
    """Checks a file or folder in any layout, or an encoder.safetensors.

    Golden tiles are looked for as FILE.golden.safetensors, then as golden.safetensors in the
    same folder. Never raises for what is in the file: see `problems`.

    Args:
      path: what to check.
      against: another file, of any layout, that should hold the same weights bit for bit.
    """
    result = VerifyResult(Path(path))
    try:
        file = read_weights(result.path)
    except ExportFileError as error:
        result.problems.append(str(error))
        return result
    result.lines.append(
        f"file: {file.path}, {file.path.stat().st_size / 1e6:.1f} MB, layout {file.layout}, "
        f"{file.architecture.name}, step {file.provenance.get('step', 'not stated')}"
    )
    _check_tensors(file, result)
    _check_metadata(file, result)
    encoder = _check_load(file, result)
    _check_golden(file, encoder, result)
    _check_conv1(file, result)
    if against is not None:
        from jaxhisto_export.against import compare  # which imports this module

        compare(file.path, Path(against), result)
    return result


def _check_tensors(file: WeightsFile, result: VerifyResult) -> None:
    expected = expected_shapes(file)
    matched = len(expected.keys() & file.tensors.keys())
    result.lines.append(
        f"keys: {matched} of {len(expected)} expected, {len(file.tensors) - matched} others"
    )
    result.problems += tensor_problems(file)
    if file.layout == "encoder":  # nobody recorded a hash
        return
    recorded = file.provenance.get("tensors_sha256")
    same = recorded == tensors_sha256(file.tensors)
    result.lines.append(f"SHA-256 of the tensors: {'as recorded' if same else 'not as recorded'}")
    if recorded is not None and not same:
        result.problems.append("a tensor was changed since the export: their SHA-256 differs")


def _check_metadata(file: WeightsFile, result: VerifyResult) -> None:
    rules = ENCODER_FIELDS if file.layout == "encoder" else EXPORT_FIELDS
    wrong = problems(file.provenance, rules)
    about = ("mean", "std", "value_range", "channel_order", "tile_px", "mpp_range", "stains")
    said = ", ".join(f"{name} {file.provenance.get(name, 'not stated')}" for name in about)
    result.lines.append(f"metadata: {len(rules) - len(wrong)} of {len(rules)} fields; {said}")
    if not file.provenance:
        wrong = ["no metadata: how to feed this file is not stated"]
    result.problems += wrong
    if file.layout in FLAT:
        _check_sidecar(file, result)
    if wrong or file.layout not in ("timm", "onnx"):
        return
    if file.layout == "timm":
        result.problems += config_problems(file.path.parent, file.provenance)
    else:
        result.problems += graph_problems(file.path, file.architecture, file.provenance)


def _check_sidecar(file: WeightsFile, result: VerifyResult) -> None:
    path = sidecar_beside(file.path)
    if not path.is_file():
        result.lines.append(f"note: {path.name} is not there; the file carries the same metadata")
        return
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        result.problems.append(f"{path.name} cannot be read as JSON")
        return
    if said != file.provenance:
        result.problems.append(f"{path.name} contradicts the metadata in the file")


def _check_load(file: WeightsFile, result: VerifyResult) -> Encoder | None:
    """The network with these weights, if they load strictly."""
    network, which = empty_resnet(file.architecture)
    backbone, wanted = file.backbone(), network.state_dict()
    matched = [
        name
        for name, tensor in wanted.items()
        if name in backbone and backbone[name].shape == tensor.shape
    ]
    result.lines.append(
        f"strict load: {len(matched)} of {len(wanted)} tensors matched in "
        f"{file.architecture.name} of {which}"
    )
    try:
        network.load_state_dict(backbone, strict=True)
    except RuntimeError:  # torch lists every key over a screen; `tensor_problems` has them
        result.problems.append(
            f"does not load strictly: {len(matched)} of {len(wanted)} tensors match"
        )
        return None
    if any(problems(file.provenance, {k: ENCODER_FIELDS[k]}) for k in Encoder.NEEDS):
        return None
    return Encoder(network, file.provenance).eval()


def _check_golden(file: WeightsFile, encoder: Encoder | None, result: VerifyResult) -> None:
    path = file.golden_path
    try:
        tiles, features, metadata = _read_golden(path)
    except ExportFileError as error:
        result.problems.append(str(error))
        return
    own = file_sha256(file.path) if file.layout == "encoder" else None
    if metadata.get("encoder_sha256") != file.provenance.get("encoder_sha256", own):
        result.problems.append(f"{path.name} holds the golden features of other weights")
    if encoder is None:
        result.lines.append("golden features: not compared, the weights do not load")
        return
    with torch.inference_mode():
        image = encoder.preprocess(tiles)
        ours = encoder(image)
    which = f"{len(tiles)} tiles of {tiles.shape[1]} px"
    _compare(ours, features, which, result)
    if file.layout == "onnx":
        _compare_graph(file, image, tiles, features, which, result)


def _compare_graph(
    file: WeightsFile,
    image: Tensor,
    tiles: Tensor,
    features: Tensor,
    which: str,
    result: VerifyResult,
) -> None:
    """The same comparison with the graph itself, where onnxruntime is installed."""
    try:
        ours = run_graph(file.path, image.numpy(), tiles.numpy())
    except ModuleNotFoundError:
        result.lines.append(
            "note: the graph was not run, onnxruntime is not installed (pip install onnxruntime)"
        )
    except ExportFileError as error:
        result.problems.append(str(error))
    else:
        _compare(torch.from_numpy(ours), features, f"{which} by onnxruntime", result)


def _read_golden(path: Path) -> tuple[Tensor, Tensor, dict[str, str]]:
    """Tiles (n, S, S, 3) uint8, features (n, d) float32, metadata."""
    if not path.is_file():
        raise ExportFileError(
            f"{path.name} is not beside the file, so features were not compared: copy it there, "
            "or export again with golden tiles."
        )
    tensors, metadata = read_safetensors(path)
    tiles, features = tensors.get("tiles"), tensors.get("features")
    fits = (
        tiles is not None
        and features is not None
        and tiles.dtype == torch.uint8
        and features.dtype == torch.float32
        and tiles.ndim == 4
        and tiles.shape[-1] == 3
        and features.ndim == 2
        and len(tiles) == len(features) > 0
    )
    if tiles is None or features is None or not fits:
        raise ExportFileError(f"{path.name} holds no golden tiles and features, export again.")
    return tiles, features, metadata


def _compare(ours: Tensor, golden: Tensor, which: str, result: VerifyResult) -> None:
    largest = float(golden.abs().max())
    if ours.shape != golden.shape or not 0.0 < largest < float("inf"):
        result.problems.append(
            f"golden features {tuple(golden.shape)} with a largest value of {largest:g} cannot be "
            f"compared with {tuple(ours.shape)}"
        )
        return
    difference = float((ours - golden).abs().max()) / largest
    result.lines.append(
        f"golden features: {which}, largest difference {difference:.1e} of the largest feature "
        f"{largest:.3g} (tolerance {TOLERANCE:.0e})"
    )
    if not difference <= TOLERANCE:  # also when it is NaN
        result.problems.append(
            f"golden features differ by {difference:.1e} of the largest feature, "
            f"more than {TOLERANCE:.0e}: these are other weights, or fed differently"
        )


def _check_conv1(file: WeightsFile, result: VerifyResult) -> None:
    weight = file.backbone().get("conv1.weight")
    if weight is None:
        return
    norm = float(weight.double().norm())
    result.lines.append(
        f"conv1: norm {norm:.2f} (published {CONV1_PUBLISHED}, ImageNet {CONV1_IMAGENET}, "
        f"random {CONV1_RANDOM:.2f})"
    )
    if abs(norm - CONV1_RANDOM) < CONV1_RANDOM_WITHIN * CONV1_RANDOM:
        result.lines.append(
            "note: conv1 looks random: its norm is that of an untrained network, so this encoder "
            "was trained little or not at all"
        )
