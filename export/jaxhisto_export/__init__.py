"""The PyTorch side of jaxhisto: files that stock torchvision loads, and a check of them.

Imports neither jax nor jaxhisto: torch, numpy and safetensors are enough.
"""

from __future__ import annotations

from typing import Any

from jaxhisto_export.errors import ExportFileError

__all__ = ["ExportFileError", "convert", "load_encoder", "verify_file"]

_HOME = {
    "convert": ("jaxhisto_export.layouts", "convert"),
    "load_encoder": ("jaxhisto_export.torch_resnet", "load_encoder"),
    "verify_file": ("jaxhisto_export.verify", "verify"),
}


def __getattr__(name: str) -> Any:
    """Imports torch when a function that needs it is asked for, not before."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module, function = _HOME[name]
    return getattr(importlib.import_module(module), function)
