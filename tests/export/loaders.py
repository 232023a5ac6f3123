"""What public code does with a file, restated as behaviours, and the table that says what comes.

The number is the row of the loader table in export/README.md. Each takes a path and returns a
network that gives features, (n, d) or a map of them. A loader that fails raises.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from random_runs import Run, features_of, torchvision_resnet
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import resnet18

from jaxhisto_export import load_encoder
from jaxhisto_export.layouts import convert

Loader = Callable[[Path], nn.Module]

LAYOUTS = {
    "published": "published.pth",
    "torchvision": "torchvision.pth",
    "torchvision fc": "with_fc.pth",
    "dsmil": "dsmil.pth",
    "timm": "timm",
    "smp": "smp.pth",
    "onnx": "encoder.onnx",
}
"""The columns of the table, and what the tests call the files."""

README = Path(__file__).parents[2] / "export" / "README.md"
WITHIN = 1e-5  # of the largest feature: right
SURELY_WRONG = 1e-2  # of the largest feature


def write_all(run: Run, folder: Path) -> Path:
    """Every layout of a run, golden tiles included."""
    for column, name in LAYOUTS.items():
        layout, *fc = column.split()
        convert(run.encoder, layout, folder / name, run.golden, "zero" if fc else "none")
    return folder


def table() -> dict[int, dict[str, str]]:
    """The cells of the README's table: row number -> layout -> `yes`, `no`, `silently wrong`."""
    rows = re.findall(r"^\| (\d+) \|[^|]*\|(.*)\|$", README.read_text("utf-8"), re.MULTILINE)
    cells = {int(number): [c.strip(" *") for c in line.split("|")] for number, line in rows}
    return {number: dict(zip(LAYOUTS, row, strict=True)) for number, row in cells.items()}


def outcome(loader: Loader, path: Path, run: Run) -> str:
    """What becomes of a file in a loader, as the table says it; a folder's weights by name."""
    if path.is_dir() and loader not in TAKE_FOLDERS:
        path = path / "model.safetensors"
    try:
        network = loader(path)
    except Exception:  # loudly is loudly
        return "no"
    away = difference(network, run)
    assert away < WITHIN or away > SURELY_WRONG, f"neither right nor wrong: {away}"
    return "yes" if away < WITHIN else "silently wrong"


