"""Settings of the verbs that train whole networks on tasks, and use them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxhisto.config import MANY, OPERATIONAL, POSITIONAL, within
from jaxhisto.downstream_config import CutConfig
from jaxhisto.task_config import TaskConfig


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
    """Devices to train on; 0: all. The numbers are the same but for the order of sums, which Adam
    makes more of (docs/tasks.md)."""
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
    """Folder for NAME.mask.png (class ids), NAME.overlay.png and predictions.json; the same line
    again goes on where it was."""
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
    max_side: int = within(8192, 32, 8192)
    """Images (no store's tiles) with a longer side are cut into equal cells no longer, px; others
    are taken as `finetune` took them, whole: the middle square at its side."""
    failures_allowed: int = within(0, 0, MANY)
    """Images (no store's tiles) or slides that may be unreadable; they are dropped, counted and
    listed."""
    cut: CutConfig = field(default_factory=CutConfig)
    batch: int = within(64, 1, 4096)
    """Tiles that a device takes at a time."""
    devices: int = within(0, 0, MANY, operational=True)
    """Devices to use; 0: all."""
    threads: int = within(0, 0, MANY, operational=True)
    """Threads that read and decode; 0: one a core."""
    force: bool = field(default=False, metadata=OPERATIONAL)
    """Replace what is there under that name."""
