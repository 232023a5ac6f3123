"""Bad input at the command line: one sentence with file, fact and remedy, and the exit code."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import tifffile
from PIL import Image

from jaxhisto import __version__
from jaxhisto.cli import VERBS
from jaxhisto.slides.pyramid import write_pyramid

PURPLE = (150, 80, 160)
GLASS = (245, 245, 245)


def sentence(result: tuple[int, str, str], verb: str, code: int = 1) -> str:
    """The one line of a refusal, once it is sure that it is one line and no traceback."""
    assert result[0] == code, result
    assert "Traceback" not in result[2]
    said = [line for line in result[2].splitlines() if line.startswith(f"jaxhisto {verb}: ")]
    assert len(said) == 1, result[2]
    return said[0]


def slide(path, colour=PURPLE, size=1024):
    texture = np.random.default_rng(0).integers(-20, 20, (size, size, 3))
    write_pyramid(path, np.clip(np.array(colour) + texture, 0, 255).astype(np.uint8))
    return path


def images(folder, count=12):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = rng.integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.jpg", quality=95)
    return folder


SMALL = ("--steps", 1, "--batch-size", 4, "--tile-px", 32, "--model.name", "resnet10")


def test_help_version_and_unknown_verbs(jaxhisto):
    code, out, _ = jaxhisto("--help")
    assert code == 0
    assert all(verb in out for verb in VERBS)
    assert jaxhisto("--version")[1].strip() == f"jaxhisto {__version__}"
    assert jaxhisto()[0] == 2
    code, _, err = jaxhisto("tyle")
    assert code == 2
    assert "tile" in err


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_has_help(jaxhisto, verb):
    assert jaxhisto(verb, "--help")[0] == 0


def test_an_unknown_key_in_a_config_is_usage(jaxhisto, tmp_path):
    path = tmp_path / "wrong.toml"
    path.write_text("batchsize = 3\n")
    said = sentence(jaxhisto("pretrain", path, "--out", tmp_path / "run"), "pretrain", code=2)
    assert "wrong.toml: unknown key batchsize; did you mean batch_size?" in said


def test_tile_refuses_an_empty_folder(jaxhisto, tmp_path):
    (tmp_path / "slides").mkdir()
    said = sentence(jaxhisto("tile", tmp_path / "slides", "--out", tmp_path / "store"), "tile")
    assert "holds no slide" in said
    assert not (tmp_path / "store").exists()


def spoil_zero(path):
    path.write_bytes(b"")


def spoil_truncated(path):
    path.write_bytes(path.read_bytes()[:4000])


def spoil_text(path):
    path.write_text("no slide at all")


@pytest.mark.parametrize("spoil", [spoil_zero, spoil_truncated, spoil_text])
def test_one_broken_slide_is_named_and_the_others_go_on(jaxhisto, tmp_path, spoil):
    (tmp_path / "slides").mkdir()
    slide(tmp_path / "slides" / "good.tiff")
    spoil(slide(tmp_path / "slides" / "bad.tiff"))
    flags = ("--mpp", 0.5, "--foreground", "otsu", "--min-foreground", 0, "--out")
    code, out, err = jaxhisto("tile", tmp_path / "slides", *flags, tmp_path / "store")
    assert code == 1
    assert "bad.tiff" in out
    assert "Traceback" not in err
    from jaxhisto.data.store import TileStore

    assert set(TileStore(tmp_path / "store").slides()) == {"good.tiff"}
    again = ("tile", tmp_path / "slides", *flags, tmp_path / "store", "--failures-allowed", 1)
    assert jaxhisto(*again)[0] == 0


def test_tile_refuses_a_slide_without_pixel_size(jaxhisto, tmp_path):
    said = sentence(jaxhisto("tile", slide(tmp_path / "a.tiff"), "--out", tmp_path / "s"), "tile")
    assert "a.tiff" in said
    assert "--mpp" in said
    assert "mpp.csv" in said


def test_tile_refuses_pixels_finer_than_the_slides(jaxhisto, tmp_path):
    flags = ("--mpp", 1.0, "--tile-mpp", 0.25, "--out", tmp_path / "s")
    said = sentence(jaxhisto("tile", slide(tmp_path / "a.tiff"), *flags), "tile")
    assert "0.25" in said


def test_tile_refuses_glass(jaxhisto, tmp_path):
    path = slide(tmp_path / "glass.tiff", GLASS)
    said = sentence(jaxhisto("tile", path, "--mpp", 0.5, "--out", tmp_path / "s"), "tile")
    assert "glass.tiff" in said
    assert "foreground" in said


def bad_jpeg(path):
    Image.new("RGB", (40, 40), PURPLE).save(path)
    path.write_bytes(path.read_bytes()[:-200])


def cmyk(path):
    Image.new("CMYK", (40, 40)).save(path)


def sixteen_bit(path):
    tifffile.imwrite(path.with_suffix(".tif"), np.zeros((40, 40, 3), np.uint16))


def transparent(path):
    Image.new("RGBA", (40, 40), (*PURPLE, 100)).save(path.with_suffix(".png"))


@pytest.mark.parametrize("spoil", [bad_jpeg, cmyk, sixteen_bit, transparent])
def test_pretrain_refuses_images_it_cannot_read_rightly(jaxhisto, tmp_path, spoil):
    folder = images(tmp_path / "images")
    spoil(folder / "spoiled.jpg")
    run = ("pretrain", *SMALL, "--data.stores", folder, "--out", tmp_path / "run")
    said = sentence(jaxhisto(*run), "pretrain")
    assert "spoiled" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("folder", ["absent", "empty"])
def test_pretrain_refuses_folders_without_images(jaxhisto, tmp_path, folder):
    (tmp_path / "empty").mkdir()
    run = ("pretrain", *SMALL, "--data.stores", tmp_path / folder, "--out", tmp_path / "run")
    assert folder in sentence(jaxhisto(*run), "pretrain")


def test_pretrain_refuses_to_start_without_stores(jaxhisto, tmp_path):
    assert "--data.stores" in sentence(
        jaxhisto("pretrain", *SMALL, "--out", tmp_path / "run"), "pretrain"
    )


def test_pretrain_refuses_an_edited_store(jaxhisto, tmp_path):
    flags = ("--mpp", 0.5, "--foreground", "otsu", "--min-foreground", 0, "--out")
    assert jaxhisto("tile", slide(tmp_path / "a.tiff"), *flags, tmp_path / "s")[0] == 0
    path = tmp_path / "s" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["slides"][0]["mpp"] = 0.25
    path.write_text(json.dumps(manifest))
    run = ("pretrain", *SMALL, "--data.stores", tmp_path / "s", "--out", tmp_path / "run")
    assert "hash" in sentence(jaxhisto(*run), "pretrain")


def test_export_refuses_what_is_no_run_and_a_run_without_checkpoint(jaxhisto, tmp_path):
    out = tmp_path / "encoder.ckpt"
    assert "no run folder" in sentence(jaxhisto("export", tmp_path, "--out", out), "export")
    folder = images(tmp_path / "images")
    from jaxhisto.config import DataConfig, ModelConfig, PretrainConfig
    from jaxhisto.data.sources import open_tiles
    from jaxhisto.pretrain.folder import open_run

    config = PretrainConfig(
        out=str(tmp_path / "run"),
        steps=1,
        batch_size=4,
        data=DataConfig(stores=(str(folder),)),
        model=ModelConfig(name="resnet10"),
    )
    open_run(config, open_tiles(config.data))
    said = sentence(jaxhisto("export", tmp_path / "run", "--out", out), "export")
    assert "no checkpoint" in said
    assert not out.exists()


def test_verify_refuses_what_is_no_checkpoint(jaxhisto, tmp_path):
    path = tmp_path / "encoder.ckpt"
    path.write_bytes(b"not a checkpoint")
    code, _, err = jaxhisto("verify", path)
    assert code == 1
    assert "encoder.ckpt" in err
    assert "Traceback" not in err


def test_debug_shows_the_traceback(jaxhisto, tmp_path):
    assert "Traceback" in jaxhisto("--debug", "export", tmp_path, "--out", tmp_path / "x")[2]


def test_python_dash_m_is_the_command_line():
    line = [sys.executable, "-m", "jaxhisto", "--version"]
    found = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert (found.returncode, found.stdout.strip()) == (0, f"jaxhisto {__version__}")
