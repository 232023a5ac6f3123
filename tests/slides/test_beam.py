"""`tile --beam` on Beam's local runner, in a process of its own: Beam warns on import."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_slides import GLASS, PINK, painted, write_slide

from jaxhisto.config import TileConfig
from jaxhisto.errors import ConfigError
from jaxhisto.slides.tiling import tile

HERE = Path(__file__).parent
RUNNER = "--runner=DirectRunner"
with_beam = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None,
    reason="Apache Beam is not installed (extra `beam`)",
)


def config(slides: Path, out: Path, **more: object) -> TileConfig:
    return TileConfig(
        slides=(str(slides),), out=str(out), dataset="d", tile_px=64, max_tiles=9, processes=1,
        failures_allowed=3, **more,
    )  # fmt: skip


def jaxhisto(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jaxhisto.cli", *arguments],
        capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )  # fmt: skip


def flags(slides: Path, out: Path, beam: str = RUNNER) -> list[str]:
    return [
        "tile", str(slides), "--out", str(out), "--dataset", "d", "--tile-px", "64", "--max-tiles",
        "9", "--failures-allowed", "3", f"--beam={beam}",
    ]  # fmt: skip


@pytest.fixture
def slides(tmp_path):
    for i in range(5):
        write_slide(tmp_path / "in" / f"{i}.tif", painted(512, 256, PINK, i))
    write_slide(tmp_path / "in" / "glass.tif", painted(512, 256, GLASS))
    (tmp_path / "in" / "text.svs").write_text("no slide")
    return tmp_path / "in"


@pytest.mark.skipif(importlib.util.find_spec("apache_beam") is not None, reason="Beam is here")
def test_without_beam_the_extra_is_named(slides, tmp_path):
    with pytest.raises(ConfigError, match=r"--beam: .*pip install 'jaxhisto\[beam\]'"):
        tile(config(slides, tmp_path / "s", beam=RUNNER))
    assert not (tmp_path / "s").exists()


@with_beam
def test_beam_leaves_the_store_that_local_processes_leave(slides, tmp_path):
    local = tile(config(slides, tmp_path / "local"))
    done = jaxhisto(*flags(slides, tmp_path / "beam"))

    assert done.returncode == 0, done.stderr
    for file in (tmp_path / "local").iterdir():
        if file.is_file():
            assert (tmp_path / "beam" / file.name).read_bytes() == file.read_bytes()
    assert {f.slide for f in local.failures} == {"glass.tif", "text.svs"}
    for failure in local.failures:
        assert failure.reason in done.stdout
    write_slide(slides / "new.tif", painted(512, 256, PINK, 9))
    more = jaxhisto(*flags(slides, tmp_path / "beam"))
    assert more.returncode == 0, more.stderr
    assert "5 of them from an earlier run" in more.stdout
    assert not (tmp_path / "beam" / "unfinished").exists()
    manifest = json.loads((tmp_path / "beam" / "manifest.json").read_text())
    assert len(manifest["slides"]) == 6


@with_beam
def test_a_runner_that_gives_up_is_said_in_a_sentence(slides, tmp_path):
    done = jaxhisto(*flags(slides, tmp_path / "s", "--runner=NoSuchRunner"))

    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "--beam --runner=NoSuchRunner: the runner gave up with 7 of 7 slides not tried" in last
    assert "Traceback" not in done.stderr


@with_beam
def test_hanging_and_crashing_jobs_cost_only_themselves(tmp_path):
    """The jobs of test_pool, on a worker of Beam."""
    code = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import test_pool
from pathlib import Path
from jaxhisto.slides import beam_engine
if __name__ == "__main__":
    jobs = [("plain", ""), ("hang", {str(tmp_path / "h")!r}), ("always", {str(tmp_path / "a")!r}),
            ("fail", "x.svs: is bad"), ("once", {str(tmp_path / "o")!r})]
    answers = beam_engine.run(test_pool.work, jobs, Path({str(tmp_path)!r}), {RUNNER!r}, 3)
    for answer in answers:
        print(answer.index, answer.value, type(answer.error).__name__)
"""
    (tmp_path / "main.py").write_text(code)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "main.py")], capture_output=True, text=True, timeout=200
    )
    assert done.stdout.splitlines() == [
        "0 plain done NoneType", "1 None TooSlow", "2 None ProcessDied", "3 None SlideError",
        "4 once done NoneType",
    ], done.stderr  # fmt: skip
    assert (tmp_path / "h").read_text() == "begun\nbegun\n"
