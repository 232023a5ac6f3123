"""Settings of the verbs that say what an encoder is worth, as `config.py` has those of training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxhisto.config import MANY, OPERATIONAL, POSITIONAL, within
from jaxhisto.task_config import TaskConfig


@dataclass(frozen=True)
class CutConfig:
    """How whole slides are cut into tiles, as `jaxhisto tile` has it."""

    tile_mpp: float | None = within(None, 0.01, 100)
    """Pixel size of the tiles in um/px; none: each slide's own highest resolution."""
    mpp: float | None = within(None, 0.02, 100)
    """Pixel size at level 0 in um/px for slides that do not state one."""
    foreground: Literal["ciga2022", "otsu", "od"] = "ciga2022"
    """Foreground rule: `ciga2022` (paper, App. B), `otsu` or `od`."""
    close_um: float = within(100.0, 0, 2000)
    """Radius of `ciga2022`'s morphological close, in um on the slide; 0 switches it off."""
    min_foreground: float = within(0.5, 0, 1)
    """Share of a tile that must be foreground, 0..1 (paper: 0.5)."""
    pen: Literal["none", "green_blue", "all"] = "green_blue"
    """Marker ink that tiles are left out for, as `jaxhisto tile` has it."""
    max_tiles: int = within(0, 0, MANY)
    """Most tiles of one slide, drawn at random; 0: all."""
    seed: int = within(0, 0, MANY)
    """Seed of that draw."""


@dataclass(frozen=True)
class EmbedConfig:
    """Features of tiles, images and whole slides from an encoder, into one HDF5 file."""

    encoder: str = field(metadata=POSITIONAL)
    """Run folder, encoder.safetensors, another project's file, a name of `jaxhisto zoo list`,
    `random:resnet18` (with a seed: `random:resnet18:1`), or `handmade` (colour and LBP)."""
    tiles: tuple[str, ...] = field(metadata=POSITIONAL)
    """Tile stores, folders, zip, tar and HDF5 files of images, CSV lists, `tfds:NAME`; or whole
    slides and folders of slides."""
    out: str
    """The HDF5 file to write; a killed line goes on where it was."""
    kind: Literal["auto", "tiles", "slides"] = "auto"
    """Whether `tiles` are images or whole slides, where their names do not say (.tif)."""
    tile_px: int = within(0, 0, 8192)
    """Side in pixels at which a tile is fed; others are resized, of long ones the middle square
    taken. 0: as the encoder was trained."""
    layer: int = within(4, 1, 4)
    """Stage whose map is averaged; 4: the encoder's features."""
    mean: tuple[float, float, float] | None = within(None, -10, 10)
    """Mean that the encoder wants subtracted from RGB in 0..1, where its file does not say."""
    std: tuple[float, float, float] | None = within(None, 1e-3, 10)
    """Standard deviation to divide by, likewise."""
    precision: Literal["f32", "bf16"] = "f32"
    """Arithmetic of the convolutions."""
    per_slide: str = ""
    """Also a folder with one HDF5 file a slide."""
    exclude: tuple[str, ...] = ()
    """Shell patterns of what is left out: image names, slide ids of a store."""
    manifest: str = ""
    """List of tiles from `jaxhisto sample`: exactly those of `tiles`, in its order."""
    max_side: int = within(512, 32, 8192)
    """Images (no store's tiles) with a longer side are cut into equal cells no longer, px."""
    failures_allowed: int = within(0, 0, MANY)
    """Images (no store's tiles) or slides that may be unreadable; they are dropped, counted and
    listed."""
    cut: CutConfig = field(default_factory=CutConfig)
    batch: int = within(64, 1, 4096)
    """Tiles that a device takes at a time; the numbers are the same on any number of devices."""
    devices: int = within(0, 0, MANY, operational=True)
    """Devices to use; 0: all."""
    threads: int = within(0, 0, MANY, operational=True)
    """Threads that read and decode; 0: one a core."""
    prefetch: int = within(2, 0, 1024, operational=True)
    """Batches decoded ahead."""
    force: bool = field(default=False, metadata=OPERATIONAL)
    """Replace what is there under that name, and begin anew."""


