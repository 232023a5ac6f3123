"""What the README's first screen promises: the demo, from nothing to a verified PyTorch file."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest


def run_demo(folder, *flags):
    return subprocess.run(
        [sys.executable, "-m", "jaxhisto.cli", "demo", *flags],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_demo_ends_in_a_file_that_stock_torchvision_loads(tmp_path):
    import torch
    import torchvision

    began = time.monotonic()
    done = run_demo(tmp_path)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 180
    assert "assumed" in done.stdout
    assert "takes `otsu`" in done.stdout
    lines = re.search(r"Load it in PyTorch:\n\n(.*?)\n\n", done.stdout, re.S).group(1)
    assert len(lines.splitlines()) == 4
    resnet = torchvision.models.resnet18()
    resnet.fc = torch.nn.Identity()
    state = torch.load(tmp_path / "demo" / "resnet18.pth", weights_only=True)
    assert not any(resnet.load_state_dict(state, strict=True))
    for name in ("tiles/report.html", "run/views.png", "run/loss.png", "run/metrics.jsonl"):
        assert (tmp_path / "demo" / name).stat().st_size > 0


def test_the_demo_replaces_nothing_that_it_did_not_make(tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "mine.txt").write_text("mine")
    done = run_demo(tmp_path)
    assert done.returncode == 1
    assert "was not made by the demo" in done.stderr
    assert (tmp_path / "demo" / "mine.txt").read_text() == "mine"


def test_the_demo_does_not_sweep_away_the_slides_it_is_given(tmp_path):
    (tmp_path / "demo" / "slides").mkdir(parents=True)
    (tmp_path / "demo" / ".jaxhisto-demo").write_text("")
    (tmp_path / "demo" / "slides" / "mine.svs").write_text("mine")
    done = run_demo(tmp_path, "--slides", "demo/slides")
    assert done.returncode == 1
    assert "lies inside" in done.stderr
    assert (tmp_path / "demo" / "slides" / "mine.svs").read_text() == "mine"


@pytest.mark.slow
def test_the_demo_takes_slides_of_the_users_own(shared_data, tmp_path):
    slides = tmp_path / "slides"
    slides.mkdir()
    name = "CMU-1-Small-Region.svs"
    (slides / name).write_bytes((shared_data / "wsi" / name).read_bytes())
    done = run_demo(tmp_path, "--slides", str(slides), "--steps", "2", "--batch-size", "16")
    assert done.returncode == 0, done.stderr
    assert f"{name}: 100 tiles at 0.499 um/px (openslide.mpp)" in done.stdout
