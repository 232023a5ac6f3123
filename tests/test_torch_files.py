"""Foreign files in, our files out, on the command line: what a user types and what comes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from refusals import refusal
from safetensors import safe_open
from safetensors.numpy import load_file

from jaxhisto import tensor_file, torch_files, weights
from jaxhisto.config import ModelConfig, PretrainConfig
from jaxhisto.models import simclr
from jaxhisto.models.resnet import BOTTLENECK
from jaxhisto.pretrain.encoder import write_golden
from jaxhisto.runlog import read_metrics
from jaxhisto.settings import to_json

IMAGENET = ["--mean", "0.485", "0.456", "0.406", "--std", "0.229", "0.224", "0.225"]
LAYOUTS = {
    "published": "out.ckpt",
    "torchvision": "out.pth",
    "dsmil": "out.pth",
    "timm": "out",
    "smp": "out.pth",
    "onnx": "out.onnx",
}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state dict as torchvision publishes them: flat, with a classifier, nothing said."""
    torch.manual_seed(0)
    network = torchvision.models.resnet.ResNet(
        torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=1000
    )
    path = tmp_path_factory.mktemp("foreign") / "resnet10.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of this project with its golden features."""
    folder = tmp_path_factory.mktemp("ours")
    model = ModelConfig(name="resnet10")
    config = PretrainConfig(out="run", tile_px=32, model=model)
    params, stats = simclr.init("resnet10", 128, seed=5)
    digest = weights.write_encoder(
        folder / "encoder.safetensors",
        params,
        stats,
        weights.describe(config, step=7, data_hash="abc", mpp_range=(0.25, 0.5), licence="MIT"),
    )
    write_golden(folder / "golden.safetensors", folder / "encoder.safetensors", model, 32, digest)
    return folder / "encoder.safetensors"


def test_what_does_not_say_how_it_is_fed_is_refused(jaxhisto, foreign, tmp_path):
    said = refusal(jaxhisto("import", foreign, "--out", tmp_path / "encoder"))
    assert "does not say how it wants to be fed; give --mean and --std" in said
    assert not (tmp_path / "encoder").exists()


def test_a_torchvision_file_becomes_an_encoder(jaxhisto, foreign, tmp_path):
    out = tmp_path / "encoder"
    line = ("import", foreign, "--out", out, "--tile-px", 64, "--licence", "BSD-3-Clause")
    code, said, _ = jaxhisto(*line, *IMAGENET)
    assert code == 0
    assert "1000" in said  # the classifier that is left out
    assert said.splitlines()[-1] == f"next: jaxhisto verify {out}/encoder.safetensors"
    code, said, problems = jaxhisto("verify", out / "encoder.safetensors", "--against", foreign)
    assert (code, problems) == (0, "")
    assert "equal bit for bit" in said

    theirs = torch.load(foreign, weights_only=True)
    tensors = load_file(out / "encoder.safetensors")
    assert tensors.keys() == {name for name in theirs if not name.startswith("fc.")}
    assert all(np.array_equal(t, theirs[name].numpy()) for name, t in tensors.items())
    with safe_open(out / "encoder.safetensors", framework="numpy") as file:
        stated = file.metadata()
    assert json.loads(stated["mean"]) == [0.485, 0.456, 0.406]
    assert json.loads(stated["source"])["file"] == "resnet10.pth"
    assert stated["licence"] == "BSD-3-Clause"

    said = refusal(jaxhisto(*line, *IMAGENET))
    assert "exists; pass --force" in said
    assert jaxhisto(*line, *IMAGENET, "--force")[0] == 0
    said = refusal(jaxhisto("export", out, "--layout", "published", "--out", tmp_path / "p.ckpt"))
    assert "projection" in said
    assert jaxhisto("export", out, "--layout", "torchvision", "--out", tmp_path / "t.pth")[0] == 0


def test_half_of_the_feeding_is_a_usage_error(jaxhisto, foreign, tmp_path):
    said = refusal(jaxhisto("import", foreign, "--out", tmp_path / "e", *IMAGENET[:4]), code=2)
    assert "give both" in said


