"""What makes a folder of ArrayRecord files a TFDS dataset, without TensorFlow."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

METADATA = ("dataset_info.json", "features.json")


def tfds_name(dataset: str) -> str:
    """A dataset name as TFDS allows it: letters, digits, underscores, a letter first."""
    name = re.sub(r"\W+", "_", dataset, flags=re.ASCII).strip("_").lower()
    return name if re.match(r"[a-z]", name) else f"tiles_{name}".rstrip("_")


@functools.cache
def _tfds() -> tuple[Any, Any]:
    """The features of a store and their serialiser; importing TFDS takes half a second."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import example_serializer

    features = tfds.features.FeaturesDict(
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
    return features, example_serializer.ExampleSerializer(features.get_serialized_info())


def serialised(example: Mapping[str, Any]) -> bytes:
    """One record: the features of a store, `image` as JPEG bytes."""
    features, serializer = _tfds()
    # TFDS stores the bytes of a file object as they are; from an array it would need TensorFlow.
    encoded = features.encode_example({**example, "image": io.BytesIO(example["image"])})
    # Deterministic: a protobuf map has another order in each process, and so would the part's hash.
    return bytes(serializer.get_tf_example(encoded).SerializeToString(deterministic=True))


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
        data_dir=str(folder), features=_tfds()[0], split_infos=[split], check_data=False,
        filename_template=template, description=f"Tiles of {slides} slides, written by jaxhisto.",
    )  # fmt: skip
