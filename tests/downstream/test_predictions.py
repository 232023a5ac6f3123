"""The folder of predicted masks: what is kept, gone on with and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from made_sets import write_images

from jaxhisto.downstream.predict import find_inputs
from jaxhisto.downstream.predictions import mask_path, open_predictions
from jaxhisto.errors import ConfigError, RunError
from jaxhisto.training_config import PredictConfig

HOW = {"unet_sha256": "a" * 64, "window_px": 64}
INPUTS = {"a": "1", "deep/b": "2", "c": "3"}


def made(out: Path, *names: str, how: dict = HOW, force: bool = False) -> list[str]:
    """Predicts these of the inputs, as a line that is killed after them; the others were kept."""
    with open_predictions(out, how, INPUTS, force) as done:
        kept = [name for name in INPUTS if done.kept(name)]
        for name in names:
            assert not done.kept(name)
            mask_path(out, name).parent.mkdir(parents=True, exist_ok=True)
            mask_path(out, name).write_bytes(b"mask")
            done.add({"name": name, "stamp": INPUTS[name]})
    return kept


def test_a_line_that_was_killed_goes_on_with_the_next_one(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    assert made(out) == []
    mask_path(out, "a").write_bytes(b"whole, and not yet in the record")
    assert made(out, "a") == []
    assert made(out, "deep/b") == ["a"]
    assert made(out) == ["a", "deep/b"]
    mask_path(out, "a").unlink()
    assert made(out, "a", "c") == ["deep/b"]
    record = json.loads((out / "predictions.json").read_text())
    assert [one["name"] for one in record["inputs"]] == ["a", "c", "deep/b"]
    assert record["unet_sha256"] == HOW["unet_sha256"]
    with open_predictions(out, HOW, {"d": "4"}) as done:  # other inputs, into the same folder
        done.add({"name": "d", "stamp": "4"})
    assert made(out) == ["a", "deep/b", "c"]


def test_masks_of_another_kind_are_refused_and_made_anew_by_force(tmp_path: Path) -> None:
    made(tmp_path, "a", "c")
    with pytest.raises(RunError, match=r"made otherwise \(window_px: 64 -> 32\); pass --force"):
        made(tmp_path, how=HOW | {"window_px": 32})
    assert made(tmp_path, "a", "deep/b", "c", force=True) == []
    assert made(tmp_path, "a", how=HOW | {"window_px": 32}, force=True) == []
    record = json.loads((tmp_path / "predictions.json").read_text())
    assert record["window_px"] == 32
    assert [one["name"] for one in record["inputs"]] == ["a"]  # the others' masks are not its own


def test_a_line_that_ended_before_its_first_mask_binds_to_nothing(tmp_path: Path) -> None:
    assert made(tmp_path, how=HOW | {"window_px": 32}) == []
    assert made(tmp_path, "a") == []
    assert made(tmp_path) == ["a"]


def test_an_image_that_was_changed_is_not_taken_for_done(tmp_path: Path) -> None:
    made(tmp_path, "a", "c")
    with (
        pytest.raises(RunError, match=r"c\.mask\.png: its image was changed since \(1 of 3 were"),
        open_predictions(tmp_path, HOW, INPUTS | {"c": "9"}),
    ):
        pass


def test_what_is_not_known_to_be_ours_stays(tmp_path: Path) -> None:
    mask_path(tmp_path, "a").write_bytes(b"drawn by hand")
    with pytest.raises(RunError, match=r"a\.mask\.png: is there already \(1 of 3 masks are\)"):
        made(tmp_path)
    assert mask_path(tmp_path, "a").read_bytes() == b"drawn by hand"
    assert not (tmp_path / "predictions.json").exists()
    for text in ("", "[]", '{"format": "jaxhisto-predictions-9"}'):
        (tmp_path / "predictions.json").write_text(text)
        with pytest.raises(RunError, match="is none of this version's"):
            made(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file: cannot be written \(File exists\)"):
        made(tmp_path / "file")


def test_two_processes_at_once_are_refused(tmp_path: Path) -> None:
    with (
        open_predictions(tmp_path, HOW, INPUTS),
        pytest.raises(RunError, match="another process predicts into it"),
        open_predictions(tmp_path, HOW, INPUTS),
    ):
        pass


def test_nothing_to_predict_is_no_success(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no image or slide is named; give files or folders"):
        find_inputs(PredictConfig((), unet="", out=str(tmp_path)))


def test_what_was_written_among_the_images_is_no_image(tmp_path: Path) -> None:
    """The same line again, with its masks beside or below the images, also after a kill."""
    images = tmp_path / "images"
    write_images(images, {f"{name}.png": np.zeros((8, 8, 3), np.uint8) for name in INPUTS})
    (images / "._a.png").write_bytes(b"as macOS adds it")
    for out in (images, images / "masks"):
        config = PredictConfig((str(images),), unet="", out=str(out))

        def found(config: PredictConfig = config) -> list[str]:
            return [one.name for one in find_inputs(config)]

        assert found() == ["a", "c", "deep/b"]
        made(out, "a", "deep/b")
        mask_path(out, "c").write_bytes(b"whole, and not yet in the record")
        assert found() == ["a", "c", "deep/b"]
        shutil.copy(images / "a.png", out / "x.mask.png")  # of no image: nobody wrote it
        assert "x.mask" in str(found())
        (out / "x.mask.png").unlink()
        for path in (mask_path(out, name) for name in INPUTS):
            path.unlink()
        (out / "predictions.json").unlink()
