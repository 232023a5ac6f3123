"""Checkpoints come back bit for bit, are kept by policy, and are believed only when whole."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from jaxhisto.checkpoints import SaveError, open_checkpoints
from jaxhisto.contents import Damaged, check
from jaxhisto.distributed import make_mesh
from jaxhisto.errors import RunError
from jaxhisto.pretrain.step import TrainState


def made(seed: int = 0, width: int = 12) -> TrainState:
    rng = np.random.default_rng(seed)
    params = {
        str(i): {"kernel": jnp.asarray(rng.random((30, i + 1), np.float32))} for i in range(width)
    }
    opt_state = optax.lars(0.1).init(params)
    odd = jnp.asarray([-0.0, np.nan, np.inf, 1e-45], jnp.float32)
    return TrainState(jnp.int32(7), params, {"bn": {"mean": odd}}, opt_state)


@pytest.fixture
def state():
    return made()


def save(run: Path, *steps: int, keep: int = 9, keep_every: int = 0) -> None:
    """A run's checkpoints, the state of each made from its step."""
    with open_checkpoints(run, keep, keep_every) as checkpoints:
        for step in steps:
            checkpoints.save_async(step, made(step), {"data_hash": "d0"})


def names(run: Path) -> set[str]:
    return {p.name for p in (run / "checkpoints").iterdir()}


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_a_state_comes_back_bit_for_bit(state, tmp_path):
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step is None
        assert checkpoints.restore(state) is None
        checkpoints.save_async(7, state, {})
    like = jax.tree.map(jnp.zeros_like, state)
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step == 7
        step, restored = checkpoints.restore(like)
    assert step == 7
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits(restored) == bits(state)


def test_what_is_saved_is_the_state_of_that_moment(state, tmp_path):
    """The next step reuses the memory of the state that was handed over."""
    before = bits(state)
    consume = jax.jit(lambda s: jax.tree.map(lambda x: x + x.dtype.type(1), s), donate_argnums=0)
    with open_checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save_async(1, state, {})
        jax.block_until_ready(consume(state))
    with open_checkpoints(tmp_path, keep=1, write=False) as checkpoints:
        assert bits(checkpoints.restore(made(5))[1]) == before


def test_the_newest_are_kept_and_every_kth(tmp_path):
    save(tmp_path, 1, 2, 3, keep=2)
    assert names(tmp_path) == {"2", "3"}
    save(tmp_path, 4, 5, 6, 7, 8, 9, keep=2, keep_every=4)
    assert names(tmp_path) == {"4", "8", "9"}


def test_a_state_moves_to_another_number_of_devices(state, tmp_path):
    with open_checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save_async(1, state, {})
    replicated = jax.sharding.NamedSharding(make_mesh(4), jax.P())
    like = jax.tree.map(lambda x: jax.device_put(jnp.zeros_like(x), replicated), state)
    with open_checkpoints(tmp_path, keep=1) as checkpoints:
        _, restored = checkpoints.restore(like)
    assert all(len(leaf.devices()) == 4 for leaf in jax.tree.leaves(restored))
    assert bits(restored) == bits(state)


