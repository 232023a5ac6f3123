"""What a fine-tuning is known by, and the files that it leaves: written and read."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxhisto import __version__, tensor_file, weights
from jaxhisto.config import ModelConfig
from jaxhisto.console import warn
from jaxhisto.data.named_images import NamedImages
from jaxhisto.downstream.classifier import Targets
from jaxhisto.downstream.encoders import Encoder
from jaxhisto.downstream.probing import Divided
from jaxhisto.downstream.training import Fitted
from jaxhisto.errors import ExportError
from jaxhisto.pretrain.encoder import write_golden
from jaxhisto.runlog import write_atomically
from jaxhisto.tasks.copies import copies_across
from jaxhisto.tasks.task import Split, Task
from jaxhisto.training_config import FinetuneConfig

SPLIT, RESULT = "split.json", "result.json"
ENCODER, GOLDEN, HEAD = "encoder.safetensors", "golden.safetensors", "head.safetensors"
PREDICTIONS = "predictions.csv"
HEAD_FORMAT = "jaxhisto-head-1"

Tree = dict[str, Any]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Facts:
    """What was trained, on what.

    Fields:
      encoder_sha256: of the weights at the start.
      split_sha256: of the split.
      labels_sha256: of all images' names and labels or targets.
      images_sha256: of the files of the images trained, chosen and tested on.
      trained_on: names of the images trained on, sorted.
    """

    encoder_sha256: str
    split_sha256: str
    labels_sha256: str
    images_sha256: str
    trained_on: tuple[str, ...]

    def hashes(self) -> dict[str, str]:
        """Of everything, which the folder and a checkpoint must agree with."""
        return {
            "encoder_sha256": self.encoder_sha256,
            "split_sha256": self.split_sha256,
            "labels_sha256": self.labels_sha256,
            "images_sha256": self.images_sha256,
            "trained_on_sha256": _sha256(list(self.trained_on)),
        }


def facts_of(
    task: Task, split: Split, encoder: Encoder, train: NDArray[np.int64], threads: int = 0
) -> Facts:
    """Of a fine-tuning on these rows.

    Raises:
      StoreError: an image cannot be read.
    """
    labels = sorted(zip(task.names, np.asarray(task.values).tolist(), strict=True))
    names = tuple(sorted(task.names[i] for i in train))
    used = sorted(task.names[i] for i in (*train, *split.validation, *split.test))
    assert isinstance(task.images, NamedImages)  # as of all tasks but those with masks
    digests = replace(task.images, names=tuple(used)).digests(threads)
    images = [[name, digest.hex()] for name, digest in zip(used, digests, strict=True)]
    copies = copies_across(task, split, dict(zip(used, digests, strict=True)))
    if copies:
        warn(copies)
    return Facts(
        encoder.sha256,
        split.sha256,
        _sha256([labels, list(task.classes)]),
        _sha256(images),
        names,
    )


def write_model(
    out: Path,
    config: FinetuneConfig,
    task: Task,
    encoder: Encoder,
    targets: Targets,
    params: Tree,
    batch_stats: Tree,
    head: Tree,
    fitted: Fitted,
    facts: Facts,
) -> None:
    """encoder.safetensors, golden.safetensors and head.safetensors of the chosen weights.

    The encoder has no projection: what one was trained for is no longer there. A regression's
    layer gives numbers in the targets' unit.
    """
    steps = fitted.steps * fitted.epoch // fitted.epochs
    metadata = weights.describe_imported(
        encoder.arch,
        0,
        encoder.mean,
        encoder.std,
        tile_px=config.task.side,
        mpp_range=None,
        licence=config.licence or encoder.licence,
        source={
            "file": Path(encoder.name).name,
            "sha256": encoder.sha256,
            "recognised": f"fine-tuned on {task.name}, {len(facts.trained_on)} images",
        },
    ) | {"data_hash": facts.hashes()["trained_on_sha256"], "step": str(steps)}
    digest = weights.write_encoder(out / ENCODER, params, batch_stats, metadata)
    model = ModelConfig(encoder.arch, mean=encoder.mean, std=encoder.std)  # type: ignore[arg-type]
    write_golden(out / GOLDEN, out / ENCODER, model, config.task.side, digest)
    kernel, bias = (np.asarray(head[name], np.float64) for name in ("kernel", "bias"))
    if not targets.classes:
        kernel, bias = kernel * targets.deviation, bias * targets.deviation + targets.mean
    tensors: dict[str, NDArray[Any]] = {
        "fc.weight": np.ascontiguousarray(kernel.T, np.float32),
        "fc.bias": bias.astype(np.float32),
    }
    about = {
        "format": HEAD_FORMAT,
        "kind": task.kind,
        "task": task.name,
        "class_names": json.dumps(list(task.classes)),
        "encoder_sha256": digest,
        "code_version": __version__,
    }
    tensor_file.write(out / HEAD, tensors, about)


@dataclass(frozen=True, eq=False)
class Head:
    """A trained last layer: weights (d, C) and bias (C,), class names (none: a regression)."""

    kernel: NDArray[np.float32]
    bias: NDArray[np.float32]
    classes: tuple[str, ...]

    def predictions(self, features: NDArray[np.float32]) -> Floats:
        """Of features (n, d): probabilities (n, C), or numbers (n,) in the targets' unit."""
        out = features @ self.kernel + self.bias[None]
        if self.classes:
            return Targets(len(self.classes)).predictions(out)
        return np.asarray(out[:, 0], np.float64)


def read_head(folder: Path, encoder_sha256: str) -> Head:
    """The last layer of a finished fine-tuning.

    Raises:
      ExportError: none there, damaged, or another encoder's.
    """
    path = folder / HEAD
    if not path.is_file():
        raise ExportError(
            f"{folder}: has no {HEAD}; give the folder of a finished `jaxhisto finetune`."
        )
    tensors, about = tensor_file.read(path)
    if about.get("format") != HEAD_FORMAT or tensors.keys() != {"fc.weight", "fc.bias"}:
        raise ExportError(f"{path}: is no last layer of ours; fine-tune again.")
    if about["encoder_sha256"] != encoder_sha256:
        raise ExportError(
            f"{path}: belongs to another encoder than the {ENCODER} beside it; keep the files of "
            "one fine-tuning together."
        )
    names = tuple(json.loads(about["class_names"]))
    return Head(tensors["fc.weight"].T, tensors["fc.bias"], names)


def write_predictions(
    out: Path, task: Task, data: Divided, predictions: Mapping[str, Floats]
) -> None:
    """predictions.csv: a row an image, in the task's order, with the truth and the scores."""
    head = ["name", "part", "group", "truth", "predicted"]
    rows = [head + [f"score_{name}" for name in task.classes]]
    for part, found in predictions.items():
        for i, values in zip(getattr(data, part), found, strict=True):
            truth = task.classes[data.y[i]] if task.classes else repr(float(data.y[i]))
            group = "" if task.groups is None else task.groups[i]
            rows.append([task.names[i], part, group, truth, *said(values, task.classes)])
    write_atomically(out / PREDICTIONS, as_csv(rows))


def said(values: Any, classes: tuple[str, ...]) -> list[str]:
    """The columns of one prediction: class and scores (C,), or the number."""
    if not classes:
        return [f"{float(values):.9g}"]
    return [classes[int(np.argmax(values))], *(f"{value:.9g}" for value in values)]


def as_csv(rows: list[list[str]]) -> str:
    """Lines of CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _sha256(content: Any) -> str:
    text = json.dumps(content, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
