"""`jaxhisto bench` as a process, on what goes wrong: memory, stores, packages, flags."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jaxhisto.bench import memory, run
from jaxhisto.bench.__main__ import helps, parsed
from jaxhisto.bench.ours import exchanges
from jaxhisto.bench.record import Row, find, read_record, row_to_json
from jaxhisto.bench_config import BenchConfig
from jaxhisto.distributed import make_mesh, to_global
from jaxhisto.errors import ConfigError, RunError

GB = 1 << 30
IMAGES = 12
TINY = ("--models", "resnet10", "--tile-px", "32", "--repeats", "3", "--peers")


def bench(out, *args, memory=0, **env):
    """Runs the bench as a process, with at most so many bytes of address space."""
    command = [sys.executable, "-m", "jaxhisto.bench", *TINY, "--out", str(out), *map(str, args)]
    if memory:  # by a shell: to set it after a fork would fork JAX's threads
        command = ["sh", "-c", f'ulimit -v {memory // 1024}; exec "$@"', "sh", *command]
    return subprocess.run(
        command, env=os.environ | env, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def swept(tmp_path_factory, images):
    """A sweep of which one batch fits and the other neither into memory nor out of the store."""
    out = tmp_path_factory.mktemp("swept") / "r.json"
    large = 8_000_000  # of 32 px: 24 GB of pixels
    args = ("--batch-sizes", 4, large, "--stages", "read", "to_device", "--stores", images)
    done = bench(out, *args, memory=16 * GB)
    assert done.returncode == 0, done.stderr
    return read_record(out), large, done.stdout


def test_a_size_that_does_not_fit_is_recorded_and_the_sweep_goes_on(swept):
    record, large, _ = swept
    fits, not_ = (find(record.rows, "to_device", batch=batch) for batch in (4, large))
    assert len(fits.seconds) == 3
    assert fits.bytes == 4 * (32 * 32 * 3 + 2 * 4)
    assert (not_.why, not_.seconds) == ("out of memory", ())


def test_a_store_smaller_than_the_batch_is_said(swept):
    record, large, _ = swept
    fits, not_ = (find(record.rows, "read", batch=batch) for batch in (4, large))
    assert fits.images_per_s > 0
    assert (fits.settings["data"], fits.settings["tiles"]) == ("store", IMAGES)
    assert f"{IMAGES} tiles cannot fill a batch of {large}" in not_.why


def test_without_an_accelerator_it_says_so_and_measures_the_cpu(swept):
    record, _, said = swept
    assert "no accelerator" in said
    assert record.machine["platform"] == "cpu"
    assert said.splitlines()[-1].startswith("next: python -m jaxhisto.bench --report ")


def test_a_record_names_no_place(swept, images):
    record, _, _ = swept
    assert str(images) not in str(record)
    assert str(Path.home()) not in str(record)


@pytest.fixture
def bare(tmp_path):
    """PYTHONPATH of a machine with an accelerator and little else; children inherit it."""
    absent = ("grain", "tensorflow_datasets", "openslide", "tyro", "kornia", "lightly",
              "simplejpeg", "array_record", "torch")  # fmt: skip
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {absent}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    return f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"


def test_without_the_packages_of_reading_the_rest_is_measured(bare, tmp_path):
    out = tmp_path / "r.json"
    args = ("--batch-sizes", 4, "--stages", "read", "to_device")
    done = bench(out, *args, PYTHONPATH=bare)
    assert done.returncode == 0, done.stderr
    assert "no store can be made (not installed: pip install" in done.stdout
    rows = read_record(out).rows
    assert find(rows, "to_device").seconds
    assert "no store" in find(rows, "read").why


@pytest.mark.slow
def test_without_them_training_from_memory_is_measured(bare, tmp_path):
    out = tmp_path / "r.json"
    done = bench(out, "--batch-sizes", 4, "--stages", "pipeline", PYTHONPATH=bare)
    assert done.returncode == 0, done.stderr
    rows = read_record(out).rows
    for cache in ("host", "device"):
        row = find(rows, "pipeline", cache=cache)
        assert row.seconds, row
        assert row.settings["data"] == "synthetic"
    assert "no store" in find(rows, "pipeline", cache="none").why


def test_flags_that_are_none(jaxhisto, tmp_path):
    out = ("--out", tmp_path / "r.json")
    for wrong in (("--stages", "warp"), ("--models", "resnet19")):
        assert jaxhisto("bench", *wrong, *out)[0] == 2
        with pytest.raises(SystemExit) as stopped:
            parsed([str(word) for word in wrong])
        assert stopped.value.code == 2
    code, _, err = jaxhisto("bench", "--stores", tmp_path / "absent", *out)
    assert code == 1
    assert "absent: no such file or folder" in err
    code, _, err = jaxhisto("bench", "--out", tmp_path / "nowhere" / "r.json")
    assert code == 1
    assert "nowhere: no such folder" in err
    assert jaxhisto("bench", "--batch-sizes", 1, *out)[0] == 2
    assert jaxhisto("bench", "--stages", *out)[0] == 2
    assert not (tmp_path / "r.json").exists()


def test_both_ways_to_give_flags_mean_the_same(monkeypatch):
    args = ["--models", "resnet18", "resnet50", "--batch-sizes", "8", "16", "--cache", "host",
            "--precision", "bf16", "--out", "r.json"]  # fmt: skip
    from jaxhisto.flags import parse

    assert parsed(args) == parse(BenchConfig, args, "bench", recipe=False)
    assert parsed([]) == parse(BenchConfig, [], "bench", recipe=False)
    with pytest.raises(ConfigError, match="--batch-sizes"):
        parsed(["--batch-sizes", "1"])


def test_what_depends_on_the_machine():
    gpu = {"platform": "gpu", "devices": ["x", "x"]}
    found = run.completed(BenchConfig(), gpu)
    assert (found.precision, found.batch_sizes, found.devices) == ("bf16", (256, 512, 1024), 2)
    found = run.completed(BenchConfig(batch_sizes=(8, 4)), {"platform": "cpu", "devices": ["x"]})
    assert (found.precision, found.batch_sizes, found.devices) == ("f32", (4, 8), 1)
    with pytest.raises(ConfigError, match="257 does not divide among 2 devices"):
        run.completed(BenchConfig(batch_sizes=(257,)), gpu)


def test_a_child_that_ends_is_told_apart_by_how():
    from jaxhisto.bench.child import OutOfMemory, end

    end(0, "warnings")
    for code, said in ((-9, ""), (memory.EXIT, ""), (-6, "std::bad_alloc")):
        with pytest.raises(OutOfMemory):
            end(code, said)
    warned = (
        "W bfc_allocator.cc:306] Allocator (GPU_0_bfc) ran out of memory trying to allocate 1 GiB. "
        "The caller indicates that this is not a failure"
    )
    hint = "For simplicity, JAX has removed its internal frames from the traceback."
    said = f"{warned}\nTraceback\n  File x\njax.errors.JaxRuntimeError: INTERNAL: x\n{hint}\n"
    for code in (1, -11):
        with pytest.raises(
            RunError, match=r"\(jax.errors.JaxRuntimeError: INTERNAL: x\); all .*r.log"
        ):
            end(code, said, "r.log")
    with pytest.raises(RunError, match=r"code 1 \(no such thing\); run fewer --stages"):
        end(1, "no such thing\n")


def test_an_error_of_ours_costs_its_row_alone(tmp_path, monkeypatch):
    """By a process: the other rows are there, the exit code tells, and the log shows where."""
    out = tmp_path / "r.json"
    (tmp_path / "sitecustomize.py").write_text(
        "import jaxhisto.bench.ours as ours\n"
        "def broken(self): raise ZeroDivisionError('planted')\n"
        "ours.Setup._augment = broken\n"
    )
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    args = ("--batch-sizes", 4, "--stages", "to_device", "augment")
    done = bench(out, *args, PYTHONPATH=path)
    assert done.returncode == 1, done.stderr
    assert "1 row failed (augment); " in done.stderr
    assert str(out) + ".log shows where" in done.stderr
    rows = read_record(out).rows
    assert find(rows, "to_device").seconds
    assert find(rows, "augment").why == "failed: ZeroDivisionError: planted"
    assert "in broken" in (tmp_path / "r.json.log").read_text()


def test_a_child_that_ends_owes_rows_and_the_bench_goes_on(monkeypatch):
    def ask(job, env):
        yield {"row": row_to_json(Row("read", "jaxhisto", {"batch": 4}, (1.0,)))}
        raise RunError("the process that measures ended with code -11 (it wrote nothing)")

    monkeypatch.setattr(run, "ask", ask)
    job = {"stages": ["read", "step"], "point": {"model": "resnet10", "batch": 4}}
    first, owed = run.point(BenchConfig(devices=1), {"platform": "cpu"}, job)
    assert first[0].seconds == (1.0,)
    assert [(row.stage, row.why) for row in owed] == [
        ("step", "failed: the process that measures ended with code -11 (it wrote nothing)")
    ]


def test_a_command_line_that_does_not_start_says_why():
    said = "Traceback\nModuleNotFoundError: No module named 'tyro.conf'\n"
    assert run.help_failed(said) == "not installed: pip install tyro"
    assert run.help_failed("SyntaxError: no\n") == "failed: SyntaxError: no"


def test_every_flag_has_its_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed(["--help"])
    assert stopped.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert set(helps()) == {field.name for field in dataclasses.fields(BenchConfig)}
    assert "Encoders, each at each batch and side." in said
    assert "show where an error was raised" in said


def test_debug_shows_where(tmp_path, capsys):
    from jaxhisto.bench.__main__ import main

    flags = ["--out", str(tmp_path / "nowhere" / "r.json")]
    assert main(flags) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert main([*flags, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_the_exchanges_are_sums_over_all_devices():
    """By hand, on four devices; and what is compiled holds the collectives, and nothing else."""
    mesh = make_mesh(4)
    grads = {"w": np.arange(6, dtype=np.float32)}
    stats = {"bn1": {"mean": np.ones(3, np.float32), "var": np.ones(3, np.float32)}}
    z = to_global(np.ones((8, 2, 4), np.float32), mesh)
    with jax.set_mesh(mesh):
        compiled = jax.jit(exchanges(mesh)).lower(grads, stats, z).compile()
        chain, every, summed = compiled(grads, stats, z)
    np.testing.assert_allclose(np.asarray(summed["w"]), 4 * grads["w"])
    np.testing.assert_array_equal(np.asarray(every), np.full(4, 64.0))
    assert float(chain) == pytest.approx(4e-30)
    text = compiled.as_text()
    assert text.count(" all-gather(") + text.count(" all-gather-start(") == 1
    # BatchNorm's two sums (forward, backward), of which neither can join the other, and the
    # gradients', which may join one of them.
    assert 2 <= text.count(" all-reduce(") + text.count(" all-reduce-start(") <= 5


@pytest.mark.slow
def test_all_stages_of_a_tiny_network(tmp_path):
    out = tmp_path / "r.json"
    done = bench(out, "--batch-sizes", 4, "--devices", 2)
    assert done.returncode == 0, done.stderr
    record = read_record(out)
    rows = {row.stage: row for row in record.rows if "beside" not in row.settings}
    assert set(rows) == set(BenchConfig().stages)
    assert all(row.seconds for row in record.rows), record.rows
    assert rows["communication"].median > 0
    assert rows["step"].flops == rows["forward"].flops + rows["backward"].flops
    assert rows["step"].peak_bytes > 1e8
    assert rows["compile"].settings["from_cache_s"] < rows["compile"].median
    caches = [row.settings["cache"] for row in record.rows if row.stage == "pipeline"]
    assert caches == ["none", "host", "device"]
    assert len(record.verdict["of"]) == 4
    assert record.machine["peaks"]["tflops"]["f32"] > 0


@pytest.mark.slow
def test_memory_that_xla_cannot_get_is_recorded(tmp_path):
    """Views of 400,000 tiles are 10 GB, all that the limit allows."""
    out = tmp_path / "r.json"
    done = bench(
        out, "--batch-sizes", 4, 400_000, "--stages", "augment", memory=10 * GB,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = read_record(out).rows
    assert find(rows, "augment", batch=4).seconds
    assert find(rows, "augment", batch=400_000).why == "out of memory"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("command", [("jaxhisto.bench",), ("jaxhisto.cli", "bench")])
def test_a_stop_ends_peers_too_whatever_they_are_at(tmp_path, command):
    """SIGTERM while PyTorch compiles, or is imported: minutes that nobody waits for any more."""
    args = ("--models", "resnet18", "--tile-px", "96", "--peers", "pytorch-compiled")
    args += ("--stages", "step", "--batch-sizes", "4", "--out", str(tmp_path / "r.json"))
    with subprocess.Popen(
        [sys.executable, "-m", *command, *args], stderr=subprocess.PIPE, text=True
    ) as parent:
        started = wait_for_peer(parent.pid)
        parent.send_signal(signal.SIGTERM)
        error = parent.communicate(timeout=60)[1]
    assert parent.returncode == 130, error
    assert error.splitlines()[-1].split(": ")[1].startswith("interrupted")
    assert "Traceback" not in error
    deadline = time.monotonic() + 10
    while alive(started) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(started)
    assert read_record(tmp_path / "r.json").rows == ()  # what is measured is kept as it comes


def wait_for_peer(root: int) -> list[int]:
    """The processes below one, once there are a child and a child of that."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        children = below(root)
        grandchildren = [pid for child in children for pid in below(child)]
        if grandchildren:
            time.sleep(1)  # it is at work
            return children + grandchildren
        time.sleep(0.1)
    raise AssertionError("no peer was started")


def below(pid: int) -> list[int]:
    """Its children, of whatever thread."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(child) for child in file.read_text().split()]
    return found


def alive(pids: list[int]) -> list[int]:
    """Those that still run; what waits for its parent to look does not."""
    left = []
    for pid in pids:
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            left += [pid] if state not in "ZX" else []
    return left
