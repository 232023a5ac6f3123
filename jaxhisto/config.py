"""Every setting, as frozen dataclasses: unit, range and source beside each field.

Defaults live here and nowhere else. A field marked `operational` says how a run is carried
out (devices, threads, logging) and may change between two starts of the same run; every
other field is part of the run's identity. The text under a field is its help on the command
line. "Ours" marks a value on which the paper is silent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

OPERATIONAL: dict[str, Any] = {"operational": True}
POSITIONAL: dict[str, Any] = {"positional": True}
MANY = 2**31 - 1


def within(default: Any, low: float, high: float, **meta: Any) -> Any:
    """A field whose number, or each of whose numbers, must lie in low..high."""
    return field(default=default, metadata={"range": (low, high), **meta})


@dataclass(frozen=True)
class TileConfig:
    """Cut slides into a store of foreground tiles."""

    slides: tuple[str, ...] = field(metadata=POSITIONAL)
    """Slides, or folders that are searched for slides."""
    out: str
    """Folder of the tile store; made if absent, completed if an earlier run was stopped."""
    dataset: str = ""
    """Dataset name stored with each tile; empty: the name of the store's folder."""
    dataset_by_folder: bool = False
    """Each slide's dataset is the first folder below the path given: one store of many datasets,
    which `sample` keeps apart. `dataset` is then the name of the whole."""
    tile_px: int = within(224, 8, 8192)
    """Side of a tile in pixels (paper: 224)."""
    tile_mpp: float | None = within(None, 0.01, 100)
    """Pixel size of the tiles in um/px; none: each slide's own highest resolution (paper)."""
    mpp: float | None = within(None, 0.02, 100)
    """Pixel size at level 0 in um/px for slides that do not state one."""
    mpp_source: Literal["flag", "assumed"] = "flag"
    """What `--mpp` is recorded as: `flag`, a figure you know, or `assumed`, a guess."""
    foreground: Literal["ciga2022", "otsu", "od"] = "ciga2022"
    """Foreground rule: `ciga2022` (paper, App. B: violet to pink in OpenCV's units), `otsu`
    (on saturation) or `od` (haematoxylin + eosin optical density)."""
    close_um: float = within(100.0, 0, 2000)
    """Radius of `ciga2022`'s morphological close, in um on the slide; 0 switches it off. Ours."""
    pen: Literal["none", "green_blue", "all"] = "green_blue"
    """Tiles with marker ink on a tenth or more are left out: `green_blue` ink; `all`, red and black
    too, which may take blood and pigment; `none` for alcian blue, trichrome and the like. Ours."""
    min_foreground: float = within(0.5, 0, 1)
    """Share of a tile that must be foreground, 0..1 (paper: 0.5)."""
    max_tiles: int = within(100, 0, MANY)
    """Most tiles taken of one slide, drawn at random (paper: 100); 0: all."""
    seed: int = within(0, 0, MANY)
    """Seed of the draw; a slide's tiles depend on (seed, slide id) alone."""
    jpeg_quality: int = within(95, 1, 100)
    """JPEG quality of the stored tiles, 1..100. Ours."""
    jpeg_subsampling: Literal["4:4:4", "4:2:2", "4:2:0"] = "4:4:4"
    """Chroma subsampling of the stored tiles; stains live in chroma, so 4:4:4. Ours."""
    passthrough: bool = False
    """Store the slide's own JPEG tiles as they are where those are the tiles asked for (same side,
    no resizing; Aperio and generic TIFF), at the slide's quality and subsampling. Ours."""
    failures_allowed: int = within(0, 0, MANY, operational=True)
    """Slides that may fail before the exit code is 1; the store is complete without them."""
    processes: int = within(0, 0, MANY, operational=True)
    """Slides cut at the same time, each in a process of its own; 0: one a core."""
    slide_timeout: float = within(3600.0, 1, 1e7, operational=True)
    """Seconds after which a slide's process is ended; a slide that takes as long again when all
    others are done counts as failed."""
    check_disk: bool = field(default=True, metadata=OPERATIONAL)
    """Refuse to start where the tiles clearly do not fit on the disk of `out`."""
    beam: str = field(default="", metadata=OPERATIONAL)
    """Flags of an Apache Beam runner, which cuts the slides in place of local processes:
    `--beam="--runner=FlinkRunner --flink_master=HOST:8081"`. Slides and `out` must lie under the
    same paths on all its workers. Needs the extra `beam`."""


