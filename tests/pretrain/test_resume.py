"""Killed, stopped, damaged, out of room or on other devices: the run goes on as if nothing were."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lives import (
    being_written,
    checkpoints,
    finish,
    lines,
    losses,
    start,
    wait_for,
    write_images,
    write_store,
)

from jaxhisto.checkpoints import open_checkpoints
from jaxhisto.config import DataConfig, ModelConfig, OptimConfig, PretrainConfig, StepConfig
from jaxhisto.data.loader import batches
from jaxhisto.data.sources import open_tiles
from jaxhisto.distributed import make_mesh, to_global
from jaxhisto.errors import RunError, StoreError
from jaxhisto.pretrain.encoder import newest
from jaxhisto.pretrain.folder import open_run
from jaxhisto.pretrain.run import batch_names, pretrain
from jaxhisto.pretrain.step import TrainState, init_state, make_train_step
from jaxhisto.runlog import read_metrics
from jaxhisto.view_params import draw_views

STEPS = 6


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def config_of(images: Path, out: Path, **fields: object) -> PretrainConfig:
    config = PretrainConfig(
        out=str(out),
        steps=STEPS,
        batch_size=8,
        tile_px=32,
        precision="f32",
        model=ModelConfig(name="resnet10"),
        optim=OptimConfig(temperature=0.5),
        data=DataConfig(stores=(str(images),)),
        checkpoint_every=2,
        keep=9,
        devices=1,
    )
    return replace(config, **fields)


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    return pretrain(config_of(images, out))


@pytest.fixture
def run(undisturbed, tmp_path):
    """A copy that a test may spoil."""
    return Path(shutil.copytree(undisturbed, tmp_path / "run"))


def whole_state(run: Path, config: PretrainConfig, devices: int = 1) -> TrainState:
    mesh = make_mesh(devices)
    with jax.set_mesh(mesh), open_checkpoints(run, 1, write=False) as saved:
        return saved.restore(init_state(config, config.steps, 3, mesh))[1]


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def flip_a_bit(checkpoint: Path) -> None:
    path = max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_after_a_damaged_checkpoint_the_run_ends_in_the_same_bits(undisturbed, run, images, capfd):
    flip_a_bit(run / "checkpoints" / "6")
    _, _, state = newest(run)  # what an export takes
    assert int(state["step"]) == 4
    assert checkpoints(run) == ["2", "4", "6"]
    capfd.readouterr()
    config = config_of(images, run)
    pretrain(config)
    said = capfd.readouterr()
    assert said.err.count("6: damaged (") == 1
    assert "resuming at step 4" in said.out
    assert checkpoints(run) == ["2", "4", "6", "6.damaged"]
    assert losses(run) == losses(undisturbed)
    assert bits(whole_state(run, config)) == bits(whole_state(undisturbed, config))


def test_a_run_without_a_sound_checkpoint_never_begins_anew(run, images):
    for step in (2, 4, 6):
        flip_a_bit(run / "checkpoints" / str(step))
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match="no checkpoint is sound"):
        pretrain(config_of(images, run))
    assert (run / "metrics.jsonl").read_bytes() == before
    assert checkpoints(run) == ["2", "4", "6"]


def test_another_runs_checkpoints_are_refused_by_their_tensors(run, images):
    """Copied between two run folders, where the configs do not tell."""
    other = json.loads((run / "config.json").read_text())
    other["model"]["projection"] = 64
    (run / "config.json").write_text(json.dumps(other))
    config = config_of(images, run, model=ModelConfig(name="resnet10", projection=64))
    with pytest.raises(RunError) as caught:
        pretrain(config)
    assert "holds another model or optimizer (params.projection." in str(caught.value)
    assert "128] there and float32[512, 64] here" in str(caught.value)
    with pytest.raises(RunError, match="another model"):
        newest(run)


def test_what_xla_refuses_ends_before_the_run_begins(images, tmp_path, jaxhisto):
    out = tmp_path / "run"
    line = ("pretrain", "--data.stores", images, "--out", out, "--batch-size", 8, "--steps", 2)
    for option, said in (("xla_no_such_thing=1", "No such compile option"), ("fast", "NAME=VALUE")):
        code, _, err = jaxhisto(*line, "--step.xla", option)
        assert code == 2
        assert err.startswith("jaxhisto pretrain: --step.xla")
        assert said in err
        assert err.count("\n") == 1
        assert not out.exists()


@pytest.mark.slow
def test_a_step_computed_otherwise_goes_on_with_the_same_run(run, images, capfd):
    form = StepConfig(stem="space_to_depth", xla=("xla_cpu_prefer_vector_width=512",))
    pretrain(config_of(images, run, steps=8, extend=True, step=form))
    assert "resuming at step 6" in capfd.readouterr().out
    assert len(read_metrics(run)) == 8
    assert json.loads((run / "config.json").read_text())["step"]["stem"] == "space_to_depth"


def test_the_names_of_a_batch_are_those_that_were_read(images, tmp_path):
    config = config_of(images, tmp_path / "run")
    tiles = open_tiles(config.data)
    for step, batch in batches(tiles, config.data, 8, config.seed, 2, 5):
        assert batch_names(config, tiles, step + 1) == [tiles.names(int(i)) for i in batch.index]


def test_a_tile_store_edited_between_runs_is_refused(tmp_path):
    store = write_store(tmp_path / "store", seed=0)
    config = config_of(store, tmp_path / "run")
    open_run(config, open_tiles(config.data))
    part = min(store.glob("*array_record*"))
    whole = part.read_bytes()
    part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(StoreError, match=rf"{part.name}: is damaged"):
        pretrain(config)
    part.unlink()
    with pytest.raises(StoreError, match=rf"{part.name}: is missing"):
        pretrain(config)
    part.write_bytes(whole)
    manifest = (store / "manifest.json").read_text()
    (store / "manifest.json").write_text(manifest.replace('"tile_mpp": 0.5', '"tile_mpp": 0.25'))
    with pytest.raises(StoreError, match=r"manifest\.json: does not match its own hash"):
        pretrain(config)
    shutil.rmtree(store)  # cut again from other pixels: a sound store, and not the same one
    write_store(store, seed=1)
    with pytest.raises(RunError, match="was trained on other data"):
        pretrain(config)


def test_a_tile_store_edited_while_a_run_reads_it_ends_the_run_by_name(tmp_path):
    store = write_store(tmp_path / "store", seed=0)
    other = write_store(tmp_path / "other", seed=1)
    config = DataConfig(stores=(str(store),), threads=1, prefetch=0)
    feed = batches(open_tiles(config), config, 8, 0, 0, 99)
    next(feed)
    for part in store.glob("*array_record*"):
        part.write_bytes(next(other.glob("*array_record*")).read_bytes())
    with pytest.raises(StoreError, match=r"store/.*array_record.*: (changed|tile \d+ cannot)"):
        list(itertools.islice(feed, 3))
    feed.close()


@pytest.mark.slow
def test_on_other_devices_it_sees_the_same_and_takes_the_same_steps(images, tmp_path):
    """Begun on 4 devices, gone on with on 4, 2 and 1: five steps at the peak rate.

    float32 sums differ in their order, and every step multiplies the difference, so that two runs
    part in the end whatever the code. Chaos is kept out by going on from one checkpoint and
    stopping after five steps; how far it carries in these, a control says that differs from the
    one-device run in the last bit of each weight alone.
    """
    config = config_of(images, tmp_path / "run", steps=40)
    first = replace(config, steps=4, devices=4, checkpoint_every=4)
    pretrain(first)
    saved = {n: whole_state(tmp_path / "run", first, n) for n in (4, 2, 1)}
    for n in (2, 1):
        assert bits(saved[n]) == bits(saved[4])
    nudged = jax.tree.map(jnp.copy, saved[1])  # a step consumes the state that it is given
    last_bits = jax.tree.map(lambda x: jnp.nextafter(x, jnp.inf), nudged.params)
    nudged = five_steps(config, 1, replace(nudged, params=last_bits))
    seen4, drawn4, loss4, update4 = five_steps(config, 4, saved[4])
    size = np.linalg.norm(update4)
    for n in (2, 1):
        seen, drawn, loss, update = five_steps(config, n, saved[n])
        assert seen == seen4
        assert drawn == drawn4
        first_loss, apart = abs(loss[0] / loss4[0] - 1), np.linalg.norm(update - update4) / size
        print(f"4 -> {n} devices: first loss {first_loss:.1e}, update of 5 steps {apart:.1e}")
        assert first_loss < 1e-5
        assert apart < 1e-3
    print(f"control, last bits nudged: {np.linalg.norm(nudged[3] - update4) / size:.1e}")


def five_steps(config: PretrainConfig, devices: int, state: TrainState):
    """(sample indices, bits of the views' parameters, losses, update of all weights)."""
    mesh = make_mesh(devices)
    tiles = open_tiles(config.data)
    before = [np.array(leaf) for leaf in jax.tree.leaves(state.params)]
    seen, drawn, loss = [], [], []
    with jax.set_mesh(mesh):
        take = make_train_step(config, config.steps, 3)
        draw = jax.jit(lambda key, sizes: draw_views(key, sizes, config.augment))
        for step, batch in batches(tiles, config.data, 8, config.seed, 4, 9):
            rows = to_global((batch.tiles, batch.sizes), mesh)
            key = jax.random.fold_in(jax.random.key(config.seed), np.int32(step))
            seen.append(batch.index.tolist())
            drawn += bits(draw(key, rows[1]))
            state, metrics = take(state, *rows)
            loss.append(float(metrics["loss"]))
    after = jax.tree.leaves(state.params)
    moved = [(np.asarray(a) - b).ravel() for a, b in zip(after, before, strict=True)]
    return seen, drawn, loss, np.concatenate(moved)


KILLED = ("--steps", 40, "--checkpoint-every", 2, "--keep", 3, "--keep-every", 16)


@pytest.mark.slow
def test_killed_at_20_moments_it_ends_in_the_same_bits(images, tmp_path):
    """Moments at random after the start, after a step, and while a checkpoint is being written."""
    reference = tmp_path / "reference"
    begun = time.monotonic()
    process = start(reference, images, *KILLED)
    wait_for(lambda: lines(reference), process)
    startup = time.monotonic() - begun  # a little more than a later one: this may compile
    code, _, err = finish(process)
    assert code == 0, err
    rng, out = random.Random(0), tmp_path / "run"
    in_write = in_start = 0
    for life in range(20):
        process = start(out, images, *KILLED)
        if life % 4 == 0:
            # At most three steps on: a machine that is idle again must not run to the end.
            until, last = time.monotonic() + rng.uniform(0, 1.2 * startup), lines(out) + 3
            while time.monotonic() < until and lines(out) < last:
                time.sleep(0.02)
        elif life % 4 == 1:
            done = lines(out)
            wait_for(lambda done=done: lines(out) > done, process)
            time.sleep(rng.uniform(0, 0.5))
        else:
            old = set(being_written(out))
            wait_for(lambda old=old: set(being_written(out)) - old, process)
            time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        code, said, err = finish(process)
        assert code in (-signal.SIGKILL, 0), err
        in_write += bool(being_written(out))
        in_start += "at step" not in said and "random weights" not in said
        assert life < 15 or code, "the run was too short for 20 kills"
    code, _, err = finish(start(out, images, *KILLED))
    assert code == 0, err
    print(f"20 kills: {in_write} while writing a checkpoint, {in_start} before the run said where")
    assert in_write >= 3
    assert checkpoints(out) == checkpoints(reference) == ["16", "32", "36", "38", "40"]
    assert losses(out) == losses(reference)
    config = config_of(images, out, steps=40)
    assert bits(whole_state(out, config)) == bits(whole_state(reference, config))


@pytest.mark.slow
def test_sigterm_before_the_first_step_leaves_nothing_half_written(images, tmp_path):
    """While Python imports, while the run looks at its data, while XLA compiles."""
    moments = {
        "importing": lambda out: time.sleep(1.5) or True,
        "compiling": lambda out: (out / "views.png").exists() and (time.sleep(0.3) or True),
    }
    for name, moment in moments.items():
        out = tmp_path / name
        empty_cache = str(tmp_path / f"cache-{name}")
        process = start(out, images, "--steps", 4, JAX_COMPILATION_CACHE_DIR=empty_cache)
        wait_for(lambda moment=moment, out=out: moment(out), process)
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        code, _, err = finish(process)
        print(f"SIGTERM while {name}: exit {time.monotonic() - asked:.2f} s later")
        assert code == 75, err
        said = [line for line in err.splitlines() if line.startswith("jaxhisto pretrain:")]
        assert said == [
            f"jaxhisto pretrain: {out}: stopped before the first step; start the same line again."
        ]
        assert "Traceback" not in err
        left = {p.name for p in out.iterdir()} if out.exists() else set()
        whole = {"config.json", "data.json", "env.json", ".lock", "views.png", "metrics.jsonl"}
        assert left <= whole, left
        assert lines(out) == 0
    code, said, err = finish(start(tmp_path / "compiling", images, "--steps", 4))
    assert code == 0, err
    assert "starting from random weights" in said


@pytest.mark.slow
def test_sigterm_while_a_checkpoint_is_written_ends_whole_and_soon(images, tmp_path):
    out = tmp_path / "run"
    process = start(out, images, "--steps", 400, "--checkpoint-every", 1)
    wait_for(lambda: being_written(out) and lines(out) > 3, process)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    print(f"SIGTERM with a save in flight: exit {time.monotonic() - asked:.2f} s later")
    assert code == 75, err
    assert not being_written(out)
    with open_checkpoints(out, 1, write=False) as saved:
        step = saved.latest_step
    assert f"stopped at step {step} of 400, checkpoint written" in err
    assert len(losses(out)) == step
    assert int(whole_state(out, config_of(images, out, steps=400)).step) == step


@pytest.mark.slow
def test_training_goes_on_while_the_disk_is_full_and_saves_when_there_is_room(images, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=150m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        out, ballast = small / "run", small / "ballast"
        flags = ("--steps", 60, "--checkpoint-every", 10, "--keep", 1)
        process = start(out, images, *flags)
        wait_for(lambda: "10" in checkpoints(out), process)
        fill(ballast)
        known = lines(out)
        # Steps go on, their lines wait: long enough for a save to fail, and not to the end.
        times = [line["time"] for line in read_metrics(out)]
        time.sleep(15 * (times[-1] - times[1]) / (len(times) - 2))
        assert process.poll() is None
        assert lines(out) <= known + 4096 // 200 + 1  # what the last page still took
        ballast.unlink()
        code, _, err = finish(process)
        assert code == 0, err
        assert "Traceback" not in err
        assert err.count("metrics.jsonl: cannot be written") == 1
        assert err.count("metrics.jsonl: can be written again") == 1
        assert "could not be written (the disk is full); training goes on and tries again" in err
        assert "saving works again" in err
        assert checkpoints(out) == ["60"]
        assert len(losses(out)) == 60
    finally:
        subprocess.run(["umount", str(small)], check=True)


def fill(ballast: Path) -> None:
    """Takes all the room that there is."""
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    assert shutil.disk_usage(ballast.parent).free == 0
