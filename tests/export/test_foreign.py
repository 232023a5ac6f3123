"""Encoders of other projects are taken whole from real files, or refused in one sentence."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from foreign_states import State, assert_same, numbered, refusal, saved, under
from lightly.models.modules import SimCLRProjectionHead
from random_runs import Run, make_run, random_resnet, torchvision_resnet
from safetensors.torch import save_file
from torch import nn

from jaxhisto_export import foreign
from jaxhisto_export.foreign import read_foreign


@pytest.fixture(scope="module")
def state() -> State:
    """Of a headless resnet10 with random statistics."""
    return random_resnet("resnet10", seed=5).state_dict()


def momentum(state: State) -> State:
    return {k: v + 1 for k, v in state.items()}


WRAPPED: dict[str, tuple[Callable[[State], Any], str]] = {
    "flat": (lambda s: s, "torchvision's names"),
    "state_dict": (lambda s: {"state_dict": s, "epoch": 3}, "state_dict"),
    "model_state_dict": (lambda s: {"model_state_dict": s}, "model_state_dict"),
    "model": (lambda s: {"model": s}, "model"),
    "distributed": (lambda s: {"state_dict": under("module.", s)}, "module"),
    "twice": (lambda s: under("module.backbone.", s), "module.backbone"),
    "moco": (
        lambda s: {
            "epoch": 200,
            "arch": "resnet50",
            "state_dict": {
                **under("module.encoder_q.", s),
                "module.encoder_q.fc.0.weight": torch.zeros(4, 4),
                **under("module.encoder_k.", momentum(s)),
                "module.queue": torch.zeros(4, 8),
            },
            "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": []},
        },
        "MoCo training file, encoder_q",
    ),
    "byol": (
        lambda s: under("online_encoder.net.", s) | under("target_encoder.net.", momentum(s)),
        "online_encoder.net",
    ),
    "lightly moco": (
        lambda s: {
            "state_dict": under("backbone.", numbered(s))
            | under("backbone_momentum.", numbered(momentum(s))),
        },
        "numbered",
    ),
    "dino": (
        lambda s: {"student": under("module.", momentum(s)), "teacher": under("backbone.", s)},
        "teacher.backbone",
    ),
    "vissl": (
        lambda s: {
            "classy_state_dict": {
                "base_model": {
                    "model": {
                        "trunk": under("_feature_blocks.", s),
                        "heads": {"0.clf.0.weight": torch.zeros(4, 4)},
                    }
                }
            }
        },
        "VISSL training file",
    ),
    "own prefix": (lambda s: under("histology.tower.", s), "histology.tower"),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped(tmp_path: Path, state: State, name: str) -> None:
    wrap, said = WRAPPED[name]
    found = read_foreign(saved(tmp_path, wrap(state)))
    assert_same(found, state)
    assert found.architecture.name == "resnet10"
    assert said in found.recognised
    assert found.feeding is None
    assert found.provenance == {}
    assert found.projection == 0


def test_what_was_left_out_is_said(tmp_path: Path, state: State) -> None:
    found = read_foreign(saved(tmp_path, WRAPPED["moco"][0](state)))
    notes = "; ".join(found.notes)
    for said in ("encoder_q.fc` (1 tensors)", f"encoder_k` ({len(state)} tensors)", "queue` (1"):
        assert said in notes
    assert "optimizer state left out" in notes
    with_fc = {**state, "fc.weight": torch.zeros(7, 512), "fc.bias": torch.zeros(7)}
    assert read_foreign(saved(tmp_path, with_fc)).notes == ("fc (7 classes) left out",)


def test_legacy_format_and_other_suffixes(tmp_path: Path, state: State) -> None:
    path = saved(tmp_path, {"state_dict": state}, _use_new_zipfile_serialization=False)
    for suffix in (".pth.tar", ".ckpt", ".pt", ".onnx"):
        renamed = path.rename(tmp_path / f"file{suffix}")
        assert_same(read_foreign(renamed), state)
        path = renamed


def test_the_real_lightly(tmp_path: Path, state: State) -> None:
    network = torchvision_resnet("resnet10")
    network.load_state_dict(state)
    model = nn.Module()
    model.backbone = nn.Sequential(*list(network.children())[:-1])
    model.projection_head = SimCLRProjectionHead(512, 512, 128)
    found = read_foreign(saved(tmp_path, {"state_dict": model.state_dict()}))
    assert_same(found, state)
    assert any("projection_head" in note for note in found.notes)


def test_the_real_timm(tmp_path: Path) -> None:
    state = timm.create_model("resnet18", num_classes=3).state_dict()
    save_file(state, tmp_path / "model.safetensors")
    truth = {k: v for k, v in state.items() if not k.startswith("fc.")}
    alone = read_foreign(tmp_path / "model.safetensors")
    assert_same(alone, truth)
    assert alone.feeding is None
    config = {"architecture": "resnet18", "pretrained_cfg": {"mean": [0.7] * 3, "std": [0.2] * 3}}
    (tmp_path / "config.json").write_text(json.dumps({**config, "license": "mit"}))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        found = read_foreign(path)
        assert_same(found, truth)
        assert found.recognised == "timm resnet18"
        assert found.feeding == foreign.Feeding((0.7,) * 3, (0.2,) * 3, "config.json", "mit")
    config["pretrained_cfg"]["std"] = [0.2, 0.0, 0.2]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "`std`" in refusal(tmp_path)


def test_the_real_segmentation_models(tmp_path: Path) -> None:
    model = smp.Unet("resnet18", encoder_weights=None)
    truth = {k: v for k, v in model.encoder.state_dict().items() if not k.startswith("fc.")}
    found = read_foreign(saved(tmp_path, model.state_dict()))
    assert_same(found, truth)
    assert any("decoder" in note for note in found.notes)


LIGHTNING = """
import sys
from pathlib import Path
import torch
from torch import nn
from torchvision.models import resnet18
import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint

