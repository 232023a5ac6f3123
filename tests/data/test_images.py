"""Pixels come back exactly or the file is refused by name; Pillow, tifffile, OpenCV are oracles."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import cv2
import imageio.v3 as iio
import numpy as np
import pytest
import tifffile
from made_images import blobs, encoded, noise
from PIL import Image

from jaxhisto.data import images
from jaxhisto.data.images import ImageError, decode_image, decode_jpeg, jpeg_is_whole
from jaxhisto.data.store_writer import encode_jpeg

RGB = noise(20, 30)
GREY = RGB[..., 0]
DEEP = RGB.astype(np.uint16) * 257


def tiff(pixels: np.ndarray, **options: object) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, pixels, **options)
    return out.getvalue()


def with_alpha(alpha: np.ndarray) -> Image.Image:
    return Image.fromarray(np.dstack([RGB, alpha.astype(np.uint8)]))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_adobe_deflate"}),
    ],
)
def test_lossless_rgb_is_exact(kind: str, options: dict[str, object]) -> None:
    assert np.array_equal(decode_image(encoded(RGB, kind, **options)), RGB)


def test_jpeg_is_what_pillow_and_imageio_read() -> None:
    data = encoded(blobs(64), "JPEG", quality=90)
    ours = decode_image(data)
    assert np.array_equal(ours, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert np.array_equal(ours, iio.imread(data, extension=".jpg"))


def test_planar_tiff_is_exact() -> None:
    data = tiff(RGB.transpose(2, 0, 1).copy(), photometric="rgb", planarconfig="separate")
    assert np.array_equal(decode_image(data), RGB)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_grey_is_replicated(kind: str) -> None:
    assert np.array_equal(decode_image(encoded(GREY, kind)), np.dstack([GREY] * 3))


def test_grey_jpeg_is_replicated() -> None:
    data = encoded(blobs(64)[..., 1], "JPEG", quality=90)
    grey = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert np.array_equal(decode_image(data), np.dstack([grey] * 3))


def test_inverted_grey_tiff_is_turned_right() -> None:
    data = tiff(255 - GREY, photometric="miniswhite")
    assert np.array_equal(decode_image(data), np.dstack([GREY] * 3))


def test_palette_is_looked_up() -> None:
    colours = noise(1, 256, 3)[0]
    picture = Image.fromarray(GREY)
    picture.putpalette(colours.tobytes())
    for kind in ("PNG", "TIFF", "BMP"):
        assert np.array_equal(decode_image(encoded(picture, kind)), colours[GREY])


def test_opaque_alpha_is_dropped() -> None:
    opaque = np.full(GREY.shape, 255)
    assert np.array_equal(decode_image(encoded(with_alpha(opaque))), RGB)
    two = Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (30, 20), 255)])
    assert np.array_equal(decode_image(encoded(two)), np.dstack([GREY] * 3))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_one_transparent_pixel_refuses_the_image(kind: str) -> None:
    alpha = np.full(GREY.shape, 255)
    alpha[3, 4] = 254
    with pytest.raises(ImageError, match="has 1 transparent pixels; flatten it"):
        decode_image(encoded(with_alpha(alpha), kind))


def test_a_colour_marked_transparent_refuses_the_image() -> None:
    data = encoded(GREY, transparency=int(GREY[0, 0]))
    with pytest.raises(ImageError, match="transparent pixels"):
        decode_image(data)


@pytest.mark.parametrize(
    ("data", "fact"),
    [
        (b"", "empty"),
        (b"GIF89a not an image of ours", "no readable JPEG, PNG, TIFF, BMP, WEBP"),
        (cv2.imencode(".png", DEEP)[1].tobytes(), "16 bits"),
        (cv2.imencode(".png", DEEP[..., 0])[1].tobytes(), "16 bits"),
        (tiff(DEEP, photometric="rgb"), "16 bits"),
        (tiff(DEEP.transpose(2, 0, 1).copy(), photometric="rgb", planarconfig="separate"), "16"),
        (tiff(DEEP, photometric="rgb", compression="zlib"), "16 bits"),
        (tiff(DEEP[..., 0]), "16 bits"),
        (tiff(GREY.astype(np.uint32)), "32 bits"),
        (tiff(GREY.astype(np.float32)), "32 bits"),
        (tiff(GREY.astype(np.int8)), "signed"),
        (encoded(Image.fromarray(RGB).convert("CMYK"), "JPEG"), "CMYK"),
        (encoded(Image.fromarray(RGB).convert("CMYK"), "TIFF"), "CMYK"),
        (encoded(Image.fromarray(GREY).convert("1")), "1-bit"),
        (encoded(Image.fromarray(GREY).convert("1"), "TIFF"), "1-bit"),
        (tiff(np.stack([RGB, RGB]), photometric="rgb"), "2 pages"),
        (
            encoded(RGB, "PNG", save_all=True, append_images=[Image.fromarray(255 - RGB)]),
            "2 pages",
        ),
    ],
)
def test_what_would_need_a_guess_is_refused_by_name(data: bytes, fact: str) -> None:
    with pytest.raises(ImageError, match=fact):
        decode_image(data)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "TIFF"])
def test_a_truncated_file_is_refused(kind: str, share: float) -> None:
    data = encoded(noise(64, 64), kind)
    with pytest.raises(ImageError, match="remove it"):
        decode_image(data[: int(len(data) * share)])


def test_a_jpeg_whose_tail_was_never_written_is_refused() -> None:
    """A download into preallocated space ends in zeros, which decoders paint grey."""
    data = encoded(noise(64, 64), "JPEG")
    hollow = data[: len(data) // 2].ljust(len(data), b"\0")
    Image.open(io.BytesIO(hollow)).load()  # Pillow is content
    with pytest.raises(ImageError, match="cut short"):
        decode_image(hollow)


def test_no_flipped_byte_in_a_png_changes_a_pixel_unseen() -> None:
    """Without the checksums one flip in seven comes back as other pixels."""
    pixels = blobs(32)
    data = encoded(pixels)
    seen = 0
    for i in range(len(data)):
        flipped = data[:i] + bytes([data[i] ^ 255]) + data[i + 1 :]
        try:
            assert np.array_equal(decode_image(flipped, checksums=True), pixels)
        except ImageError:
            seen += 1
    assert seen > 0.9 * len(data)


def test_stored_tiles_are_rgb_as_pillow_reads_them() -> None:
    data = encode_jpeg(blobs(64), 95, "4:4:4")
    ours = decode_jpeg(data)
    pillow = np.asarray(Image.open(io.BytesIO(data)))
    assert np.abs(ours.astype(int) - pillow).max() <= 1  # two libjpegs may round differently
    assert np.abs(ours.astype(int) - blobs(64)).mean() < 3  # and not BGR


def by_opencv(data: bytes) -> np.ndarray | None:
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    bgr = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    return None if bgr is None else bgr[..., ::-1]


def grainy(height: int, width: int) -> np.ndarray:
    """Coloured spots under a fine grain: every coefficient of a JPEG is in use."""
    spots = cv2.resize(noise(3, 4), (width, height), interpolation=cv2.INTER_CUBIC)
    return (spots // 2 + noise(height, width, 1) // 4).astype(np.uint8)


@pytest.mark.parametrize("side", [(1, 1), (7, 9), (33, 31), (97, 224)])
@pytest.mark.parametrize("factor", ["444", "422", "420", "440", "411"])
def test_stored_tiles_are_the_pixels_that_opencv_reads(
    factor: str, side: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of runs that are under way must not change: not a bit, and not by falling back."""
    monkeypatch.setattr("jaxhisto.data.images._by_opencv", None)
    sampling = getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{factor}")
    for quality in (30, 95, 100):
        for progressive in (0, 1):
            flags = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling]
            flags += [cv2.IMWRITE_JPEG_PROGRESSIVE, progressive]
            data = cv2.imencode(".jpg", grainy(*side), flags)[1].tobytes()
            assert np.array_equal(decode_jpeg(data), by_opencv(data))


