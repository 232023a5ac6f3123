"""Records that TFDS's own serialiser would read the same out of."""

from __future__ import annotations

import io

import numpy as np
import pytest
from tensorflow_datasets.core import example_serializer
from tensorflow_datasets.proto import tf_example_pb2

from jaxhisto.data.tfds_format import features, image_of, serialised

LARGE = 2**62
CASES = [
    (b"", "", "", 0, 0, 0.0),
    (b"\xff\xd8" * 9000, "a/b.svs", "tcga", 127, 128, 0.25),
    (b"x" * 127, "日本/" + "é" * 300, "d" * 128, LARGE, -1, 1e-30),
    (b"x" * 128, "s", "d", -LARGE, 16383, 28.97),
    (b"x" * 16384, "s" * 16383, "d", 16384, 2**31, 3.4e38),
]


@pytest.mark.parametrize(("image", "slide", "dataset", "x", "y", "mpp"), CASES)
def test_a_record_is_tfdss(image, slide, dataset, x, y, mpp):
    example = {
        "image": image, "slide": slide, "dataset": dataset, "x": x, "y": y, "mpp": mpp,
        "mpp_source": "flag",
    }  # fmt: skip
    theirs = example_serializer.ExampleSerializer(features().get_serialized_info())
    encoded = features().encode_example({**example, "image": io.BytesIO(image)})
    expected = theirs.get_tf_example(encoded)
    ours = serialised(example)
    assert type(expected).FromString(ours) == expected
    assert len(ours) == expected.ByteSize()  # nothing that a reader skips
    assert serialised({**example, "mpp": np.float32(mpp), "x": np.int64(x)}) == ours
    shuffled = dict(sorted(example.items(), key=lambda item: item[0][::-1]))
    assert serialised(shuffled) == ours
    assert image_of(ours) == expected.features.feature["image"].bytes_list.value[0] == image


def test_the_image_is_found_in_any_order_of_features(monkeypatch):
    example = {
        "dataset": "d", "image": b"JPEG" * 99, "mpp_source": "flag", "mpp": 0.5, "slide": "s",
        "x": -3, "y": 4,
    }  # fmt: skip
    for order in (list(example), list(example)[::-1], ["image", *example]):
        monkeypatch.setattr("jaxhisto.data.tfds_format.ORDER", order)
        record = serialised(example)
        theirs = tf_example_pb2.Example.FromString(record).features.feature["image"]
        assert image_of(record) == theirs.bytes_list.value[0] == example["image"]


def test_what_is_no_record_is_refused():
    record = serialised(
        {"image": b"JPEG" * 50, "slide": "s", "dataset": "d", "x": 1, "y": 2, "mpp": 0.5,
         "mpp_source": "flag"}
    )  # fmt: skip
    for end in range(len(record)):
        with pytest.raises(ValueError, match="not a tile's record"):
            image_of(record[:end])
    for data in (b"\xff" * 300, record + b"\0", record.replace(b"\x05image", b"\x05imagf")):
        with pytest.raises(ValueError, match=r"not a tile's record|no image in it"):
            image_of(data)
