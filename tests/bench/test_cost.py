"""Projections by hand-made records, and meters by made files and programs."""

from __future__ import annotations

import dataclasses
import statistics
import subprocess
import sys
import types
from pathlib import Path

import pytest

from jaxhisto.bench import cost, energy, projects
from jaxhisto.bench.child import OutOfMemory
from jaxhisto.bench.cost_child import measured, trained
from jaxhisto.bench.ours import Point
from jaxhisto.bench.record import Record, Row, read_record, row_to_json, write_record
from jaxhisto.bench.runner import Runner
from jaxhisto.bench_config import BenchConfig
from jaxhisto.config import MemoryConfig, ModelConfig
from jaxhisto.errors import ConfigError, RunError
from jaxhisto.flags import shipped_configs

AT = {"model": "resnet18", "tile_px": 224, "batch": 512, "precision": "bf16", "devices": 1}
RECIPE = "pretrain_resnet18"


def row(seconds=(0.1, 0.1, 0.1), who="jaxhisto", stage="step", **settings):
    at = {**AT, **settings}
    return Row(stage, who, at, tuple(seconds), at["batch"])


def record(*rows):
    return Record({}, {"platform": "gpu", "device": "made", "cores": 1}, rows)


def test_the_papers_recipe_by_hand():
    """5,000 images/s: 976 steps of 512 a pass, 1000 passes."""
    recipe = cost.read_recipe(RECIPE)
    speed = cost.Speed("jaxhisto", row((0.1024,) * 3, devices=2), {"joules": 300.0}, 1000)
    (found,) = cost.costs(recipe, RECIPE, 0, [speed])
    images = 976 * 512 * 1000
    assert (found["tiles"], found["steps"], found["batch"]) == (500_000, 976_000, 512)
    assert found["hours"] == pytest.approx(images / 5000 / 3600)
    assert found["accelerator_hours"] == pytest.approx(2 * found["hours"])
    assert found["kwh"] == pytest.approx(0.3 * images / 3.6e6)
    assert found["beyond"] == (
        "3 turns of 512 images stand for 499,712,000",
        "tiles are there: reading them is not in it",
        cost.LEFT_OUT,
    )


def test_the_claim_is_the_ledgers():
    text = cost.section([])
    assert "| the paper's claim | 4 P100 | resnet18 | 5,787 | 24 | 96 | not stated |" in text


def test_what_was_not_measured_is_said():
    recipe = dataclasses.replace(cost.read_recipe("pretrain_resnet50"), epochs=10.0)
    speed = cost.Speed("jaxhisto", row((0.1, 0.15, 0.2), batch=32, precision="f32"), {})
    found, papers = cost.costs(recipe, "mine", 5120, [speed])
    assert (found["name"], found["steps"]) == ("mine, 5,120 tiles", 100)
    assert papers["name"] == "the paper's recipe (sec. 5), 500,000 tiles"
    # 4.11 and 1.82 G multiply-adds forward (He et al. 2015, table 1, to their rounding).
    scale = found["images_per_s"] / (32 / 0.15)
    assert scale == pytest.approx(1.82 / 4.11, rel=0.02)
    said = " ".join(found["beyond"])
    for part in ("measured resnet18 at 224 px; resnet50 at 224 px by its operations, x 2.",
                 "measured in f32, the recipe trains in bf16", "at batch 32 is taken for 512",
                 "inconclusive: the row spreads by 100%"):  # fmt: skip
        assert part in said
    assert found["kwh"] is None
    assert found["why"] == cost.NO_POWER


def test_the_nearest_row_counts_and_peers_of_the_same():
    recipe = cost.read_recipe(RECIPE)
    pipeline = row(stage="pipeline", batch=256, cache="device")
    slower = row((9.0,), stage="pipeline", batch=256, cache="none")
    other = row(model="resnet50", stage="pipeline")
    torch = row((0.3,), who="pytorch", stage="pipeline", batch=256)
    step_only = row(who="lightly")
    speeds = cost.speeds_of(record(row(), other, slower, pipeline, torch, step_only), recipe)
    assert [(s.who, s.row) for s in speeds] == [("jaxhisto", pipeline), ("pytorch", torch)]
    with pytest.raises(RunError, match="no step of ours"):
        cost.speeds_of(record(torch), recipe)