def test_odd_kinds_of_stored_tiles_are_as_opencv_reads_them() -> None:
    picture = Image.fromarray(grainy(33, 31))
    turned = Image.Exif()
    turned[0x112] = 6
    for data in (
        encoded(picture.convert("L"), "JPEG"),
        encoded(picture.convert("CMYK"), "JPEG"),
        encoded(picture, "JPEG", keep_rgb=True),
        encoded(picture, "JPEG", exif=turned),
        encoded(picture, "JPEG", restart_marker_blocks=1),
    ):
        assert np.array_equal(decode_jpeg(data), by_opencv(data))


def test_a_damaged_stored_tile_is_what_opencv_makes_of_it() -> None:
    """Also where it is decoded to a place that held something."""
    data, rng, odd = encode_jpeg(grainy(40, 40), 95, "4:2:0"), np.random.default_rng(0), 0
    for i in rng.integers(2, len(data) - 2, 60).tolist():
        flipped = data[:i] + bytes([data[i] ^ int(rng.integers(1, 256))]) + data[i + 1 :]
        expected, out = by_opencv(flipped), np.full((40, 40, 3), 7, np.uint8)
        if expected is None or not jpeg_is_whole(flipped):
            with pytest.raises(ImageError, match="cut the slides again"):
                decode_jpeg(flipped, out)
            continue
        assert np.array_equal(decode_jpeg(flipped, out), expected)
        odd += not np.array_equal(expected, by_opencv(data))
    assert odd > 20


