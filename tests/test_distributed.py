"""The mesh and the placing of a batch."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxhisto.distributed import is_main, make_mesh, to_global
from jaxhisto.errors import RunError


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_a_batch_is_sharded_in_order(devices: int) -> None:
    mesh = make_mesh(devices)
    assert mesh.axis_types == (AxisType.Explicit,)
    rows = np.arange(8, dtype=np.int32)
    placed, pair = to_global((rows, np.stack([rows, rows], 1)), mesh)
    assert len(placed.sharding.device_set) == devices
    assert placed.addressable_shards[0].data.shape == (8 // devices,)
    np.testing.assert_array_equal(placed, rows)
    np.testing.assert_array_equal(pair[:, 1], rows)


def test_zero_means_all_devices() -> None:
    assert make_mesh().size == len(jax.devices())
    assert is_main()


def test_more_devices_than_there_are_is_refused() -> None:
    with pytest.raises(RunError, match="--devices 99: there are 4"):
        make_mesh(99)
