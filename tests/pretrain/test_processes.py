"""Several processes over loopback: one truth, one end, one sentence."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from pods import Pod, pod, refusals

from jaxhisto.models import simclr
from jaxhisto.pretrain.encoder import write_encoder
from jaxhisto.runlog import read_metrics
from jaxhisto.weights import read_encoder

STEPS = 40
FLAGS = (
    *("pretrain", "--steps", STEPS, "--batch-size", 8, "--tile-px", 32, "--precision", "f32"),
    *("--model.name", "resnet10", "--checkpoint-every", 4, "--optim.temperature", 0.5),
)
PROGRAM = (str(Path(__file__).with_name("batch_program.py")),)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(24):
        low = rng.integers(0, 256, (6, 6, 3), np.uint8)
        Image.fromarray(low).resize((40, 40)).save(folder / f"tile_{i:02d}.png")
    return folder


def line(images: Path, out: Path, *flags: object) -> tuple[object, ...]:
    return (*FLAGS, "--data.stores", images, "--out", out, *flags)


# What is refused before any process has started JAX.


def test_another_config_is_refused_by_both_naming_the_field(images, tmp_path):
    own = lambda process: ("--seed", 5 * process, "--log-every", 1 + process)  # noqa: E731
    with pod(line(images, tmp_path / "run"), 2, own=own) as both:
        said = refusals(both.finish(60))
    assert said[0] == said[1]
    assert re.search(r"process 1 \(.+\) differs from process 0 \(.+\) in seed: 0 -> 5;", said[0])
    assert not (tmp_path / "run").exists()


def test_a_host_that_is_missing_is_named(images, tmp_path):
    flags = line(images, tmp_path / "run", "--distributed.start-timeout", 4)
    with pod(flags, 2, own=lambda _: ("--distributed.processes", 3)) as both:
        said = refusals(both.finish(60))
    assert said[0] == said[1]
    assert "process 2 of 3 did not come" in said[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_port_in_use_is_refused_and_so_is_a_coordinator_that_is_none(images, tmp_path):
    flags = line(images, tmp_path / "run", "--distributed.start-timeout", 2)
    with (
        socket.create_server(("", 0)) as other,
        pod(flags, 2, port=other.getsockname()[1]) as both,
    ):
        said = refusals(both.finish(60))
    assert "is in use on this host" in said[0]
    assert "process 1 of 2: process 0 did not answer" in said[1]


def test_numbers_that_cannot_be_are_usage_errors(images, tmp_path):
    flags = line(images, tmp_path / "run", "--distributed.coordinator", "node1")
    code, _, err = alone((*flags, "--distributed.processes", 2))
    assert code == 2
    assert "--distributed.process: missing" in err


# What needs JAX in each process.


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(2, 2), (4, 1)])
def test_a_pod_trains_as_one_device(processes, devices):
    """Five LARS steps at the peak rate; test_pod.py has one process, and the planted faults."""
    with pod(("doctor", "--pod"), processes, devices) as hosts:
        ended = hosts.finish()
    for code, _, err in ended:
        assert code == 0, err
    said = ended[0][1]
    print(said)
    for check in ("processes in order", "all-gather", "all-reduce", "loss", "gradient", "update"):
        assert f"ok    {check}" in said, said
    assert "4 devices train as one does" in said
    assert float(re.search(r"update +(\S+)", said)[1]) < 1e-4
    # the others' checks are in process 0's table, and they say nothing themselves
    assert [out for _, out, _ in ended[1:]] == [""] * (processes - 1)


@pytest.mark.slow
def test_global_batches_are_the_same_on_any_number_of_processes(images, tmp_path):
    flags = ("--data.stores", images, "--out", tmp_path, "--seed", 3)
    found = {}
    for processes, devices in ((1, 1), (1, 4), (2, 2), (4, 1)):
        with pod(flags, processes, devices, program=PROGRAM) as hosts:
            ended = hosts.finish()
        for code, out, err in ended:
            assert code == 0, err
            found[processes, devices] = json.loads(out.splitlines()[-1])
            assert found[processes, devices] == found[1, 1]
    assert len({batch[0] for batch in found[1, 1]}) == 5  # a batch a step


@pytest.mark.slow
def test_other_data_on_one_host_is_refused_by_both(images, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(images, other)
    with Image.open(other / "tile_03.png") as image:
        image.rotate(90).save(other / "tile_03.png")
    own = lambda process: ("--data.stores", other if process else images)  # noqa: E731
    with pod(line(images, tmp_path / "run"), 2, own=own) as both:
        said = refusals(both.finish())
    assert all("data hash:" in sentence and "process 1" in sentence for sentence in said)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_process_0_refuses_all_refuse(images, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pod(line(images, tmp_path), 2) as both:
        said = refusals(both.finish())
    assert all("no run folder" in sentence for sentence in said)


@pytest.mark.slow
def test_a_run_survives_a_killed_process_and_a_sigterm(images, tmp_path):
    out = tmp_path / "run"
    with pod(line(images, out), 2) as both:
        killed_at = kill_one(both, out)
    with pod(line(images, out, "--checkpoint-every", 100), 2) as both:
        stopped_at = stop_one(both, out)
    assert f"resuming at step {killed_at}" in stopped_at[1]
    # One process with two devices goes on where two processes with one each stopped.
    code, said, err = alone(line(images, out, "--checkpoint-every", 3), devices=2)
    assert code == 0, err
    assert f"resuming at step {stopped_at[0]}" in said
    assert {"views.png", "loss.png"} <= {p.name for p in out.iterdir()}
    compare_with_one_process(out, images, tmp_path / "alone")


def kill_one(both: Pod, out: Path) -> int:
    """SIGKILL to process 1: process 0 ends within a minute and says who it was."""
    both.wait_for(lambda: (out / "checkpoints" / "4").exists())
    both.kill(1)
    began = time.monotonic()
    code, _, err = both.finish(60)[0]
    print(f"ended {time.monotonic() - began:.1f} s after the kill")
    assert code == 1, err
    said = re.search(r"process 1 of 2 \(.+\) is gone; .* the run goes on from step (\d+)\.", err)
    assert said, err
    assert "unexpected" not in err
    return int(said[1])


def stop_one(both: Pod, out: Path) -> tuple[int, str]:
    """SIGTERM to process 1: both stop at the same step, with a checkpoint."""
    before = len(read_metrics(out))
    both.wait_for(lambda: len((out / "metrics.jsonl").read_text().splitlines()) > before)
    both.processes[1].send_signal(signal.SIGTERM)
    ended = both.finish()
    assert [code for code, _, _ in ended] == [75, 75], ended
    steps = {re.search(r"stopped at step (\d+) of", err)[1] for _, _, err in ended}
    assert len(steps) == 1, steps
    assert (out / "checkpoints" / min(steps)).exists()
    assert ended[1][1] == ""  # process 0 speaks for all
    return int(min(steps)), ended[0][1]


def alone(args: tuple[object, ...], devices: int = 1) -> tuple[int, str, str]:
    """A run of one process: (exit code, stdout, stderr)."""
    ended = subprocess.run(
        [sys.executable, "-m", "jaxhisto.cli", *map(str, args)],
        env=os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    return ended.returncode, ended.stdout, ended.stderr


def compare_with_one_process(out: Path, images: Path, other: Path) -> None:
    """The same losses and weights as one process on one device, but for rounding."""
    code, _, err = alone(line(images, other))
    assert code == 0, err
    losses = [[entry["loss"] for entry in read_metrics(run)] for run in (out, other)]
    assert len(losses[0]) == STEPS
    # As in test_run.py for one process of four devices: rounding, which grows with the steps.
    np.testing.assert_allclose(*losses, rtol=2e-4)
    np.testing.assert_allclose(losses[0][:5], losses[1][:5], rtol=1e-6)
    params, _ = simclr.init("resnet10", 128, 0)
    ours, theirs = (read_encoder(write_encoder(run)[0])[0] for run in (out, other))
    trees = (jax.tree.leaves(tree) for tree in (ours, theirs, params))
    apart = [norm(a - b) / norm(b - start) for a, b, start in zip(*trees, strict=True)]
    print("weights differ by", max(apart), "of the way they went")
    assert max(apart) < 0.02


def norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(np.ravel(x)))
