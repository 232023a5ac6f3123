"""The peers as oracles and as rows: the same training as ours, and a reason where there is none."""

from __future__ import annotations

import dataclasses
import io
import re
import sys
from pathlib import Path
from typing import get_args

import jax
import numpy as np
import optax
import pytest
from PIL import Image

from jaxhisto.bench import peer_child, peers, peers_augment, peers_read, peers_torch
from jaxhisto.bench.peer_job import PeerJob, Prepared
from jaxhisto.bench.record import Row
from jaxhisto.bench.runner import Runner, measure
from jaxhisto.bench_config import PeerName
from jaxhisto.config import AugmentConfig, ModelConfig, OptimConfig, PretrainConfig
from jaxhisto.distributed import make_mesh, to_global
from jaxhisto.errors import ConfigError
from jaxhisto.optim import peak_rate
from jaxhisto.pretrain.loss import nt_xent
from jaxhisto.pretrain.step import init_state, make_loss_and_grads, make_update
from jaxhisto.weights import to_torch

torch = pytest.importorskip("torch")
JOB = PeerJob("backward", "pytorch", "resnet10", 32, 32, batch=4, rate=0.3 * 4 / 256)
CONFIG = PretrainConfig(
    out="",
    batch_size=4,
    tile_px=32,
    precision="f32",
    model=ModelConfig(name="resnet10"),
    optim=OptimConfig(warmup_epochs=0.0),
)
WITHOUT = 'exec {python} -S -c "$2" "$3" "$4"'  # no site-packages: no peer is installed


@pytest.fixture
def interpreter(tmp_path: Path):
    """A made interpreter: what a shell does with the arguments of a Python."""

    def made(script: str) -> str:
        path = tmp_path / "python"
        path.write_text("#!/bin/sh\n" + script.format(python=sys.executable) + "\n")
        path.chmod(0o755)
        return str(path)

    return made


@pytest.fixture(scope="module")
def our_step():
    """(state, views) -> (state, loss), compiled once."""
    loss_and_grads, update = make_loss_and_grads(CONFIG), make_update(CONFIG, 10**6, 1)

    @jax.jit
    def step(state, views):
        loss, _, stats, grads = loss_and_grads(state.params, state.batch_stats, views)
        return update(dataclasses.replace(state, batch_stats=stats), grads)[0], loss

    return step


@pytest.mark.parametrize("who", ["pytorch", "lightly"])
def test_a_peer_takes_the_steps_that_we_take(who, our_step):
    """From the same weights, on the same views: the same losses, and the same weights after."""
    pytest.importorskip(who.replace("pytorch", "torch"))
    mesh = make_mesh(1)
    state = init_state(CONFIG, 10**6, 1, mesh)
    setup = peers_torch.Setup(dataclasses.replace(JOB, who=who))
    named = to_torch(state.params, state.batch_stats, "resnet10", 0)
    setup.model.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in named.items()})
    views = np.random.default_rng(0).random((4, 2, 32, 32, 3), dtype=np.float32)
    placed = to_global((views,), mesh)[0]
    for _ in range(2):
        with jax.set_mesh(mesh):
            state, loss = our_step(state, placed)
        theirs = setup.gradient()
        setup.update()
        assert float(theirs) == pytest.approx(float(loss), abs=2e-5)
    ours = to_torch(state.params, state.batch_stats, "resnet10", 2)
    for name, value in setup.model.state_dict().items():
        np.testing.assert_allclose(value.numpy(), ours[name], atol=2e-5, err_msg=name)


def test_the_losses_are_one():
    z = np.random.default_rng(1).normal(size=(6, 2, 16)).astype(np.float32)
    flat = torch.from_numpy(z.reshape(12, 16))
    with jax.set_mesh(make_mesh(1)):
        ours = float(nt_xent(to_global(z, make_mesh(1)), 0.1)[0])
    assert float(peers_torch.nt_xent(flat, 0.1)) == pytest.approx(ours, rel=1e-5)


