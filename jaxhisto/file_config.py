"""Settings of the verbs that turn files into files, as `config.py` has those of the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxhisto.config import MANY, POSITIONAL, within


@dataclass(frozen=True)
class ExportConfig:
    """Write an encoder as a PyTorch, timm or ONNX file, or as a folder with all; or a UNet."""

    run: str = field(metadata=POSITIONAL)
    """Run folder of `jaxhisto pretrain` (its newest checkpoint is taken), an
    encoder.safetensors, a unet.safetensors, or a name of `jaxhisto zoo list`."""
    out: str = ""
    """The file to write; of layout timm, the folder."""
    layout: Literal["published", "torchvision", "dsmil", "timm", "smp", "onnx"] = "published"
    """`published`: state_dict under model.resnet., head last, as the released weights;
    `torchvision`: flat, for a strict load into a stock ResNet; `dsmil`: flat, head last, for
    loaders by position; `timm`: a folder for timm.create_model; `smp`: the encoder of
    segmentation_models_pytorch, and of a UNet its whole Unet; `onnx`: for onnxruntime."""
    bundle: str = ""
    """Instead of `out`: a folder to upload, with every layout, model card, golden tiles and
    checksums."""
    card: bool = False
    """Also write the model card, README.md beside the file."""
    fc: Literal["none", "zero", "trained"] = "none"
    """Of layout torchvision: leave `fc` out, write a zero one of 1000 classes, or that which
    `jaxhisto finetune` trained."""
    normalise: bool = False
    """Of layout onnx: take uint8 RGB tiles and normalise inside the graph."""
    force: bool = False
    """Replace what is there under that name, once the new one is whole."""
    licence: str = ""
    """Licence of the weights, written into the file."""
    stains: tuple[str, ...] = ()
    """Stains of the tiles trained on, written into the file: H&E, IHC."""


@dataclass(frozen=True)
class ImportConfig:
    """Read another project's ResNet or Unet as one of ours; its pickle is never executed."""

    file: str = field(metadata=POSITIONAL)
    """A .pth, .pt, .ckpt, .safetensors or ONNX file, a timm folder, or a name of
    `jaxhisto zoo list`."""
    out: str
    """Folder for encoder.safetensors and golden.safetensors, or for unet.safetensors and
    unet.safetensors.golden.safetensors; or a name ending in .safetensors."""
    part: Literal["", "encoder", "unet"] = ""
    """Of a file with a whole Unet of segmentation_models_pytorch: take that, which is the
    default, or its `encoder` alone."""
    class_names: tuple[str, ...] = ()
    """Names of a Unet's classes, in order, where the file does not say."""
    arch: Literal["", "resnet10", "resnet18", "resnet34", "resnet50", "resnet101"] = ""
    """The architecture you expect; another one in the file is then refused."""
    mean: tuple[float, float, float] | None = within(None, -10, 10)
    """Mean that the encoder wants subtracted from RGB in 0..1, where the file does not say:
    0.485 0.456 0.406 for ImageNet's, 0.5 0.5 0.5 for the published weights."""
    std: tuple[float, float, float] | None = within(None, 1e-3, 10)
    """Standard deviation to divide by, likewise: 0.229 0.224 0.225 for ImageNet's."""
    tile_px: int = within(224, 8, 8192)
    """Side of the tiles it was trained on in pixels, where the file does not say."""
    mpp_range: tuple[float, float] | None = within(None, 1e-3, 1e3, ordered=True)
    """Smallest and largest um/px of these tiles, where the file does not say."""
    licence: str = ""
    """Licence of the weights, where the file does not say."""
    force: bool = False
    """Replace what is there under that name, once the new one is whole."""


@dataclass(frozen=True)
class VerifyConfig:
    """Check an exported file against a stock torchvision ResNet, and against another file."""

    file: str = field(metadata=POSITIONAL)
    """The file, or the folder of layout timm."""
    against: str = ""
    """Another file, of any layout, that should hold the same weights."""


@dataclass(frozen=True)
class ZooConfig:
    """Published encoders: what there is, and how to get it."""

    action: Literal["list", "get"] = field(metadata=POSITIONAL)
    """`list` the registry, or `get` a file into the cache."""
    name: str = field(default="", metadata=POSITIONAL)
    """Of `get`: a name from the list."""
    source: str = field(default="", metadata={"flag": "from"})
    """A folder or address that holds the file, instead of where the registry says."""
    unchecked: bool = False
    """Take a file whose SHA-256 the registry does not know."""


@dataclass(frozen=True)
class CatalogConfig:
    """The datasets that the paper pretrained on (Table F.13), and where to get them."""

    organ: tuple[str, ...] = ()
    """Organs to list; `kidney` finds renal, `lung` chest, `colorectal` colon and rectum."""
    stain: tuple[str, ...] = ()
    """Stains to list: H&E, Giemsa."""
    kind: str = ""
    """`slides` or `patches`; empty: both."""
    notes: bool = False
    """Also print what the table contradicts, and what a set served for in the paper."""


