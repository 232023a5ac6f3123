"""The whole chain in minutes, with no network and no data of the user's."""

from __future__ import annotations

import importlib.util
import shutil
import time
from pathlib import Path

from jaxhisto.config import DataConfig, DemoConfig, ModelConfig, PretrainConfig, TileConfig
from jaxhisto.errors import JaxhistoError, RunError, SlideError
from jaxhisto.file_config import ExportConfig
from jaxhisto.slides.pyramid import write_pyramid

MARK = ".jaxhisto-demo"
NEEDED = ("skimage", "torch", "torchvision")
ASSUMED_MPP = 0.5
WHY_OTSU = (
    "The micrograph is a DAB stain (brown), which `ciga2022`, the paper's rule, rejects: it keeps\n"
    "violet to pink. So the demo takes `otsu`. It states no pixel size, so the demo passes\n"
    f"{ASSUMED_MPP} um/px with the source `assumed`, and every tile carries that word."
)
LOAD = """\
import torch, torchvision
resnet = torchvision.models.{arch}()
state = torch.load("{file}", weights_only=True)
resnet.fc = torch.nn.Identity(); resnet.load_state_dict(state)"""


def run_demo(config: DemoConfig) -> int:
    """Slide, tiles, pretraining, two PyTorch files, verification; returns the exit code.

    Raises:
      JaxhistoError: an `out` that is not the demo's to replace, no slides, too few tiles, or a
        missing extra.
    """
    began = time.perf_counter()
    check_request(config)
    out = fresh_folder(Path(config.out))
    slides = Path(config.slides) if config.slides else micrograph_slide(out / "slides")
    store, code = cut(config, slides, out / "tiles")
    run = train(config, store, out / "run")
    code = max(code, to_pytorch(config, run, out))
    say("5 look", f"{store / 'report.html'}, {run / 'views.png'}, {run / 'loss.png'}")
    print(f"\ndemo done in {time.perf_counter() - began:.0f} s")
    return code


def check_request(config: DemoConfig) -> None:
    """Refuses what would fail after minutes, and slides that the demo would sweep away."""
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            raise JaxhistoError(f"{name} is not installed; pip install 'jaxhisto[demo]'.")
    if not config.slides:
        return
    given, out = Path(config.slides).resolve(), Path(config.out).resolve()
    if not given.exists():
        raise SlideError(f"{config.slides}: is not there; check the path.")
    if given.is_relative_to(out):
        raise RunError(f"{given}: lies inside {out}, which the demo replaces; give another --out.")


def fresh_folder(out: Path) -> Path:
    """An empty folder; an earlier demo's is replaced, anything else is refused."""
    if out.exists() and not (out / MARK).exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out}: exists and was not made by the demo; give another --out.")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARK).write_text("Made by `jaxhisto demo`, which replaces this folder.\n")
    return out


def micrograph_slide(folder: Path) -> Path:
    """Writes scikit-image's immunohistochemistry micrograph as a pyramidal TIFF slide."""
    from skimage import data

    folder.mkdir(parents=True)
    image = data.immunohistochemistry()
    write_pyramid(folder / "immunohistochemistry.tiff", image)
    height, width, _ = image.shape
    say("1 slide", f"{folder}/immunohistochemistry.tiff, {width} x {height} px, DAB + haematoxylin")
    print(WHY_OTSU)
    return folder


def cut(config: DemoConfig, slides: Path, store: Path) -> tuple[Path, int]:
    """Tiles the slides into a store; the exit code is 1 when some of them failed."""
    from jaxhisto.slides.tiling import tile

    own = bool(config.slides)
    rule = config.foreground or ("ciga2022" if own else "otsu")
    result = tile(
        TileConfig(
            slides=(str(slides),),
            out=str(store),
            dataset="demo",
            tile_px=config.tile_px,
            mpp=config.mpp if own else ASSUMED_MPP,
            mpp_source="flag" if own else "assumed",
            foreground=rule,
        )
    )
    say("2 tile", "\n".join(result.summary()))
    return store, result.exit_code


def train(config: DemoConfig, store: Path, run: Path) -> Path:
    """Pretrains a small setting on the store."""
    from jaxhisto.data.store import TileStore
    from jaxhisto.pretrain.run import pretrain

    tiles = len(TileStore(store))
    if tiles < 2:
        raise SlideError(f"{store}: {tiles} tile is too few to contrast; give more slides.")
    say("3 pretrain", f"SimCLR, {config.name}, {config.steps} steps")
    return pretrain(
        PretrainConfig(
            out=str(run),
            steps=config.steps,
            batch_size=min(config.batch_size, tiles),
            tile_px=config.tile_px,
            precision="f32",
            devices=1,
            log_every=10,
            data=DataConfig(stores=(str(store),)),
            model=ModelConfig(name=config.name),
        )
    )


def to_pytorch(config: DemoConfig, run: Path, out: Path) -> int:
    """Exports both layouts, verifies both, and loads one as a stranger would."""
    from jaxhisto.torch_files import export_encoder, verify_file

    code = 0
    files = {"published": out / "encoder.ckpt", "torchvision": out / f"{config.name}.pth"}
    for layout, file in files.items():
        say("4 export", f"{layout}: {file}")
        export_encoder(ExportConfig(run=str(run), out=str(file), layout=layout))  # type: ignore[arg-type]
        code = max(code, verify_file(str(file)))
    lines = LOAD.format(arch=config.name, file=files["torchvision"])
    print("\nLoad it in PyTorch:\n\n" + lines)
    scope: dict = {}
    exec(lines, scope)
    print(f"\n-> {scope['resnet'].eval()(scope['torch'].zeros(1, 3, 224, 224)).shape}")
    return code


def say(stage: str, text: str) -> None:
    """One headline a stage."""
    print(f"\n[{stage}] {text}", flush=True)
