"""Records that TFDS's own serialiser would read the same out of."""

from __future__ import annotations

import io

import numpy as np
import pytest
from tensorflow_datasets.core import example_serializer

from jaxhisto.data.tfds_format import features, serialised

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
