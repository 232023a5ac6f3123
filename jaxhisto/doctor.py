"""`jaxhisto doctor`: what is installed, whether it works, and what to do where it does not."""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from jaxhisto.config import DoctorConfig
from jaxhisto.runlog import environment

FREE_GB = 5
REMEDIES = {
    "devices": "reinstall jax for this device (pip install 'jaxhisto[cuda]' or 'jaxhisto[tpu]')",
    "step": "reinstall jax for this device (pip install 'jaxhisto[cuda]' or 'jaxhisto[tpu]')",
    "openslide": "pip install -U openslide-bin openslide-python",
    "disk": f"make room for {FREE_GB} GB",
}
OPTIONAL = {"torch": "export", "torchvision": "demo", "matplotlib": "plots"}


def examine(config: DoctorConfig) -> int:
    """Runs every check, prints a line each; returns 1 if one failed.

    With `config.pod` set, compares these devices with one instead.
    """
    if config.pod:
        from jaxhisto.pretrain.pod import prove

        return prove(config.devices)
    failed = [check.__name__ for check in CHECKS if not passed(check)]
    print("all well" if not failed else f"to mend: {', '.join(failed)}")
    return 1 if failed else 0


def passed(check: Callable[[], str]) -> bool:
    """Runs one check; whatever it raises is what is wrong."""
    try:
        print(f"ok    {check.__name__:<10} {check()}")
    except Exception as error:
        remedy = REMEDIES.get(check.__name__, "pip install --force-reinstall jaxhisto")
        print(f"FAIL  {check.__name__:<10} {' '.join(str(error).split())}; {remedy}")
        return False
    return True


def versions() -> str:
    """Versions of all that takes part."""
    found = environment([])
    missing = [name for name, version in found["versions"].items() if version is None]
    if missing:
        raise RuntimeError(f"not installed: {', '.join(missing)}")
    pairs = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"Python {found['python']}, {pairs}"


def extras() -> str:
    """Optional packages: their absence is said, and is no failure."""
    said = []
    for name, extra in OPTIONAL.items():
        try:
            said.append(f"{name} {importlib.import_module(name).__version__}")
        except (ImportError, RuntimeError, OSError) as error:
            broken = "" if isinstance(error, ModuleNotFoundError) else f" broken ({error})"
            said.append(f"no {name}{broken} (pip install 'jaxhisto[{extra}]')")
    return ", ".join(said)


def devices() -> str:
    """What JAX computes on."""
    import jax

    found = jax.devices()
    kinds = sorted({f"{d.platform} {d.device_kind}" for d in found})
    accelerator = found[0].platform != "cpu"
    hint = "" if accelerator else "; no accelerator: pip install 'jaxhisto[cuda]' on a GPU machine"
    return f"{len(found)} x {', '.join(kinds)}{hint}"


def step() -> str:
    """One sharded training step of a small encoder on all devices."""
    import jax
    import numpy as np

    from jaxhisto.config import ModelConfig, PretrainConfig
    from jaxhisto.distributed import make_mesh, to_global
    from jaxhisto.pretrain.step import init_state, make_train_step

    mesh = make_mesh()
    batch = 4 * mesh.size
    config = PretrainConfig(
        out="", batch_size=batch, tile_px=32, precision="f32", model=ModelConfig(name="resnet10")
    )
    tiles = np.random.default_rng(0).integers(0, 256, (batch, 32, 32, 3), np.uint8)
    sizes = np.full((batch, 2), 32, np.int32)
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        train_step = make_train_step(config, 10, 1)
        rows = to_global((tiles, sizes), mesh)
        _, metrics = train_step(init_state(config, 10, 1, mesh), *rows)
        loss = float(metrics["loss"])
    if not np.isfinite(loss):
        raise RuntimeError(f"the loss of one step is {loss}")
    seconds = time.perf_counter() - began
    return f"mesh {dict(mesh.shape)}, loss {loss:.3f}, {seconds:.1f} s with compilation"


def openslide() -> str:
    """OpenSlide opens a slide that is written here and reads the right colour."""
    import numpy as np
    import openslide as library

    from jaxhisto.slides.pyramid import write_pyramid

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "check.tiff"
        write_pyramid(path, np.full((512, 512, 3), (200, 30, 120), np.uint8))
        with library.OpenSlide(path) as slide:
            pixel = slide.read_region((100, 100), 0, (1, 1)).convert("RGB").getpixel((0, 0))
            levels = slide.level_count
    if pixel != (200, 30, 120) or levels != 2:
        raise RuntimeError(f"read {pixel} of {levels} levels")
    return f"library {library.__library_version__}, Python {library.__version__}"


def disk() -> str:
    """Free space where the next run would be written."""
    free = shutil.disk_usage(os.getcwd()).free / 1e9
    if free < FREE_GB:
        raise RuntimeError(f"{free:.0f} GB free in {os.getcwd()}")
    return f"{free:.0f} GB free in {os.getcwd()}"


CHECKS = (versions, extras, devices, step, openslide, disk)
