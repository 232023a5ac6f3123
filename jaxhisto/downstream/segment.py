"""`jaxhisto segment`: images with masks and an encoder -> a trained UNet and what it is worth."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from jaxhisto import __version__, metrics, unet_weights
from jaxhisto.console import say, warn
from jaxhisto.distributed import make_mesh
from jaxhisto.downstream.crops import Looked, look_at, read_pair, training_part, validation_part
from jaxhisto.downstream.encoders import Encoder, open_encoder
from jaxhisto.downstream.learner import Tree
from jaxhisto.downstream.painting import painted, with_legend, write_png
from jaxhisto.downstream.pixel_scores import class_f1, class_iou, confusion, scores
from jaxhisto.downstream.run_folder import open_run
from jaxhisto.downstream.tiled import Windows, predict_image, windows_of
from jaxhisto.downstream.training import Fitted, adam, fit
from jaxhisto.downstream.unet_learner import unet_learner
from jaxhisto.downstream.unet_predict import UNET, make_predict
from jaxhisto.errors import ConfigError, StoreError
from jaxhisto.models.unet import STRIDE
from jaxhisto.runlog import environment, write_atomically
from jaxhisto.settings import to_json
from jaxhisto.tasks.splits import fraction, task_split, write_split
from jaxhisto.tasks.task import Split, Task, open_task
from jaxhisto.torch_files import golden_beside
from jaxhisto.training_config import SegmentConfig

FORMAT = "jaxhisto-segment-1"
SHOWN = 8
BATCH = 8
"""Windows of test images at a time, on each device."""

Matrices = NDArray[np.int64]


def segment(config: SegmentConfig) -> dict[str, Any]:
    """Trains, scores the test images, and writes the run folder.

    RUN holds config.json, facts.json, env.json, split.json, metrics.jsonl, checkpoints/ until the
    end, unet.safetensors with its golden file, predictions.png, and last result.json. A run that
    has it is done: nothing is trained again.

    Returns:
      What result.json holds.

    Raises:
      ConfigError: settings that do not go together.
      StoreError: images, masks or a split that are not as they should be.
      ExportError: no such encoder, or one of which nothing says how it wants to be fed.
      RunError, Stopped: as `training.fit`.
    """
    if config.crop_px % STRIDE:
        raise ConfigError(
            f"--crop-px {config.crop_px}: a UNet halves its images five times; take a multiple of "
            f"{STRIDE}."
        )
    windows = windows_of(config.crop_px, config.overlap_px, config.margin_px)
    ready = prepare(config)
    out = open_run(config.out, config, ready.facts())
    if (out / "result.json").exists() and (out / UNET).exists():
        result = json.loads((out / "result.json").read_text(encoding="utf-8"))
        say(f"{out}: is done\n{table(result)}")
        return dict(result)
    write_split(out / "split.json", ready.split, ready.task)
    fitted, *trees = train(config, ready, out)
    write_weights(config, out, ready, fitted, *trees)
    matrices = judge(config, ready, windows, out, *trees)
    result = result_of(config, ready, fitted, matrices)
    write_atomically(out / "result.json", json.dumps(result, indent=1) + "\n")
    if not config.keep_checkpoints:
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    say(table(result))
    return result


@dataclasses.dataclass(frozen=True, eq=False)
class Ready:
    """What a run trains on and starts from: `rows` are the training images, `looked` by part."""

    task: Task
    split: Split
    rows: NDArray[np.int64]
    looked: dict[str, Looked]
    encoder: Encoder

    def facts(self) -> dict[str, Any]:
        """What stands in facts.json, and must be the same for a run to go on."""
        return {
            "task": self.task.name,
            "classes": list(self.task.classes),
            "split": self.split.sha256,
            "encoder": self.encoder.sha256,
            **{f"{name}_pixels": of.sha256 for name, of in self.looked.items()},
        }


def prepare(config: SegmentConfig) -> Ready:
    """Reads task, split and encoder, and each image once."""
    task = open_task(config.task)
    check_task(task)
    say("\n".join(task.summary()))
    split = task_split(task, config.task)
    say(split.summary())
    encoder = open_unet_encoder(config)
    rows = split.train
    if config.percent < 100:
        seed = config.training.seed
        rows = fraction(task, split, config.percent, config.repeat, seed, config.scarce)
        say(f"training on {len(rows):,} images, {config.percent:g} %")
    parts = {"train": rows, "validation": split.validation, "test": split.test}
    for name, part in parts.items():
        if not len(part):
            raise StoreError(f"{task.name}: the split has no {name} images; name another split.")
    threads = config.training.threads
    looked = {name: look_at(task, part, threads) for name, part in parts.items()}
    check_classes(task, looked)
    return Ready(task, split, rows, looked, encoder)


def train(config: SegmentConfig, ready: Ready, out: Path) -> tuple[Fitted, Tree, Tree]:
    """The loop; gives the whole UNet's weights, frozen ones too."""
    task, encoder, training = ready.task, ready.encoder, config.training
    side, seed, threads = config.crop_px, training.seed, training.threads
    learner = unet_learner(
        encoder, len(task.classes), seed, freeze=config.freeze, precision=training.precision
    )
    crops = training_part(task, ready.rows, side, config.crops, seed, threads)
    sizes = ready.looked["validation"].sizes
    pieces = validation_part(task, ready.split.validation, sizes, side, threads)
    tx = adam(training, encoder.arch)
    fitted = fit(learner, crops, pieces, tx, training, out, verb="segment", facts=ready.facts())
    fixed = learner.fixed
    params = fitted.params | fixed.get("params", {})
    return fitted, params, fitted.batch_stats | fixed.get("stats", {})


