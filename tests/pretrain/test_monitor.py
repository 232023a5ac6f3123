"""What a run says of itself: against scikit-learn and NumPy on the exported encoder's features."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import RidgeCV
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from jaxhisto.config import DataConfig, ModelConfig, MonitorConfig, PretrainConfig
from jaxhisto.data.labelled import read_labelled
from jaxhisto.data.sources import open_tiles
from jaxhisto.distributed import make_mesh, to_global
from jaxhisto.errors import RunError, StoreError
from jaxhisto.models import simclr
from jaxhisto.pretrain.encoder import write_encoder
from jaxhisto.pretrain.monitor import (
    PATIENCE,
    VIEWS_AT,
    CollapseGuard,
    Monitor,
    batch_of,
    open_probe_set,
)
from jaxhisto.pretrain.step import augmented, make_embed, normalise
from jaxhisto.probes import LAMBDAS
from jaxhisto.runlog import read_metrics, read_monitor
from jaxhisto.settings import from_json
from jaxhisto.weights import read_encoder

SIDE, TILES = 32, 7


def pictures(folder: Path, count: int, colour: tuple[int, int, int], seed: int) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        low = np.clip(rng.normal(colour, 60, (5, 5, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(low).resize((SIDE, SIDE)).save(folder / f"{i:02d}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Training images, and a labelled set of three classes, four images of which are trained on."""
    root = tmp_path_factory.mktemp("data")
    pictures(root / "train", 16, (150, 110, 160), 0)
    for c, colour in enumerate([(165, 110, 150), (150, 130, 160), (140, 110, 175)]):
        pictures(root / "labelled" / f"class{c}", 12, colour, 10 + c)
    for i in range(4):
        source = root / "labelled" / "class0" / f"{i:02d}.png"
        (root / "train" / f"copy{i}.png").write_bytes(source.read_bytes())
    return root


def pretrain(data: Path, out: Path, *flags: object, devices: int = 2) -> tuple[str, str]:
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    args = [
        *("pretrain", "--out", out, "--data.stores", data / "train", "--steps", 4),
        *("--batch-size", 8, "--tile-px", SIDE, "--precision", "f32", "--model.name", "resnet10"),
        *("--checkpoint-every", 2, *flags),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "jaxhisto.cli", *map(str, args)],
        capture_output=True,
        text=True,
        env=env,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """(run folder, what it said)."""
    out = tmp_path_factory.mktemp("runs") / "run"
    flags = ("--monitor.images", data / "labelled", "--monitor.tiles", TILES, "--monitor.k", 5)
    said, _ = pretrain(data, out, *flags, "--profile", 2, 3, "--tensorboard")
    return out, said


@pytest.fixture(scope="module")
def exported(run, data):
    """(params, batch_stats) of the exported encoder."""
    params, stats, metadata = read_encoder(write_encoder(run[0])[0])
    assert str(data) not in json.dumps(metadata)  # where the labelled set lies is nobody's business
    return params, stats


@pytest.mark.slow
def test_probes_are_scikit_learns_on_the_exported_encoders_features(run, data, exported):
    lines = read_monitor(run[0])
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert len({line["set"] for line in lines}) == 1
    found = read_labelled(data / "labelled")
    images = np.stack([found.read(i) for i in range(36)]).astype(np.float32) / 255
    x = np.asarray(make_embed(ModelConfig(name="resnet10"))(*exported, jnp.asarray(images)), float)
    train, test = found.split()
    y, truth = found.labels[train], found.labels[test]

    knn = KNeighborsClassifier(
        5, weights=lambda d: np.exp((1 - d) / 0.07), metric="cosine", algorithm="brute"
    )
    votes = knn.fit(x[train], y).predict_proba(x[test])
    scaler = StandardScaler().fit(x[train])
    search = RidgeCV(LAMBDAS).fit(scaler.transform(x[train]), np.eye(3)[y])
    ridge = search.predict(scaler.transform(x[test]))
    assert lines[-1]["ridge_lambda"] == search.alpha_
    for name, scores in (("knn", votes), ("ridge", ridge)):
        area = np.mean([roc_auc_score(truth == c, scores[:, c]) for c in range(3)])
        expected = {
            "f1": f1_score(truth, scores.argmax(1), average="macro"),
            "auc": area,
            "accuracy": accuracy_score(truth, scores.argmax(1)),
        }
        for measure, value in expected.items():
            assert lines[-1][f"{name}_{measure}"] == pytest.approx(value, abs=1e-9), measure


