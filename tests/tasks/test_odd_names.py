"""Names of images that no file of ours could hold."""

from __future__ import annotations

import os
import sys

import pytest
from made_images import noise, write_pngs
from PIL import Image

from jaxhisto.errors import StoreError
from jaxhisto.task_config import TaskConfig
from jaxhisto.tasks.task import open_task


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_not_utf8_are_told_how_to_mend(tmp_path):
    names = [f"{c}/größe µm {i}.png" for c in "ab" for i in range(2)]
    folder = write_pngs(tmp_path / "set", {name: noise(8, 8) for name in names})
    assert len(open_task(TaskConfig(data=str(folder)))) == 4
    os.rename(folder / "b", os.fsencode(folder) + b"/b\xf6sartig")  # as a ZIP of Windows has it
    with pytest.raises(StoreError, match=r"2 file names are not written in UTF-8 \(b\\xf6sartig"):
        open_task(TaskConfig(data=str(folder)))


def test_two_images_of_one_mask_are_refused(tmp_path):
    images = write_pngs(tmp_path / "i", {f"{i}.png": noise(8, 8, i) for i in range(4)})
    ids = noise(8, 8, 9)[..., 0] % 2
    for i in range(4):
        (tmp_path / "m").mkdir(exist_ok=True)
        Image.fromarray(ids).save(tmp_path / "m" / f"{i}.png")
    config = TaskConfig(data=str(images), masks=str(tmp_path / "m"))
    assert len(open_task(config)) == 4
    Image.fromarray(noise(8, 8, 2)).save(images / "2.tif")
    with pytest.raises(StoreError, match=r"2\.png and 2\.tif would share the mask 2\.png; keep"):
        open_task(config)