def test_another_depth_than_asked_for_is_refused(jaxhisto, foreign, tmp_path):
    line = ("import", foreign, "--out", tmp_path / "e", "--arch", "resnet50", *IMAGENET)
    said = refusal(jaxhisto(*line))
    assert "resnet10" in said
    assert "resnet50" in said


@pytest.mark.parametrize(
    "layout",
    [pytest.param(x, marks=[pytest.mark.slow] if x != "published" else []) for x in LAYOUTS],
)
def test_import_undoes_export_to_the_last_bit(layout, jaxhisto, ours, tmp_path):
    out, back = tmp_path / LAYOUTS[layout], tmp_path / "back.safetensors"
    assert jaxhisto("export", ours, "--layout", layout, "--out", out)[0] == 0
    assert jaxhisto("verify", out)[0] == 0
    code, _, problems = jaxhisto("import", out, "--out", back)
    assert code == 0, problems
    before, after = load_file(ours), load_file(back)
    assert before.keys() - after.keys() in (set(), {n for n in before if n.startswith("fc.")})
    assert layout not in ("published", "dsmil") or len(before) == len(after)
    assert all(t.tobytes() == before[name].tobytes() for name, t in after.items())
    with safe_open(back, framework="numpy") as file:
        stated = file.metadata()
    assert (stated["step"], stated["data_hash"], stated["licence"]) == ("7", "abc", "MIT")
    assert json.loads(stated["mpp_range"]) == [0.25, 0.5]
    assert jaxhisto("verify", back)[0] == 0


def test_feeding_that_contradicts_the_file_is_refused(jaxhisto, ours, tmp_path):
    said = refusal(jaxhisto("import", ours, "--out", tmp_path / "e", *IMAGENET))
    assert "wants mean [0.5, 0.5, 0.5]" in said


def test_an_export_replaces_nothing_unasked(jaxhisto, ours, tmp_path):
    out = tmp_path / "out.pth"
    out.write_bytes(b"mine")
    line = ("export", ours, "--layout", "torchvision", "--out", out)
    assert "exists" in refusal(jaxhisto(*line))
    assert out.read_bytes() == b"mine"
    assert jaxhisto(*line, "--force")[0] == 0
    assert "state" not in str(out.read_bytes()[:4])


def test_out_and_bundle_exclude_each_other(jaxhisto, ours, tmp_path):
    both = ("--out", tmp_path / "a", "--bundle", tmp_path / "b")
    assert "give one of them" in refusal(jaxhisto("export", ours, *both), code=2)
    assert "give one of them" in refusal(jaxhisto("export", ours), code=2)


def test_a_bundle_and_a_card_from_the_command_line(jaxhisto, ours, tmp_path):
    code, said, _ = jaxhisto("export", ours, "--bundle", tmp_path / "upload")
    assert code == 0
    assert said.splitlines()[-1] == f"next: jaxhisto verify {tmp_path / 'upload'}"
    assert jaxhisto("verify", tmp_path / "upload")[0] == 0
    card = ("--layout", "torchvision", "--out", tmp_path / "t.pth", "--card")
    assert jaxhisto("export", ours, *card)[0] == 0
    assert "`t.pth`" in (tmp_path / "README.md").read_text()


def test_what_is_no_encoder_is_pointed_to_import(jaxhisto, foreign, tmp_path):
    said = refusal(jaxhisto("export", foreign, "--out", tmp_path / "o.ckpt"))
    assert f"jaxhisto import {foreign}" in said


def test_a_run_is_to_be_exported_before_it_can_be_verified(jaxhisto, tmp_path):
    (tmp_path / "data.json").write_text("{}")
    assert f"jaxhisto export {tmp_path}" in refusal(jaxhisto("verify", tmp_path))


