"""Every setting, as frozen dataclasses: unit, range and source beside each field.

Defaults live here and nowhere else. A field marked `operational` says how a run is carried
out (devices, threads, logging) and may change between two starts of the same run; every
other field is part of the run's identity. The text under a field is its help on the command
line. "Ours" marks a value on which the paper is silent.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from jaxhisto.errors import ConfigError

Config = TypeVar("Config")

OPERATIONAL: dict[str, Any] = {"operational": True}
POSITIONAL: dict[str, Any] = {"positional": True}


@dataclass(frozen=True)
class TileConfig:
    """Cut slides into a store of foreground tiles."""

    slides: tuple[str, ...] = field(metadata=POSITIONAL)
    """Slides, or folders that are searched for slides."""
    out: str
    """Folder of the tile store; made if absent, completed if an earlier run was stopped."""
    dataset: str = ""
    """Dataset name stored with each tile; empty: the name of the store's folder."""
    tile_px: int = 224
    """Side of a tile in pixels (paper: 224)."""
    tile_mpp: float | None = None
    """Pixel size of the tiles in um/px; none: each slide's own highest resolution (paper)."""
    mpp: float | None = None
    """Pixel size at level 0 in um/px for slides that do not state one."""
    mpp_source: Literal["flag", "assumed"] = "flag"
    """What `--mpp` is recorded as: `flag`, a figure you know, or `assumed`, a guess."""
    foreground: Literal["ciga2022", "otsu", "od"] = "ciga2022"
    """Foreground rule: `ciga2022` (paper, App. B: violet to pink in OpenCV's units), `otsu`
    (on saturation) or `od` (haematoxylin + eosin optical density)."""
    close_um: float = 100.0
    """Radius of `ciga2022`'s morphological close, in um on the slide; 0 switches it off. Ours."""
    min_foreground: float = 0.5
    """Share of a tile that must be foreground, 0..1 (paper: 0.5)."""
    max_tiles: int = 100
    """Most tiles taken of one slide, drawn at random (paper: 100); 0: all."""
    seed: int = 0
    """Seed of the draw; a slide's tiles depend on (seed, slide id) alone."""
    jpeg_quality: int = 95
    """JPEG quality of the stored tiles, 1..100. Ours."""
    jpeg_subsampling: Literal["4:4:4", "4:2:2", "4:2:0"] = "4:4:4"
    """Chroma subsampling of the stored tiles; stains live in chroma, so 4:4:4. Ours."""
    failures_allowed: int = field(default=0, metadata=OPERATIONAL)
    """Slides that may fail before the exit code is 1; the store is complete without them."""
    processes: int = field(default=0, metadata=OPERATIONAL)
    """Slides cut at the same time, each in a process of its own; 0: one a core."""
    slide_timeout: float = field(default=3600.0, metadata=OPERATIONAL)
    """Seconds after which a slide's process is ended and the slide counted as failed."""


@dataclass(frozen=True)
class DataConfig:
    """What is trained on, and how it is read."""

    stores: tuple[str, ...] = ()
    """Tile stores written by `jaxhisto tile`, and plain image folders."""
    exclude: tuple[str, ...] = ()
    """Shell patterns of what is left out: names relative to an image folder, slide ids of a
    store; `C5_*` keeps a test section out."""
    max_side: int = 512
    """Images of a folder with a longer side are cut into equal cells no longer, px. Ours."""
    failures_allowed: int = 0
    """Images of a folder that may be unreadable; they are dropped, counted and listed."""
    threads: int = field(default=0, metadata=OPERATIONAL)
    """Threads that read and decode; 0: one a core."""
    prefetch: int = field(default=4, metadata=OPERATIONAL)
    """Batches decoded ahead."""


@dataclass(frozen=True)
class AugmentConfig:
    """The random view of a tile (paper: App. C)."""

    crop_area: tuple[float, float] = (0.01, 1.0)
    """Area of the random crop as a share of the tile (paper: 1..100 % is best)."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio of the crop, log-uniform. Ours."""
    rot90: bool = True
    """Turn by 0, 90, 180 or 270 degrees, 25 % each (paper)."""
    flips: bool = True
    """Flip each axis with 50 % (paper)."""
    jitter: Literal["none", "light", "medium", "heavy"] = "medium"
    """Brightness, contrast, saturation, hue: light .4 .4 .4 .2, medium .8 .8 .8 .2 (paper's
    best), heavy .8 .8 .8 .4."""
    jitter_probability: float = 0.8
    """Share of views that are jittered. Ours."""
    grey_probability: float = 0.0
    """Share of views turned grey; the paper names none, google-research/simclr has 0.2. Ours."""
    blur_probability: float = 0.5
    """Share of views that are blurred (paper)."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the Gaussian's sigma in pixels, uniform (paper); the kernel is a tenth of the
    side (23 taps at 224)."""