@dataclass(frozen=True)
class DataConfig:
    """What is trained on, and how it is read."""

    stores: tuple[str, ...] = ()
    """Tile stores written by `jaxhisto tile`; folders, zip, tar and HDF5 files of images; CSV lists
    of images; `tfds:NAME`."""
    manifest: str = ""
    """List of tiles from `jaxhisto sample`: exactly those of `stores` are trained on; not with
    `exclude`. The file may move between two starts, what it lists may not change."""
    exclude: tuple[str, ...] = ()
    """Shell patterns of what is left out: names in an image folder or file, slide ids of a store;
    `C5_*` keeps a test section out."""
    max_side: int = within(512, 32, 8192)
    """Images (no store's tiles) with a longer side are cut into equal cells no longer, px. Ours."""
    failures_allowed: int = within(0, 0, MANY)
    """Images (no store's tiles) that may be unreadable; they are dropped, counted and listed."""
    threads: int = within(0, 0, MANY, operational=True)
    """Threads that read and decode; 0: one a core."""
    prefetch: int = within(4, 0, MANY, operational=True)
    """Batches decoded ahead."""
    cache: Literal["none", "host", "device"] = field(default="none", metadata=OPERATIONAL)
    """Decode each tile once, at the start, and keep it: `host`, in the memory of each process;
    `device`, shared out among the memories of the devices; `none`: read each batch anew."""


@dataclass(frozen=True)
class AugmentConfig:
    """The random view of a tile (paper: App. C)."""

    crop_area: tuple[float, float] = within((0.01, 1.0), 1e-6, 1, ordered=True)
    """Area of the random crop as a share of the tile (paper: 1..100 % is best)."""
    crop_ratio: tuple[float, float] = within((3 / 4, 4 / 3), 0.01, 100, ordered=True)
    """Aspect ratio of the crop, log-uniform. Ours."""
    rot90: bool = True
    """Turn by 0, 90, 180 or 270 degrees, 25 % each (paper)."""
    flips: bool = True
    """Flip each axis with 50 % (paper)."""
    jitter: Literal["none", "light", "medium", "heavy"] = "medium"
    """Brightness, contrast, saturation, hue: light .4 .4 .4 .2, medium .8 .8 .8 .2 (paper's
    best), heavy .8 .8 .8 .4."""
    jitter_probability: float = within(0.8, 0, 1)
    """Share of views that are jittered. Ours."""
    grey_probability: float = within(0.0, 0, 1)
    """Share of views turned grey; the paper names none, google-research/simclr has 0.2. Ours."""
    blur_probability: float = within(0.5, 0, 1)
    """Share of views that are blurred (paper)."""
    blur_sigma: tuple[float, float] = within((0.1, 2.0), 1e-3, 100, ordered=True)
    """Range of the Gaussian's sigma in pixels, uniform (paper); the kernel is a tenth of the
    side (23 taps at 224)."""


@dataclass(frozen=True)
class ModelConfig:
    """Encoder and projection."""

    name: Literal["resnet10", "resnet18", "resnet34", "resnet50", "resnet101"] = "resnet18"
    """Encoder; resnet10 has one block a stage and is for smoke runs."""
    projection: int = within(128, 1, 65536)
    """Width of z (paper: 128)."""
    mean: tuple[float, float, float] = within((0.5, 0.5, 0.5), -10, 10)
    """Mean that is subtracted from RGB in 0..1 (published weights: 0.5)."""
    std: tuple[float, float, float] = within((0.5, 0.5, 0.5), 1e-3, 10)
    """Standard deviation that RGB in 0..1 is divided by (published weights: 0.5)."""
    bn_group: int = within(0, 0, MANY)
    """BatchNorm over groups of so many consecutive images of the global batch, both views of
    each; 0: over the whole batch. The groups are the same on any number of devices. Ours."""


@dataclass(frozen=True)
class OptimConfig:
    """Loss temperature, optimizer and schedule."""

    name: Literal["lars", "lamb", "adam"] = "lars"
    """Optimizer (paper: LARS, LAMB and Adam compared in C.6)."""
    temperature: float = within(0.1, 1e-4, 1e4)
    """NT-Xent's tau (paper's best: 0.1, Table C.6)."""
    rate: float | None = within(None, 0, 1e4)
    """Peak learning rate; none: the paper's rule (LARS 0.3 N/256, LAMB 0.005 at N = 512,
    Adam 1e-4)."""
    weight_decay: float = within(1e-6, 0, 10)
    """Weight decay (paper); biases and BatchNorm are exempt under LARS and LAMB (ours)."""
    momentum: float = within(0.9, 0, 1)
    """LARS momentum. Ours, as google-research/simclr."""
    trust_coefficient: float = within(0.001, 0, 10)
    """LARS trust coefficient. Ours, as google-research/simclr."""
    warmup_epochs: float = within(10.0, 0, 1e6)
    """Linear warm-up from 0, epochs, at most `warmup_share` of the steps. Ours."""
    warmup_share: float = within(0.1, 0, 1)
    """Longest warm-up as a share of all steps. Ours."""