def test_recipes_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.toml: no such file"):
        cost.read_recipe("nowhere.toml")
    bad = tmp_path / "bad.toml"
    bad.write_text("epoch = 3\n")
    with pytest.raises(ConfigError, match=r"bad.toml: unknown key epoch; did you mean epochs"):
        cost.read_recipe(str(bad))
    bad.write_text("epochs = \n")
    with pytest.raises(ConfigError, match=r"bad.toml: not valid TOML"):
        cost.read_recipe(str(bad))
    recipe = cost.read_recipe(RECIPE)
    with pytest.raises(RunError, match="larger than the data, 100 tiles"):
        cost.costs(recipe, RECIPE, 100, [cost.Speed("jaxhisto", row(), {})])


def test_a_recipe_of_a_record(tmp_path, capsys):
    source, out = tmp_path / "bench.json", tmp_path / "cost.json"
    write_record(source, record(row(), row((0.2,) * 3, who="pytorch")))
    config = BenchConfig(recipe=RECIPE, record=str(source), out=str(out))
    assert projects.run_cost(config) == out
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert said[0].startswith(
        "the paper's recipe (sec. 5), 500,000 tiles, resnet18, jaxhisto: 27.1 h"
    )
    assert "pytorch: 54.2 h at 2,560 images/s" in said[1]
    found = read_record(out)
    assert [one["who"] for one in found.more["cost"]] == ["jaxhisto", "pytorch"]
    assert "energy not known" in cost.section(found.more["cost"])
    with pytest.raises(RunError, match="a file of their own"):
        projects.run_cost(dataclasses.replace(config, out=str(source)))


def test_on_the_command_line(tmp_path, jaxhisto):
    source, out = tmp_path / "bench.json", tmp_path / "cost.json"
    write_record(source, record(row()))
    line = ("bench", "--recipe", RECIPE, "--record", source, "--tiles", "10240", "--out", out)
    code, said, _ = jaxhisto(*line)
    assert code == 0
    mine, papers, wrote, following = said.splitlines()
    assert mine.startswith("pretrain_resnet18, 10,240 tiles, resnet18, jaxhisto: 0.556 h at 5,120")
    assert papers.startswith("the paper's recipe (sec. 5)")
    assert (wrote, following) == (
        f"wrote {out}",
        f"next: jaxhisto bench --report {out} --out benchmarks.md",
    )
    assert jaxhisto(*line[:2], "nowhere.toml", *line[3:])[::2] == (
        2,
        "jaxhisto bench: nowhere.toml: no such file; give a TOML file or one of "
        f"{', '.join(shipped_configs())}.\n",
    )
    code, _, err = jaxhisto(*line[:4], tmp_path / "absent.json", *line[5:])
    assert (code, "no such file; name a record" in err) == (1, True)


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    asked = []

    def ask(job, env):
        asked.append((job["point"]["batch"], job["point"]["precision"]))
        if asked[-1][0] > 128:
            raise OutOfMemory
        found = row(batch=job["point"]["batch"])
        yield {"row": row_to_json(found), "energy": {"joules": 5.0}, "images": 7}

    monkeypatch.setattr(cost, "ask", ask)
    recipe = cost.read_recipe(RECIPE)
    speed = cost.measure_speed(recipe, {"platform": "gpu"}, 1, 3)
    assert asked == [(512, "bf16"), (256, "bf16"), (128, "bf16")]
    assert (speed.row.images, speed.energy, speed.images) == (128, {"joules": 5.0}, 7)
    asked.clear()
    cost.measure_speed(recipe, {"platform": "cpu"}, 1, 3)
    assert asked == [(32, "f32")]
    monkeypatch.setattr(cost, "ask", lambda job, env: (_ for _ in ()).throw(OutOfMemory))
    with pytest.raises(RunError, match="not even 8 images fit"):
        cost.measure_speed(recipe, {"platform": "gpu"}, 1, 3)


