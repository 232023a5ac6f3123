"""The paper's recipe on 1 to 512 accelerators, on paper: bytes, memory, time, and what stops it.

    python benchmarks/scaling.py            # prints the tables
    python benchmarks/scaling.py --write    # puts them into docs/scaling.md

Pure arithmetic from the constants below, each with its source; nothing here is measured. What is
assumed is named so, and every assumption is generous: the tables say where scaling must stop,
not how fast a run will be.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jaxhisto.config import MemoryConfig

TILES, EPOCHS, SIDE, PROJECTION = 400_000, 1000, 224, 128
"""The paper's recipe (arXiv 2011.13971, sec. 4 and 5)."""
DEVICES = (1, 8, 64, 512)
FIXED_BATCH, SHARE = 512, 64
"""The paper's best batch, kept on any number of devices; and images a device where it grows."""
F32, BF16 = 4, 2


@dataclass(frozen=True)
class Model:
    """What the arithmetic needs to know of an encoder with its head.

    Attributes:
      parameters, channels: numbers in the trained tree; channels over all BatchNorms, of which
        there are `norms` (tests/test_scaling.py counts them in the model).
      macs: multiply-adds of one forward pass at 224 px (He et al. 2015, torchvision's table).
      outputs: elements of all convolutions' outputs at 224 px, for one view.
    """

    name: str
    parameters: int
    channels: int
    norms: int
    macs: float
    outputs: int

    @property
    def flop_per_image(self) -> float:
        """Two views; a backward pass counts as two forward ones."""
        return 2 * 3 * 2 * self.macs

    @property
    def activation_bytes(self) -> int:
        """Kept for the backward pass of one image: of each of two views each convolution's
        output and what BatchNorm and ReLU made of it, in bfloat16; and the views in float32."""
        return 2 * (2 * BF16 * self.outputs + F32 * SIDE * SIDE * 3)


MODELS = (
    Model("ResNet18", 11_504_832, 4_800, 20, 1.82e9, 2_483_712),
    Model("ResNet50", 27_966_656, 26_560, 53, 4.11e9, 11_113_984),
)


@dataclass(frozen=True)
class Machine:
    """An accelerator and what connects it.

    Attributes:
      flops: operations a second of bfloat16 products; f32_flops: of float32 ones.
      memory_gb: of one device, 1e9 bytes.
      near, far: bytes a second each way of one device within a group of `group` devices, and
        between groups.
      latency_s: of one hop of a small exchange.
    """

    name: str
    flops: float
    f32_flops: float
    memory_gb: float
    group: int
    near: float
    far: float
    latency_s: float


MACHINES = (
    # 790 TFLOP/s: products as large as can be, not the datasheet's 989; 67 in float32; 141 GB;
    # NVLink 4: 900 GB/s both ways (NVIDIA H200 datasheet); one 400 Gb/s InfiniBand NDR adapter
    # a GPU (DGX H200 guide). Latency of a hop assumed.
    Machine("H200", 790e12, 67e12, 141, 8, 450e9, 50e9, 5e-6),
    # 459 TFLOP/s, 95 GB, 4,800 Gb/s of interconnect a chip, both ways (Google Cloud, TPU v5p).
    # float32 is six bfloat16 passes. A torus of up to 8,960 chips: no second network. Latency
    # of a hop assumed.
    Machine("TPU v5p", 459e12, 76e12, 95, 8_960, 300e9, 300e9, 1e-6),
)
UTILISATION = 0.35
"""Share of `flops` that convolutions reach. Assumed: ResNets are bound by memory, not products."""


def all_reduce_s(size: float, devices: int, machine: Machine) -> float:
    """Seconds to sum `size` bytes over all devices: within groups, then between them.

    Each byte is sent and received twice but for the own share (Patarasuk, Yuan 2009); a small
    exchange goes up and down a tree of log2(devices) hops.
    """
    if devices == 1:
        return 0.0
    inside = min(devices, machine.group)
    groups = devices // inside
    near = 2 * (inside - 1) / inside * size / machine.near
    far = 2 * (groups - 1) / groups * size / inside / machine.far
    return near + far + 2 * math.log2(devices) * machine.latency_s


def all_gather_s(size: float, devices: int, machine: Machine) -> float:
    """Seconds until each device has all of `size` bytes that lie in shares; half a sum."""
    return all_reduce_s(size, devices, machine) / 2


