"""A whole smp.Unet around the ResNet that was found in a file."""

from __future__ import annotations

from jaxhisto_export.architecture import (
    ARCHITECTURES,
    COUNT_SUFFIX,
    UNET_ENCODER,
    UNET_HEAD,
)
from jaxhisto_export.foreign_names import Place, listed
from jaxhisto_export.provenance import ENCODER_FIELDS, Provenance

FIRST = "decoder.blocks.0.conv1.0.weight"
FORMATS = ("jaxhisto-unet-1", "jaxhisto-smp-unet-1")


def unet_around(place: Place) -> Place | None:
    """The names from one level above, where the ResNet is the encoder of an smp.Unet.

    Of segmentation_models_pytorch's networks Unet alone has `FIRST`.
    """
    if place.numbered or not place.prefix.endswith(UNET_ENCODER):
        return None
    base = place.prefix.removesuffix(UNET_ENCODER)
    own = [name for name in place.table.tensors if name.startswith(base)]
    names = {name.removeprefix(base): name for name in own}
    return Place(place.table, base, False, names) if FIRST in names else None


def check_unet(whole: Place, encoder: Place) -> int:
    """Whether it is smp.Unet as it is by default, and of how many classes.

    Raises:
      ValueError: it is not; a clause that begins with what the file `is`, `has` or `lacks`.
    """
    tensors = whole.tensors
    head = tensors[UNET_HEAD].shape if UNET_HEAD in tensors else ()
    needed = encoder.architecture.unet(head[0] if head else 1)
    parts = ("decoder.", "segmentation_head.")
    extra = [n for n in tensors if n.startswith(parts) and n not in needed]
    missing = [n for n in needed if n not in tensors and not n.endswith(COUNT_SUFFIX)]
    wrong = [n for n in needed if n in tensors and tensors[n].shape != needed[n]]
    found = []
    if extra:
        found.append(f"has {len(extra)} tensors that the default Unet has not: {listed(extra)}")
    if missing:
        found.append(f"lacks {len(missing)} tensors of a Unet: {listed(missing)}")
    if wrong:
        found.append(
            f"has {len(wrong)} tensors of another shape: `{wrong[0]}` is "
            f"{tensors[wrong[0]].shape}, not {needed[wrong[0]]}"
        )
    if found:
        raise ValueError("; ".join(found))
    return int(head[0])


def encoder_of(provenance: Provenance) -> Provenance:
    """What the metadata of a UNet says of its encoder alone."""
    kept = {name: provenance[name] for name in ENCODER_FIELDS if name in provenance}
    width = ARCHITECTURES[provenance["arch"]].feature_width
    return kept | {"feature_width": width, "projection_width": 0}
