"""Settings of the verbs that say what an encoder is worth, as `config.py` has those of training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxhisto.config import MANY, OPERATIONAL, POSITIONAL, within


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
class TaskConfig:
    """A labelled set on which an encoder is judged, and how it is divided."""

    data: str = ""
    """Folder of the images; of a published set, the folder it was unpacked to."""
    layout: Literal[
        "auto",
        "bach",
        "breakhis",
        "nct_crc",
        "lymph",
        "gleason2019",
        "bach_segmentation",
        "digestpath2019",
        "breastpathq",
    ] = "auto"
    """`auto`: a folder a class, or a folder with `labels` or `masks`; else one of the paper's
    sets (App. C.1) in the form in which it is published."""
    labels: str = ""
    """CSV file (.tsv: tab-separated) with a row an image."""
    file: str = "file"
    """Its column of image names, relative to `data`."""
    label: str = ""
    """Its column of classes: a classification task."""
    target: str = ""
    """Its column of numbers: a regression task."""
    target_scale: float = within(1.0, 1e-9, 1e9)
    """What these numbers are multiplied by; 100 turns a share into percent, as the paper's."""
    masks: str = ""
    """Folder with a mask an image, of the same name but for the suffix: a segmentation task."""
    masks_are: Literal["classes", "instances"] = "classes"
    """What a mask's pixels are: class ids (of two classes also 0 and 255), or `instances`, each
    with a number of its own, of which all become one foreground."""
    classes: tuple[str, ...] = ()
    """Classes in their order. Of labels: those wanted, others are left out; empty: all, sorted.
    Of masks: the names of the ids 0, 1, ...; empty: background and foreground."""
    group: str = ""
    """Column of patient, slide, section or region; what is of one group is never divided."""
    group_pattern: str = ""
    """Instead: a regular expression, whose group in an image's relative name is the group."""
    window: int = within(0, 0, 65536)
    """Cut images and masks into windows of this side, px; 0: whole images. Of
    `bach_segmentation` 0 means 1024 (paper)."""
    windows: Literal["all", "annotated"] = "all"
    """Of `bach_segmentation`: all windows, or those that an annotation touches."""
    split_by: Literal["group", "image"] = "group"
    """`group`: no group is divided, where the images have any; `image`: groups are ignored (paper),
    so that images of one patient may be on both sides. A set's own split stays as it is."""
    side: int = within(224, 8, 8192)
    """Side to which an image's centre square is resized, px."""
    test: tuple[str, ...] = ()
    """Groups to test on; empty: drawn."""
    split: str = ""
    """Split file to use; empty: the set's own split, or one that is drawn."""
    split_seed: int = within(0, 0, MANY)
    """Seed of the draw of the split."""
    validation_by_image: bool = False
    """Draw the validation images from the groups that are trained on: where too few groups are
    left for one of their own. The test stays clean, the validation score is too good."""


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


@dataclass(frozen=True)
class TrainingConfig:
    """Supervised training of a whole network (paper: sec. 4.2)."""

    epochs: int = within(100, 1, 100000)
    """Passes over the training images (paper: 100); the one with the best validation score is
    taken (paper)."""
    patience: int = within(0, 0, 100000)
    """Stop after so many epochs without a better validation score; 0: never (paper)."""
    batch: int = within(128, 1, MANY)
    """Images in the global batch (paper: 128); lowered, and said, where there are fewer."""
    rate: float = within(1e-4, 1e-9, 10)
    """Learning rate of Adam. Ours; the paper names none."""
    weight_decay: float | None = within(None, 0, 10)
    """L2 in the gradient; none: 1e-5 for ResNet10 and 18, else 1e-4 (paper)."""
    seed: int = within(0, 0, MANY)
    """Seed of new weights, of the order and of the augmentation."""
    crop_area: tuple[float, float] = within((1.0, 1.0), 1e-6, 1, ordered=True)
    """Area of a random crop as a share of the image, resized to its side; 1 1: none. Ours."""
    flips: bool = True
    """Flip each axis with 50 %. Ours, as the others here: the paper names no augmentation."""
    rot90: bool = True
    """Turn by 0, 90, 180 or 270 degrees, 25 % each."""
    jitter: Literal["none", "light", "medium", "heavy"] = "light"
    """Brightness, contrast, saturation, hue, as in `pretrain`: light .4 .4 .4 .2."""
    jitter_probability: float = within(0.8, 0, 1)
    """Share of the images that are jittered."""
    precision: Literal["f32", "bf16"] = "f32"
    """Of the convolutions in training; parameters, BatchNorm and loss are float32."""
    checkpoint_every: int = within(1, 1, 100000, operational=True)
    """Epochs between two checkpoints."""
    log_every: int = within(50, 1, MANY, operational=True)
    """Steps between two lines of progress, where there is no terminal."""
    devices: int = within(0, 0, MANY, operational=True)
    """Devices to train on; 0: all. The numbers are the same but for the order of sums."""
    threads: int = within(0, 0, MANY, operational=True)
    """Threads that read and decode; 0: one a core."""


