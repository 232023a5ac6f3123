"""Any TFDS dataset with an `image`, by name, from where TFDS keeps what it has prepared."""

from __future__ import annotations

import difflib
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np

from jaxhisto.config import DataConfig
from jaxhisto.data.image_source import ImageSource, Pixels
from jaxhisto.data.images import RGB8, ImageError
from jaxhisto.errors import StoreError

PREFIX = "tfds:"
NAME = re.compile(
    r"tfds:(?P<name>[\w./-]+)(:(?P<version>\d+\.\d+\.\d+))?(:(?P<split>[A-Za-z_].*))?"
)
SPLIT = "train"  # what is tested on is not to be trained on by leaving out a word


class TfdsSource(ImageSource):
    """`tfds:NAME[/CONFIG][:VERSION][:SPLIT]`, the feature `image` of each example, named by index.

    SPLIT is `train` by default, and TFDS's slices are allowed (`train[:10%]`). Read from
    `~/tensorflow_datasets`, or where TFDS_DATA_DIR says, as ArrayRecord; nothing is downloaded.
    Known by its pixels, as TFDS decodes them.

    Raises:
      StoreError: no such dataset or split, not prepared, or without 8-bit grey or RGB images.
    """

    kind = "TFDS set"

    def __init__(self, path: Path, config: DataConfig) -> None:
        self._lock = threading.Lock()  # TFDS opens its readers on first use
        self._examples = _examples(str(path))
        if not len(self._examples):
            raise StoreError(f"{path}: holds no example; name another split.")
        super().__init__(path, [str(i) for i in range(len(self._examples))], config)

    def load(self, name: str) -> Pixels:
        try:
            with self._lock:
                image = np.asarray(self._examples[int(name)]["image"])
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            raise ImageError(f"cannot be read ({error})", "prepare the dataset again") from error
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
            raise ImageError(f"is {image.shape} {image.dtype}", RGB8)
        return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image


def _examples(text: str) -> Any:
    """TFDS's random-access data source of what is named."""
    parts = NAME.fullmatch(text)
    if not parts:
        raise StoreError(f"{text}: is no tfds:NAME or tfds:NAME:SPLIT; write it so.")
    import tensorflow_datasets as tfds

    name, version = parts["name"], parts["version"]
    try:
        builder = tfds.builder(f"{name}:{version}" if version else name)
    except (ValueError, AssertionError, ImportError) as error:
        near = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False), 1)
        hint = f"do you mean tfds:{near[0]}?" if near else "check the name."
        # TFDS appends all the names it knows.
        reason = str(error).strip().partition("\n")[0]
        raise StoreError(f"{text}: TFDS has no such dataset ({reason}); {hint}") from error
    if "image" not in builder.info.features:
        held = ", ".join(builder.info.features)
        raise StoreError(f"{text}: has no feature `image` but {held}; name a set of images.")
    split = parts["split"] or SPLIT
    try:
        return builder.as_data_source(split=split)
    except (NotImplementedError, AssertionError, OSError) as error:
        build = f"`tfds build {name} --file_format=array_record` (this downloads it)"
        where = builder.data_dir
        raise StoreError(
            f"{text}: lies in {where} in a form that is not read at random places; take it away "
            f"and prepare it with {build}."
            if builder.is_prepared()
            else f"{text}: is not in {where}; prepare it with {build}, or set TFDS_DATA_DIR to "
            "where it is."
        ) from error
    except (ValueError, KeyError) as error:
        there = ", ".join(builder.info.splits)
        raise StoreError(f"{text}: has no split {split!r}; there is {there}.") from error
