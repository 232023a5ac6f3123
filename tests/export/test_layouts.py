"""What is in the files, against torchvision, and what the conversion refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from random_runs import WIDTHS, Run, encoder_metadata, make_run, torchvision_resnet
from safetensors.torch import save_file

from jaxhisto_export.architecture import ARCHITECTURES, closest
from jaxhisto_export.errors import ExportFileError
from jaxhisto_export.layouts import convert

DEPTHS = sorted(WIDTHS)


@pytest.mark.parametrize("name", DEPTHS)
def test_names_order_and_shapes_are_torchvisions(name: str) -> None:
    with torch.device("meta"):
        theirs = torchvision_resnet(name).state_dict()
    ours = ARCHITECTURES[name].backbone()
    assert list(ours) == list(theirs)
    assert all(tuple(theirs[key].shape) == shape for key, shape in ours.items())


@pytest.mark.parametrize(
    ("name", "keys"), [("resnet18", 124), ("resnet34", 220), ("resnet50", 322), ("resnet101", 628)]
)
def test_key_counts(name: str, keys: int) -> None:
    architecture = ARCHITECTURES[name]
    assert len(architecture.backbone() | architecture.head(128)) == keys
    assert architecture.feature_width == WIDTHS[name]


@pytest.mark.parametrize("name", DEPTHS)
def test_architecture_is_recognised_by_its_names(name: str) -> None:
    with torch.device("meta"):
        names = list(torchvision_resnet(name).state_dict())
    assert closest(names).name == name
    assert closest(names[:-7]).name == name


def test_published_layout(published: Path, run18: Run) -> None:
    content = torch.load(published, weights_only=True)
    state = content["state_dict"]
    backbone = list(torchvision_resnet("resnet18").state_dict())
    head = ["fc.1.weight", "fc.1.bias", "fc.3.weight", "fc.3.bias"]
    assert list(state) == ["model.resnet." + name for name in backbone + head]
    for key, tensor in state.items():
        assert tensor.device.type == "cpu"
        assert tensor.dtype == (torch.int64 if key.endswith("tracked") else torch.float32)
        assert torch.equal(tensor, run18.tensors[key.removeprefix("model.resnet.")])
    assert state["model.resnet.bn1.num_batches_tracked"].item() == 120


def test_published_provenance_is_primitives_beside_the_state(published: Path) -> None:
    content = torch.load(published, weights_only=True)
    assert content["arch"] == "resnet18"
    assert content["mean"] == content["std"] == [0.5, 0.5, 0.5]
    assert content["tile_px"] == 64
    assert content["mpp_range"] == [0.25, 0.5]
    assert content["stains"] == ["H&E"]
    assert content["step"] == 120
    assert content["config"]["batch_size"] == 64
    assert json.loads(json.dumps({k: v for k, v in content.items() if k != "state_dict"}))
    # timm and others look for these names before `state_dict`.
    assert not {"model", "state_dict_ema", "model_ema", "model_state_dict"} & content.keys()


def test_published_file_is_as_large_as_its_tensors(published: Path, run18: Run) -> None:
    """No tensor drags a larger storage along."""
    payload = sum(t.numel() * t.element_size() for t in run18.tensors.values())
    assert payload < published.stat().st_size < 1.002 * payload


def test_flat_provenance_survives_a_strict_load(flat: Path, run18: Run) -> None:
    state = torch.load(flat, weights_only=True)
    torchvision_resnet("resnet18").load_state_dict(state, strict=True)
    inside = state._metadata["jaxhisto"]
    beside = json.loads(flat.with_name("encoder.pth.json").read_text())
    assert inside == beside
    assert inside["data_hash"] == "0" * 64
    assert all(torch.equal(tensor, run18.tensors[key]) for key, tensor in state.items())


@pytest.fixture(scope="module")
def headless(run18: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder of `run18` without its projection, as an import may leave it."""
    path = tmp_path_factory.mktemp("headless") / "encoder.safetensors"
    tensors = {k: v for k, v in run18.tensors.items() if not k.startswith("fc.")}
    save_file(tensors, path, encoder_metadata("resnet18", projection_width="0"))
    return path


