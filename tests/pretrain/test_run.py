"""The loop as a user meets it: real processes, real folders, kills, resumes, refusals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxhisto.runlog import read_metrics
from jaxhisto.weights import read_encoder

STEPS = 40
FLAGS = [
    *("--steps", str(STEPS), "--batch-size", "8", "--tile-px", "32", "--precision", "f32"),
    *("--model.name", "resnet10", "--checkpoint-every", "4", "--optim.temperature", "0.5"),
]


def jaxhisto(*args: object, devices: int = 1) -> subprocess.Popen[str]:
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return subprocess.Popen(
        [sys.executable, "-m", "jaxhisto.cli", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def pretrain(out: Path, images: Path, *flags: object, devices: int = 1) -> tuple[int, str, str]:
    args = ("pretrain", *FLAGS, "--data.stores", images, "--out", out, *flags)
    return finish(jaxhisto(*args, devices=devices))


def losses(run: Path) -> list[float]:
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def refused(result: tuple[int, str, str], code: int = 1) -> str:
    """The one sentence of a refusal."""
    assert result[0] == code, result[2]
    assert "Traceback" not in result[2]
    said = [line for line in result[2].splitlines() if line.startswith("jaxhisto pretrain:")]
    assert len(said) == 1, result[2]
    return said[0]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(24):
        low = rng.integers(0, 256, (6, 6, 3), np.uint8)
        Image.fromarray(low).resize((40, 40)).save(folder / f"tile_{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    code, said, err = pretrain(out, images)
    assert code == 0, err
    assert said.splitlines()[-1].startswith("next: jaxhisto export ")
    return out


@pytest.fixture(scope="module")
def trained(undisturbed):
    """(params, batch_stats) of the undisturbed run."""
    return encoder(undisturbed)


def restored(run: Path):
    """(params, batch_stats) of the newest checkpoint, without writing into the run."""
    from jaxhisto.pretrain.encoder import newest

    state = newest(run)[2]
    return state["params"], state["batch_stats"]


def encoder(run: Path):
    from jaxhisto.pretrain.encoder import write_encoder

    path, _ = write_encoder(run)
    return read_encoder(path)


def test_a_run_folder_says_what_happened(undisturbed):
    names = {p.name for p in undisturbed.iterdir()}
    expected = {"config.json", "data.json", "env.json", "metrics.jsonl", "checkpoints"}
    assert expected | {"views.png", "loss.png"} <= names
    assert len(losses(undisturbed)) == STEPS
    assert {p.name for p in (undisturbed / "checkpoints").iterdir()} == {"32", "36", "40"}
    # 8 tiles, each with two views beside it, cells of 128 px and gaps of 4
    with Image.open(undisturbed / "views.png") as sheet:
        assert sheet.size == (3 * 132 + 4, 8 * 132 + 4)
    data = json.loads((undisturbed / "data.json").read_text())
    assert data["tiles"] == 24


def test_the_same_line_again_does_nothing_more(undisturbed, images):
    before = (undisturbed / "metrics.jsonl").read_bytes()
    code, _, err = pretrain(undisturbed, images)
    assert code == 0, err
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


def test_killed_and_started_again_it_ends_in_the_same_weights(
    undisturbed, trained, images, tmp_path
):
    out = tmp_path / "run"
    process = jaxhisto("pretrain", *FLAGS, "--data.stores", images, "--out", out)
    wait_for(lambda: checkpoints_of(out), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    code, said, err = pretrain(out, images)
    assert code == 0, err
    assert "resuming at step" in said
    assert losses(out) == losses(undisturbed)
    params, stats, _ = encoder(out)
    assert_trees_equal((params, stats), trained[:2])


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_75(undisturbed, trained, images, tmp_path):
    out = tmp_path / "run"
    args = ("pretrain", *FLAGS, "--data.stores", images, "--out", out, "--checkpoint-every", 100)
    process = jaxhisto(*args)
    wait_for(lambda: len(lines_of(out)) >= 2, process)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 75, err
    assert "checkpoint written" in err
    code, said, err = pretrain(out, images)
    assert code == 0, err
    assert "resuming at step" in said
    params, stats, _ = encoder(out)
    assert_trees_equal((params, stats), trained[:2])


@pytest.mark.slow
def test_four_devices_see_the_same_losses_as_one(undisturbed, images, tmp_path):
    code, _, err = pretrain(tmp_path / "run", images, devices=4)
    assert code == 0, err
    # float32 sums in another order; warm-up is short, so differences grow slowly
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(undisturbed), rtol=2e-4)


def test_another_config_is_refused_naming_what_differs(undisturbed, images):
    sentence = refused(pretrain(undisturbed, images, "--seed", 5))
    assert "seed: 0 -> 5" in sentence
    sentence = refused(pretrain(undisturbed, images, "--steps", 20))
    assert "steps: 40 -> 20" in sentence
    assert "--extend" in sentence


def test_other_data_is_refused(undisturbed, images, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for i, path in enumerate(sorted(images.iterdir())):
        with Image.open(path) as image:
            image.rotate(90 * (i == 3)).save(other / path.name)
    assert "other data" in refused(pretrain(undisturbed, other))


def test_batches_that_cannot_be_are_refused(images, tmp_path):
    out = tmp_path / "run"
    assert "not divisible" in refused(pretrain(out, images, "--batch-size", 6, devices=4))
    assert "larger than the data" in refused(pretrain(out, images, "--batch-size", 32))
    assert not out.exists()


def test_a_folder_that_is_no_run_is_left_alone(images, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    assert "no run folder" in refused(pretrain(tmp_path, images))
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_loss_that_is_not_finite_stops_with_step_and_last_good_checkpoint(images, tmp_path):
    out = tmp_path / "run"
    # LARS multiplies: at this rate each step makes the weights some ten times larger.
    flags = ("--optim.name", "lars", "--optim.rate", 1e4, "--optim.warmup-epochs", 0)
    sentence = refused(pretrain(out, images, *flags, "--checkpoint-every", 1, "--steps", 60))
    assert re.search(r"step \d+: (loss|grad_norm|state_norm) is (nan|inf)", sentence)
    assert re.search(r"checkpoint \d+ is kept", sentence)
    [listed] = out.glob("nonfinite-*.json")
    assert f"{listed} lists the batch's tiles." in sentence
    batch = json.loads(listed.read_text())
    assert f"step {batch['step']}:" in sentence
    assert not all(np.isfinite(float(value)) for value in batch["metrics"].values())
    assert len(set(batch["tiles"])) == 8
    assert set(batch["tiles"]) <= {str(path) for path in images.iterdir()}
    params, stats, _ = encoder(out)
    assert all(np.isfinite(leaf).all() for leaf in leaves((params, stats)))


def test_a_place_that_cannot_be_written_is_one_sentence(images):
    assert "/proc/run" in refused(pretrain(Path("/proc/run"), images))


@pytest.mark.slow
def test_a_start_that_died_before_its_config_counts_as_nothing(images, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "env.json").write_text("{}")
    (out / ".data.json.4711").write_text("{")
    code, _, err = pretrain(out, images, "--steps", 1)
    assert code == 0, err


def test_a_run_inside_its_own_images_is_refused(images):
    assert "lies inside the data" in refused(pretrain(images / "run", images))
    assert not (images / "run").exists()


@pytest.mark.slow
def test_extend_goes_on_and_never_back(images, tmp_path):
    out = tmp_path / "run"
    assert pretrain(out, images, "--steps", 3)[0] == 0
    assert "shorter" in refused(pretrain(out, images, "--steps", 2, "--extend"))
    code, said, err = pretrain(out, images, "--steps", 5, "--extend")
    assert code == 0, err
    assert "resuming at step 3" in said
    assert len(losses(out)) == 5


@pytest.mark.slow
def test_a_second_process_is_kept_out_of_a_run(images, tmp_path):
    out = tmp_path / "run"
    args = ("pretrain", *FLAGS, "--data.stores", images, "--out", out, "--steps", 2000)
    process = jaxhisto(*args)
    try:
        wait_for(lambda: len(lines_of(out)) >= 1, process)
        assert "another process" in refused(pretrain(out, images, "--steps", 2000))
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_full_disk_ends_with_the_last_whole_checkpoint_kept(images, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=150m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        sentence = refused(pretrain(small / "run", images, "--checkpoint-every", 1, "--keep", 9))
        assert "the disk is full" in sentence
        assert checkpoints_of(small / "run")
        for leaf in leaves(restored(small / "run")):
            assert np.isfinite(leaf).all()
    finally:
        subprocess.run(["umount", str(small)], check=True)


def lines_of(run: Path) -> list[str]:
    path = run / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def checkpoints_of(run: Path) -> list[Path]:
    folder = run / "checkpoints"
    return [p for p in folder.iterdir() if p.name.isdigit()] if folder.exists() else []


def wait_for(condition, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def leaves(tree) -> list[np.ndarray]:
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    return [x for t in tree for x in leaves(t)] if isinstance(tree, tuple) else [np.asarray(tree)]


def assert_trees_equal(ours, theirs) -> None:
    a, b = leaves(ours), leaves(theirs)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)