@pytest.mark.slow
def test_spread_is_numpys_on_fixed_views_of_the_runs_tiles(run, data, exported):
    out, _ = run
    config = from_json(PretrainConfig, (out / "config.json").read_text())
    tiles = open_tiles(config.data)
    rows = [tiles.read(i) for i in (0, 3, 6, 10, 13, 16, 19)]  # 7 of 20, evenly
    mesh = make_mesh(1)
    with jax.set_mesh(mesh):
        batch = np.stack(rows), np.full((7, 2), SIDE, np.int32)
        drawn = jax.jit(augmented, static_argnums=0)
        views = drawn(config, np.int32(VIEWS_AT), *to_global(batch, mesh))
    views = np.asarray(views).reshape(14, SIDE, SIDE, 3)
    inputs = normalise(jnp.asarray(views), config.model)
    graphdef, _, _ = simclr.structure("resnet10", 128)
    project = jax.jit(lambda p, s, x: simclr.project(graphdef, p, s, x, train=False)[0])
    z = project(*exported, inputs)
    features = np.asarray(make_embed(config.model)(*exported, jnp.asarray(views)), float)
    u = np.asarray(z, float).reshape(7, 2, 128)
    u /= np.linalg.norm(u, axis=-1, keepdims=True)

    def rank(x):
        p = np.linalg.svd(x, compute_uv=False)
        p = p / p.sum()
        return np.exp(-(p * np.log(p)).sum())

    line = read_monitor(out)[-1]
    assert line["effective_rank"] == pytest.approx(rank(features), rel=1e-4)
    assert line["effective_rank_z"] == pytest.approx(rank(u.reshape(14, 128)), rel=1e-4)
    pairs = [(i, j) for i in range(7) for j in range(i)]
    pulled = np.mean([np.sum((a - b) ** 2) for a, b in u])
    pushed = [
        np.log(np.mean([np.exp(-2 * np.sum((u[i, v] - u[j, v]) ** 2)) for i, j in pairs]))
        for v in (0, 1)
    ]
    others = [a @ b for i in range(7) for j in range(7) if i != j for a in u[i] for b in u[j]]
    assert line["alignment"] == pytest.approx(pulled, rel=1e-4)
    assert line["uniformity"] == pytest.approx(np.mean(pushed), rel=1e-4)
    assert line["pos_sim"] == pytest.approx(1 - pulled / 2, rel=1e-4)
    assert line["neg_sim"] == pytest.approx(np.mean(others), rel=1e-4)


@pytest.mark.slow
def test_what_the_run_says(run):
    out, said = run
    assert "labelled: 36 labelled images (class0 12, class1 12, class2 12)" in said
    assert "fitted on 18, tested on 18" in said
    # the four copies, on whichever side they fell
    leaked = [line for line in said.splitlines() if "in the training data" in line]
    assert sum(int(line.split("on, ")[1].split()[0]) for line in leaked) == 4
    assert any("tested on" in line and "transductive" in line for line in leaked)
    assert all(f"step {k}: kNN macro F1" in said for k in (0, 2, 4))
    assert "trust_ratios.csv: 14 parameters adapted, 26 exempt" in said
    assert len((out / "trust_ratios.csv").read_text().splitlines()) == 1 + 40
    events = b"".join(p.read_bytes() for p in (out / "tensorboard").iterdir())
    assert b"monitor/knn_f1" in events


@pytest.mark.slow
def test_a_steps_time_is_split(run):
    lines = read_metrics(run[0])
    assert all(line["step_s"] > 0 and line["wait_s"] >= 0 for line in lines)
    # the save and the measurement after step 2 held step 3 up, and nothing else did
    for name in ("checkpoint_s", "monitor_s"):
        assert [line[name] > 0 for line in lines] == [False, False, True, False]
    measured = read_monitor(run[0])[1]["monitor_s"]
    assert measured <= lines[2]["monitor_s"] < measured + 5
    assert all("memory_bytes" not in line for line in lines)  # a CPU says nothing


@pytest.mark.slow
def test_a_trace_appears_where_it_is_said(run):
    out, said = run
    assert f"{out}/profile: trace of steps 2 to 3" in said
    assert list((out / "profile").rglob("*.trace.json.gz"))
    assert list((out / "profile").rglob("*.xplane.pb"))


def config_of(data: Path, **monitor: object) -> PretrainConfig:
    return PretrainConfig(
        out="run",
        batch_size=8,
        tile_px=SIDE,
        precision="f32",
        data=DataConfig(stores=(str(data / "train"),)),
        model=ModelConfig(name="resnet10"),
        monitor=MonitorConfig(**monitor),
    )


def monitor_of(config: PretrainConfig, say=print, steps: int = 10, devices: int = 1) -> Monitor:
    return Monitor(config, open_tiles(config.data), make_mesh(devices), steps, 2.0, say)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, []),
        ({"every": 4}, [0, 4, 8, 10]),
        ({"every": 20}, [0, 10]),
    ],
)
def test_when_it_measures(data, settings, steps):
    monitor = monitor_of(config_of(data, **settings))
    assert [k for k in range(11) if monitor.due(k)] == steps


def test_a_labelled_set_alone_is_measured_at_checkpoints(data):
    config = config_of(data, images=str(data / "labelled"))
    monitor = monitor_of(config, steps=2500)
    assert [k for k in range(2501) if monitor.due(k)] == [0, 1000, 2000, 2500]


def test_lines_of_steps_done_again_are_cut_off(data, tmp_path):
    monitor = monitor_of(config_of(data, every=2))
    lines = "".join(json.dumps({"step": k}) + "\n" for k in (0, 2, 4, 6))
    for start, kept in ((4, [0, 2, 4]), (3, [0, 2]), (0, [])):
        (tmp_path / "monitor.jsonl").write_text(lines + '{"step": 8, "al')
        monitor.open(tmp_path, start)
        assert [line["step"] for line in read_monitor(tmp_path)] == kept


