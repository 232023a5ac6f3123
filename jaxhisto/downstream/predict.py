"""`jaxhisto predict`: a trained UNet on images and whole slides -> masks and overlays."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxhisto.config import TileConfig
from jaxhisto.console import say
from jaxhisto.data.folder_source import image_names
from jaxhisto.data.images import SUFFIXES, ImageError, decode_image
from jaxhisto.data.named_images import read_bytes
from jaxhisto.distributed import make_mesh
from jaxhisto.downstream.painting import MaskPNG, Overlay, with_legend, write_png
from jaxhisto.downstream.predictions import (
    NOWHERE,
    cannot_write,
    mask_path,
    open_predictions,
    overlay_path,
    written_in,
)
from jaxhisto.downstream.tiled import (
    Band,
    ImageRaster,
    Predict,
    Raster,
    Windows,
    predict_bands,
    windows_of,
)
from jaxhisto.downstream.unet_predict import TrainedUNet, make_predict, open_unet
from jaxhisto.errors import ConfigError, StoreError
from jaxhisto.progress import Progress
from jaxhisto.slides import reader
from jaxhisto.slides.finding import find_slides
from jaxhisto.slides.pixel_size import GivenPixelSize
from jaxhisto.slides.raster import SlideRaster
from jaxhisto.slides.slide_files import file_stamp
from jaxhisto.training_config import PredictConfig


@dataclass(frozen=True)
class Input:
    """An image or a slide: its file, what its results are called, what tells whether it was
    changed, and, of a slide, `given`."""

    path: Path
    name: str
    stamp: str
    given: GivenPixelSize | None = None


def predict(config: PredictConfig) -> list[dict[str, Any]]:
    """Writes OUT/NAME.mask.png, OUT/NAME.overlay.png and OUT/predictions.json; what an earlier
    start of the same line finished is kept.

    Returns:
      The entries of predictions.json, one an input.

    Raises:
      ConfigError: windows that do not cover an image, slides without a pixel size to read them at.
      StoreError, SlideError: inputs that are not there or cannot be read.
      ExportError: no UNet.
      RunError: results that are there already and were made otherwise; see `open_predictions`.
    """
    unet = open_unet(config.unet)
    windows = windows_of(config.window_px or unet.tile_px, config.overlap_px, config.margin_px)
    inputs = find_inputs(config)
    out = Path(config.out)
    mesh = make_mesh(config.devices)
    batch = -(-config.batch // mesh.size) * mesh.size
    network = make_predict(
        unet.arch, len(unet.class_names), unet.params, unet.batch_stats, unet.mean, unet.std, mesh
    )
    found = []
    stamps = {one.name: one.stamp for one in inputs}
    with open_predictions(out, how(config, unet, windows), stamps, config.force) as done:
        if kept := sum(done.kept(name) is not None for name in stamps):
            say(f"{out}: {kept:,} of {len(inputs):,} masks are there, going on")
        for one in inputs:
            entry = done.kept(one.name)
            if entry is None:
                with opened(one, config, unet) as raster:
                    entry = predict_one(one, raster, network, unet, windows, batch, config)
                done.add(entry)
                shares = ", ".join(f"{n} {s:.1%}" for n, s in entry["shares"].items())
                size = f"{entry['width']} x {entry['height']} px"
                say(f"{mask_path(out, one.name)}: {size}, {shares}")
            found.append(entry)
    return found


def how(config: PredictConfig, unet: TrainedUNet, windows: Windows) -> dict[str, Any]:
    """What makes two predictions of one input the same."""
    return {
        "unet_sha256": unet.sha256,
        "classes": list(unet.class_names),
        "kind": config.kind,
        "tile_mpp": config.tile_mpp,
        "mpp": config.mpp,
        "window_px": windows.side,
        "overlap_px": windows.overlap,
        "margin_px": windows.margin,
        "overlay": [config.overlay_px, config.opacity] if config.overlay else None,
    }


def predict_one(
    one: Input,
    raster: Raster,
    network: Predict,
    unet: TrainedUNet,
    windows: Windows,
    batch: int,
    config: PredictConfig,
) -> dict[str, Any]:
    """Predicts one input in bands of rows, each written as soon as it is done."""
    classes, began = len(unet.class_names), time.perf_counter()
    height, width = raster.height, raster.width
    path = mask_path(Path(config.out), one.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path.parent, error) from error
    overlay = Overlay(height, width, classes, config.overlay_px, config.opacity)
    counts = np.zeros(NOWHERE + 1, np.int64)
    with (
        Progress(f"predict {one.name}", height, unit="rows") as progress,
        MaskPNG(path, height, width, classes) as mask,
    ):
        for band in predict_bands(raster, network, classes, windows, batch):
            ids = ids_of(band, raster)
            mask.write(ids)
            if config.overlay:
                overlay.write(band.rgb, ids)
            counts += np.bincount(ids.reshape(-1), minlength=len(counts))
            progress.update(band.y + len(ids))
    shares = counts[:classes] / max(int(counts[:classes].sum()), 1)
    if config.overlay:
        picture = with_legend(overlay.picture(), unet.class_names, shares.tolist())
        write_png(overlay_path(Path(config.out), one.name), picture)
    of_slide = isinstance(raster, SlideRaster)
    return {
        "name": one.name,
        "file": one.path.name,
        "stamp": one.stamp,
        "width": width,
        "height": height,
        "mpp": raster.mpp if isinstance(raster, SlideRaster) else None,
        "pixels": {n: int(c) for n, c in zip(unet.class_names, counts[:classes], strict=True)},
        "shares": {n: float(s) for n, s in zip(unet.class_names, shares, strict=True)},
        "not_in_the_file": int(counts[NOWHERE]) if of_slide else 0,
        "unreadable": raster.unreadable if isinstance(raster, SlideRaster) else 0,
        "seconds": round(time.perf_counter() - began, 2),
    }


def ids_of(band: Band, raster: Raster) -> NDArray[np.uint8]:
    """(h, width) uint8: the likeliest class, `NOWHERE` where a slide's file has no pixel."""
    ids = band.probabilities.argmax(-1).astype(np.uint8)
    if isinstance(raster, SlideRaster):
        ids[~raster.there(band.y, band.y + len(ids))] = NOWHERE
    return ids