@dataclass(frozen=True)
class SegmentConfig:
    """Train a UNet on images with masks, on a ResNet encoder of any start."""

    encoder: str = field(metadata=POSITIONAL)
    """What the UNet's encoder starts from, as `embed` takes it; `random:resnet18` for none."""
    out: str
    """The run folder; the same again goes on where it was stopped."""
    task: TaskConfig = field(default_factory=TaskConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    freeze: bool = False
    """Train the decoder alone; the encoder's weights and running statistics stay (paper: no)."""
    crop_px: int = within(256, 32, 4096)
    """Side of the training crops, px of the images as they are; a multiple of 32. Ours."""
    crops: int = within(1, 1, 4096)
    """Crops of an image in an epoch, at random places. Ours."""
    percent: float = within(100.0, 1e-9, 100)
    """Percent of the training images that are used (paper: 5, 10, 20, 50, 100)."""
    scarce: Literal["group", "image"] = "group"
    """Whether few percent are few groups, or few images of each."""
    repeat: int = within(0, 0, MANY)
    """Number of the draw of these (paper: 5 repeats)."""
    mpp: float | None = within(None, 1e-3, 1e3)
    """Pixel size of the images in um/px, written into the UNet for use on slides; none: that of
    the encoder's tiles, where its file says one alone."""
    mean: tuple[float, float, float] | None = within(None, -10, 10)
    """Of an encoder whose file does not say, as in `embed`."""
    std: tuple[float, float, float] | None = within(None, 1e-3, 10)
    """Likewise."""
    overlap_px: int | None = within(None, 0, 4096)
    """Of the windows that the test images are predicted in, as in `predict`."""
    margin_px: int | None = within(None, 0, 4096)
    """Likewise."""
    draws: int = within(1000, 1, MANY)
    """Bootstrap draws of the test images, or of their groups, for the intervals."""
    licence: str = ""
    """Licence of the weights, written into the UNet."""
    keep_checkpoints: bool = field(default=False, metadata=OPERATIONAL)
    """Keep the state of training after its end: 400 MB of a ResNet18's UNet."""


@dataclass(frozen=True)
class PredictConfig:
    """Masks of images and whole slides from a trained UNet."""

    inputs: tuple[str, ...] = field(metadata=POSITIONAL)
    """Image files, whole slides, and folders of either."""
    unet: str
    """Run folder of `jaxhisto segment`, or a unet.safetensors."""
    out: str
    """Folder for NAME.mask.png (class ids), NAME.overlay.png and predictions.json."""
    kind: Literal["auto", "images", "slides"] = "auto"
    """Whether `inputs` are images or whole slides, where their names do not say (.tif)."""
    tile_mpp: float | None = within(None, 0.01, 100)
    """Pixel size at which slides are read, um/px; none: the UNet's own."""
    mpp: float | None = within(None, 0.02, 100)
    """Pixel size at level 0 in um/px for slides that do not state one."""
    window_px: int = within(0, 0, 8192)
    """Side of the windows, a multiple of 32; 0: of the UNet's training crops. Ours, as the next."""
    overlap_px: int | None = within(None, 0, 8192)
    """By which neighbouring windows overlap, a multiple of 32; none: half a window."""
    margin_px: int | None = within(None, 0, 4096)
    """Edge of a window that does not count where a neighbour has it too; none: an eighth of a
    window. Between the margins windows are blended by sin^2."""
    batch: int = within(8, 1, 4096)
    """Windows that all devices take at a time."""
    overlay: bool = True
    """Also draw the mask over the image."""
    overlay_px: int = within(2048, 64, 65536)
    """Longest side of that picture; larger images are shrunk."""
    opacity: float = within(0.4, 0, 1)
    """Of the classes' colours in it."""
    devices: int = within(0, 0, MANY, operational=True)
    """Devices to use; 0: all."""
    force: bool = field(default=False, metadata=OPERATIONAL)
    """Replace what is there under these names."""


@dataclass(frozen=True)
class FinetuneConfig:
    """An encoder and a linear layer trained on a task, all layers of them (paper: sec. 4.2)."""

    encoder: str = field(metadata=POSITIONAL)
    """What to start from, as `embed` takes it: run folder, encoder.safetensors, another project's
    file, a name of `jaxhisto zoo list`, `random:resnet18`."""
    out: str
    """Folder of the result; the same line again goes on where it was."""
    task: TaskConfig = field(default_factory=TaskConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    freeze: Literal["none", "bn", "encoder"] = "none"
    """`none`: all layers are trained (paper: fine-tuning), BatchNorm by the global batch; `bn`:
    BatchNorm keeps and uses the running statistics it came with, its scale and bias are trained;
    `encoder`: the last layer alone is trained (paper: last layer), on the features as they are."""
    percent: float = within(100.0, 1e-9, 100)
    """Percent of the training images that are used (paper: 5, 10, 20, 50, 100)."""
    scarce: Literal["group", "image"] = "group"
    """Whether few percent are few groups, or few images of each."""
    repeat: int = within(0, 0, MANY)
    """Number of the draw of these (paper: 5 repeats)."""
    seed: int = within(0, 0, MANY)
    """Seed of that draw and of the bootstrap; weights and order have `training.seed`."""
    draws: int = within(1000, 1, MANY)
    """Bootstrap draws of the test images, or of their groups, for the intervals."""
    mean: tuple[float, float, float] | None = within(None, -10, 10)
    """Of an encoder whose file does not say, as in `embed`."""
    std: tuple[float, float, float] | None = within(None, 1e-3, 10)
    """Likewise."""
    licence: str = ""
    """Licence of the trained weights, written into their file; empty: that of the encoder's."""
    keep_checkpoints: bool = field(default=False, metadata=OPERATIONAL)
    """Keep the state of training after its end: 450 MB of a ResNet18."""
    cache_gb: float = within(2.0, 0, 1e6, operational=True)
    """Images are kept in memory, resized, where they need no more than this, GB."""


@dataclass(frozen=True)
class ClassifyConfig:
    """What a fine-tuned encoder says of tiles, images or whole slides, as a CSV file."""

    model: str = field(metadata=POSITIONAL)
    """Folder of `jaxhisto finetune`."""
    tiles: tuple[str, ...] = field(metadata=POSITIONAL)
    """Tiles, images or slides, as `embed` takes them."""
    out: str
    """The CSV file to write: name, x, y, class and a score a class, or the number."""
    kind: Literal["auto", "tiles", "slides"] = "auto"
    """Whether `tiles` are images or whole slides, where their names do not say (.tif)."""
    exclude: tuple[str, ...] = ()
    """Shell patterns of what is left out: image names, slide ids of a store."""
    max_side: int = within(512, 32, 8192)
    """Images (no store's tiles) with a longer side are cut into equal cells no longer, px."""
    cut: CutConfig = field(default_factory=CutConfig)
    batch: int = within(64, 1, 4096)
    """Tiles that a device takes at a time."""
    devices: int = within(0, 0, MANY, operational=True)
    """Devices to use; 0: all."""
    threads: int = within(0, 0, MANY, operational=True)
    """Threads that read and decode; 0: one a core."""
    force: bool = field(default=False, metadata=OPERATIONAL)
    """Replace what is there under that name."""
