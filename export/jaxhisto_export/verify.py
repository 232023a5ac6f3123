"""Check an exported file: keys, values, a strict load, golden features or logits, metadata.

Whatever is wrong is listed at once; nothing is repaired and nothing is guessed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from jaxhisto_export.errors import ExportFileError
from jaxhisto_export.onnx_graph import graph_problems, run_graph
from jaxhisto_export.provenance import problems, rules_of
from jaxhisto_export.timm_folder import config_problems
from jaxhisto_export.torch_resnet import Preprocessing, empty_resnet
from jaxhisto_export.torch_unet import empty_unet
from jaxhisto_export.weights_file import (
    FLAT,
    UNETS,
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

# L2 norm of the decoder's first convolution at its start: numbers of variance 2 / fan-in, 512 / 2
# of them times fan-in. It scatters by 3e-4 of itself, and this is six times that.
DECODER_RANDOM = 22.627
DECODER_RANDOM_WITHIN = 0.002

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
    """Checks a file or folder in any layout, an encoder.safetensors or a unet.safetensors.

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
    network = (_check_unet_load if file.layout in UNETS else _check_load)(file, result)
    _check_golden(file, network, result)
    _check_norms(file, result)
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
    if file.layout in ("encoder", "unet"):  # nobody recorded a hash
        return
    recorded = file.provenance.get("tensors_sha256")
    same = recorded == tensors_sha256(file.tensors)
    result.lines.append(f"SHA-256 of the tensors: {'as recorded' if same else 'not as recorded'}")
    if recorded is not None and not same:
        result.problems.append("a tensor was changed since the export: their SHA-256 differs")


def _check_metadata(file: WeightsFile, result: VerifyResult) -> None:
    rules = rules_of(file.layout)
    wrong = problems(file.provenance, rules)
    about: tuple[str, ...] = ("classes", "class_names") if file.layout in UNETS else ()
    about += ("mean", "std", "value_range", "channel_order", "tile_px", "mpp_range", "stains")
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


def _check_load(file: WeightsFile, result: VerifyResult) -> nn.Module | None:
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
    return network.eval()


def _check_unet_load(file: WeightsFile, result: VerifyResult) -> nn.Module | None:
    """smp's UNet with these weights, if they load strictly and there is one to load them into."""
    expected, found = expected_shapes(file), file.tensors
    matched = [n for n, shape in expected.items() if n in found and found[n].shape == shape]
    if len(matched) < len(expected) or found.keys() - expected.keys():
        result.problems.append(
            f"does not load strictly: {len(matched)} of {len(expected)} tensors match"
        )
        return None
    network, which = empty_unet(file.architecture, file.classes)
    if network is None:
        result.lines.append(f"note: neither loaded nor run, {which}")
        return None
    network.load_state_dict(file.tensors, strict=True)
    result.lines.append(
        f"strict load: {len(matched)} of {len(network.state_dict())} tensors matched in the Unet "
        f"of {file.architecture.name} of {which}"
    )
    return network.eval()


def _check_golden(file: WeightsFile, network: nn.Module | None, result: VerifyResult) -> None:
    path = file.golden_path
    what = "logits" if file.layout in UNETS else "features"
    try:
        tiles, golden, metadata = _read_golden(path, what)
    except ExportFileError as error:
        result.problems.append(str(error))
        return
    own = file_sha256(file.path) if file.layout in ("encoder", "unet") else None
    if metadata.get(file.own_sha256) != file.provenance.get(file.own_sha256, own):
        result.problems.append(f"{path.name} holds the golden {what} of other weights")
    needed = {name: rules_of(file.layout)[name] for name in Preprocessing.NEEDS}
    if network is None or problems(file.provenance, needed):
        result.lines.append(f"golden {what}: not compared, the weights were not loaded")
        return
    with torch.inference_mode():
        image = Preprocessing(file.provenance).preprocess(tiles)
        ours = network(image)
    which = f"golden {what}", f"{len(tiles)} tiles of {tiles.shape[1]} px"
    _compare(ours, golden, which, result)
    if file.layout == "onnx":
        _compare_graph(file, image, tiles, golden, which, result)


def _compare_graph(
    file: WeightsFile,
    image: Tensor,
    tiles: Tensor,
    golden: Tensor,
    which: tuple[str, str],
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
        what, tiles_of = which
        _compare(torch.from_numpy(ours), golden, (what, f"{tiles_of} by onnxruntime"), result)


def _read_golden(path: Path, what: str) -> tuple[Tensor, Tensor, dict[str, str]]:
    """Tiles (n, S, S, 3) uint8, features (n, d) or logits (n, k, S, S) float32, metadata."""
    if not path.is_file():
        raise ExportFileError(
            f"{path.name} is not beside the file, so {what} were not compared: copy it there, "
            "or export again with golden tiles."
        )
    tensors, metadata = read_safetensors(path)
    tiles, golden = tensors.get("tiles"), tensors.get(what)
    fits = (
        tiles is not None
        and golden is not None
        and tiles.dtype == torch.uint8
        and golden.dtype == torch.float32
        and tiles.ndim == 4
        and tiles.shape[-1] == 3
        and golden.ndim == (4 if what == "logits" else 2)
        and len(tiles) == len(golden) > 0
    )
    if tiles is None or golden is None or not fits:
        raise ExportFileError(f"{path.name} holds no golden tiles and {what}, export again.")
    return tiles, golden, metadata


def _compare(ours: Tensor, golden: Tensor, which: tuple[str, str], result: VerifyResult) -> None:
    what, tiles = which
    one = what.removeprefix("golden ").removesuffix("s")
    largest = float(golden.abs().max())
    if ours.shape != golden.shape or not 0.0 < largest < float("inf"):
        result.problems.append(
            f"{what} {tuple(golden.shape)} with a largest value of {largest:g} cannot be "
            f"compared with {tuple(ours.shape)}"
        )
        return
    difference = float((ours - golden).abs().max()) / largest
    result.lines.append(
        f"{what}: {tiles}, largest difference {difference:.1e} of the largest {one} "
        f"{largest:.3g} (tolerance {TOLERANCE:.0e})"
    )
    if not difference <= TOLERANCE:  # also when it is NaN
        result.problems.append(
            f"{what} differ by {difference:.1e} of the largest {one}, "
            f"more than {TOLERANCE:.0e}: these are other weights, or fed differently"
        )


def _check_norms(file: WeightsFile, result: VerifyResult) -> None:
    first = file.tensors.get("decoder.blocks.0.conv1.0.weight")
    if first is not None:
        norm = float(first.double().norm())
        result.lines.append(f"decoder: norm {norm:.3f} of its start (random {DECODER_RANDOM:.3f})")
        if abs(norm - DECODER_RANDOM) < DECODER_RANDOM_WITHIN * DECODER_RANDOM:
            result.lines.append("note: the decoder looks random, so it was trained little or not")
    _check_conv1(file, result)


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