@dataclass(frozen=True)
class Step:
    """One training step of a model, at a batch, on devices: sizes and times."""

    model: Model
    machine: Machine
    devices: int
    batch: int

    @property
    def gradient_bytes(self) -> float:
        """A float32 a parameter."""
        return F32 * self.model.parameters

    @property
    def norm_bytes(self) -> float:
        """Sum and sum of squares of each channel, forward; the two sums of their gradient."""
        return 2 * 2 * F32 * self.model.channels

    @property
    def columns(self) -> int:
        """Views that the loss takes at a time by `--memory.loss auto`; 0: all, the dense form."""
        return MemoryConfig().columns(self.batch)

    @property
    def z_bytes(self) -> float:
        """Both projections of each image, float32; the chunked loss gathers three numbers more."""
        return 2 * F32 * (PROJECTION + (3 if self.columns else 0)) * self.batch

    @property
    def sent_bytes(self) -> float:
        """What one device sends (and receives) in a step."""
        others = (self.devices - 1) / self.devices
        return others * (2 * self.gradient_bytes + 2 * self.norm_bytes + self.z_bytes)

    @property
    def compute_s(self) -> float:
        """Convolutions on the own images, and the loss in float32: three products of the 2N x 2N
        similarities by 128, whole on each device in the dense form, shared out in the chunked."""
        loss = 3 * 2 * (2 * self.batch) ** 2 * PROJECTION / self.machine.f32_flops
        return self.convolutions_s + loss / (self.devices if self.columns else 1)

    @property
    def convolutions_s(self) -> float:
        """What would be left if devices need not talk and the loss cost nothing."""
        images = self.batch / self.devices
        return images * self.model.flop_per_image / (self.machine.flops * UTILISATION)

    @property
    def norm_s(self) -> float:
        """BatchNorm's exchanges, forward and backward: none can wait for another."""
        each = self.norm_bytes / (2 * self.model.norms)
        return 2 * self.model.norms * all_reduce_s(each, self.devices, self.machine)

    @property
    def gradient_s(self) -> float:
        """The sum of the gradients, as if none of it hid behind the backward pass."""
        return all_reduce_s(self.gradient_bytes, self.devices, self.machine)

    @property
    def seconds(self) -> float:
        """The whole step."""
        gather = all_gather_s(self.z_bytes, self.devices, self.machine)
        return self.compute_s + self.norm_s + self.gradient_s + gather

    @property
    def memory_bytes(self) -> float:
        """Of one device: weights, gradient, momentum; activations; the loss (docs/memory.md):
        three 2N x 2N dense; chunked, two blocks of the own rows and three times all views."""
        state = 3 * F32 * self.model.parameters
        images = self.batch / self.devices * self.model.activation_bytes
        views = 2 * self.batch
        if not self.columns:
            return state + images + 3 * F32 * views**2
        blocks = 2 * F32 * views / self.devices * min(self.columns, views)
        return state + images + blocks + 3 * F32 * views * PROJECTION

    @property
    def images_per_s(self) -> float:
        """Of all devices together."""
        return self.batch / self.seconds

    @property
    def efficiency(self) -> float:
        """Share of the step that convolutions take."""
        return self.convolutions_s / self.seconds

    @property
    def held_up_by(self) -> str:
        """What a step spends most of the rest of its time on."""
        parts = {
            "BatchNorm's exchanges": self.norm_s,
            "gradients": self.gradient_s,
            "the loss": self.compute_s - self.convolutions_s,
        }
        if self.memory_bytes > self.machine.memory_gb * 1e9:
            return "does not fit"
        if self.efficiency > 0.95:
            return "nothing"
        return max(parts, key=lambda name: parts[name])

    @property
    def hours(self) -> float:
        """All epochs; an epoch's last, smaller batch is left out."""
        return EPOCHS * (TILES // self.batch) * self.seconds / 3600


def batches() -> Iterator[tuple[str, dict[int, int]]]:
    """The two ways to use more devices: (title, batch by devices)."""
    yield f"Batch {FIXED_BATCH} on any number", dict.fromkeys(DEVICES, FIXED_BATCH)
    yield f"{SHARE} images a device", {devices: SHARE * devices for devices in DEVICES}


HEAD = (
    "model", "devices", "batch", "images a device", "sent a step, MB", "memory, GB",
    "convolutions, ms", "BatchNorm, ms", "gradients, ms", "step, ms", "images/s", "efficiency",
    "hours", "held up by",
)  # fmt: skip


def row(step: Step) -> list[str]:
    """A line of a table."""
    return [
        step.model.name,
        f"{step.devices}",
        f"{step.batch:,}",
        f"{step.batch // step.devices}",
        f"{step.sent_bytes / 1e6:.1f}",
        f"{step.memory_bytes / 1e9:.1f}",
        f"{step.convolutions_s * 1e3:.2f}",
        f"{step.norm_s * 1e3:.2f}",
        f"{step.gradient_s * 1e3:.2f}",
        f"{step.seconds * 1e3:.2f}",
        f"{step.images_per_s:,.0f}",
        f"{step.efficiency:.0%}",
        f"{step.hours:.2g}",
        step.held_up_by,
    ]


def tables() -> str:
    """All tables as Markdown."""
    parts = []
    for machine in MACHINES:
        for title, by_devices in batches():
            lines = [HEAD, ["---"] * len(HEAD)]
            lines += [
                row(Step(model, machine, devices, batch))
                for model in MODELS
                for devices, batch in by_devices.items()
            ]
            text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
            parts.append(f"### {machine.name}: {title.lower()}\n\n{text}\n")
    return "\n".join(parts)


BEGIN, END = "<!-- python benchmarks/scaling.py --write -->\n", "<!-- end -->\n"
DOC = Path(__file__).parents[1] / "docs" / "scaling.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"put the tables into {DOC.name}")
    if parser.parse_args().write:
        before, rest = DOC.read_text(encoding="utf-8").split(BEGIN)
        DOC.write_text(before + BEGIN + tables() + END + rest.split(END)[1], encoding="utf-8")
    else:
        print(tables())


if __name__ == "__main__":
    main()
