"""`jaxhisto plot`: what runs are called, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from jaxhisto.cli import main
from jaxhisto.config import OptimConfig, PlotConfig, PretrainConfig
from jaxhisto.errors import ConfigError, RunError
from jaxhisto.overlay import plot_runs, run_names
from jaxhisto.settings import to_json

CONFIG = PretrainConfig(out="run", steps=3)


def write_run(folder: Path, config: PretrainConfig = CONFIG, steps: int = 3) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(to_json(config))
    lines = [{"step": i + 1, "loss": 5.0 - i, "images_per_s": 1.0} for i in range(steps)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
    return folder


def test_runs_are_named_by_folder_and_by_what_differs():
    warm = replace(CONFIG, out="other", optim=OptimConfig(temperature=0.5), keep=9)
    names = run_names([Path("x/a"), Path("x/b")], [CONFIG, warm])
    assert names == ["a (optim.temperature 0.1)", "b (optim.temperature 0.5)"]
    # folders, places and operational settings do not tell runs apart
    assert run_names([Path("x/a"), Path("y/a")], [CONFIG, replace(CONFIG, keep=9)]) == [
        "x/a",
        "y/a",
    ]
    many = replace(warm, seed=1, steps=9, batch_size=64)
    assert run_names([Path("a"), Path("b")], [CONFIG, many]) == ["a", "b"]


def test_the_verb_draws(tmp_path, capsys):
    runs = [write_run(tmp_path / name) for name in "ab"]
    out = tmp_path / "runs.png"
    assert main(["plot", *map(str, runs), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 2 runs\n"
    with Image.open(out) as picture:
        assert picture.width > 1000


def test_what_is_no_run_is_refused(tmp_path):
    run = write_run(tmp_path / "run")

    def plot(*runs: Path, out: Path = tmp_path / "runs.png") -> None:
        plot_runs(PlotConfig(runs=tuple(map(str, runs)), out=str(out)))

    with pytest.raises(RunError, match=r"config.json is missing"):
        plot(run, tmp_path)
    with pytest.raises(RunError, match="no step is recorded yet"):
        plot(run, write_run(tmp_path / "young", steps=0))
    with pytest.raises(ConfigError, match="is named twice"):
        plot(run, tmp_path / "run" / ".." / "run")
    with pytest.raises(ConfigError, match="no run"):
        plot()
    with pytest.raises(ConfigError, match="could be written"):
        plot(run, out=tmp_path / "no folder" / "runs.png")
    with pytest.raises(ConfigError, match=r"xyz.*end the name in \.png"):
        plot(run, out=tmp_path / "runs.xyz")
    (run / "metrics.jsonl").unlink()
    with pytest.raises(RunError, match=r"metrics\.jsonl: no such file"):
        plot(run)
    assert not list(tmp_path.glob("runs.*"))