def test_without_simplejpeg_opencv_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simplejpeg", None)  # what an import then raises: ImportError
    images._simplejpeg.cache_clear()
    try:
        assert images.jpeg_decoder() == "opencv"
        data, out = encode_jpeg(grainy(40, 40), 95, "4:4:4"), np.zeros((40, 40, 3), np.uint8)
        assert decode_jpeg(data, out) is out
        assert np.array_equal(out, by_opencv(data))
    finally:
        images._simplejpeg.cache_clear()
    monkeypatch.undo()
    assert images.jpeg_decoder() == "simplejpeg"


@pytest.mark.parametrize("larger", [0, 8, -8])
def test_a_stored_tile_is_decoded_to_its_place(larger: int) -> None:
    data, side = encode_jpeg(grainy(40, 40), 95, "4:4:4"), 40 + larger
    batch = np.full((3, side, side, 3), 7, np.uint8)
    out = batch[1]
    got = decode_jpeg(data, out)
    assert np.array_equal(got, by_opencv(data))
    assert (got is out) == (larger == 0)
    assert (batch[[0, 2]] == 7).all()
    if got is not out:
        assert not np.shares_memory(got, batch)


@pytest.mark.parametrize(
    "tail", [b"", b"\xff", b"\xff\xd9", b"\0\0\xff\xda\0", b"\xff\xda\xff\xd9"]
)
@pytest.mark.parametrize("scans", [0, 1, 2])
def test_a_whole_jpeg_has_its_end_after_its_last_scan(scans: int, tail: bytes) -> None:
    data = b"\xff\xd8\0" + b"\xff\xda\1\2" * scans + b"\xff\xd9" * (scans > 1) + tail
    assert jpeg_is_whole(data) == (data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda") >= 0)


@pytest.mark.parametrize("cut", [0, 2, 10, -2, -40])
def test_a_stored_tile_that_is_not_whole_is_refused(cut: int) -> None:
    data = encode_jpeg(noise(64, 64), 95, "4:4:4")
    with pytest.raises(ImageError, match="not a whole JPEG"):
        decode_jpeg(data[:cut])


def test_real_rgba_and_tiff_files(shared_data: Path) -> None:
    for name in ("dsb2018_stained/images/*.png", "tissue_qc/*/*.png", "nct_crc_mini/*/*.tif"):
        file = sorted(shared_data.glob(name))[0]
        assert np.array_equal(decode_image(file.read_bytes()), iio.imread(file)[..., :3])
