"""What public code does with a checkpoint, restated as behaviours.

The number is the row of the loader table in export/README.md. Each takes a path and returns
a network; `headless` ones give (n, 512) features. A loader that fails raises.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from random_runs import torchvision_resnet
from torch import Tensor, nn
from torchvision.models import resnet18


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _state(path: Path) -> dict[str, Tensor]:
    content = _load(path)
    return content.get("state_dict", content)


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


def by_position(state: OrderedDict[str, Tensor]) -> nn.Module:
    """14: pops the last four entries and deals the others out in torchvision's order."""
    state = OrderedDict(state)
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


PUBLISHED = {
    1: readme,
    2: timm_ciga,
    3: hest,
    4: hi_ml,
    5: prismtoolbox,
    6: hissl,
    8: ssl_ciga,
    9: asserting,
    10: cytomine,
}
