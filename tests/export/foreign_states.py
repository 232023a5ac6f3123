"""State dicts as files, and what a reader of them must give."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models import resnet

from jaxhisto_export.errors import ExportFileError
from jaxhisto_export.foreign import Imported, read_foreign

State = dict[str, Tensor]


def saved(tmp_path: Path, content: Any, **how: Any) -> Path:
    torch.save(content, tmp_path / "file.bin", **how)
    return tmp_path / "file.bin"


def under(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def numbered(state: State) -> State:
    """As lightly has it: the keys of nn.Sequential(*resnet.children())."""
    children = [name for name, _ in resnet.resnet18().named_children()]
    split = {name: name.partition(".") for name in state}
    return {f"{children.index(c)}.{rest}": state[name] for name, (c, _, rest) in split.items()}


def assert_same(found: Imported, state: State) -> None:
    """Bit for bit, in torchvision's order, ready for a strict load."""
    assert list(found.tensors) == list(state)
    for name, tensor in state.items():
        np.testing.assert_array_equal(found.tensors[name], tensor.detach().numpy(), strict=True)
    assert found.sha256 == hashlib.sha256(found.path.read_bytes()).hexdigest()


def refusal(path: Path, arch: str | None = None) -> str:
    with pytest.raises(ExportFileError) as caught:
        read_foreign(path, arch)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    assert str(path) in sentence
    return sentence