@dataclass(frozen=True)
class MemoryConfig:
    """What a step holds at a time; what is learnt is the same, but for rounding."""

    loss: Literal["auto", "dense", "chunked"] = field(default="auto", metadata=OPERATIONAL)
    """NT-Xent's similarities: `dense`, all (2N)^2 on each device; `chunked`, the device's own
    rows by `loss_chunk` columns; `auto`, dense up to N = 1024."""
    loss_chunk: int = within(1024, 1, MANY, operational=True)
    """Columns (views) that the chunked loss takes at a time. Ours."""
    remat: Literal["none", "block"] = field(default="none", metadata=OPERATIONAL)
    """`block`: keep the inputs of the residual blocks alone and compute what lies inside again
    for the gradient."""
    accumulate: int = within(1, 1, MANY, operational=True)
    """Micro-batches in which a batch passes through the network, one after the other; the loss
    has all negatives. Needs `--model.bn-group`, so that BatchNorm is the same in one or many."""

    def columns(self, batch_size: int) -> int:
        """Columns that the loss takes at a time at a global batch of N images; 0: dense.

        Of N alone, never of the devices: the same loss on any number of them. Dense takes
        48 N^2 bytes on each device (benchmarks/loss_memory.py: three float32 matrices): 50 MB
        at 1024, little beside the activations of as many images, 206 GB at 65,536.
        """
        chunked = self.loss == "chunked" or (self.loss == "auto" and batch_size > 1024)
        return self.loss_chunk if chunked else 0


@dataclass(frozen=True)
class StepConfig:
    """How a step is computed, which `bench --variants` measures; it learns the same, but for
    rounding."""

    stem: Literal["plain", "space_to_depth"] = field(default="plain", metadata=OPERATIONAL)
    """The first convolution: `space_to_depth`, 2x2 pixels as twelve channels under a 4x4 kernel in
    place of 7x7 with stride 2; what is saved and exported stays 7x7. Ours."""
    xla: tuple[str, ...] = field(default=(), metadata=OPERATIONAL)
    """Options of the XLA compiler for the step, NAME=VALUE, as
    `xla_gpu_enable_latency_hiding_scheduler=true`; names that this XLA does not know are refused.
    Options of fast math change what is learnt."""


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes; docs/pods.md has the lines for each kind of cluster."""

    coordinator: str = field(default="", metadata=OPERATIONAL)
    """host:port of process 0; empty: JAXHISTO_COORDINATOR, else what JAX finds (Slurm, Open MPI,
    Cloud TPU, Kubernetes), else one process."""
    processes: int | None = within(None, 1, 1 << 20, operational=True)
    """How many there are; none: JAXHISTO_PROCESSES, or as JAX finds; 1: train alone."""
    process: int | None = within(None, 0, 1 << 20, operational=True)
    """Which one this is, from 0; none: JAXHISTO_PROCESS, or as JAX finds."""
    start_timeout: int = within(300, 1, MANY, operational=True)
    """Seconds that processes wait for each other at the start."""
    heartbeat: int = within(20, 2, 3600, operational=True)
    """Seconds of silence after which a process counts as lost."""


@dataclass(frozen=True)
class MonitorConfig:
    """What is measured beside the loss while a run trains; it changes nothing in the run."""

    images: str = field(default="", metadata=OPERATIONAL)
    """Folder of labelled images for the probes: a folder for each class, or any with `labels`."""
    labels: str = field(default="", metadata=OPERATIONAL)
    """CSV file with a row an image of `images`."""
    label: str = field(default="", metadata=OPERATIONAL)
    """Its column of classes."""
    file: str = field(default="file", metadata=OPERATIONAL)
    """Its column of image names, relative to `images`."""
    classes: tuple[str, ...] = field(default=(), metadata=OPERATIONAL)
    """Classes to tell apart; empty: all."""
    group: str = field(default="", metadata=OPERATIONAL)
    """Its column of groups (patient, slide), which the split never tears."""
    test: tuple[str, ...] = field(default=(), metadata=OPERATIONAL)
    """Groups to test on; empty: half of the groups, or of each class, drawn from their names."""
    every: int = within(0, 0, MANY, operational=True)
    """Steps between measurements; 0: before the first step, at checkpoints and at the end, and
    that only where `images` names a labelled set."""
    limit: int = within(4000, 0, MANY, operational=True)
    """Most labelled images taken, drawn from their names; 0: all. They stay in memory. Ours."""
    tiles: int = within(512, 2, 65536, operational=True)
    """The run's own tiles of which two fixed views each are looked at. Ours."""
    tile_px: int = within(0, 0, 8192, operational=True)
    """Side of the labelled images as fed, pixels; 0: the run's `tile_px`."""
    k: int = within(20, 1, MANY, operational=True)
    """Neighbours of the kNN probe (DINO: 20)."""
    min_rank: float = within(2.0, 0, 1e6, operational=True)
    """Effective rank of z below which a run is called collapsed after its warm-up. Ours."""