@dataclass(frozen=True)
class ProbeConfig:
    """What frozen features are worth on a task: last-layer training, linear probe, neighbours."""

    features: str = field(metadata=POSITIONAL)
    """File of `jaxhisto embed` (.h5), or an encoder as `embed` takes it, of which features are
    computed at `task.side` px and kept nowhere."""
    out: str
    """The record to write, JSON; the split lies beside it."""
    task: TaskConfig = field(default_factory=TaskConfig)
    encoder: str = ""
    """Encoder that the file of features must be of; another one's is refused."""
    probes: tuple[Literal["last_layer", "linear", "knn"], ...] = ("last_layer", "linear", "knn")
    """`last_layer`: a linear layer trained by Adam (paper); `linear`: logistic regression by L-BFGS
    or ridge regression in closed form; `knn`: nearest neighbours by cosine."""
    percent: float = within(100.0, 1e-9, 100)
    """Percent of the training images that are used (paper: 5, 10, 20, 50, 100)."""
    scarce: Literal["group", "image"] = "group"
    """Whether few percent are few groups, or few images of each."""
    repeat: int = within(0, 0, MANY)
    """Number of the draw of these (paper: 5 repeats)."""
    seed: int = within(0, 0, MANY)
    """Seed of that draw, of the layer's initial weights and batches, and of the bootstrap."""
    epochs: int = within(100, 1, 100000)
    """Of the last layer (paper: 100); the one with the best validation score is taken."""
    batch: int = within(128, 1, MANY)
    """Images in a batch of the last layer (paper: 128)."""
    rate: float = within(1e-3, 1e-9, 10)
    """Learning rate of Adam. PyTorch's default; the paper names none."""
    weight_decay: float | None = within(None, 0, 10)
    """Of the last layer; none: 1e-5 for ResNet10 and 18, else 1e-4 (paper)."""
    standardise: bool = True
    """Give features the training images' mean 0 and deviation 1 first; not for `knn`. Ours."""
    select: Literal["validation", "groups"] = "validation"
    """How the strength of `linear` is chosen: on the validation images, or by leaving out groups
    of training and validation, on both of which the probe is then fitted."""
    k: int = within(20, 1, MANY)
    """Neighbours."""
    tau: float = within(0.07, 1e-6, 1e6)
    """Temperature of their votes."""
    draws: int = within(1000, 1, MANY)
    """Bootstrap draws of the test images, or of their groups, for the intervals."""
    mean: tuple[float, float, float] | None = within(None, -10, 10)
    """Of an encoder whose file does not say, as in `embed`."""
    std: tuple[float, float, float] | None = within(None, 1e-3, 10)
    """Likewise."""
    embed_batch: int = within(64, 1, 4096)
    """Images that a device takes at a time where features are computed."""
    devices: int = within(0, 0, MANY, operational=True)
    """Devices to compute features on; 0: all."""
    threads: int = within(0, 0, MANY, operational=True)
    """Threads that read images; 0: one a core."""


@dataclass(frozen=True)
class StudyConfig:
    """Encoders on tasks at several shares of the labels: scores, intervals, tests, figures."""

    file: str = field(metadata=POSITIONAL)
    """The study as a TOML file (docs/study.md), or the name of one that comes with jaxhisto."""
    out: str
    """Folder of cells, features, tables and report; the same line again goes on where it was."""
    root: str = "."
    """Folder below which the file's paths of images, tables, masks, splits and encoders lie."""
    only: tuple[str, ...] = ()
    """Compute cells alone of which TASK/ENCODER/SETTING matches one of these shell patterns."""
    plan: bool = False
    """Check the file and what it names, count the cells, and compute nothing."""
    devices: int = within(0, 0, MANY, operational=True)
    """Devices to compute with; 0: all."""
    threads: int = within(0, 0, MANY, operational=True)
    """Threads that read images; 0: one a core."""