def judge(
    config: SegmentConfig, ready: Ready, windows: Windows, out: Path, params: Tree, stats: Tree
) -> Matrices:
    """(n, C, C): pixels of each test image by true and predicted class; draws predictions.png."""
    task, encoder = ready.task, ready.encoder
    classes, mesh = len(task.classes), make_mesh(config.training.devices)
    predict = make_predict(encoder.arch, classes, params, stats, encoder.mean, encoder.std, mesh)
    counts, shown = [], []
    # Spread over the test images, whose order is often that of their groups.
    wanted = set(np.linspace(0, len(ready.split.test) - 1, SHOWN).astype(int).tolist())
    for i, row in enumerate(ready.split.test.tolist()):
        image, truth = read_pair(task, row)
        ids = predict_image(image, predict, classes, windows, BATCH * mesh.size)
        counts.append(confusion(truth, ids, classes))
        if i in wanted:
            shown.append((image, truth, ids))
    matrices = np.stack(counts)
    write_png(out / "predictions.png", sheet(shown, task, matrices.sum(0)))
    return matrices


def check_task(task: Task) -> None:
    """Refuses what has no masks, or more classes than a mask of the loop can hold.

    Raises:
      ConfigError: it is so.
    """
    if task.kind != "segmentation":
        raise ConfigError(
            f"{task.name}: is a {task.kind} task; pass --task.masks, or use `jaxhisto probe`."
        )
    if len(task.classes) > 255:
        raise ConfigError(f"{task.name}: has {len(task.classes)} classes; 255 are possible.")


def check_classes(task: Task, looked: dict[str, Looked]) -> None:
    """Refuses to train on one class alone; says which classes a part lacks.

    Raises:
      StoreError: all training pixels are of one class.
    """
    for part, of in looked.items():
        there = of.counts.sum(0) > 0
        absent = [name for name, known in zip(task.classes, there, strict=True) if not known]
        if part == "train" and there.sum() < 2:
            raise StoreError(
                f"{task.name}: all training pixels are {task.classes[int(there.argmax())]}; take "
                "more of the images, or another split."
            )
        if absent:
            remedy = (
                "it cannot be learnt"
                if part == "train"
                else "it counts where it is predicted alone"
            )
            warn(f"{task.name}: no {part} pixel is {', '.join(absent)}; {remedy}")


def open_unet_encoder(config: SegmentConfig) -> Encoder:
    """The encoder to start from.

    Raises:
      ConfigError: one that is no network.
      ExportError: as `encoders.open_encoder`.
    """
    encoder = open_encoder(config.encoder, config.mean, config.std)
    if not encoder.params:
        raise ConfigError(
            f"{config.encoder}: is no network; a UNet needs one, such as random:resnet18."
        )
    if config.freeze and config.encoder.startswith("random:"):
        warn(f"{config.encoder}: is random and frozen; the decoder learns on what chance made")
    return encoder


def write_weights(
    config: SegmentConfig, out: Path, ready: Ready, fitted: Fitted, params: Tree, stats: Tree
) -> None:
    """RUN/unet.safetensors, which `jaxhisto export --layout smp` takes, and its golden file."""
    encoder, task = ready.encoder, ready.task
    span = encoder.mpp_range if encoder.mpp_range and len(set(encoder.mpp_range)) == 1 else None
    metadata = unet_weights.describe(
        encoder.arch,
        len(task.classes),
        task.classes,
        mean=encoder.mean,
        std=encoder.std,
        tile_px=config.crop_px,
        mpp_range=(config.mpp, config.mpp) if config.mpp else span,
        data_hash=ready.looked["train"].sha256,
        step=fitted.steps // fitted.epochs * fitted.epoch,
        config=to_json(without_places(config)),
        licence=config.licence,
        encoder_sha256=None if config.encoder.startswith("random:") else encoder.sha256,
    )
    path = out / UNET
    digest = unet_weights.write_unet(path, params, stats, metadata)
    unet_weights.write_golden(golden_beside(path), params, stats, metadata, digest)


