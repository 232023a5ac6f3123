"""Checkpoints come back bit for bit, the newest are kept, and half-written ones never count."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxhisto.checkpoints import open_checkpoints
from jaxhisto.distributed import make_mesh
from jaxhisto.pretrain.step import TrainState


@pytest.fixture
def state():
    rng = np.random.default_rng(0)
    params = {
        str(i): {"kernel": jnp.asarray(rng.random((3, i + 1), np.float32))} for i in range(12)
    }
    opt_state = optax.lars(0.1).init(params)
    return TrainState(jnp.int32(7), params, {"bn": {"mean": jnp.ones(3)}}, opt_state)


def test_a_state_comes_back_bit_for_bit(state, tmp_path):
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step is None
        checkpoints.save_async(7, state, {})
    like = jax.tree.map(jnp.zeros_like, state)
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step == 7
        restored = checkpoints.restore(like)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_only_the_newest_are_kept(state, tmp_path):
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save_async(step, state, {})
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"2", "3"}


def test_a_half_written_checkpoint_does_not_count(state, tmp_path):
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save_async(1, state, {})
    # Orbax writes under such a name and renames when all is there.
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir()
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step == 1


def test_a_state_moves_to_another_number_of_devices(state, tmp_path):
    with open_checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save_async(1, state, {})
    replicated = jax.sharding.NamedSharding(make_mesh(4), jax.P())
    like = jax.tree.map(lambda x: jax.device_put(jnp.zeros_like(x), replicated), state)
    with open_checkpoints(tmp_path, keep=1) as checkpoints:
        restored = checkpoints.restore(like)
    assert all(len(leaf.devices()) == 4 for leaf in jax.tree.leaves(restored))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