class Hyper(dict):
    pass

class SimCLR(pl.LightningModule):
    def __init__(self, hparams):
        super().__init__()
        self.save_hyperparameters({"extra": hparams})
        self.model = nn.Module()
        self.model.resnet = resnet18()
        self.model.resnet.fc = nn.Sequential(
            nn.Identity(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128))
    def training_step(self, batch, index):
        return self.model.resnet(batch[0]).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3, momentum=0.9)

folder = Path(sys.argv[1])
data = torch.utils.data.DataLoader(
    torch.utils.data.TensorDataset(torch.randn(4, 3, 32, 32)), batch_size=2)
model = SimCLR(Hyper(path=folder))
keep = ModelCheckpoint(dirpath=folder, filename="lightning", monitor=None)
pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, callbacks=[keep],
           enable_progress_bar=False, enable_model_summary=False).fit(model, data)
torch.save(model.state_dict(), folder / "truth.pth")
"""

READ = """
import sys
for name in ("pytorch_lightning", "lightning", "torch", "torchvision"):
    sys.modules[name] = None
from pathlib import Path
import numpy as np
from jaxhisto_export.foreign import read_foreign
found = read_foreign(Path(sys.argv[1]))
np.savez(sys.argv[2], **found.tensors)
print(found.recognised, found.feeding.mean, found.feeding.source, found.projection, sep="|")
print(*found.notes, sep="|")
"""


@pytest.mark.slow
def test_a_real_lightning_file_without_lightning_or_torch(tmp_path: Path) -> None:
    for code, args in ((LIGHTNING, [tmp_path]), (READ, ["lightning.ckpt", "read.npz"])):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, *map(str, args)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    said, notes = done.stdout.splitlines()
    assert said == "published layout (Lightning file)|(0.5, 0.5, 0.5)|published layout|128"
    assert notes == "optimizer state left out"
    truth = torch.load(tmp_path / "truth.pth", weights_only=True)
    with np.load(tmp_path / "read.npz") as read:
        assert [f"model.resnet.{name}" for name in read] == list(truth)
        for name, tensor in truth.items():
            array = read[name.removeprefix("model.resnet.")]
            np.testing.assert_array_equal(array, tensor.numpy(), strict=True)
    with pytest.raises(Exception, match=r"Weights only load failed"):
        torch.load(tmp_path / "lightning.ckpt", weights_only=True)


@pytest.mark.parametrize("layout", ["published", "torchvision", "dsmil", "smp", "timm", "onnx"])
def test_files_of_ours(tmp_path: Path, run10: Run, layout: str) -> None:
    found = read_foreign(
        run10.export(layout, tmp_path / ("out.onnx" if layout == "onnx" else "out"))
    )
    headless = {k: v for k, v in run10.tensors.items() if not k.startswith("fc.")}
    head = layout in ("published", "dsmil")
    assert_same(found, run10.tensors if head else headless)
    assert found.projection == (128 if head else 0)
    assert found.feeding == foreign.Feeding((0.5,) * 3, (0.5,) * 3, "file metadata")
    assert found.provenance["arch"] == "resnet10"
    assert found.provenance["step"] == 120
    assert found.provenance["config"]["data"] == {"stores": ["tiles"]}


def test_the_published_layout_says_how_to_feed_it(tmp_path: Path, run10: Run) -> None:
    found = read_foreign(saved(tmp_path, {"state_dict": under("model.resnet.", run10.tensors)}))
    assert_same(found, run10.tensors)
    assert found.recognised == "published layout (PyTorch file)"
    assert found.feeding == foreign.Feeding((0.5,) * 3, (0.5,) * 3, "published layout")
    assert (found.projection, found.provenance, found.notes) == (128, {}, ())


def test_an_encoder_of_ours(run10: Run) -> None:
    found = read_foreign(run10.encoder, "resnet10")
    assert_same(found, run10.tensors)
    assert found.projection == 128
    assert found.provenance["mean"] == [0.5, 0.5, 0.5]


def test_contradictions_of_ours_are_refused(tmp_path: Path, run10: Run) -> None:
    wrong = make_run(tmp_path / "a", "resnet10", arch="resnet18")
    assert "says that it is a resnet18" in refusal(wrong.encoder)
    wrong = make_run(tmp_path / "b", "resnet10", std="[0.5, 0.0, 0.5]")
    assert "`std`" in refusal(wrong.encoder)
    folder = run10.export("timm", tmp_path / "timm")
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.4, 0.5, 0.5]
    (folder / "config.json").write_text(json.dumps(config))
    assert "contradicts" in refusal(folder)


def test_known_files(tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, state)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(foreign.TORCHVISION_FILES, digest[:8], "resnet10")
    found = read_foreign(path)
    assert found.recognised == "torchvision ImageNet resnet10"
    assert found.feeding.mean == (0.485, 0.456, 0.406)
    entry = SimpleNamespace(title="A. et al.", mean=(0.1,) * 3, std=(0.2,) * 3, licence="MIT")
    registry = {(digest, path.stat().st_size): entry}
    monkeypatch.setattr("jaxhisto_export.zoo.known", lambda *asked: registry.get(asked))
    found = read_foreign(path)
    assert found.recognised == "known file: A. et al. (SHA-256 matches)"
    assert found.feeding == foreign.Feeding((0.1,) * 3, (0.2,) * 3, "known file", "MIT")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", ["checkpoint", "safetensors"])
def test_types_are_converted_and_said(
    tmp_path: Path, state: State, dtype: torch.dtype, form: str
) -> None:
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    path = tmp_path / "file"
    (torch.save if form == "checkpoint" else save_file)(given, path)
    found = read_foreign(path)
    assert_same(found, {k: v.float() if v.is_floating_point() else v for k, v in given.items()})
    floats = sum(v.is_floating_point() for v in state.values())
    said = str(dtype).removeprefix("torch.")
    assert found.notes == (f"{floats} tensors were {said}, converted to float32",)


def test_absent_counters_are_written_as_0(tmp_path: Path, state: State) -> None:
    counters = [name for name in state if name.endswith("num_batches_tracked")]
    found = read_foreign(saved(tmp_path, {k: v for k, v in state.items() if k not in counters}))
    assert_same(found, {**state, **{name: torch.tensor(0) for name in counters}})
    assert found.notes == ("num_batches_tracked absent, written as 0",)