def without_places(config: SegmentConfig) -> SegmentConfig:
    """The config without the user's folders, which are nobody's business."""
    task = config.task
    task = dataclasses.replace(
        task,
        data=Path(task.data).name,
        labels=Path(task.labels).name,
        masks=Path(task.masks).name,
        split=Path(task.split).name,
    )
    return dataclasses.replace(config, out="", encoder=Path(config.encoder).name, task=task)


def result_of(
    config: SegmentConfig, ready: Ready, fitted: Fitted, matrices: Matrices
) -> dict[str, Any]:
    """What result.json holds; of a class that is nowhere, F1 and IoU are null."""
    task, split, encoder = ready.task, ready.split, ready.encoder
    total = matrices.sum(0)
    groups = None if task.groups is None else [task.groups[i] for i in split.test]

    def resampled(rows: Any, _: Any) -> dict[str, float]:
        return scores(matrices[rows].sum(0))

    order = np.arange(len(matrices))
    rows = order.astype(np.float64)
    found = metrics.bootstrap(resampled, order, rows, groups, config.draws, config.training.seed)
    return {
        "format": FORMAT,
        "task": task.name,
        "classes": list(task.classes),
        "encoder": encoder.name if encoder.name.startswith("random:") else Path(encoder.name).name,
        "encoder_sha256": encoder.sha256,
        "arch": encoder.arch,
        "freeze": config.freeze,
        "split_sha256": split.sha256,
        "images": {part: len(of.sizes) for part, of in ready.looked.items()},
        "percent": config.percent,
        "repeat": config.repeat,
        "epoch": fitted.epoch,
        "epochs": fitted.epochs,
        "batch": fitted.batch,
        "validation": {k: _number(v) for k, v in fitted.metrics.items()},
        "test": {
            name: {k: _number(v) for k, v in dataclasses.asdict(interval).items()}
            for name, interval in found.items()
        },
        "bootstrap_by": metrics.drawn_by(groups),
        "intervals": metrics.told(len(matrices), groups),
        "per_class": [
            {"class": name, "f1": _number(f1), "iou": _number(iou), "pixels": int(pixels)}
            for name, f1, iou, pixels in zip(
                task.classes, class_f1(total), class_iou(total), total.sum(1), strict=True
            )
        ],
        "confusion": total.tolist(),
        "code_version": __version__,
        "environment": environment([]),
    }


def table(result: dict[str, Any]) -> str:
    """The result for a person."""
    best = result["validation"]["macro_f1"]
    lines = [f"best validation macro F1 {best:.3f} in epoch {result['epoch']}"]
    for name, value in result["test"].items():
        low, high = value["low"], value["high"]
        spread = "" if low is None else f" [{low:.3f}, {high:.3f}]"
        lines.append(f"test {name.replace('_', ' ')} {value['value']:.3f}{spread}")
    for one in result["per_class"]:
        f1 = "is nowhere" if one["f1"] is None else f"F1 {one['f1']:.3f}"
        lines.append(f"  {one['class']}: {f1}, {one['pixels']:,} pixels")
    lines.append(f"[{result['intervals']}]")
    return "\n".join(lines)


def sheet(shown: list[tuple[Any, Any, Any]], task: Task, counts: Matrices) -> NDArray[np.uint8]:
    """Test images, their truth and their prediction side by side, a row an image."""
    side, gap, head = 256, 4, 20
    classes = len(task.classes)
    picture = np.full((head + len(shown) * (side + gap), 3 * (side + gap), 3), 255, np.uint8)
    for i, (image, truth, ids) in enumerate(shown):
        for j, cell in enumerate(
            (image, painted(image, truth, classes), painted(image, ids, classes))
        ):
            small = _cell(cell, side)
            y, x = head + i * (side + gap), j * (side + gap)
            picture[y : y + small.shape[0], x : x + small.shape[1]] = small
    drawn = Image.fromarray(picture)
    for j, title in enumerate(("image", "truth", "prediction")):
        ImageDraw.Draw(drawn).text((j * (side + gap) + 4, 4), title, fill=(0, 0, 0))
    return with_legend(np.asarray(drawn), task.classes, (counts.sum(1) / counts.sum()).tolist())


def _cell(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    scale = side / max(image.shape[:2])
    size = tuple(max(1, round(n * scale)) for n in image.shape[1::-1])
    kind = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    return np.asarray(cv2.resize(image, size, interpolation=kind), np.uint8)


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
