"""What a study's file names on the disk, looked at before the first cell; and its features."""

from __future__ import annotations

import gc
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxhisto import __version__
from jaxhisto.console import say, warn
from jaxhisto.data.features import Features, FeatureWriter, need_h5py
from jaxhisto.data.named_images import centre_square
from jaxhisto.distributed import make_mesh
from jaxhisto.downstream.embed import features_of
from jaxhisto.downstream.encoders import Encoder, open_encoder
from jaxhisto.downstream.inputs import in_threads
from jaxhisto.errors import ConfigError, ExportError, JaxhistoError, StoreError
from jaxhisto.progress import Progress
from jaxhisto.study.cells import Entry, Ready, applies
from jaxhisto.study.file import Study, rooted_encoder, rooted_task
from jaxhisto.study.hashes import digests_of, task_hashes
from jaxhisto.tasks.copies import copies_across
from jaxhisto.tasks.splits import task_split, write_split
from jaxhisto.tasks.task import open_task

FEATURES, SPLITS, HASHES = "features", "splits", "hashes"
LAYER, PRECISION = 4, "f32"


def open_entries(study: Study, root: str) -> list[Entry]:
    """The encoders of all rows, each opened once to see that it can be.

    Raises:
      ConfigError, ExportError: no such encoder, or nothing says how it wants to be fed; the
        sentence names the row. Two files of a row that hold the same weights.
    """
    entries: list[Entry] = []
    for name, row in study.encoders.items():
        hashes: dict[str, str] = {}
        for index, file in enumerate(row.files):
            try:
                file = rooted_encoder(file, root)
                encoder = open_encoder(file, row.mean, row.std)
            except JaxhistoError as error:
                raise type(error)(f"encoders.{name}: {as_keys(str(error))}") from error
            except Exception as error:
                if not type(error).__module__.startswith("jaxhisto_export"):
                    raise
                raise ExportError(f"encoders.{name}: {as_keys(str(error))}") from error
            if encoder.sha256 in hashes:
                raise ConfigError(
                    f"encoders.{name}: {file} holds the same weights as {hashes[encoder.sha256]}; "
                    "a row's files are runs that differ in their seed."
                )
            hashes[encoder.sha256] = file
            entries.append(
                Entry(name, index, file, row.mean, row.std, encoder.sha256, encoder.arch)
            )
            del encoder
            gc.collect()  # of a large encoder; only its hash is kept
    return entries


def open_tasks(study: Study, root: str, out: Path, threads: int) -> list[Ready]:
    """The tasks, divided; the splits are written to OUT/splits.

    Raises:
      ConfigError, StoreError: as `open_task` and `task_split`, naming the task; a task for which
        no setting of the study is one.
    """
    tasks = []
    for name, config in study.tasks.items():
        config = rooted_task(config, root)
        try:
            task = open_task(config)
            split = task_split(task, config)
        except JaxhistoError as error:
            raise type(error)(f"tasks.{name}: {as_keys(str(error))}") from error
        if not any(applies(setting, task.kind, "resnet18") for setting in study.settings):
            wanted = "segment" if task.kind == "segmentation" else "last_layer or finetune"
            raise ConfigError(
                f"tasks.{name}: is a {task.kind} task, for which none of the settings "
                f"{', '.join(study.settings)} is one; add {wanted} to settings."
            )
        say("\n".join([f"[{name}] {task.summary()[0]}", *task.summary()[1:], split.summary()]))
        hashes = task_hashes(task, config, out / HASHES / name, threads)
        digests = digests_of(out / HASHES / f"{name}.json")
        if digests.keys() >= set(task.names):  # no windows, whose files are those of whole images
            copies = copies_across(task, split, digests)
            if copies:
                warn(copies)
        tasks.append(Ready(name, config, task, split, *hashes))
        try:
            write_split(out / SPLITS / f"{name}.json", split, task,
                        validation_by_image=config.validation_by_image)  # fmt: skip
        except OSError as error:
            raise StoreError(
                f"{out / SPLITS}: cannot be written ({error.strerror}); choose another --out."
            ) from error
    return tasks


def as_keys(sentence: str) -> str:
    """A verb's sentence with its flags as a study's file has them: `--mean 1 2 3` as a key."""
    sentence = re.sub(
        r"--(mean|std)((?: \d+(?:\.\d+)?){3})",
        lambda m: f"{m[1]} = [{', '.join(m[2].split())}]",
        sentence,
    )
    sentence = re.sub(r"--(mean|std)\b", r"\1", sentence)
    return re.sub(r"--task\.([a-z-]+)", lambda m: m[1].replace("-", "_"), sentence)


