"""Settings of `jaxhisto bench`, as `config.py` has those of training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from jaxhisto.config import MANY, within

Stage = Literal[
    "startup",
    "compile",
    "read",
    "to_device",
    "augment",
    "forward",
    "backward",
    "optimizer",
    "communication",
    "step",
    "pipeline",
]
PeerName = Literal[
    "pytorch",
    "pytorch-compiled",
    "lightly",
    "torchvision",
    "kornia",
    "files+torchvision",
    "files+pillow",
    "files+simplejpeg",
    "store+torchvision",
    "store+tfds",
]
Encoder = Literal["resnet10", "resnet18", "resnet34", "resnet50", "resnet101"]
Cache = Literal["none", "host", "device"]


@dataclass(frozen=True)
class BenchConfig:
    """Measure training on this machine, stage by stage, or write a report of such records."""

    out: str = ""
    """The record to write, JSON; with `report`, the Markdown to write. Empty: bench.json, or
    benchmarks.md."""
    report: tuple[str, ...] = ()
    """Records to write a report of; nothing is then measured."""
    stages: tuple[Stage, ...] = get_args(Stage)
    """What to measure: start-up of the command line, compilation of the step, reading + decoding,
    host to device, augmentation, forward, backward, optimizer, communication between devices,
    the whole step on tiles that are there, and the whole pipeline from a store."""
    models: tuple[Encoder, ...] = ("resnet18",)
    """Encoders, each at each batch and side."""
    batch_sizes: tuple[int, ...] = within((), 2, MANY)
    """Images N in the global batch, twice as many views; empty: 32 on a CPU, 256 512 1024 on an
    accelerator."""
    tile_px: tuple[int, ...] = within((224,), 8, 8192)
    """Sides of tiles and views in pixels."""
    precision: Literal["auto", "bf16", "f32"] = "auto"
    """Of the convolutions; `auto`: f32 on a CPU, bf16 on an accelerator."""
    stores: tuple[str, ...] = ()
    """What to read from, as `pretrain --data.stores`; empty: a store of made tiles."""
    cache: tuple[Cache, ...] = get_args(Cache)
    """Caches to train from a store with, as `pretrain --data.cache`."""
    steps: int = within(0, 0, 100000)
    """Batches or steps of a turn of `read` and `pipeline`; 0: 4 on a CPU, 20 on an accelerator."""
    repeats: int = within(5, 1, 1000)
    """Turns that count; one before them does not."""
    threads: int = within(0, 0, MANY)
    """Cores to use; 0: all that this process may."""
    devices: int = within(0, 0, MANY)
    """Devices to shard a batch over; 0: all. More than one on a CPU shares its cores among them,
    which times communication and nothing else."""
    peers: tuple[PeerName, ...] = get_args(PeerName)
    """Others to measure by turns with ours, where they are installed: PyTorch's training as it is
    and through torch.compile, lightly's loss and LARS, augmentation by torchvision and kornia, and
    torch DataLoaders over JPEG files or the store, by decoder. Nothing after the flag: none."""
    peer_env: tuple[str, ...] = ()
    """NAME=PYTHON: the interpreter of a peer that has an environment of its own."""
    growth: bool = False
    """Instead: how time and memory grow, as fitted exponents: with the batch (64 to 16,384, or
    `batch_sizes`), the side and the depth (32 to 224 px and 18 to 101, or several `tile_px` and
    `models`), around the first of each."""
    limit: float = within(30.0, 0.1, 1e6)
    """Of `growth`: sizes whose step is expected to take longer, in seconds, are not run."""
    variants: bool = False
    """Instead: the whole step by turns with itself in other forms, the space-to-depth stem and
    options of XLA (of this platform, and for several devices): which are quicker here. `steps` of
    them are a turn; 0: 1 on a CPU, 20 on an accelerator."""
    xla: tuple[str, ...] = ()
    """Of `variants`: options NAME=VALUE, as `pretrain --step.xla`, together one variant more."""
    recipe: str = ""
    """Instead: what training by this recipe (a TOML file or the name of a shipped one) costs, and
    the paper's beside it: hours, accelerator-hours, energy."""
    record: str = ""
    """Of `recipe`: the record to take the speed from; empty: a few steps are measured."""
    tiles: int = within(0, 0, MANY)
    """Of `recipe`: tiles to train on; 0: those of `stores`, else the paper's half a million."""