def largest(checkpoint: Path) -> Path:
    """The file with the arrays."""
    return max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(checkpoint: Path) -> None:
    os.truncate(largest(checkpoint), largest(checkpoint).stat().st_size // 2)


def flip_a_bit(checkpoint: Path) -> None:
    flip(largest(checkpoint), largest(checkpoint).stat().st_size // 2)


def flip(path: Path, at: int, bit: int = 2) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def lose_contents(checkpoint: Path) -> None:
    (checkpoint / "contents.json").unlink()


def lose_metadata(checkpoint: Path) -> None:
    (checkpoint / "state" / "_METADATA").unlink()


def edit_contents(checkpoint: Path) -> None:
    path = checkpoint / "contents.json"
    path.write_text(path.read_text().replace('"d0"', '"d1"'))


def empty(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def be_a_file(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.write_text("")


def be_another_step(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    shutil.copytree(checkpoint.with_name("2"), checkpoint)


DAMAGES = {
    truncate: "bytes of",
    flip_a_bit: "sha256 differs",
    lose_contents: "contents.json is missing",
    lose_metadata: "state/_METADATA is missing",
    edit_contents: "contents.json is not the file that was written",
    empty: "contents.json is missing",
    be_a_file: "is no folder",
    be_another_step: "it holds step 2",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_a_damaged_newest_is_set_aside_and_the_one_before_taken(damage, tmp_path, capfd):
    save(tmp_path, 1, 2, 3)
    damage(tmp_path / "checkpoints" / "3")
    with open_checkpoints(tmp_path, keep=3, write=False) as reader:
        step, read = reader.restore(made())
    assert (step, bits(read)) == (2, bits(made(2)))
    assert names(tmp_path) == {"1", "2", "3"}  # a reader changes nothing
    assert "set aside" not in one_line(capfd)
    with open_checkpoints(tmp_path, keep=3) as writer:
        step, read = writer.restore(made(), {"data_hash": "d0"})
        assert (step, bits(read)) == (2, bits(made(2)))
        said = one_line(capfd)
        assert f"{tmp_path}/checkpoints/3: damaged (" in said
        assert DAMAGES[damage] in said
        assert said.endswith("set aside as 3.damaged; going on from the one before, step 2\n")
        assert names(tmp_path) == {"1", "2", "3.damaged"}
        writer.save_async(3, made(3), {"data_hash": "d0"})
    assert names(tmp_path) == {"1", "2", "3", "3.damaged"}
    damage(tmp_path / "checkpoints" / "3")
    with open_checkpoints(tmp_path, keep=3) as writer:
        assert writer.restore(made())[0] == 2
    assert names(tmp_path) == {"1", "2", "3.damaged", "3.damaged2"}


def one_line(capfd) -> str:
    said = capfd.readouterr().err
    assert said.count("\n") == 1, said
    return said


def test_no_flipped_bit_of_any_file_passes(tmp_path):
    save(tmp_path, 1)
    checkpoint = tmp_path / "checkpoints" / "1"
    rng = random.Random(0)
    check(checkpoint)
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.stat().st_size):
        for _ in range(6):
            at, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
            flip(path, at, bit)
            with pytest.raises(Damaged):
                check(checkpoint)
            flip(path, at, bit)
    check(checkpoint)


def test_orbax_alone_hands_out_a_flipped_bit_as_another_number(tmp_path):
    """Why every file is summed. Where this fails, Orbax has learned to and ours may go."""
    weights = np.random.default_rng(0).standard_normal((64, 1000)).astype(np.float32)
    with open_checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save_async(3, {"weights": jnp.asarray(weights)}, {})
    flip_a_bit(tmp_path / "checkpoints" / "3")
    with ocp.PyTreeCheckpointer() as orbax:
        loaded = orbax.restore(tmp_path / "checkpoints" / "3" / "state")["weights"]
    assert loaded.shape == weights.shape
    assert np.asarray(loaded).tobytes() != weights.tobytes()


def test_where_none_is_sound_it_refuses_and_leaves_all_as_it_is(tmp_path):
    save(tmp_path, 1, 2)
    for step in ("1", "2"):
        truncate(tmp_path / "checkpoints" / step)
    for write in (False, True):
        with (
            open_checkpoints(tmp_path, keep=3, write=write) as checkpoints,
            pytest.raises(RunError, match=r"no checkpoint is sound \(2: .*; 1: .*\); put a copy"),
        ):
            checkpoints.restore(made())
    assert names(tmp_path) == {"1", "2"}
    (tmp_path / "checkpoints" / "2").rename(tmp_path / "checkpoints" / "2.damaged")
    shutil.rmtree(tmp_path / "checkpoints" / "1")
    with (
        open_checkpoints(tmp_path, keep=3) as checkpoints,
        pytest.raises(RunError, match=r"no checkpoint is sound \(set aside earlier\)"),
    ):
        checkpoints.restore(made())


def test_half_written_ones_do_not_count_and_are_swept(tmp_path, capfd):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "checkpoints" / "1", tmp_path / "checkpoints" / "2.writing")
    (tmp_path / "checkpoints" / "0.dropped").mkdir()
    with open_checkpoints(tmp_path, keep=2, write=False) as reader:
        assert reader.restore(made())[0] == 1
    assert names(tmp_path) == {"0.dropped", "1", "2.writing"}
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step == 1
    assert names(tmp_path) == {"1"}
    assert "2.writing: was not written to its end; removed" in one_line(capfd)


def refusal(run: Path, like, metadata=None) -> str:
    with open_checkpoints(run, keep=3) as checkpoints, pytest.raises(RunError) as caught:
        checkpoints.restore(like, metadata)
    assert str(run / "checkpoints") in str(caught.value)
    return str(caught.value)


def test_another_model_or_optimizer_is_refused_naming_the_first_tensors(state, tmp_path):
    save(tmp_path, 1)
    wider = TrainState(state.step, made(width=13).params, state.batch_stats, state.opt_state)
    sentence = refusal(tmp_path, wider)
    assert "params.12.kernel is absent there and float32[30, 13] here" in sentence
    shapes = dict(state.params)
    shapes["0"] = {"kernel": jnp.zeros((3, 1), jnp.bfloat16)}
    sentence = refusal(tmp_path, TrainState(state.step, shapes, {}, state.opt_state))
    assert "params.0.kernel is float32[30, 1] there and bfloat16[3, 1] here" in sentence
    assert "batch_stats.bn.mean is float32[4] there and absent here" in sentence
    adam = optax.adam(0.1).init(state.params)
    sentence = refusal(tmp_path, TrainState(state.step, state.params, state.batch_stats, adam))
    assert sentence.count(" here") == 3  # the first ones, and how many more
    assert "holds another model or optimizer" in sentence
    assert ", and " in sentence
    assert names(tmp_path) == {"1"}  # it is whole: nothing is set aside


def test_another_runs_checkpoint_is_refused(state, tmp_path):
    save(tmp_path, 1)
    assert "data_hash d0, here d1" in refusal(tmp_path, state, {"data_hash": "d1"})


def test_a_reader_takes_some_of_the_fields(state, tmp_path):
    save(tmp_path, 1)
    with open_checkpoints(tmp_path, keep=3, write=False) as checkpoints:
        _, read = checkpoints.restore({"params": state.params, "step": state.step})
    assert bits(read["params"]) == bits(made(1).params)


def test_contents_name_every_tensor(state, tmp_path):
    save(tmp_path, 1)
    contents = json.loads((tmp_path / "checkpoints" / "1" / "contents.json").read_text())
    assert len(contents["tensors"]) == len(jax.tree.leaves(state))
    assert contents["tensors"]["params.3.kernel"] == "float32[30, 4]"
    assert contents["metadata"] == {"data_hash": "d0"}


@pytest.fixture
def full(monkeypatch):
    """Makes the storage library say that the disk is full, as it does, while the list holds."""
    left: list[int] = []
    real = ocp.Checkpointer.save

    def failing(self, directory, *args, **kwargs):
        if left:
            left.pop()
            Path(directory).mkdir()
            (Path(directory) / "half").write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, directory, *args, **kwargs)

    monkeypatch.setattr(ocp.Checkpointer, "save", failing)
    return left


def test_a_save_that_fails_leaves_what_was_there_and_the_next_one_works(state, tmp_path, full):
    save(tmp_path, 1)
    with open_checkpoints(tmp_path, keep=1) as checkpoints:
        full.append(1)
        checkpoints.save_async(2, state, {})
        checkpoints.settle()
        assert "checkpoint 2 could not be written (the disk is full)" in str(checkpoints.failure())
        assert names(tmp_path) == {"1"}
        checkpoints.save_async(3, state, {})
        checkpoints.wait()
        assert checkpoints.failure() is None
        assert names(tmp_path) == {"3"}


def test_leaving_with_a_failed_save_is_an_error(state, tmp_path, full):
    full.append(1)
    with pytest.raises(SaveError, match="the disk is full"), open_checkpoints(tmp_path, 1) as saved:
        saved.save_async(2, state, {})
    full.append(1)
    with pytest.raises(KeyError):
        fail_after_saving(tmp_path, state)


def fail_after_saving(run: Path, state: TrainState) -> None:
    with open_checkpoints(run, 1) as checkpoints:
        checkpoints.save_async(2, state, {})
        raise KeyError("the first error is the one that counts")


PROCESS = """
import sys
from pathlib import Path
import jax, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
from jaxhisto.checkpoints import open_checkpoints
from jaxhisto.distributed import make_mesh
from jaxhisto.errors import RunError
from jaxhisto.pretrain.step import replicate

odd = np.array([-0.0, np.nan, 1e-45, 3], np.float32)
host = {"a": odd, "b": {"c": np.arange(6, dtype=np.int32).reshape(2, 3)}, "d": np.int32(5)}
mesh, run = make_mesh(), Path(sys.argv[3])
with jax.set_mesh(mesh), open_checkpoints(run, 2) as checkpoints:
    state = replicate(host, mesh)
    assert checkpoints.restore(state, {"of": "this"}) is None
    for step in (1, 2, 3):
        checkpoints.save_async(step, state, {"of": "this"})
    checkpoints.wait()
    like = replicate(jax.tree.map(np.zeros_like, host), mesh)
    step, read = checkpoints.restore(like, {"of": "this"})
    assert step == 3
    for ours, theirs in zip(jax.tree.leaves(read), jax.tree.leaves(host), strict=True):
        assert len(ours.sharding.device_set) == 4
        assert np.asarray(ours.addressable_data(0)).tobytes() == np.asarray(theirs).tobytes()
    try:
        checkpoints.restore(like, {"of": "another"})
    except RunError as error:
        print(error)
"""


def test_two_processes_read_what_process_0_wrote_without_a_shared_disk(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", PROCESS, str(port), str(i), tmp_path / str(i)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for i in range(2)
    ]
    for process in processes:
        said, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert f"{tmp_path}/0/checkpoints/3: belongs to another run (of this, here another)" in said
    assert names(tmp_path / "0") == {"2", "3"}
    assert not (tmp_path / "1").exists()