@pytest.mark.parametrize(("layout", "keys"), [("dsmil", 124), ("smp", 120)])
def test_flat_layouts(layout: str, keys: int, run18: Run, tmp_path: Path) -> None:
    out = run18.export(layout, tmp_path / "out.pth")
    state = torch.load(out, weights_only=True)
    backbone = list(torchvision_resnet("resnet18").state_dict())
    head = ["fc.1.weight", "fc.1.bias", "fc.3.weight", "fc.3.bias"]
    assert list(state) == [*backbone, *head][:keys]
    assert all(torch.equal(tensor, run18.tensors[key]) for key, tensor in state.items())
    inside = state._metadata["jaxhisto"]
    assert inside == json.loads((tmp_path / "out.pth.json").read_text())
    assert inside["format"] == f"jaxhisto-{layout}-1"


@pytest.mark.parametrize("layout", ["published", "dsmil"])
def test_layouts_with_a_head_refuse_an_encoder_without(
    layout: str, headless: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportFileError, match=r"no projection.*take layout torchvision") as failure:
        convert(headless, layout, tmp_path / "out.pth")
    assert str(failure.value).startswith(str(headless))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("layout", "fc"), [("torchvision", "none"), ("torchvision", "zero")])
def test_an_encoder_without_a_head_is_whole(
    layout: str, fc: str, headless: Path, run18: Run, tmp_path: Path
) -> None:
    convert(headless, layout, tmp_path / "out.pth", fc=fc)
    state = torch.load(tmp_path / "out.pth", weights_only=True)
    assert len(state) == (122 if fc == "zero" else 120)
    assert torch.equal(state["conv1.weight"], run18.tensors["conv1.weight"])


def test_a_head_that_the_metadata_denies_is_refused(run18: Run, tmp_path: Path) -> None:
    path = _without(run18, tmp_path, projection_width="0", licence="MIT")
    with pytest.raises(ExportFileError, match=r"4 keys that do not belong there: `fc\.1"):
        convert(path, "torchvision", tmp_path / "out.pth")


def test_a_head_of_another_width_is_kept(run18: Run, tmp_path: Path) -> None:
    tensors = run18.tensors | {"fc.3.weight": torch.ones(64, 512), "fc.3.bias": torch.ones(64)}
    path = tmp_path / "encoder.safetensors"
    save_file(tensors, path, encoder_metadata("resnet18", projection_width="64"))
    convert(path, "dsmil", tmp_path / "out.pth")
    assert torch.load(tmp_path / "out.pth", weights_only=True)["fc.3.bias"].shape == (64,)


def test_zero_fc(flat_with_fc: Path) -> None:
    state = torch.load(flat_with_fc, weights_only=True)
    assert list(state)[-2:] == ["fc.weight", "fc.bias"]
    assert state["fc.weight"].shape == (1000, 512)
    assert not state["fc.weight"].any()
    assert not state["fc.bias"].any()


def test_same_encoder_same_bytes(published: Path, run18: Run, tmp_path: Path) -> None:
    again = run18.export("published", tmp_path / "another_name.pt")
    assert again.read_bytes() == published.read_bytes()


def test_golden_tiles_lie_beside_the_file(published: Path, run18: Run) -> None:
    beside = published.with_name("encoder.pth.golden.safetensors")
    assert beside.read_bytes() == run18.golden.read_bytes()


def test_companions_of_an_earlier_file_go(run18: Run, tmp_path: Path) -> None:
    out = tmp_path / "encoder.pth"
    run18.export("torchvision", out)
    written = convert(run18.encoder, "published", out, force=True)
    assert written == [out]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["encoder.pth"]


