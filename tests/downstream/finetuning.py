"""What the tests of fine-tuning share: a set, lines, and what is read of a folder."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from made_sets import MEAN, SIDE, STD, read_json, tissue, write_images

from jaxhisto import tensor_file
from jaxhisto.task_config import TaskConfig
from jaxhisto.training_config import FinetuneConfig, TrainingConfig

PLAIN = ("--training.no-flips", "--training.no-rot90", "--training.jitter", "none")
BLUE, RED = "blue", "red"


STEP = ("--training.batch", 16, "--training.rate", 1e-3, "--training.weight-decay", 0.1, *PLAIN)
"""One batch an epoch, of images as they are; in all fast tests, so that one program serves them."""


CONFIG = FinetuneConfig(
    "",
    "",
    TaskConfig(label="label", side=SIDE),
    TrainingConfig(
        epochs=1,
        batch=16,
        rate=1e-3,
        weight_decay=0.1,
        flips=False,
        rot90=False,
        jitter="none",
        devices=1,
    ),
)


def labelled(folder: Path, count: int = 32) -> Path:
    """Images of two colours that overlap in none, and labels.csv: label, shuffled, patient, tint.

    Half of the images are red; their tint is how red, 0..100.
    """
    rng = np.random.default_rng(7)
    images, rows = {}, ["file,label,shuffled,patient,tint"]
    shuffled = rng.permutation(np.arange(count) % 2)
    for i, image in enumerate(tissue(count, 3)):
        tint = rng.uniform(30, 50) * (1 if i % 2 else -1)
        image = np.clip(image.astype(int) + np.array([tint, 0, -tint]).astype(int), 0, 255)
        images[f"images/{i:02d}.png"] = image.astype(np.uint8)
        names = [(BLUE, RED)[k] for k in (i % 2, shuffled[i])]
        rows.append(f"{i:02d}.png,{','.join(names)},p{i // 4 % 4},{tint + 50:.3f}")
    write_images(folder, images)
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder


def task(folder: Path, *more: object, label: str = "label") -> list[object]:
    """The flags of the set as a classification, divided by image: 16, 8 and 8 of 32."""
    flags = ["--task.data", folder / "images", "--task.labels", folder / "labels.csv"]
    return [*flags, "--task.label", label, "--task.side", SIDE, *more]


def line(place: Path, out: Path, *more: object) -> list[object]:
    """Four epochs on one device."""
    flags = ["--training.epochs", 4, "--training.devices", 1]
    return ["finetune", place / "encoder.safetensors", "--out", out, *task(place), *flags, *more]


def config_of(place: Path, out: Path, **changes: Any) -> FinetuneConfig:
    data = replace(CONFIG.task, data=str(place / "images"), labels=str(place / "labels.csv"))
    fields = {"encoder": str(place / "encoder.safetensors"), "out": str(out), "task": data}
    return replace(CONFIG, **fields | changes)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def metrics_of(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock says."""
    lines = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("epoch_s", "time")} for line in lines]


def record_of(out: Path) -> dict[str, Any]:
    """result.json without date and command."""
    return {k: v for k, v in read_json(out / "result.json").items() if k != "environment"}


def same(a: Path, b: Path) -> bool:
    """Whether two fine-tunings left the same bytes."""
    names = ("encoder.safetensors", "head.safetensors", "golden.safetensors", "predictions.csv")
    same_files = all((a / name).read_bytes() == (b / name).read_bytes() for name in names)
    return same_files and metrics_of(a) == metrics_of(b) and record_of(a) == record_of(b)


def stock(folder: Path, outputs: int) -> torch.nn.Module:
    """torchvision's ResNet, with the encoder of a folder, and no last layer yet."""
    block = torchvision.models.resnet.BasicBlock
    network = torchvision.models.resnet.ResNet(block, [1, 1, 1, 1], num_classes=outputs)
    tensors, _ = tensor_file.read(folder / "encoder.safetensors")
    own = {k: torch.tensor(v) for k, v in tensors.items() if not k.startswith("fc.")}
    missing, unexpected = network.load_state_dict(own, strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    return network


def fed(images: np.ndarray) -> torch.Tensor:
    """(n, 3, S, S), normalised."""
    scaled = torch.tensor(images).permute(0, 3, 1, 2).float() / 255
    return (scaled - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
