"""What a file says about itself: which fields, of which type, and where they come from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

from jaxhisto_export.architecture import ARCHITECTURES

Provenance = dict[str, Any]
Rule = tuple[Callable[[Any], bool], str]

PLAIN_STRINGS = (
    "format",
    "architecture",
    "arch",
    "channel_order",
    "data_hash",
    "manifest",
    "code_version",
    "licence",
)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_size(value: Any) -> bool:
    return _is_count(value) and value > 0


def _is_numbers(value: Any, count: int, above: float) -> bool:
    if not isinstance(value, list) or len(value) != count:
        return False
    return all(isinstance(v, (int, float)) and isfinite(v) and v > above for v in value)


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


# Of an encoder.safetensors.
ENCODER_FIELDS: dict[str, Rule] = {
    "format": (lambda v: isinstance(v, str) and v.startswith("jaxhisto-"), "jaxhisto-..."),
    "arch": (
        lambda v: isinstance(v, str) and v in ARCHITECTURES,
        "one of " + ", ".join(ARCHITECTURES),
    ),
    "feature_width": (_is_size, "channels of the features"),
    "projection_width": (_is_count, "channels of the projection, 0 without one"),
    "mean": (lambda v: _is_numbers(v, 3, float("-inf")), "three numbers"),
    "std": (lambda v: _is_numbers(v, 3, 0.0), "three numbers above 0"),
    "value_range": (lambda v: _is_numbers(v, 2, float("-inf")) and v[0] < v[1], "[low, high]"),
    "channel_order": (lambda v: isinstance(v, str) and v in ("RGB", "BGR"), "RGB or BGR"),
    "tile_px": (_is_size, "side of a training view in pixels"),
    "mpp_range": (lambda v: v is None or _is_numbers(v, 2, 0.0), "[low, high] um/px, or null"),
    "stains": (
        lambda v: v is None or (isinstance(v, list) and all(isinstance(s, str) for s in v)),
        "a list of stains, or null",
    ),
    "data_hash": (lambda v: isinstance(v, str) and v != "", "hash of the training data"),
    "step": (_is_count, "optimizer steps done"),
    "config": (lambda v: isinstance(v, dict), "the run's settings"),
    "code_version": (lambda v: isinstance(v, str) and v != "", "version of jaxhisto"),
    "licence": (lambda v: isinstance(v, str), "a licence, or empty"),
}

# Of a file that `layouts.convert` wrote.
EXPORT_FIELDS: dict[str, Rule] = ENCODER_FIELDS | {
    "encoder_sha256": (_is_hash, "SHA-256 of the encoder.safetensors"),
    "tensors_sha256": (_is_hash, "SHA-256 of the tensors in this file"),
}


# Of a unet.safetensors: nobody computes features of a UNet.
UNET_FIELDS: dict[str, Rule] = {
    **{k: v for k, v in ENCODER_FIELDS.items() if k not in ("feature_width", "projection_width")},
    "architecture": (lambda v: v == "unet", "unet"),
    "tile_px": (lambda v: _is_size(v) and v % 32 == 0, "side of a training tile, n x 32 pixels"),
    "classes": (_is_size, "channels of the logits"),
    "class_names": (
        lambda v: v is None or (isinstance(v, list) and all(isinstance(s, str) for s in v)),
        "a list of names, or null",
    ),
    "encoder_sha256": (
        lambda v: v is None or _is_hash(v),
        "SHA-256 of the encoder.safetensors it began from, or null",
    ),
}

# Of a UNet that `layouts.convert` wrote.
UNET_EXPORT_FIELDS: dict[str, Rule] = UNET_FIELDS | {
    "unet_sha256": (_is_hash, "SHA-256 of the unet.safetensors"),
    "tensors_sha256": EXPORT_FIELDS["tensors_sha256"],
}


def rules_of(layout: str) -> dict[str, Rule]:
    """The fields that a file of this layout must have."""
    special = {"encoder": ENCODER_FIELDS, "unet": UNET_FIELDS, "smp-unet": UNET_EXPORT_FIELDS}
    return special.get(layout, EXPORT_FIELDS)


def parse(metadata: Mapping[str, str]) -> Provenance:
    """The string metadata of a safetensors file as JSON values.

    A value that should be JSON and is not stays the string it is: `problems` names it.
    """
    return {key: _value(key, text) for key, text in metadata.items()}


def to_strings(provenance: Mapping[str, Any]) -> dict[str, str]:
    """JSON values as the string metadata of a safetensors file; the inverse of `parse`."""
    return {k: v if k in PLAIN_STRINGS else json.dumps(v) for k, v in provenance.items()}


def _value(key: str, text: str) -> Any:
    if key in PLAIN_STRINGS:
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def problems(provenance: Mapping[str, Any], rules: Mapping[str, Rule]) -> list[str]:
    """One sentence for each field that is missing or of another type, and for contradictions."""
    found = [
        f"metadata lacks `{name}` ({meaning})"
        if name not in provenance
        else f"metadata `{name}` is {str(provenance[name])[:60]!r}, not {meaning}"
        for name, (accepts, meaning) in rules.items()
        if name not in provenance or not accepts(provenance[name])
    ]
    arch, width = provenance.get("arch"), provenance.get("feature_width")
    asked = {"arch", "feature_width"} <= rules.keys()
    if asked and not found and width != ARCHITECTURES[str(arch)].feature_width:
        found.append(f"metadata `feature_width` is {width}, which {arch} has not")
    names = provenance.get("class_names")
    if "class_names" in rules and not found and names and len(names) != provenance["classes"]:
        found.append(f"metadata `class_names` are {len(names)} for {provenance['classes']} classes")
    return found