class FeatureCache:
    """Features of a task's images from an encoder, computed once, in OUT/features.

    The last ones are kept in memory, as the cells of one encoder and task come in a row; so is
    a failure, which is then told for each of them.
    """

    def __init__(self, out: Path, batch: int, devices: int, threads: int) -> None:
        self._folder, self._batch = out / FEATURES, batch
        self._devices, self._threads = devices, threads
        self._held: tuple[Path, NDArray[np.float32]] | None = None
        self._failed: dict[Path, JaxhistoError] = {}

    def __call__(self, entry: Entry, ready: Ready) -> NDArray[np.float32]:
        """(n, d) float32, in the task's order.

        Raises:
          StoreError: an image cannot be read, features are not finite, no room to write.
        """
        path = self._path(entry, ready)
        if path in self._failed:
            raise self._failed[path]
        if self._held is None or self._held[0] != path:
            self._held = None
            try:
                self._held = path, self._computed(path, entry, ready)
            except JaxhistoError as error:
                self._failed[path] = error
                raise
        return self._held[1]

    def _computed(self, path: Path, entry: Entry, ready: Ready) -> NDArray[np.float32]:
        task, side, identity = ready.task, ready.config.side, self._identity(entry, ready)
        need_h5py(path)
        if path.exists():
            try:
                with Features(path) as found:
                    if found.names == task.names:
                        return found.all()
            except StoreError:
                warn(f"{path}: is no whole file of features; they are computed again")
            path.unlink(missing_ok=True)
        encoder = open_encoder(entry.name, entry.mean, entry.std)
        if encoder.sha256 != entry.sha256:
            raise StoreError(
                f"{entry.name}: has changed since the study was started; start it again."
            )
        facts = {"arch": encoder.arch, "depth": encoder.depth, "encoder": encoder.name,
                 "mean": list(encoder.mean), "std": list(encoder.std),
                 "code_version": __version__}  # fmt: skip
        with FeatureWriter(path, identity, encoder.width(LAYER), self._batch) as writer:
            self._fill(writer, encoder, entry, ready)
            n = len(task)
            writer.finish(task.names, [""] * n, np.full(n, float(side)), {**identity, **facts})
        with Features(path) as found:
            return found.all()

    def _identity(self, entry: Entry, ready: Ready) -> dict[str, Any]:
        """All that the numbers depend on, as JSON values."""
        return {
            "encoder_sha256": entry.sha256,
            "feeding": json.dumps([entry.mean, entry.std]),
            "data_hash": ready.data_hash,
            "side": ready.config.side,
            "layer": LAYER,
            "precision": PRECISION,
            "batch": self._batch,
        }

    def _path(self, entry: Entry, ready: Ready) -> Path:
        """Of other numbers another file: what an earlier file of the study asked for stays."""
        identity = json.dumps(self._identity(entry, ready), sort_keys=True)
        digest = hashlib.sha256(identity.encode()).hexdigest()
        return self._folder / f"{entry.sha256[:12]}-{ready.data_hash[:12]}-{digest[:12]}.h5"

    def _fill(self, writer: FeatureWriter, encoder: Encoder, entry: Entry, ready: Ready) -> None:
        task, side, start = ready.task, ready.config.side, writer.done
        mesh = make_mesh(self._devices)

        def read(i: int) -> NDArray[np.uint8]:
            return centre_square(task.images.read(i), side)

        blocks = in_threads(read, start, len(task), self._batch * mesh.size, self._threads)

        def images() -> Iterator[NDArray[np.uint8]]:
            for block in blocks:
                yield np.stack(block)

        verb = f"features of {ready.name} from {entry.row} (file {entry.index + 1})"
        with Progress(verb, len(task), start) as progress:
            try:
                found = features_of(encoder, images(), self._batch, mesh, layer=LAYER,
                                    precision=PRECISION)  # fmt: skip
                for rows in found:
                    first = writer.done

                    def name(i: int, first: int = first) -> str:
                        return task.names[first + i]

                    writer.append(rows, np.zeros((len(rows), 2), np.int64), name)
                    progress.advance(len(rows))
            finally:
                blocks.close()
