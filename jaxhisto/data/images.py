"""Encoded images to RGB pixels: exactly, or not at all.

What an 8-bit grey, palette or RGB file says is what comes back. Anything that would need a
guess is refused by name: more than 8 bits (which window?), CMYK (which profile?), transparency
(which background?), several pages (which?), damaged data (which pixels?). One thing no decoder
sees: a JPEG holds no checksum, so bytes changed in its middle come back as other pixels.
"""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
MODES = ("L", "LA", "P", "PA", "RGB", "RGBA")

RGB8 = "convert it to 8-bit RGB"
TIFF_BITS, TIFF_SAMPLE_FORMAT, UNSIGNED = 258, 339, 1
JPEG_START, JPEG_SCAN, JPEG_END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"


class ImageError(Exception):
    """An image that is refused: `fact` ends a sentence that starts with its name."""

    def __init__(self, fact: str, remedy: str) -> None:
        super().__init__(f"{fact}; {remedy}")
        self.fact, self.remedy = fact, remedy


def decode_image(data: bytes, checksums: bool = False) -> NDArray[np.uint8]:
    """The pixels of a JPEG, PNG, TIFF, BMP or WebP file, as stored (EXIF turns nothing).

    Grey is replicated to three channels, palettes are looked up, and an alpha channel that is
    opaque everywhere is dropped. A transparent pixel refuses the file: what lies beneath is
    often black or left over, and painting it white would invent glass.

    Args:
      checksums: also verify a PNG's chunk checksums, which decoding skips.

    Returns:
      (h, w, 3) uint8 RGB.

    Raises:
      ImageError: damaged, or not 8-bit grey, palette or RGB on one page.
    """
    if not data:
        raise ImageError("is empty (0 bytes)", "remove it")
    try:
        if checksums:
            _opened(data).verify()
        with _opened(data) as image:
            _check(image, data)
            image.load()
            return _rgb(image)
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"is no readable {', '.join(FORMATS)} image", "remove it") from error
    except Exception as error:  # fed with damaged bytes, Pillow's decoders raise nearly anything
        raise ImageError(f"cannot be decoded ({error})", "remove it") from error


def decode_jpeg(data: bytes, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """The pixels of a stored tile, (h, w, 3) uint8 RGB; by simplejpeg, the quickest decoder here.

    What simplejpeg finds anything odd in, OpenCV decides on, and on all where simplejpeg is not
    installed; of all else both make the same pixels.

    Args:
      out: (h, w, 3) uint8, contiguous; filled and returned where the tile is of this size. Where
        another array comes back, anything may be in it.

    Raises:
      ImageError: not a whole JPEG.
    """
    if not data.startswith(JPEG_START) or not jpeg_is_whole(data):
        raise ImageError("is not a whole JPEG", "cut the slides again")
    tile = _by_simplejpeg(data, out)
    if tile is None:
        tile = _by_opencv(data)
        if out is not None and tile.shape == out.shape:
            out[:] = tile
    if out is None:
        return tile
    return out if tile.shape == out.shape else tile.copy()  # it may be a view of `out`


def jpeg_decoder() -> str:
    """What decodes stored tiles on this machine: `simplejpeg`, or `opencv`, which is slower."""
    return "opencv" if _simplejpeg() is None else "simplejpeg"


@cache
def _simplejpeg() -> Any | None:
    """The module, or None where it is not installed: a machine with an accelerator may lack it."""
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def _by_simplejpeg(data: bytes, out: NDArray[np.uint8] | None) -> NDArray[np.uint8] | None:
    """None of what is damaged, of a kind that it does not convert, or larger than `out`."""
    simplejpeg = _simplejpeg()
    if simplejpeg is None:
        return None
    try:
        # Its defaults are the exact DCT and the smooth upsampling, which OpenCV uses too.
        tile: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", buffer=out)
    except ValueError:
        return None
    return tile


def _by_opencv(data: bytes) -> NDArray[np.uint8]:
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    bgr = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if bgr is None:
        raise ImageError("cannot be decoded", "cut the slides again")
    # Not IMREAD_COLOR_RGB: OpenCV 4.10 does not have it.
    return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint8)


def jpeg_is_whole(data: bytes) -> bool:
    """Whether an end marker follows the last scan, where neither marker occurs by chance.

    Decoders take what is missing for zeros and paint on: a file whose tail was never written
    would come back half grey.
    """
    if data.endswith(JPEG_END):  # which follows any scan; the first one is soon found
        return JPEG_SCAN in data
    return data.rfind(JPEG_END) > data.rfind(JPEG_SCAN) >= 0


def _opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=FORMATS)


def _check(image: Image.Image, data: bytes) -> None:
    pages = getattr(image, "n_frames", 1)
    if pages > 1:
        raise ImageError(
            f"has {pages} pages", "save the page you mean alone, or cut it with `jaxhisto tile`"
        )
    bits, unsigned = _sample(image, data)
    if bits > 8 or image.mode.startswith("I"):
        raise ImageError(f"has {max(bits, 16)} bits a channel", RGB8)
    if not unsigned:
        raise ImageError("has signed or floating-point pixels", RGB8)
    if image.mode not in MODES:
        raise ImageError(f"is {'1-bit' if image.mode == '1' else image.mode}", RGB8)
    if image.format in ("JPEG", "MPO") and not jpeg_is_whole(data):
        raise ImageError("is cut short (its end marker is missing)", "remove it")


def _sample(image: Image.Image, data: bytes) -> tuple[int, bool]:
    """Bits a channel and whether they are unsigned; Pillow's mode says 8 for 16-bit RGB."""
    if image.format == "PNG":
        return data[24], True  # IHDR: signature 8, length and type 8, width and height 8
    if image.format == "TIFF":
        tags = getattr(image, "tag_v2", {})
        kinds = np.atleast_1d(tags.get(TIFF_SAMPLE_FORMAT, UNSIGNED))
        bits = int(np.max(tags.get(TIFF_BITS, 1)))
        return bits, bool(np.all(kinds == UNSIGNED)) and image.mode != "F"
    return 8, image.mode != "F"


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    if not image.has_transparency_data:
        return np.array(image.convert("RGB"))
    pixels = np.array(image.convert("RGBA"))
    clear = int((pixels[..., 3] < 255).sum())
    if clear:
        raise ImageError(f"has {clear} transparent pixels", "flatten it onto one background")
    return np.ascontiguousarray(pixels[..., :3])