def test_a_zoo_name_is_an_encoder(monkeypatch, jaxhisto, ours, tmp_path):
    """The registry hands out a file of the published layout; the rest is real."""
    from jaxhisto_export import zoo

    file = tmp_path / "cache" / "native.ckpt"
    assert jaxhisto("export", ours, "--out", file)[0] == 0
    monkeypatch.setattr(zoo, "find", lambda name: None)
    monkeypatch.setattr(zoo, "get", lambda name, *_, **__: file)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second time it lies in the cache
        encoder, golden = torch_files.encoder_files("some-name")
        assert encoder == tmp_path / "cache" / "native.ckpt.imported" / "encoder.safetensors"
        assert golden == encoder.with_name("golden.safetensors")


def test_an_unknown_zoo_name_lists_what_there_is(jaxhisto, tmp_path):
    assert "ciga" in refusal(jaxhisto("zoo", "get", "ciga-none"))
    assert "give a name" in refusal(jaxhisto("zoo", "get"), code=2)
    code, said, _ = jaxhisto("zoo", "list")
    assert code == 0
    assert "ae652d1a586c" in said or "ciga-tenpercent-native" in said


@pytest.mark.slow
def test_pretraining_starts_from_an_imported_encoder(jaxhisto, foreign, tmp_path):
    assert jaxhisto("import", foreign, "--out", tmp_path / "encoder", *IMAGENET)[0] == 0
    images = tmp_path / "images"
    images.mkdir()
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{i}.png")
    line = [
        *("pretrain", "--data.stores", images, "--out", tmp_path / "run", "--steps", 1),
        *("--batch-size", 8, "--tile-px", 32, "--precision", "f32", "--devices", 1),
        *("--model.name", "resnet10", "--init", tmp_path / "encoder"),
        *("--optim.rate", 0),
    ]
    assert "--model.mean 0.485 0.456 0.406" in refusal(jaxhisto(*line))
    feeding = ["--model.mean", *IMAGENET[1:4], "--model.std", *IMAGENET[5:]]
    code, said, problems = jaxhisto(*line, *feeding)
    assert code == 0, problems
    assert "starting from" in said
    assert "with a new head" in said
    assert len(read_metrics(tmp_path / "run")) == 1
    # At rate 0 the encoder that comes out is the one that went in.
    assert jaxhisto("export", tmp_path / "run", "--out", tmp_path / "out.ckpt")[0] == 0
    out = torch.load(tmp_path / "out.ckpt", weights_only=True)
    assert out["config"]["init"] == "encoder.safetensors"
    theirs = torch.load(foreign, weights_only=True)
    weight = out["state_dict"]["model.resnet.layer1.0.conv1.weight"]
    assert torch.equal(weight, theirs["layer1.0.conv1.weight"])