@dataclass(frozen=True)
class SampleConfig:
    """Draw tiles from stores and image folders into a frozen list for `pretrain`."""

    sources: tuple[str, ...] = field(metadata=POSITIONAL)
    """Tile stores and image folders; `NAME=FOLDER` names an image folder's dataset, which is
    else called as the folder."""
    out: str
    """The manifest to write."""
    percent: float | None = within(None, 1e-9, 100)
    """Percent of each dataset, above 0 (paper: 0.01, 0.1, 1 and 10)."""
    per_dataset: int | None = within(None, 1, MANY)
    """Instead: so many of each dataset, or all it has (paper: 10)."""
    total: int | None = within(None, 1, MANY)
    """Instead: so many in all. Each dataset gets its minimum; each further tile goes where the
    smallest share is then taken, until a maximum is reached."""
    minimum: int = within(10, 0, MANY)
    """Fewest of a dataset, or all it has (paper: 10); not for `per_dataset`."""
    maximum: int = within(2000, 0, MANY)
    """Most of a dataset (paper: 2000); 0: no limit; not for `per_dataset`."""
    per_slide: int = within(100, 0, MANY)
    """Most of one slide, over all its resolutions, before percent are counted (paper: 100);
    0: all."""
    only: tuple[str, ...] = ()
    """Datasets to draw from; empty: all."""
    organ: tuple[str, ...] = ()
    """Organs to draw from, as the catalogue or `datasets` has them."""
    stain: tuple[str, ...] = ()
    """Stains to draw from, likewise."""
    mpp: tuple[float, ...] = within((), 0.01, 100)
    """Pixel sizes to draw from in um/px (paper: 1, 0.5, 0.25); empty: any."""
    mpp_tolerance: float = within(0.1, 0, 1)
    """How far from `mpp` a tile's may lie, as a share of it. Ours."""
    exclude: tuple[str, ...] = ()
    """Shell patterns of what is left out: image names, slide ids."""
    datasets: str = ""
    """CSV file with dataset, organ, stain (and mpp of image folders) of what is not in the
    catalogue, or otherwise there."""
    seed: int = within(0, 0, MANY)
    """Seed of the draw."""
    failures_allowed: int = within(0, 0, MANY)
    """Images of a folder that may be unreadable; they are left out and listed."""
    threads: int = within(0, 0, MANY)
    """Threads that check the images; 0: one a core."""


@dataclass(frozen=True)
class LeakageConfig:
    """Find what pretraining tiles and labelled images have in common, and report it."""

    pretraining: tuple[str, ...] = field(metadata=POSITIONAL)
    """A run folder of `jaxhisto pretrain`, a list of `jaxhisto sample`, or tile stores and image
    folders. After a run or a list the labelled sets may follow, in place of `against`."""
    against: tuple[str, ...] = ()
    """The labelled sets: image folders, folders of class folders, tile stores."""
    out: str = ""
    """Folder of the report; empty: leakage-NAME in the run folder."""
    stores: tuple[str, ...] = ()
    """Of a list: the stores and image folders that hold its tiles. Of a run: where its data lies
    now, if it was moved."""
    exclude: tuple[str, ...] = ()
    """Of stores and folders: shell patterns of what was not trained on, as `pretrain` had them;
    a run says so itself."""
    patient_pattern: str = "(TCGA-[A-Z0-9]{2}-[A-Z0-9]{4})"
    """Regular expression whose group is the patient in a slide id or an image's relative name;
    case is ignored. The default reads TCGA barcodes."""
    slide_pattern: str = ""
    """Likewise the slide; empty: TCGA barcodes, else slide ids of stores."""
    distance: int = within(10, 0, 16)
    """Bits of 63 in which the hashes of a near-identical pair may differ. Ours."""
    correlation: float = within(0.9, 0.5, 1)
    """Least correlation of the luminances of a near-identical pair or common piece. Ours."""
    flat: float = within(3.0, 0, 64)
    """Images whose 32 x 32 luminance deviates less than this are too flat to tell, grey levels
    of 255. Ours."""
    parts: bool = True
    """Also look for pieces: crops, shifts, overlaps. Ten times the time of the rest."""
    worst: int = within(24, 1, 200)
    """Pairs that are drawn."""
    fail: bool = False
    """Exit with 1 where there is an overlap, for CI; else a report is no failure."""
    force: bool = False
    """Replace an earlier report."""
    failures_allowed: int = within(0, 0, MANY)
    """Images of a folder that may be unreadable; they are left out and counted."""
    threads: int = within(0, 0, MANY)
    """Threads that read and compare; 0: one a core."""