@dataclass(frozen=True)
class PicturesConfig:
    """Where the pictures behind a file of features are."""

    tiles: tuple[str, ...] = ()
    """What was embedded: tile stores, folders and files of images."""
    slides: tuple[str, ...] = ()
    """Whole slides and folders of slides, to paint on; also tiles are read from them that
    `tiles` does not hold."""
    manifest: str = ""
    """The list of tiles that was embedded, if one was."""
    exclude: tuple[str, ...] = ()
    """Shell patterns of what was left out when the tiles were embedded."""
    max_side: int = within(512, 32, 8192)
    """Longest side of a cell of large images when they were embedded, px."""
    failures_allowed: int = within(0, 0, MANY)
    """Images that may be unreadable, as when they were embedded."""
    mpp: float | None = within(None, 0.01, 100)
    """um/px of images, and at level 0 of slides, that do not state one: for the scale bar."""
    partial: bool = False
    """Go on where the tiles are not those that were embedded: by name, the others drawn as
    missing, counted and listed."""
    threads: int = within(0, 0, MANY, operational=True)
    """Threads that check images; 0: one a core."""


@dataclass(frozen=True)
class ClusterConfig:
    """Cluster features by mini-batch k-means, and show what the clusters are."""

    features: str = field(metadata=POSITIONAL)
    """File of `jaxhisto embed`."""
    out: str
    """Folder for clusters.json, centres.npy, assignments.h5 and the pictures."""
    k: tuple[int, ...] = within((), 1, MANY)
    """Clusters. Several: each is tried, the elbow of their curve is taken (paper: 1000 1500 ..
    10000, elbow 3000). Empty: ten even steps up to 10,000 or a twentieth of the rows."""
    seed: int = within(0, 0, MANY)
    """Seed of the start, the order of mini-batches, and what is shown."""
    shown: int = within(24, 0, 500)
    """Clusters on the sheet, drawn at random (paper: Fig. 5)."""
    nearest: int = within(3, 1, 12)
    """Tiles nearest to its centre that are shown of each (paper: 3)."""
    maps: int = within(8, 0, 1000)
    """Slides that are painted with the clusters, those with most tiles (paper: Fig. 6)."""
    highlight: tuple[int, ...] = within((), 0, MANY)
    """Clusters to show alone on the slides."""
    show: PicturesConfig = field(default_factory=PicturesConfig)
    pick: int = within(0, 0, MANY)
    """Write picked.jsonl, a list of so many representative tiles, for
    `pretrain --data.manifest`: in turn the nearest to each centre, largest clusters first."""
    pick_from: tuple[int, ...] = within((), 0, MANY)
    """Clusters to pick from; empty: all."""
    devices: int = within(0, 0, MANY, operational=True)
    """Devices to use; 0: all. The numbers are the same on any number."""
    force: bool = field(default=False, metadata=OPERATIONAL)
    """Replace what is there. Clusters of the same features, k and seed are kept, and only the
    pictures made anew."""


@dataclass(frozen=True)
class RetrieveConfig:
    """Find the tiles that are most like a tile, by the cosine of their features."""

    features: str = field(metadata=POSITIONAL)
    """File of `jaxhisto embed`."""
    query: tuple[str, ...]
    """Names of tiles in it, one row of the sheet each; `slide.svs@y,x` of a store's."""
    out: str
    """The PNG to write; a CSV file with names and cosines lies beside it."""
    count: int = within(8, 1, 200)
    """Nearest tiles shown of each."""
    show: PicturesConfig = field(default_factory=PicturesConfig)
    other_slides: bool = False
    """Leave out tiles of the query's own slide, which are near because they are neighbours."""
    force: bool = field(default=False, metadata=OPERATIONAL)
    """Replace the files of that name."""


@dataclass(frozen=True)
class SheetConfig:
    """Tiles of many datasets on one sheet (paper: Fig. 2)."""

    sources: tuple[str, ...] = field(metadata=POSITIONAL)
    """Tile stores and image folders; `NAME=FOLDER` names an image folder's dataset."""
    out: str
    """The PNG to write."""
    per_dataset: int = within(8, 1, 200)
    """Tiles of each, drawn as `jaxhisto sample` draws them."""
    exclude: tuple[str, ...] = ()
    """Shell patterns of what is left out: image names, slide ids."""
    seed: int = within(0, 0, MANY)
    """Seed of the draw."""
    failures_allowed: int = within(0, 0, MANY)
    """Images of a folder that may be unreadable; they are left out."""
    force: bool = field(default=False, metadata=OPERATIONAL)
    """Replace a file of that name."""