@dataclass(frozen=True)
class PretrainConfig:
    """Train an encoder on tiles without labels (SimCLR)."""

    out: str
    """Run folder; the same folder again resumes."""
    steps: int | None = within(None, 1, MANY)
    """Optimizer steps; replaces `epochs`."""
    epochs: float | None = within(None, 1e-6, 1e9)
    """Passes over the data (paper: 1000, taken when neither is given)."""
    batch_size: int = within(512, 2, MANY)
    """Images N in the global batch, over all devices; 2N views (paper: 512)."""
    tile_px: int = within(224, 8, 8192)
    """Side of a view in pixels: the crop comes from the whole tile and is resized once."""
    seed: int = within(0, 0, MANY)
    """Order, augmentation and initial weights are functions of (seed, step, row)."""
    precision: Literal["bf16", "f32"] = "bf16"
    """Of the convolutions; parameters, BatchNorm statistics and logits are float32."""
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    step: StepConfig = field(default_factory=StepConfig)
    init: str = ""
    """Start from this encoder instead of random weights: a run folder, an encoder.safetensors
    (`jaxhisto import` writes one of other people's files), or a name of `jaxhisto zoo list`."""
    extend: bool = field(default=False, metadata=OPERATIONAL)
    """Allow an existing run to get another number of steps (changes the cosine schedule)."""
    checkpoint_every: int = within(1000, 1, MANY, operational=True)
    """Steps between checkpoints; the last step is always saved."""
    keep: int = within(3, 1, MANY, operational=True)
    """Newest checkpoints kept."""
    keep_every: int = within(0, 0, MANY, operational=True)
    """Besides, checkpoints of steps divisible by this are kept for good; 0: none."""
    deterministic: bool = field(default=False, metadata=OPERATIONAL)
    """On a GPU, go on bit for bit after a kill: no kernel whose sums depend on timing, and what
    XLA's autotuning chose is kept in the run folder. Changes nothing on a CPU or TPU."""
    devices: int = within(0, 0, MANY, operational=True)
    """Devices to shard the batch over; 0: all."""
    log_every: int = within(50, 1, MANY, operational=True)
    """Steps between progress lines where there is no terminal; every step is recorded."""
    tensorboard: bool = field(default=False, metadata=OPERATIONAL)
    """Also write TensorBoard events (extra `tensorboard`)."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    profile: tuple[int, int] | None = within(None, 1, MANY, operational=True, ordered=True)
    """First and last step of a profiler trace, written into the run folder."""


@dataclass(frozen=True)
class DemoConfig:
    """The whole chain: slide, tiles, pretraining, PyTorch file, verification."""

    out: str = "demo"
    """Folder of everything the demo writes; made anew each time."""
    slides: str = ""
    """A folder of your own slides; empty: the micrograph that ships with scikit-image."""
    mpp: float | None = within(None, 0.02, 100)
    """Pixel size in um/px for slides of yours that state none."""
    foreground: Literal["", "ciga2022", "otsu", "od"] = ""
    """Foreground rule; empty: `otsu` for the micrograph, `ciga2022` for slides of yours."""
    tile_px: int = within(64, 32, 1024)
    """Side of tiles and views in pixels."""
    steps: int = within(40, 1, MANY)
    """Optimizer steps."""
    batch_size: int = within(32, 2, MANY)
    """Images in a batch."""
    name: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet18"
    """Encoder."""


@dataclass(frozen=True)
class DoctorConfig:
    """What is installed, whether it works, and what to do where it does not."""

    pod: bool = False
    """Instead: prove on these devices that all of them together train as one alone does. Start
    the same line on every host of a pod."""
    devices: int = within(0, 0, MANY)
    """Of `pod`: devices to compare with one, over all processes; 0: all."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)


@dataclass(frozen=True)
class PlotConfig:
    """Draw runs over each other: loss, similarities, probes, ranks, speed."""

    runs: tuple[str, ...] = field(metadata=POSITIONAL)
    """Run folders of `jaxhisto pretrain`."""
    out: str = "runs.png"
    """The picture to write; another suffix that matplotlib knows gives another format."""