@pytest.mark.parametrize("name", ["out.pth", "out.pth.json", "out.pth.golden.safetensors"])
def test_what_is_there_is_replaced_only_by_force(name: str, run18: Run, tmp_path: Path) -> None:
    """Also what lies beside under the file's name: golden tiles of other weights mislead."""
    (tmp_path / name).write_text("mine")
    with pytest.raises(ExportFileError, match="exists, pass --force to replace it") as failure:
        convert(run18.encoder, "smp", tmp_path / "out.pth")
    assert str(failure.value).startswith(str(tmp_path / name))
    assert [p.read_text() for p in tmp_path.iterdir()] == ["mine"]
    convert(run18.encoder, "smp", tmp_path / "out.pth", force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.pth", "out.pth.json"]


def test_a_link_that_leads_nowhere_is_there_too(run18: Run, tmp_path: Path) -> None:
    (tmp_path / "out.pth").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ExportFileError, match="exists"):
        convert(run18.encoder, "smp", tmp_path / "out.pth")


MEASURE = """
import resource, sys
import onnx, onnx.helper, onnx.numpy_helper
from jaxhisto_export import layouts
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
layouts.convert(*sys.argv[1:])
print((peak() - before) * 1024)
"""


@pytest.fixture(scope="module")
def run101(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The largest depth."""
    return make_run(tmp_path_factory.mktemp("run101"), "resnet101")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["published", "torchvision", "dsmil", "timm", "smp", "onnx"])
def test_peak_memory(layout: str, run101: Run, tmp_path: Path) -> None:
    """Beyond the imports: less than twice the weights, which are mapped once."""
    out = tmp_path / {"timm": "out", "onnx": "out.onnx"}.get(layout, "out.pth")
    command = [sys.executable, "-c", MEASURE, run101.encoder, layout, out, run101.golden]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    weights = sum(t.numel() * t.element_size() for t in run101.tensors.values())
    assert int(done.stdout) < 1.5 * weights


@pytest.mark.slow
@pytest.mark.parametrize("name", DEPTHS)
def test_every_depth_loads_strictly(name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", name, seed=3)
    state = torch.load(run.export("torchvision", tmp_path / "flat.pth"), weights_only=True)
    network = torchvision_resnet(name)
    network.load_state_dict(state, strict=True)
    state = torch.load(run.export("published", tmp_path / "published.pth"), weights_only=True)
    assert len(state["state_dict"]) == len(network.state_dict()) + 4


def _without(run: Run, folder: Path, **metadata: str | None) -> Path:
    """The encoder with other metadata; None leaves a field out."""
    changed = {k: v for k, v in {**encoder_metadata("resnet18"), **metadata}.items() if v}
    path = folder / "changed.safetensors"
    save_file(run.tensors, path, changed)
    return path


def test_missing_and_broken_metadata_are_refused_at_once(run18: Run, tmp_path: Path) -> None:
    path = _without(run18, tmp_path, mean=None, std="[0.5, 0.0, 0.5]", step="many", licence=" ")
    with pytest.raises(ExportFileError) as failure:
        convert(path, "published", tmp_path / "out.pth")
    message = str(failure.value)
    assert message.startswith(str(path))
    assert all(word in message for word in ("`mean`", "`std`", "`step`"))
    assert "\n" not in message
    assert not (tmp_path / "out.pth").exists()


def test_metadata_of_another_depth_is_refused(run18: Run, tmp_path: Path) -> None:
    path = _without(run18, tmp_path, arch="resnet34", licence="MIT")
    with pytest.raises(ExportFileError, match="says resnet34, the tensors are a resnet18"):
        convert(path, "published", tmp_path / "out.pth")


TENSOR_FAULTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing": (lambda t: t.pop("layer1.0.bn1.running_var"), "1 of 124 keys missing"),
    "extra": (lambda t: t.update({"layer5.weight": torch.zeros(1)}), "`layer5.weight`"),
    "shape": (lambda t: t.update({"fc.3.bias": torch.zeros(64)}), r"`fc.3.bias` has shape \(64,\)"),
    "dtype": (lambda t: t.update({"bn1.bias": t["bn1.bias"].half()}), "float16"),
    "NaN": (lambda t: t.update({"bn1.bias": t["bn1.bias"] * float("nan")}), "NaN"),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_an_encoder_with_wrong_tensors_is_refused(fault: str, run18: Run, tmp_path: Path) -> None:
    plant, message = TENSOR_FAULTS[fault]
    tensors = dict(run18.tensors)
    plant(tensors)
    path = tmp_path / "encoder.safetensors"
    save_file(tensors, path, encoder_metadata("resnet18"))
    with pytest.raises(ExportFileError, match=message):
        convert(path, "published", tmp_path / "out.pth")


def test_golden_features_of_another_run_are_refused(run18: Run, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", "resnet10", seed=1)
    with pytest.raises(ExportFileError, match="other weights"):
        convert(run18.encoder, "published", tmp_path / "out.pth", golden=other.golden)


@pytest.mark.parametrize("content", [b"", b"PK not a safetensors file"])
def test_what_is_no_encoder_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    path.write_bytes(content)
    with pytest.raises(ExportFileError, match="not a whole safetensors file"):
        convert(path, "published", tmp_path / "out.pth")


def test_truncated_encoder_is_refused(run18: Run, tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    path.write_bytes(run18.encoder.read_bytes()[:-1000])
    with pytest.raises(ExportFileError, match="not a whole safetensors file"):
        convert(path, "published", tmp_path / "out.pth")


def test_an_output_that_cannot_be_written(run18: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExportFileError, match="cannot be written"):
        convert(run18.encoder, "published", tmp_path / "file" / "out.pth")


def test_a_full_disk_leaves_the_earlier_file_whole(run18: Run, tmp_path: Path) -> None:
    """A file-size limit of the process stands for the full disk."""
    import resource
    import signal

    out = tmp_path / "out.pth"
    out.write_bytes(b"the earlier file")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(ExportFileError, match="cannot be written"):
            convert(run18.encoder, "published", out, golden=run18.golden, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in tmp_path.iterdir()] == ["out.pth"]
    assert out.read_bytes() == b"the earlier file"


@pytest.mark.parametrize(
    ("layout", "out", "fc", "message"),
    [
        ("jit", "out.pth", "none", "no such layout"),
        ("published", "out.pth", "zero", "has no 1000-way fc"),
        ("onnx", "out.pth", "none", "call it .onnx"),
        ("smp", "out.onnx", "none", "call it .pth"),
        ("torchvision", "out.pth", "half", "no such choice"),
        ("published", "out.safetensors", "none", "call it .pth"),
        ("published", ".", "none", "is a folder"),
        ("onnx", ".", "none", "is a folder"),
        ("timm", "encoder.txt", "none", "is a file"),
    ],
)
def test_requests_that_make_no_sense(
    layout: str, out: str, fc: str, message: str, run18: Run, tmp_path: Path
) -> None:
    (tmp_path / "encoder.txt").touch()
    with pytest.raises(ExportFileError, match=message):
        convert(run18.encoder, layout, tmp_path / out, fc=fc)


def test_normalise_is_of_layout_onnx(run18: Run, tmp_path: Path) -> None:
    with pytest.raises(ExportFileError, match="take normalise with layout onnx"):
        convert(run18.encoder, "smp", tmp_path / "out.pth", normalise=True)


def test_an_encoder_is_nothing_but_an_encoder(run18: Run, published: Path, tmp_path: Path) -> None:
    folder = run18.export("timm", tmp_path / "timm")
    for path in (published, folder / "model.safetensors"):
        with pytest.raises(ExportFileError, match=r"give RUN/encoder\.safetensors"):
            convert(path, "smp", tmp_path / "out.pth")