def test_the_plain_lars_is_googles():
    """Over ten steps with other gradients each; `optax.lars` is the oracle."""
    rng = np.random.default_rng(2)
    start = {"w": rng.normal(size=(3, 4)), "b": rng.normal(size=4)}
    start = {k: v.astype(np.float32) for k, v in start.items()}
    job = dataclasses.replace(JOB, rate=0.7, weight_decay=0.01)
    mask = {"w": True, "b": False}
    tx = optax.lars(0.7, 0.01, mask, 0.001, trust_ratio_mask=mask, momentum=0.9)
    params, state = start, tx.init(start)
    theirs = {k: torch.from_numpy(v.copy()).requires_grad_() for k, v in start.items()}
    lars = peers_torch.Lars(job, list(theirs.values()))
    for _ in range(10):
        grads = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in start.items()}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name, parameter in theirs.items():
            parameter.grad = torch.from_numpy(grads[name])
        lars.step()
    for name, parameter in theirs.items():
        np.testing.assert_allclose(parameter.detach().numpy(), params[name], atol=1e-6)


def test_a_peer_has_our_recipe():
    config = AugmentConfig()
    crop = (config.crop_area, config.crop_ratio)
    assert crop == (peers_augment.CROP_AREA, peers_augment.CROP_RATIO)
    rest = (config.jitter_probability, config.blur_probability, config.blur_sigma)
    assert rest == (peers_augment.JITTERED, peers_augment.BLURRED, peers_augment.SIGMA)
    assert (config.jitter, PeerJob("", "").jitter) == ("medium", (0.8, 0.8, 0.8, 0.2))
    assert peers_augment.taps(224) == 23
    optim = OptimConfig()
    job = peers.job_of("step", "pytorch", {"batch": 512, "tile_px": 96})
    assert (job.side, job.rate) == (96, peak_rate(optim, 512))
    assert (job.temperature, job.momentum) == (optim.temperature, optim.momentum)
    assert (job.weight_decay, job.trust) == (optim.weight_decay, optim.trust_coefficient)


@pytest.mark.parametrize("place", peers_augment.PLACES)
def test_views_of_a_peer(place):
    job = dataclasses.replace(JOB, stage="augment", tile_px=40)
    torch.manual_seed(0)  # of two very dark views one may be the other
    tiles = peers_augment.made_tiles(job)
    transform = peers_augment.torchvision_transform(job, place)
    views = peers_augment.by_torchvision(transform, channels_last=True, tiles=tiles)
    assert (views.shape, views.dtype) == ((8, 3, 32, 32), torch.float32)
    assert 0 <= views.min() < views.max() <= 1 + 1e-6
    assert all((views[i] - views[j]).abs().max() > 1e-3 for i in range(8) for j in range(i))


# torchvision still has the decoder that its users have; TorchCodec is to take over.
@pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities")
def test_readers_hand_over_the_same_pixels(tmp_path):
    pixels = np.random.default_rng(3).integers(0, 256, (4, 24, 16, 3), np.uint8)
    for i, one in enumerate(pixels):
        Image.fromarray(one).save(tmp_path / f"{i}.jpg", quality=95, subsampling=0)
    expected = [
        np.asarray(Image.open(io.BytesIO((tmp_path / f"{i}.jpg").read_bytes()))) for i in range(4)
    ]
    for who in ("files+torchvision", "files+pillow", "files+simplejpeg"):
        job = dataclasses.replace(JOB, stage="read", who=who, files=str(tmp_path))
        found = peers_read.dataset_of(job)
        assert len(found) == 4
        for one, theirs in zip(expected, (found[i] for i in range(4)), strict=True):
            assert theirs.shape == (24, 16, 3)
            # Two builds of libjpeg may round an inverse cosine transform differently.
            assert np.abs(theirs.numpy().astype(int) - one).max() <= 1, who