def difference(network: nn.Module, run: Run) -> float:
    """Largest difference from the features of the network that was exported, as a share."""
    features = features_of(network, run.tiles)
    if isinstance(features, list):
        features = features[-1]
    if features.ndim == 4:
        features = features.mean((2, 3))
    return float((features - run.features).abs().max() / run.features.abs().max())


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _state(path: Path) -> dict[str, Tensor]:
    return _load(path)["state_dict"]


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every `model.` and then every `resnet.` taken out, wherever it stands."""
    return {k.replace("model.", "").replace("resnet.", ""): v for k, v in state.items()}


def _keep_matching(network: nn.Module, state: dict[str, Tensor]) -> int:
    """Overwrites what has a name in the network; returns how many did."""
    own = network.state_dict()
    matching = {k: v for k, v in state.items() if k in own}
    network.load_state_dict({**own, **matching})
    return len(matching)


def readme(path: Path) -> nn.Module:
    """1: silent; the fc is replaced afterwards."""
    network = resnet18(weights=None)
    _keep_matching(network, _renamed(_state(path)))
    network.fc = nn.Identity()
    return network.eval()


def timm_ciga(path: Path) -> nn.Module:
    """2: the head must be there to be deleted, then strict with a zero classifier."""
    state = {k.replace("model.resnet.", ""): v for k, v in _state(path).items()}
    for name in ("fc.1.weight", "fc.1.bias", "fc.3.weight", "fc.3.bias"):
        del state[name]
    state["fc.weight"], state["fc.bias"] = torch.zeros(1000, 512), torch.zeros(1000)
    network = resnet18(weights=None)
    network.load_state_dict(state, strict=True)
    network.fc = nn.Identity()
    return network.eval()


def hest(path: Path) -> nn.Module:
    """3: prefix off, head dropped, strict without fc."""
    state = {k.replace("model.resnet.", ""): v for k, v in _state(path).items()}
    network = torchvision_resnet("resnet18")
    network.load_state_dict({k: v for k, v in state.items() if "fc." not in k}, strict=True)
    return network


def hi_ml(path: Path) -> nn.Module:
    """4: as 1, and refuses when nothing matches."""
    network = resnet18(weights=None)
    if not _keep_matching(network, _renamed(_state(path))):
        raise ValueError("no weight matches")
    network.fc = nn.Identity()
    return network.eval()


def prismtoolbox(path: Path) -> nn.Module:
    """5: head dropped, strict; no map_location, so the tensors must be on the CPU."""
    state = torch.load(path, weights_only=True)["state_dict"]
    state = _renamed({k: v for k, v in state.items() if "fc" not in k})
    network = torchvision_resnet("resnet18")
    network.load_state_dict(state, strict=True)
    return network


def hissl(path: Path) -> nn.Module:
    """6: as 1 in a converter: a backbone that is written out again and read by name."""
    network = torchvision_resnet("resnet18")
    _keep_matching(network, _renamed(_state(path)))
    again = torchvision_resnet("resnet18")
    again.load_state_dict(network.state_dict())
    return again


def triplex(path: Path) -> nn.Module:
    """7: as 1, then the children up to the last two: a (512, h, w) map."""
    network = resnet18(weights=None)
    _keep_matching(network, _renamed(_state(path)))
    return nn.Sequential(*list(network.children())[:-2]).eval()


def ssl_ciga(path: Path) -> nn.Module:
    """8: prefix off, head dropped, strict=False."""
    state = {k.replace("model.resnet.", ""): v for k, v in _state(path).items() if "fc" not in k}
    network = torchvision_resnet("resnet18")
    network.load_state_dict(state, strict=False)
    return network


def asserting(path: Path) -> nn.Module:
    """9: strict=False, and then only fc may be missing or unexpected."""
    network = resnet18(weights=None)
    report = network.load_state_dict(_renamed(_state(path)), strict=False)
    for name in [*report.missing_keys, *report.unexpected_keys]:
        if not name.startswith("fc."):
            raise AssertionError(name)
    network.fc = nn.Identity()
    return network.eval()


class _Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = torchvision_resnet("resnet18")

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


def cytomine(path: Path) -> nn.Module:
    """10: `resnet.` becomes `f.`, the attribute that holds the network; silent."""
    state = {k.replace("model.", "").replace("resnet.", "f."): v for k, v in _state(path).items()}
    network = _Wrapped()
    _keep_matching(network, state)
    return network.eval()


def marugoto(path: Path) -> nn.Module:
    """11: takes the one original file and no other."""
    if hashlib.sha256(path.read_bytes()).hexdigest() != (
        "ae652d1a586c1be11b8ed7f4033094a98ac9c620e43a28998c6c86d248e750ab"
    ):
        raise ValueError("not the file it was made for")
    return readme(path)


def flat_headless(path: Path) -> nn.Module:
    """12: the file is the state dict; strict without fc."""
    network = torchvision_resnet("resnet18")
    network.load_state_dict(_load(path), strict=True)
    return network


def flat_full(path: Path) -> nn.Module:
    """13: the file is the state dict; strict with the 1000-way fc."""
    network = resnet18(weights=None)
    network.load_state_dict(_load(path), strict=True)
    network.fc = nn.Identity()
    return network.eval()


def by_position(path: Path) -> nn.Module:
    """14: pops the last four entries and deals the others out in torchvision's order."""
    state = OrderedDict(_load(path))
    for _ in range(4):
        state.popitem()
    network = torchvision_resnet("resnet18")
    dealt = dict(zip(network.state_dict(), state.values(), strict=False))
    network.load_state_dict(dealt, strict=False)
    return network


