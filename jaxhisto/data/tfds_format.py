"""What makes a folder of ArrayRecord files a TFDS dataset, without TensorFlow."""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Of a record's features: a map has none, and without one the same tile had other bytes. This is
# what protobuf's deterministic serialisation made of it in stores that are there already.
ORDER = ("dataset", "image", "mpp_source", "mpp", "slide", "x", "y")
METADATA = ("dataset_info.json", "features.json")


def tfds_name(dataset: str) -> str:
    """A dataset name as TFDS allows it: letters, digits, underscores, a letter first."""
    name = re.sub(r"\W+", "_", dataset, flags=re.ASCII).strip("_").lower()
    return name if re.match(r"[a-z]", name) else f"tiles_{name}".rstrip("_")


@functools.cache
def features() -> Any:
    """TFDS's description of a store's records; importing TFDS takes half a second."""
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "slide": tfds.features.Text(),
            "dataset": tfds.features.Text(),
            "x": np.int64,
            "y": np.int64,
            "mpp": np.float32,
            "mpp_source": tfds.features.Text(),
        }
    )


def serialised(example: Mapping[str, Any]) -> bytes:
    """One record: the features of a store, `image` as JPEG bytes.

    A `tf.train.Example`, as TFDS's own serialiser gives, which took a tenth of the time of cutting
    a slide.
    """
    entries = (_field(1, key.encode()) + _field(2, _feature(example[key])) for key in ORDER)
    return _field(1, b"".join(_field(1, entry) for entry in entries))


def _feature(value: bytes | str | int | float) -> bytes:
    """A `tf.train.Feature` of one value: bytes and text, float32 or int64."""
    if isinstance(value, (bytes, str)):
        return _field(1, _field(1, value if isinstance(value, bytes) else value.encode()))
    if isinstance(value, (float, np.floating)):
        return _field(2, _field(1, struct.pack("<f", value)))
    return _field(3, _field(1, _varint(int(value) & 0xFFFFFFFFFFFFFFFF)))


def _field(number: int, payload: bytes) -> bytes:
    """A field of protobuf's wire format whose length is stated."""
    return bytes([number << 3 | 2]) + _varint(len(payload)) + payload


def _varint(value: int) -> bytes:
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)


def shard_file(name: str, digest: str, number: int, shards: int) -> str:
    """The file name of a shard: other content, other digest."""
    return f"{name}-train-{digest}.array_record-{number:05d}-of-{shards:05d}"


def write_metadata(
    folder: Path, name: str, digest: str, shards: Sequence[Mapping[str, Any]], slides: int
) -> None:
    """Writes `METADATA` of a store into a folder that holds nothing else.

    Args:
      folder: to write into.
      name: of the dataset, from `tfds_name`.
      digest: in the shards' names.
      shards: `file`, `tiles` and `bytes` of each.
      slides: how many there are, for the description.
    """
    import tensorflow_datasets as tfds

    template = f"{{DATASET}}-{{SPLIT}}-{digest}.{{FILEFORMAT}}-{{SHARD_X_OF_Y}}"
    (folder / shards[0]["file"]).touch()  # TFDS takes the names from the files that it sees
    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=[shard["tiles"] for shard in shards],
        num_bytes=sum(shard["bytes"] for shard in shards),
        filename_template=tfds.core.ShardedFileTemplate(
            template=template, dataset_name=name, data_dir=folder, split="train",
            filetype_suffix="array_record",
        ),
    )  # fmt: skip
    # check_data would read through TensorFlow.
    tfds.folder_dataset.write_metadata(
        data_dir=str(folder), features=features(), split_infos=[split], check_data=False,
        filename_template=template, description=f"Tiles of {slides} slides, written by jaxhisto.",
    )  # fmt: skip