def test_energy_of_the_turns_alone():
    runner = Runner("step", "jaxhisto", lambda: None, 32, AT)
    found = measured(runner, energy.Meter("tpu"), 4, 0.0, 0.0)
    assert (len(found["row"]["seconds"]), found["images"]) == (4, 128)
    assert found["energy"]["why"] == "no meter for tpu devices"


def test_what_is_measured_is_the_recipes_own_step():
    """Its augmentation, optimizer and memory, not the defaults of the bench."""
    recipe = dataclasses.replace(
        cost.read_recipe(RECIPE),
        memory=MemoryConfig(remat="block", accumulate=4),
        model=ModelConfig(bn_group=64),
    )
    recipe = dataclasses.replace(
        recipe, augment=dataclasses.replace(recipe.augment, jitter="heavy")
    )
    whole = trained(recipe, Point("resnet18", 224, 512, "bf16"))
    assert whole == recipe
    part = trained(recipe, Point("resnet18", 224, 32, "f32"))
    assert (part.augment.jitter, part.memory.remat) == ("heavy", "block")
    assert (part.batch_size, part.precision) == (32, "f32")
    assert (part.memory.accumulate, part.model.bn_group) == (1, 0)
    (found, _) = cost.costs(recipe, "mine", 5120, [cost.Speed("jaxhisto", row(batch=32), {})])
    assert "and in one go for one in 4 micro-batches" in found["beyond"]


TINY = """batch_size = 16
tile_px = 32
epochs = 3
precision = "f32"
[model]
name = "resnet10"
[augment]
blur_probability = 0.0
"""


@pytest.mark.slow
def test_a_recipe_measured_in_a_process_of_its_own(tmp_path):
    """The projection is that of the row which the process measured, by hand."""
    (tmp_path / "tiny.toml").write_text(TINY)
    done = subprocess.run(
        [sys.executable, "-m", "jaxhisto.cli", "bench", "--recipe", "tiny.toml", "--tiles", "4100",
         "--repeats", "3", "--out", "cost.json"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = read_record(tmp_path / "cost.json")
    (measured_row,) = found.rows
    assert measured_row.settings["model"] == "resnet10"
    assert len(measured_row.seconds) >= 3
    assert sum(measured_row.seconds) >= 5.0
    assert len(measured_row.cpu_seconds) == len(measured_row.seconds)
    mine, papers = found.more["cost"]
    speed = 16 / statistics.median(measured_row.seconds)
    images = 256 * 16 * 3  # whole batches of 4,100 tiles, three times
    assert (mine["tiles"], mine["steps"], mine["batch"]) == (4100, 768, 16)
    assert mine["images_per_s"] == pytest.approx(speed)
    assert mine["hours"] == pytest.approx(images / speed / 3600)
    assert mine["accelerator_hours"] == mine["hours"]
    # 49 times the pixels, less what does not grow with them: head and loss.
    assert 46 < mine["images_per_s"] / papers["images_per_s"] < 49
    assert papers["hours"] == pytest.approx(976_000 * 512 / papers["images_per_s"] / 3600)
    assert (mine["kwh"] is None) == bool(mine["why"])
    assert "tiny, 4,100 tiles, resnet10, jaxhisto: " in done.stdout


def test_the_meter_begins_when_the_device_is_warm(monkeypatch):
    clock, done = [0.0], []
    monkeypatch.setattr("jaxhisto.bench.cost_child.time.perf_counter", lambda: clock[0])

    class Meter:
        def start(self):
            done.append(("start", clock[0]))

        def stop(self):
            done.append(("stop", clock[0]))
            return energy.Energy(1.0, 1.0)

    def run():
        clock[0] += 0.5

    found = measured(Runner("step", "jaxhisto", run, 32, AT), Meter(), 3, 2.0, 15.0)
    assert done == [("start", 2.5), ("stop", 17.5)]  # after the one that compiles, 2 s
    assert len(found["row"]["seconds"]) == 30


@pytest.fixture
def powercap(tmp_path, monkeypatch) -> Path:
    for zone, before in (("intel-rapl:0", 900), ("intel-rapl:1", 5), ("intel-rapl:0:0", 7)):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "energy_uj").write_text(f"{before}\n")
        (tmp_path / zone / "max_energy_range_uj").write_text("1000\n")
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    return tmp_path


def test_counters_of_packages_wrap(powercap):
    meter = energy.Meter("cpu")
    meter.start()
    (powercap / "intel-rapl:0" / "energy_uj").write_text("100\n")
    (powercap / "intel-rapl:1" / "energy_uj").write_text("25\n")
    found = meter.stop()
    assert found.joules == pytest.approx((100 - 900 + 1000 + 20) / 1e6)
    assert found.source.startswith("RAPL, 2 CPU package(s)")


def test_counters_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "none")
    meter = energy.Meter("cpu")
    meter.start()
    assert meter.stop().why.startswith("no RAPL counters in ")