def test_a_turn_of_a_peer_and_how_it_ends(tmp_path):
    """A whole process: prepared, its turns, figures and settings; no paths in the row."""
    for i in range(6):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / f"{i}.jpg")
    settings = {"tile_px": 16, "batch": 2, "images": 4, "threads": 1, "data": "store"}
    there = {"files": str(tmp_path), "platform": "cpu"}
    runner = peers.prepare_peer("read", settings | there, "files+pillow")
    assert isinstance(runner, Runner), runner
    (row,) = measure([runner], 2)
    runner.close()
    assert (row.images, len(row.seconds), len(row.cpu_seconds)) == (4, 2, 2)
    assert min(row.seconds) > 0
    assert row.peak_bytes > 10**7
    assert row.settings["peer"]["workers"] in (0, 1)
    assert "torch" in row.settings["peer"]["versions"]
    assert str(tmp_path) not in str(row.settings)


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (
            WITHOUT,
            r"not installed \(numpy\): pip install torch torchvision, or in an environment .*",
        ),
        ("kill -9 $$", "out of memory"),
        ("echo no such thing >&2; exit 3", "its process ended with 3: no such thing"),
        ("exec sleep 20", "not ready after 1 s"),
        ('echo \'{{"why": "RuntimeError: no compiler"}}\'', "RuntimeError: no compiler"),
    ],
)
def test_why_a_peer_has_no_figure(interpreter, script, why):
    found = peers.prepare_peer(
        "step", {"batch": 2}, "pytorch-compiled", {"pytorch": interpreter(script)}, limit_s=1.4
    )
    assert isinstance(found, Row)
    assert not found.seconds
    assert (found.stage, found.who, found.settings) == ("step", "pytorch-compiled", {"batch": 2})
    assert re.fullmatch(why, found.why), found.why


def test_a_peer_that_dies_at_its_turn_leaves_a_row(interpreter):
    script = "echo '{{\"settings\": {{}}}}'; read turn; echo broken >&2; exit 1"
    runner = peers.prepare_peer("step", {}, "lightly", {"lightly": interpreter(script)})
    (row,) = measure([runner], 3)
    assert (row.why, row.seconds) == ("its process ended with 1: broken", ())


@pytest.mark.parametrize(
    ("stage", "waits"), [("forward", 1), ("backward", 2), ("optimizer", 1), ("step", 1)]
)
def test_a_turn_is_its_calls_and_waits_at_their_end(monkeypatch, stage, waits):
    """As our turns do; a wait between gradient and update would empty a GPU's queue."""
    done = []

    class Setup:
        def __init__(self, job):
            self.job = job
            named = ("forward", "gradient", "update", "wait")
            for name in named:
                setattr(self, name, lambda name=name: done.append(name))

        step, calls = peers_torch.Setup.step, peers_torch.Setup.calls
        backward, settings = peers_torch.Setup.backward, lambda self: {}

        def gradient(self, images=None):
            done.append("gradient")

    monkeypatch.setattr(peers_torch, "Setup", Setup)
    job = dataclasses.replace(JOB, stage=stage, augment=False, calls=3)
    prepared = peers_torch.prepare(job)
    done.clear()
    prepared.run()
    assert done.count("wait") == waits
    assert done[-1] == "wait"
    assert len(done) - waits == {"backward": 6, "step": 6}.get(stage, 3)


def test_the_calls_of_the_network_wait_for_nothing(monkeypatch):
    setup = peers_torch.Setup(JOB)
    monkeypatch.setattr(setup, "wait", lambda: pytest.fail("it waited"))
    setup.step()
    setup.forward()


def test_the_pipeline_waits_a_step_behind():
    done = []

    class Setup:
        steps = 0

        def step(self, batch):
            self.steps += 1
            done.append(f"step {self.steps}")

        def mark(self):
            now = self.steps
            return lambda: done.append(f"until {now}")

        def wait(self):
            done.append("all")

    peers_read.train(Setup(), iter("abc"))
    assert done == ["step 1", "step 2", "until 1", "step 3", "until 2", "all"]