def used_to(arch: str, tiles: np.ndarray, branch: tuple[float, float]) -> dict[str, np.ndarray]:
    """torchvision's initial weights with the running statistics that these tiles give.

    With other statistics the features are the last BatchNorms' biases, whatever the tile.
    `branch` is the range of the last BatchNorm's scales in each block, `bn2` or `bn3`.
    """
    last = "bn3" if arch in BOTTLENECK else "bn2"
    torch.manual_seed(0)
    network = getattr(torchvision.models, arch)(weights=None)
    network.fc = torch.nn.Identity()
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the plain mean
            torch.nn.init.uniform_(module.weight, *(branch if name.endswith(last) else (0.2, 0.6)))
            torch.nn.init.normal_(module.bias, 0.0, 0.1)
    x = torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        network.train()((x - 0.5) / 0.5)
    return {name: tensor.numpy() for name, tensor in network.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("branch", [(0.0, 0.2), (0.2, 0.6)], ids=["small", "large"])
@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_features_of_real_tiles_are_pytorchs(arch, branch, shared_data, tmp_path):
    """64 tiles of two sets, through the exported file: 1e-5 of the largest feature.

    Small residual branches are what training keeps (zero-gamma starts them at 0): there 1e-5
    holds against PyTorch's float32 and its float64. Large ones on random weights amplify the
    last bit from block to block, in PyTorch as here (4e-5 in a ResNet101): there ours may be as
    far from float64 as PyTorch's float32 is.
    """
    from jaxhisto.pretrain.step import make_embed
    from jaxhisto_export import convert, load_encoder

    sets = [shared_data / name / "images" for name in ("her2st_spots", "bcss_tumor")]
    found = [sorted(p for p in s.iterdir() if p.suffix in (".jpg", ".png"))[::4][:32] for s in sets]
    files = [file for some in found for file in some]
    assert len(files) == 64
    tiles = np.stack([np.asarray(Image.open(f).convert("RGB"))[:96, :96] for f in files])
    encoder, config = tmp_path / "encoder.safetensors", PretrainConfig(out="run")
    config = replace(config, model=ModelConfig(name=arch))
    stated = weights.describe(config, step=0, data_hash="none") | {"projection_width": "0"}
    tensor_file.write(encoder, used_to(arch, tiles, branch), stated)
    convert(encoder, "torchvision", tmp_path / "encoder.pth")
    network = load_encoder(tmp_path / "encoder.pth")
    x = network.preprocess(torch.from_numpy(tiles))
    with torch.inference_mode():
        theirs = network(x).numpy()
        truth = network.double()(x.double()).numpy()
    params, stats, _ = weights.read_encoder(encoder)
    ours = np.asarray(make_embed(config.model)(params, stats, tiles.astype(np.float32) / 255))
    largest = np.abs(truth).max()
    errors = [np.abs(f - truth).max() / largest for f in (ours, theirs)]
    between = np.abs(ours - theirs).max() / largest
    print(
        f"{arch} {branch}: ours {errors[0]:.1e}, PyTorch's float32 {errors[1]:.1e} from float64, "
        f"{between:.1e} between them"
    )
    assert errors[0] <= (1e-5 if branch == (0.0, 0.2) else max(1e-5, 1.2 * errors[1]))
    assert between <= (1e-5 if branch == (0.0, 0.2) else max(1e-5, 2.2 * errors[1]))
    # Features that hardly differ between tiles would prove nothing.
    assert truth.std(0).mean() > 0.1 * np.abs(truth).mean()


MEASURE = """
import sys, threading
import optax, torch
from orbax.checkpoint import v1
import jaxhisto.pretrain.encoder, jaxhisto.torch_files, jaxhisto_export.layouts
from jaxhisto.file_config import ExportConfig

def held():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return [int(lines[kind].split()[0]) * 1024 for kind in ("RssAnon", "VmRSS")]

def watch():
    while not done.wait(0.002):
        most[:] = map(max, most, held())

done, before = threading.Event(), held()
most = list(before)
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
jaxhisto.torch_files.export_encoder(ExportConfig(run=sys.argv[1], out=sys.argv[2]))
done.set()
watcher.join()
print(*(m - b for m, b in zip(most, before)))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_resnet101_run_is_exported_in_less_than_twice_its_weights(tmp_path):
    """Memory beyond the imports, with and without the pages of mapped files."""
    from jaxhisto.checkpoints import open_checkpoints
    from jaxhisto.distributed import make_mesh
    from jaxhisto.pretrain.step import init_state

    model = ModelConfig(name="resnet101")
    config = PretrainConfig(out=str(tmp_path), model=model, tile_px=224)
    with open_checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save_async(1, init_state(config, 1, 1.0, make_mesh(1)), {})
    (tmp_path / "config.json").write_text(to_json(config))
    (tmp_path / "data.json").write_text('{"hash": "none", "mpp_range": null}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    command = [sys.executable, "-c", MEASURE, tmp_path, tmp_path / "out.ckpt"]
    # What another process compiled is not found: compiling takes the most memory.
    alone = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    started = time.monotonic()
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, env=alone
    )
    assert ended.returncode == 0, ended.stderr
    seconds = time.monotonic() - started
    size = (tmp_path / "encoder.safetensors").stat().st_size
    private, resident = (int(n) / size for n in ended.stdout.splitlines()[-1].split())
    print(
        f"{private:.2f} x the weights of {size / 2**20:.0f} MB, {resident:.2f} x with mapped "
        f"files, {seconds:.0f} s with the imports"
    )
    assert private < 2
    assert resident < 2