@dataclass(frozen=True)
class ModelConfig:
    """Encoder and projection."""

    name: Literal["resnet10", "resnet18", "resnet34", "resnet50", "resnet101"] = "resnet18"
    """Encoder; resnet10 has one block a stage and is for smoke runs."""
    projection: int = 128
    """Width of z (paper: 128)."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Mean that is subtracted from RGB in 0..1 (published weights: 0.5)."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Standard deviation that RGB in 0..1 is divided by (published weights: 0.5)."""


@dataclass(frozen=True)
class OptimConfig:
    """Loss temperature, optimizer and schedule."""

    name: Literal["lars", "lamb", "adam"] = "lars"
    """Optimizer (paper: LARS, LAMB and Adam compared in C.6)."""
    temperature: float = 0.1
    """NT-Xent's tau (paper's best: 0.1, Table C.6)."""
    rate: float | None = None
    """Peak learning rate; none: the paper's rule (LARS 0.3 N/256, LAMB 0.005 at N = 512,
    Adam 1e-4)."""
    weight_decay: float = 1e-6
    """Weight decay (paper); biases and BatchNorm are exempt under LARS and LAMB (ours)."""
    momentum: float = 0.9
    """LARS momentum. Ours, as google-research/simclr."""
    trust_coefficient: float = 0.001
    """LARS trust coefficient. Ours, as google-research/simclr."""
    warmup_epochs: float = 10.0
    """Linear warm-up from 0, epochs, at most `warmup_share` of the steps. Ours."""
    warmup_share: float = 0.1
    """Longest warm-up as a share of all steps. Ours."""


@dataclass(frozen=True)
class PretrainConfig:
    """Train an encoder on tiles without labels (SimCLR)."""

    out: str
    """Run folder; the same folder again resumes."""
    steps: int | None = None
    """Optimizer steps; replaces `epochs`."""
    epochs: float | None = None
    """Passes over the data (paper: 1000, taken when neither is given)."""
    batch_size: int = 512
    """Images N in the global batch, over all devices; 2N views (paper: 512)."""
    tile_px: int = 224
    """Side of a view in pixels: the crop comes from the whole tile and is resized once."""
    seed: int = 0
    """Order, augmentation and initial weights are functions of (seed, step, row)."""
    precision: Literal["bf16", "f32"] = "bf16"
    """Of the convolutions; parameters, BatchNorm statistics and logits are float32."""
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    extend: bool = field(default=False, metadata=OPERATIONAL)
    """Allow an existing run to get another number of steps (changes the cosine schedule)."""
    checkpoint_every: int = field(default=1000, metadata=OPERATIONAL)
    """Steps between checkpoints; the last step is always saved."""
    keep: int = field(default=3, metadata=OPERATIONAL)
    """Newest checkpoints kept."""
    devices: int = field(default=0, metadata=OPERATIONAL)
    """Devices to shard the batch over; 0: all."""
    log_every: int = field(default=50, metadata=OPERATIONAL)
    """Steps between progress lines where there is no terminal; every step is recorded."""
    tensorboard: bool = field(default=False, metadata=OPERATIONAL)
    """Also write TensorBoard events (extra `tensorboard`)."""


def parse(cls: type[Config], argv: Sequence[str], verb: str) -> Config:
    """Builds a config from `[CONFIG.toml] --flags`; the flags win over the file.

    The file is read as the flags it stands for, so one parser checks both.

    Raises:
      ConfigError: unknown key or a value that does not parse, with a suggestion.
      SystemExit: `--help` (0), or what the parser itself refuses (2).
    """
    import tyro

    args = list(argv)
    if args and args[0].endswith(".toml") or (args and _shipped(args[0]) and not _positional(cls)):
        path = _config_file(args.pop(0))
        args = _without_overridden(_file_flags(cls, path), args) + args
    return tyro.cli(_tyro_type(cls), args=args, prog=f"jaxhisto {verb}", description=cls.__doc__)


def to_json(config: Any) -> str:
    """The config as JSON text, every field included, in field order."""
    return json.dumps(dataclasses.asdict(config), indent=1) + "\n"


def from_json(cls: type[Config], text: str) -> Config:
    """Reads what `to_json` wrote; unknown keys raise ConfigError."""
    return _build(cls, json.loads(text))


def identity(config: Any) -> dict[str, Any]:
    """The dotted fields that make two runs the same run: all that are not operational."""
    return {name: value for name, value, meta in _fields(config) if not meta.get("operational")}


def differences(ours: Any, theirs: Any) -> list[str]:
    """`field: theirs -> ours` for each identity field in which two configs differ."""
    a, b = identity(ours), identity(theirs)
    return [f"{k}: {b.get(k)} -> {a.get(k)}" for k in a | b if a.get(k) != b.get(k)]