@contextlib.contextmanager
def opened(one: Input, config: PredictConfig, unet: TrainedUNet) -> Iterator[Raster]:
    """The pixels of an input; a slide's at the UNet's pixel size."""
    if one.given is None:
        try:
            yield ImageRaster(decode_image(read_bytes(one.path)))
        except ImageError as error:
            tiff = one.path.suffix.lower() in reader.SUFFIXES
            hint = "; if it is a whole slide, pass --kind slides" if tiff else ""
            raise StoreError(f"{one.path}: {error}{hint}.") from error
        return
    with reader.Slide(one.path, one.given) as slide:
        yield SlideRaster(slide, pixel_size_of(config, unet))


def pixel_size_of(config: PredictConfig, unet: TrainedUNet) -> float:
    """um/px at which slides are read.

    Raises:
      ConfigError: neither the UNet nor the user says it, or the UNet's spread.
    """
    if config.tile_mpp is not None:
        return config.tile_mpp
    if unet.mpp_range is None:
        raise ConfigError(
            f"{unet.path}: does not say at how many um/px it was trained; pass --tile-mpp, such as "
            "--tile-mpp 0.5."
        )
    low, high = unet.mpp_range
    if high > 1.05 * low:
        raise ConfigError(
            f"{unet.path}: was trained at {low:g} to {high:g} um/px; say at which slides are to be "
            "read by --tile-mpp."
        )
    return (low * high) ** 0.5


def find_inputs(config: PredictConfig) -> list[Input]:
    """The images and slides that a config names, no two of one name.

    Raises:
      StoreError, SlideError: one that is not there, a folder without any.
      ConfigError: two of one name.
    """
    if not config.inputs:
        raise ConfigError("no image or slide is named; give files or folders before the flags.")
    found: list[Input] = []
    for name in config.inputs:
        path = Path(name)
        if not path.exists():
            raise StoreError(f"{path}: is not there; check the path.")
        slides = config.kind == "slides" or (config.kind == "auto" and _holds_slides(path))
        found += _slides(config, path) if slides else _images(path, Path(config.out))
    names: dict[str, Path] = {}
    for one in found:
        if one.name in names:
            raise ConfigError(
                f"{names[one.name]} and {one.path}: both would be called {one.name}; predict them "
                "into two folders."
            )
        names[one.name] = one.path
    return found


def _images(path: Path, out: Path) -> list[Input]:
    """A file, or the images of a folder but for what an earlier start wrote among them."""
    if not path.is_dir():
        return [Input(path, path.stem, file_stamp(path))]
    names = image_names(path)
    place = out.resolve()
    if place.is_relative_to(path.resolve()):
        inside = place.relative_to(path.resolve())
        written = written_in(out, [_stem(name) for name in names])
        names = [n for n in names if not (Path(n).is_relative_to(inside)
                                          and Path(n).relative_to(inside) in written)]  # fmt: skip
    if not names:
        raise StoreError(f"{path}: holds nothing but predicted masks; name another folder.")
    return [Input(path / name, _stem(name), file_stamp(path / name)) for name in names]


def _stem(name: str) -> str:
    return str(Path(name).with_suffix(""))


def _slides(config: PredictConfig, path: Path) -> list[Input]:
    jobs = find_slides(TileConfig((str(path),), "", mpp=config.mpp))
    return [
        Input(
            job.path,
            str(Path(job.id).with_suffix("")),
            file_stamp(job.path, job.others),
            job.given,
        )
        for job in jobs
    ]


def _holds_slides(path: Path) -> bool:
    """Whether a path is a slide, or a folder with one, by suffixes that no image has."""
    own = tuple(s for s in reader.SUFFIXES if s not in SUFFIXES)
    if path.is_file():
        return path.suffix.lower() in own
    return any(p.suffix.lower() in own for p in path.rglob("*"))
