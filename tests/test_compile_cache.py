"""What is compiled is kept where the user's caches are, by real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxhisto import compile_cache
from jaxhisto.compile_cache import LIMIT, MOST, WHERE, keep_compiled, processor


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


def pretrain(images: Path, out: Path, cache: Path, *flags: str, **env: str) -> None:
    line = [sys.executable, "-m", "jaxhisto.cli", "pretrain", "--data.stores", str(images)]
    line += ["--out", str(out), "--model.name", "resnet10", "--tile-px", "32", "--batch-size", "4"]
    line += ["--steps", "2", *flags]
    kept = {k: v for k, v in os.environ.items() if k not in (WHERE, "XLA_FLAGS")}
    done = subprocess.run(
        line, env={**kept, "XDG_CACHE_HOME": str(cache), **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr, done.stderr


def programs(cache: Path) -> dict[str, bytes]:
    """What was kept, by name; times of use aside."""
    files = (p for p in cache.rglob("*") if p.is_file() and not p.name.endswith("-atime"))
    return {str(p.relative_to(cache)): p.read_bytes() for p in files}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "darwin", reason="caches lie elsewhere there")
def test_a_second_start_compiles_nothing_and_trains_the_same(images, tmp_path):
    cache = tmp_path / "cache"
    pretrain(images, tmp_path / "a", cache)
    first = programs(cache / "jaxhisto")
    assert any(processor() in name and "jit_step" in name for name in first), list(first)
    pretrain(images, tmp_path / "b", cache)
    assert programs(cache / "jaxhisto") == first
    losses = []
    for run in "ab":
        lines = (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert len(losses[0]) == 2
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "darwin", reason="caches lie elsewhere there")
def test_what_a_killed_start_left_is_compiled_anew_without_a_word(images, tmp_path):
    """JAX would say "Error writing" at each program, and keep no more of them."""
    cache = tmp_path / "cache"
    pretrain(images, tmp_path / "a", cache)
    first = programs(cache / "jaxhisto")
    [step] = cache.rglob("jit_step-*-cache")
    step.write_bytes(step.read_bytes()[:1000])
    step.with_name(step.name.removesuffix("-cache") + "-atime").unlink()
    os.utime(step, (0, 0))
    pretrain(images, tmp_path / "b", cache)
    assert programs(cache / "jaxhisto").keys() == first.keys()
    assert step.stat().st_size > 1000


def test_programs_at_work_and_marked_ones_stay(tmp_path):
    for name in ("old-cache", "new-cache", "marked-cache", "marked-atime", "other"):
        (tmp_path / name).write_bytes(b"12345678")
        if name != "new-cache":
            os.utime(tmp_path / name, (0, 0))
    compile_cache.drop_unmarked(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["marked-atime", "marked-cache", "new-cache", "other"]
    compile_cache.drop_unmarked(tmp_path / "none")


@pytest.mark.slow
def test_deterministic_runs_and_those_who_say_otherwise_keep_nothing_there(images, tmp_path):
    cache, own = tmp_path / "cache", tmp_path / "own"
    pretrain(images, tmp_path / "a", cache, "--deterministic")
    assert not programs(cache / "jaxhisto")
    pretrain(images, tmp_path / "b", cache, **{WHERE: str(own)})
    assert not programs(cache / "jaxhisto")
    assert programs(own)


def test_it_is_kept_where_downloads_are_and_not_without_end(monkeypatch, tmp_path):
    """Without pooch, which a machine that only trains may lack, and where pooch would."""
    import pooch

    where = Path(pooch.os_cache("jaxhisto"))
    monkeypatch.setitem(sys.modules, "pooch", None)
    for name in (WHERE, MOST):
        monkeypatch.setenv(name, "set so that it is put back")
        monkeypatch.delenv(name)
    keep_compiled()
    assert Path(os.environ[WHERE]) == where / "compiled" / processor()
    assert int(os.environ[MOST]) == LIMIT
    monkeypatch.delenv(WHERE)
    monkeypatch.delenv(MOST)
    monkeypatch.setattr(compile_cache, "find_spec", lambda name: None)
    keep_compiled()  # JAX takes a limit with filelock alone, and would keep nothing
    assert MOST not in os.environ
    monkeypatch.delenv(WHERE)
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        keep_compiled()
        assert Path(os.environ[WHERE]).parents[2] == tmp_path


def test_what_the_environment_says_stays(monkeypatch, tmp_path):
    for said in (str(tmp_path), ""):
        monkeypatch.setenv(WHERE, said)
        keep_compiled()
        assert os.environ[WHERE] == said
    monkeypatch.delenv(WHERE)
    keep_compiled()
    assert Path(os.environ[WHERE]).name == processor()
    monkeypatch.delenv(WHERE)