def test_sets_that_cannot_be_are_refused_before_training(data, tmp_path):
    tiles = open_tiles(DataConfig(stores=(str(data / "train"),)))
    with pytest.raises(RunError, match=r"--monitor.group: needs --monitor.images"):
        open_probe_set(MonitorConfig(group="patient"), SIDE, tiles, print)
    with pytest.raises(StoreError, match="does not exist"):
        open_probe_set(MonitorConfig(images=str(tmp_path / "no")), SIDE, tiles, print)
    assert open_probe_set(MonitorConfig(), SIDE, tiles, print) is None


def test_a_limit_draws_and_another_size_is_another_set(data):
    tiles = open_tiles(DataConfig(stores=(str(data / "train"),)))
    said: list[str] = []
    images = str(data / "labelled")
    whole = open_probe_set(MonitorConfig(images=images), SIDE, tiles, said.append)
    some = open_probe_set(MonitorConfig(images=images, limit=20), SIDE, tiles, said.append)
    small = open_probe_set(MonitorConfig(images=images), 16, tiles, said.append)
    assert whole is not None
    assert some is not None
    assert small is not None
    assert (len(some.images), small.images.shape) == (20, (36, 16, 16, 3))
    assert len({whole.hash, some.hash, small.hash}) == 3
    assert any("20 of them drawn" in line for line in said)


@pytest.mark.parametrize(
    ("most", "devices", "size"), [(7, 1, 8), (7, 4, 8), (1000, 1, 64), (1000, 8, 512), (1, 4, 8)]
)
def test_a_batch_gives_each_device_the_same_even_number(most, devices, size):
    assert batch_of(most, devices) == size


def test_the_guard_warns_once_of_negatives_that_stay_alike():
    said: list[str] = []
    guard = CollapseGuard(warmup=10, min_rank=2, say=said.append)
    for step in range(1, 11 + 2 * PATIENCE):
        guard.step(step, 0.999)
    assert len(said) == 1
    assert f"step {10 + PATIENCE}: the embedding looks collapsed: the mean cosine" in said[0]
    for step in range(200, 200 + PATIENCE):  # one sound step in between, and it starts anew
        guard.step(step, 0.5 if step == 210 else 0.999)
    assert len(said) == 1


def test_the_guard_warns_of_a_low_rank_until_it_recovers():
    said: list[str] = []
    guard = CollapseGuard(warmup=10, min_rank=2, say=said.append)
    for step, rank in ((0, 1.0), (20, 1.5), (30, 1.4), (40, 2.5), (50, float("nan")), (60, 1.0)):
        guard.measured(step, rank)
    assert [line.split(":")[0] for line in said] == ["step 20", "step 60"]
    assert "effective rank of z is 1.50, below 2" in said[0]


MEASURE = """
import sys, jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
port, processes, process, out = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
if processes > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
from pathlib import Path
from jaxhisto.config import PretrainConfig
from jaxhisto.settings import from_json
from jaxhisto.data.sources import open_tiles
from jaxhisto.distributed import make_mesh
from jaxhisto.pretrain.monitor import Monitor
from jaxhisto.pretrain.step import init_state
config = from_json(PretrainConfig, (Path(out) / "config.json").read_text())
mesh = make_mesh()
monitor = Monitor(config, open_tiles(config.data), mesh, 10, 2.0, lambda line: None)
with jax.set_mesh(mesh):
    monitor.open(Path(out), 0)
    print(monitor.measure(0, init_state(config, 10, 2.0, mesh)))
"""


@pytest.mark.slow
def test_two_processes_measure_what_one_does(data, tmp_path):
    import socket

    from jaxhisto.settings import to_json

    lines = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        out.mkdir()
        config = config_of(data, images=str(data / "labelled"), tiles=TILES)
        (out / "config.json").write_text(to_json(config))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={2 // processes}"}
        started = [
            subprocess.Popen(
                [sys.executable, "-c", MEASURE, *map(str, (port, processes, i, out))],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=env,
            )
            for i in range(processes)
        ]
        said = [process.communicate(timeout=240) for process in started]
        assert [p.returncode for p in started] == [0] * processes, said
        (lines[processes],) = read_monitor(out)
        assert [s[0].splitlines()[-1] == "{}" for s in said] == [i > 0 for i in range(processes)]
    assert lines[1]["set"] == lines[2]["set"]
    for name in lines[1].keys() - {"set", "time", "monitor_s"}:
        assert lines[2][name] == pytest.approx(lines[1][name], rel=1e-4), name


@pytest.mark.slow
def test_watching_changes_nothing_in_the_run(run, data, tmp_path):
    pretrain(data, tmp_path / "run")
    ours, theirs = ([m["loss"] for m in read_metrics(r)] for r in (run[0], tmp_path / "run"))
    assert ours == theirs
    weights = [read_encoder(write_encoder(r)[0])[:2] for r in (run[0], tmp_path / "run")]
    assert jax.tree.all(jax.tree.map(np.array_equal, *weights))