def test_counters_that_only_root_reads(powercap, monkeypatch):
    def refused(file):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(energy, "number", refused)
    meter = energy.Meter("cpu")
    meter.start()
    found = meter.stop()
    assert found.joules is None
    assert found.why.endswith("cannot be read (Permission denied); as root: chmod a+r it")


@pytest.mark.parametrize(
    ("said", "watts", "why"),
    [("300.0\\n500.0\\n", 400.0, ""), ("[N/A]\\n", None, "gives no power: it says '[N/A]'")],
)
def test_power_of_gpus(tmp_path, monkeypatch, said, watts, why):
    """A made nvidia-smi that samples until it is ended, and writes down what it was asked."""
    script = tmp_path / "nvidia-smi"
    script.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\nprintf "{said}"\nexec sleep 60\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    meter = energy.Meter("gpu", 2)
    meter.start()
    import time

    deadline = time.monotonic() + 20
    asked = tmp_path / "asked"
    while not (asked.exists() and asked.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    found = meter.stop()
    assert "--id=3,5 --query-gpu=power.draw" in asked.read_text()
    assert why in found.why
    if watts:
        assert found.joules == pytest.approx(watts * 2 * found.seconds)
        assert "2 samples of 400 W" in found.source


def test_gpus_without_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for amd, why in ((False, "nvidia-smi is not on PATH"), (True, "an AMD GPU's energy is not")):
        monkeypatch.setattr(energy, "AMD", tmp_path if amd else tmp_path / "none")
        meter = energy.Meter("gpu")
        meter.start()
        assert why in meter.stop().why


@pytest.mark.parametrize(
    ("shown", "joules"), [("", 1.0 + 2.0), ("GPU-c,1", 4.0 + 2.0), ("GPU-none", None)]
)
def test_counters_of_gpus(monkeypatch, shown, joules):
    """A made pynvml of three GPUs, whose counters rise by 1, 2 and 4 J; in CUDA's order."""
    rises, asked = (1000, 2000, 4000), [0, 0, 0]
    made = types.ModuleType("pynvml")
    made.nvmlInit = lambda: None
    made.nvmlDeviceGetCount = lambda: 3
    made.nvmlDeviceGetHandleByIndex = lambda i: i
    made.nvmlDeviceGetUUID = lambda i: f"GPU-{'abc'[i]}123".encode()

    def counter(i):
        asked[i] += 1
        return 10**9 + asked[i] * rises[i]

    made.nvmlDeviceGetTotalEnergyConsumption = counter
    monkeypatch.setitem(sys.modules, "pynvml", made)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    monkeypatch.setenv("PATH", "/nowhere")
    meter = energy.Meter("gpu", 2)
    meter.start()
    found = meter.stop()
    assert found.joules == joules
    assert found.source.startswith("NVML, the counters of 2 GPU(s)") == (joules is not None)
