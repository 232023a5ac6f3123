"""The decoded tiles of a run in the devices' memory, and each batch gathered there by index.

Tiles lie in rows of 32-bit words, each device holding a run of consecutive ones. Flat rows need
no padding on any accelerator, and words add up four pixels at a time where bytes may not add up
at all. A batch costs one reduce-scatter: each device takes the rows it holds, zeros for the
others, and the sum gives each device its rows of the batch. The store itself never moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxhisto.data.cache import Decode, decoder, sizes_of
from jaxhisto.data.sources import Tiles
from jaxhisto.distributed import is_main
from jaxhisto.pretrain.step import replicate

BLOCK_BYTES = 32 << 20  # of a device's tiles decoded and sent at a go: all the host ever holds
GATHER_BYTES = 128 << 20  # most that a gather takes beside the batch, on each device
WORD = 4

Gather = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


@dataclass(frozen=True)
class Layout:
    """Where the tiles lie: tile i on device i // rows, as its row i % rows."""

    tiles: int
    canvas: tuple[int, int]
    devices: int

    @property
    def tile_bytes(self) -> int:
        """Bytes of a decoded tile on the canvas, H * W * 3."""
        return math.prod(self.canvas) * 3

    @property
    def words(self) -> int:
        """32-bit words of a row: a tile, filled up to whole ones."""
        return -(-self.tile_bytes // WORD)

    @property
    def blocks(self) -> int:
        """Blocks in which a device's rows are written."""
        return -(-self._share // max(1, BLOCK_BYTES // (self.words * WORD)))

    @property
    def block_rows(self) -> int:
        """Rows of a block; equal ones, so that fewer than `blocks` rows hold nothing."""
        return -(-self._share // self.blocks)

    @property
    def rows(self) -> int:
        """Rows on each device."""
        return self.blocks * self.block_rows

    @property
    def device_bytes(self) -> int:
        """Bytes of the store on each device."""
        return self.rows * self.words * WORD

    @property
    def _share(self) -> int:
        return -(-self.tiles // self.devices)

    def piece_rows(self, batch_size: int) -> int:
        """Rows that a device gets at a go of a gather: a divisor of its share of the batch.

        The rows of all devices lie on each before they are summed; `GATHER_BYTES` bounds that,
        or one row for each device where it is more.
        """
        share = batch_size // self.devices
        most = GATHER_BYTES // (self.devices * self.words * WORD)
        return max(r for r in range(1, share + 1) if share % r == 0 and (r <= most or r == 1))

    def gather_bytes(self, batch_size: int) -> int:
        """Bytes that a gather takes on each device, beside the store and the batch."""
        return (self.devices + 1) * self.piece_rows(batch_size) * self.words * WORD

    def sent_bytes(self, batch_size: int) -> int:
        """Bytes that each device sends for a batch, when a ring sums: 0 on one device."""
        share = batch_size // self.devices
        return (self.devices - 1) * share * self.words * WORD


class DeviceCache:
    """All tiles of a run, decoded, shared out among the devices of a mesh.

    Attributes:
      layout: where each tile lies.
      store: (devices * rows, words) uint32, sharded over `data`.
      sizes: (T, 2) int32, height and width of each tile, on every device.
    """

    def __init__(self, tiles: Tiles, mesh: Mesh, threads: int = 0) -> None:
        """Decodes the tiles of this process's devices and sends them there, block by block.

        Args:
          tiles: what to hold; it is not read again.
          mesh: from `make_mesh`.
          threads: as `DataConfig.threads`.

        Raises:
          StoreError: a tile that cannot be read, which is named.
        """
        self.mesh = mesh
        self.layout = Layout(len(tiles), tiles.canvas, mesh.size)
        self.sizes = replicate(sizes_of(tiles), mesh)
        first_of = [
            d * self.layout.rows
            for d, device in enumerate(mesh.devices.flat)
            if device.process_index == jax.process_index()
        ]
        own = sum(len(range(first, self._end(first, self.layout.rows))) for first in first_of)
        with decoder(tiles, threads, own, is_main()) as decode:
            self.store = self._filled(decode)
        self._gather = make_gather(self.layout, mesh)

    def batch(self, index: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """The tiles of a batch, gathered on the devices.

        Args:
          index: (N,) integers, positions in `Tiles`; the same in all processes.

        Returns:
          (N, H, W, 3) uint8 and (N, 2) int32, sharded over `data`, rows in the order of `index`.
        """
        placed = replicate(np.asarray(index, np.int32), self.mesh)
        return self._gather(self.store, self.sizes, placed)

    def _filled(self, decode: Decode) -> jax.Array:
        layout, sharding = self.layout, NamedSharding(self.mesh, P("data"))
        shape = (layout.devices * layout.block_rows, layout.words)
        write = make_write(self.mesh)
        store = make_empty(layout, self.mesh)()
        for at in range(0, layout.rows, layout.block_rows):
            block = jax.make_array_from_callback(shape, sharding, self._block(decode, at))
            # Waiting keeps the host at one block for each of its devices.
            store = write(store, block, np.int32(at)).block_until_ready()
        return store

    def _block(self, decode: Decode, at: int) -> Callable[[Any], np.ndarray]:
        """A function that decodes the rows from `at` on of the device whose block is asked for."""
        layout = self.layout

        def decoded(index: Any) -> np.ndarray:
            first = (index[0].start or 0) // layout.block_rows * layout.rows + at
            rows = np.zeros((layout.block_rows, layout.words * WORD), np.uint8)
            decode(first, rows[: self._end(first, layout.block_rows) - first])
            return rows.view("<u4")

        return decoded

    def _end(self, first: int, rows: int) -> int:
        """Where the tiles end that lie in `rows` rows from tile `first` on."""
        return max(first, min(first + rows, self.layout.tiles))


def make_empty(layout: Layout, mesh: Mesh) -> Callable[[], jax.Array]:
    """The compiled function () -> a store of zeros."""

    def zeros() -> jax.Array:
        return jnp.zeros((layout.rows, layout.words), jnp.uint32)

    return jax.jit(jax.shard_map(zeros, mesh=mesh, in_specs=(), out_specs=P("data")))


def make_write(mesh: Mesh) -> Callable[[jax.Array, jax.Array, np.int32], jax.Array]:
    """The compiled function (store, blocks, at) -> store, in the memory of the one passed in.

    `blocks` (devices * b, words) hold b rows for each device, which go to its rows `at` onwards.
    """

    def write(store: jax.Array, block: jax.Array, at: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice(store, block, (at, jnp.zeros_like(at)))

    specs = (P("data"), P("data"), P())
    return jax.jit(
        jax.shard_map(write, mesh=mesh, in_specs=specs, out_specs=P("data")), donate_argnums=0
    )


def make_gather(layout: Layout, mesh: Mesh) -> Gather:
    """The compiled function (store, sizes, index (N,) int32) -> (tiles, sizes) of a batch.

    `store` and `sizes` as in `DeviceCache`, `index` on every device. The tiles are (N, H, W, 3)
    uint8, the sizes (N, 2) int32, both sharded over `data`.
    """
    devices = layout.devices

    def taken(store: jax.Array, index: jax.Array) -> jax.Array:
        """(r, words) for this device, of (devices * r,) indices, device by device."""
        if devices == 1:
            return store.at[index].get(mode="promise_in_bounds")
        here = index - lax.axis_index("data") * layout.rows
        held = (here >= 0) & (here < layout.rows)
        rows = store.at[jnp.where(held, here, 0)].get(mode="promise_in_bounds")
        # One device adds the row and the others zeros, so the sum is the row, bit by bit.
        rows = jnp.where(held[:, None], rows, jnp.zeros_like(rows))
        return lax.psum_scatter(rows, "data", scatter_dimension=0, tiled=True)

    def as_tiles(words: jax.Array) -> jax.Array:
        pixels = lax.bitcast_convert_type(words, jnp.uint8).reshape(len(words), -1)
        return pixels[:, : layout.tile_bytes].reshape(len(words), *layout.canvas, 3)

    def gather(store: jax.Array, sizes: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        share = len(index) // devices
        r = layout.piece_rows(len(index))
        own = lax.dynamic_slice(index, (lax.axis_index("data") * share,), (share,))
        pieces = index.reshape(devices, share // r, r).swapaxes(0, 1).reshape(-1, devices * r)
        if len(pieces) == 1:
            tiles = as_tiles(taken(store, pieces[0]))
        else:
            tiles = lax.map(lambda piece: as_tiles(taken(store, piece)), pieces)
        return tiles.reshape(share, *layout.canvas, 3), sizes[own]

    specs = (P("data"), P(), P())
    return jax.jit(
        jax.shard_map(gather, mesh=mesh, in_specs=specs, out_specs=P("data")),
        # As `to_global` says it: a step that was compiled for P("data", None, ..) is another one.
        out_shardings=NamedSharding(mesh, P("data")),
    )