def test_the_peak_of_a_peer_is_that_of_its_turn(monkeypatch):
    """What preparing tried (cuDNN's algorithms, ways to augment) is not the step's."""
    done = []
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(cuda, "reset_peak_memory_stats", lambda: done.append("reset"))
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda: done.append("asked") or 7)
    answer = peer_child.turn(Prepared(lambda: done.append("run")))
    assert done == ["reset", "run", "asked"]
    assert answer["peak_bytes"] == 7


@pytest.mark.parametrize(
    ("settings", "why"), [({"devices": 4}, "one device, not on 4"), ({"platform": "tpu"}, "GPU")]
)
def test_what_no_peer_is_measured_at(settings, why):
    assert why in peers.prepare_peer("step", settings, "pytorch").why


def test_torch_compile_as_it_comes_and_as_it_tunes(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda model, **more: asked.append(more) or model)
    for who in ("pytorch", "pytorch-compiled", "pytorch-autotuned"):
        job = dataclasses.replace(JOB, who=who)
        found = peers_torch.Setup(job).settings()
        assert (found["torch_compile"], found["torch_compile_mode"]) == (bool(job.mode), job.mode)
    assert asked == [{"mode": "default"}, {"mode": "max-autotune-no-cudagraphs"}]
    assert set(peers.PEERS) == set(get_args(PeerName))


def test_tuning_is_for_gpus_and_has_a_limit_of_its_own(monkeypatch):
    row = peers.prepare_peer("step", {"platform": "cpu"}, "pytorch-autotuned")
    assert row.why == "not measured: torch.compile tries kernels out on a GPU"
    limits = []

    class Process:
        settings, turn, close = {}, None, None

        def __init__(self, job, python, limit_s):
            limits.append(limit_s)

    monkeypatch.setattr(peers, "PeerProcess", Process)
    for who in ("pytorch-autotuned", "pytorch-compiled"):
        peers.prepare_peer("step", {"platform": "gpu"}, who)
    assert limits == [peers.AUTOTUNE_LIMIT_S, peers.COMPILE_LIMIT_S]


def test_environments_of_peers(interpreter):
    python = interpreter("true")
    assert peers.peer_envs([f"kornia={python}"]) == {"kornia": python}
    with pytest.raises(ConfigError, match="no peer 'cornea'; one of pytorch, "):
        peers.peer_envs([f"cornea={python}"])
    with pytest.raises(ConfigError, match="no interpreter there"):
        peers.peer_envs(["kornia=/nowhere/python"])
    assert peers.peers_of("augment") == ("torchvision", "kornia")


TINY = {"model": "resnet10", "tile_px": 32, "batch": 4, "threads": 2, "platform": "cpu"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "who", "found"),
    [
        ("augment", "torchvision", {"processes": 2}),
        ("forward", "pytorch", {"torch_compile": False}),
        ("backward", "pytorch", {"memory_format": "channels_last"}),
        ("optimizer", "lightly", {"lars": "lightly LARS"}),
        ("step", "pytorch", {"autocast": False, "tf32": False}),
        ("pipeline", "pytorch", {"views_made_in": "workers", "decoder": "torchvision"}),
        ("forward", "pytorch-compiled", {"torch_compile": True}),
    ],
)
def test_a_peer_of_each_stage(tmp_path, stage, who, found):
    for i, pixels in enumerate(
        np.random.default_rng(4).integers(0, 256, (12, 32, 32, 3), np.uint8)
    ):
        Image.fromarray(pixels).save(tmp_path / f"{i}.jpg")
    settings = TINY | {"files": str(tmp_path), "images": 8}
    runner = peers.prepare_peer(stage, settings, who)
    if who == "pytorch-compiled" and isinstance(runner, Row):
        assert re.match("not ready|.*Error", runner.why)  # no compiler here: the row says so
        return
    assert isinstance(runner, Runner), runner
    (row,) = measure([runner], 2)
    runner.close()
    assert not row.why
    assert row.settings["peer"].items() >= found.items()
    assert min(row.seconds) >= 0
    assert row.median < 60
    assert row.images == (8 if stage == "pipeline" else 4)