def pickled_module(path: Path) -> nn.Module:
    """15: the file is the network itself."""
    network = _load(path)
    if not isinstance(network, nn.Module):
        raise TypeError("not a module")
    return network


def timm_folder(path: Path) -> nn.Module:
    """16: the real timm, a folder."""
    import timm

    return timm.create_model(f"local-dir:{path}", pretrained=True).eval()


def timm_file(path: Path) -> nn.Module:
    """17: the real timm, a file; not strict, because its own checkpoints have 1000 classes."""
    import timm

    overlay = {"file": str(path)}
    return timm.create_model(
        "resnet18", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0
    ).eval()


def smp_encoder(path: Path) -> nn.Module:
    """18: the real segmentation_models_pytorch; its encoder drops a 1000-way fc by itself."""
    import segmentation_models_pytorch as smp

    encoder = smp.Unet("resnet18", encoder_weights=None).encoder
    encoder.load_state_dict(_load(path))
    return encoder.eval()


def lightly_backbone(path: Path) -> nn.Module:
    """19: the real lightly's SimCLR: a torchvision network without its last child, and a head."""
    from lightly.models.modules import SimCLRProjectionHead

    resnet = torchvision_resnet("resnet18")
    resnet.load_state_dict(_load(path), strict=True)
    model = nn.Module()
    model.backbone = nn.Sequential(*list(resnet.children())[:-1])
    model.projection_head = SimCLRProjectionHead(512, 512, 128)
    model.eval()
    assert model.projection_head(model.backbone(torch.zeros(2, 3, 32, 32)).flatten(1)).shape[1]
    return model.backbone


def hub_mixin(path: Path) -> nn.Module:
    """20: the real huggingface_hub: a torchvision network that is loaded from a folder."""
    from huggingface_hub import PyTorchModelHubMixin
    from torchvision.models.resnet import BasicBlock, ResNet

    class Network(ResNet, PyTorchModelHubMixin):
        def __init__(self) -> None:
            super().__init__(BasicBlock, [2, 2, 2, 2])
            self.fc = nn.Identity()

    return Network.from_pretrained(path, strict=True).eval()


def any_safetensors(path: Path) -> nn.Module:
    """21: the real safetensors, strict without fc."""
    network = torchvision_resnet("resnet18")
    network.load_state_dict(load_file(path), strict=True)
    return network


class _Session(nn.Module):
    def __init__(self, path: Path) -> None:
        super().__init__()
        import onnxruntime

        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(["features"], {"image": x.numpy()})[0])


def runtime(path: Path) -> nn.Module:
    """22: the real onnxruntime."""
    return _Session(path)


class _ByFeatures(nn.Module):
    """Feeds a network of ours what `features_of` feeds, by way of its own preprocessing."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.encoder = load_encoder(path)

    def forward(self, x: Tensor) -> Tensor:
        tiles = ((x * 0.5 + 0.5) * 255).round().byte().permute(0, 2, 3, 1)
        return self.encoder.features(tiles)


def ours(path: Path) -> nn.Module:
    """23: this package, with the preprocessing of the file."""
    return _ByFeatures(path)


RESTATED: dict[int, Loader] = {
    1: readme,
    2: timm_ciga,
    3: hest,
    4: hi_ml,
    5: prismtoolbox,
    6: hissl,
    7: triplex,
    8: ssl_ciga,
    9: asserting,
    10: cytomine,
    11: marugoto,
    12: flat_headless,
    13: flat_full,
    14: by_position,
    15: pickled_module,
}
REAL: dict[int, Loader] = {
    16: timm_folder,
    17: timm_file,
    18: smp_encoder,
    19: lightly_backbone,
    20: hub_mixin,
    21: any_safetensors,
    22: runtime,
    23: ours,
}
TAKE_FOLDERS: tuple[Loader, ...] = (timm_folder, hub_mixin, ours)
