"""The hash against SciPy's transform, symmetries against NumPy's, the index against all pairs."""

from __future__ import annotations

import numpy as np
import pytest
from planted import tissue
from scipy.fft import dctn

from jaxhisto.leakage import hashes
from jaxhisto.leakage.hamming import HammingIndex


def thumbnails(count: int) -> np.ndarray:
    return np.stack([hashes.thumbnail(hashes.grey(tissue(96, 96, i))) for i in range(count)])


def test_bits_are_the_signs_of_scipys_cosine_transform():
    small = thumbnails(5)
    low = dctn(small.astype(np.float64), axes=(1, 2))[:, :8, :8].reshape(5, 64)[:, 1:]
    bits = (hashes.hashes(small)[:, None] >> np.arange(63, dtype=np.uint64)) & np.uint64(1)
    assert np.array_equal(bits.astype(bool), low > 0)


def test_brightness_and_contrast_change_no_bit():
    small = thumbnails(5)
    assert np.array_equal(hashes.hashes(small), hashes.hashes(0.5 * small + 40))


def test_the_eight_symmetries_are_all_there_are_and_act_on_images_as_on_thumbnails():
    image = tissue(64, 64, 0)
    turned = [hashes.turned(image, k) for k in range(8)]
    by_hand = [image, np.rot90(image), image[::-1, ::-1], np.rot90(image, -1)]
    by_hand += [image[:, ::-1], np.rot90(image[:, ::-1]), image[::-1], np.rot90(image[::-1])]
    assert all(np.array_equal(a, b) for a, b in zip(turned[:7], by_hand[:7], strict=True))
    assert len({t.tobytes() for t in turned}) == 8
    small = [hashes.thumbnail(hashes.grey(t)) for t in turned]
    alone = hashes.hashes(np.stack(small))
    assert np.array_equal(hashes.all_hashes(small[0][None])[0], alone)


def test_correlation_is_pearsons_and_zero_of_a_constant():
    a, b = np.random.default_rng(0).random((2, 32, 32))
    assert hashes.correlation(a, b) == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1])
    assert hashes.correlation(a, np.ones((32, 32))) == 0


@pytest.mark.parametrize("radius", [0, 3, 4, 7, 10, 13, 16])
def test_the_index_finds_what_comparing_all_pairs_finds(radius):
    """Codes at every distance up to two above the radius, at random places and in one band."""
    rng = np.random.default_rng(radius)
    codes = rng.integers(0, 1 << 63, 600, np.uint64)
    queries = codes[:300].copy()
    for n in range(300):
        # Crowded into the low bits half of the time: one band takes all the differences.
        places = rng.choice(63 if n % 2 else 20, n % (radius + 3), replace=False)
        queries[n] ^= np.bitwise_or.reduce(np.uint64(1) << places.astype(np.uint64), initial=0)
    distance = np.bitwise_count(queries[:, None] ^ codes[None]).astype(int)
    query, code = np.nonzero(distance <= radius)
    found = HammingIndex(codes, radius).pairs(queries)
    assert np.array_equal(found[0], query)
    assert np.array_equal(found[1], code)
    assert np.array_equal(found[2], distance[query, code])
    assert len(query) >= 100  # one query in radius + 3 at each distance


def test_an_index_of_nothing_and_queries_of_nothing():
    none = np.empty(0, np.uint64)
    assert [len(part) for part in HammingIndex(none, 10).pairs(np.ones(3, np.uint64))] == [0] * 3
    assert [len(part) for part in HammingIndex(np.ones(3, np.uint64), 10).pairs(none)] == [0] * 3
