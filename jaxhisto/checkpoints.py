"""Checkpoints of a run, by Orbax: written in the background, atomic, newest `keep` kept."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
from orbax.checkpoint import v1 as ocp

from jaxhisto.errors import RunError

State = TypeVar("State")


LOST = {
    "No space left on device": "the disk is full",
    "Disk quota exceeded": "the quota is used up",
    "PERMISSION_DENIED": "writing is not permitted",
    "Read-only file system": "the file system is read-only",
}
"""What the storage library says when nothing can be written, in words."""

READ_AT_ONCE = 32 * 2**20
"""Bytes of a checkpoint that a reader of the weights holds on the way; the largest tensor of a
ResNet101, its projection's, has 17 MB."""


class Checkpoints:
    """The checkpoints under RUN/checkpoints: plain nested dicts, no framework objects."""

    def __init__(self, run: str | Path, keep: int, *, write: bool = True) -> None:
        self.directory = Path(run).resolve() / "checkpoints"
        # Orbax logs whole tracebacks of what it raises too; the user gets our one sentence.
        if not logging.getLogger("jaxhisto").isEnabledFor(logging.DEBUG):
            logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._orbax = ocp.training.Checkpointer(
            self.directory,
            # Every step handed over is saved; the loop decides which ones are.
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            # A reader must not sweep away what a run beside it is writing.
            cleanup_tmp_directories=write,
            # A reader may want the weights alone, without the optimizer's twice as much.
            context=None if write else _weights_alone(),
        )

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, none when there is none."""
        latest = self._orbax.latest
        return None if latest is None else int(latest.step)

    def save_async(self, step: int, state: Any, metadata: dict[str, Any]) -> None:
        """Copies the state off the device, then writes it while training goes on.

        Raises:
          RunError: an earlier write failed (disk full, folder read-only).
        """
        with self._refuse_to_lose():
            if self.latest_step != step:
                self._orbax.save_async(step, _as_dict(state), custom_metadata=metadata)

    def wait(self) -> None:
        """Returns when all that was handed over is on disk."""
        with self._refuse_to_lose():
            self._orbax.wait()

    def restore(self, like: State, step: int | None = None) -> State:
        """The newest state (or that of `step`), with the shapes and shardings of `like`.

        Args:
          like: a state of arrays or of `jax.ShapeDtypeStruct` with sharding; of a reader
            (`write=False`) also a dict with some of a state's fields.

        Raises:
          RunError: the checkpoint is damaged.
        """
        step = self.latest_step if step is None else step
        try:
            loaded = self._orbax.load(step, jax.tree.map(_abstract, _as_dict(like)))
        except (OSError, ValueError, KeyError) as error:
            raise RunError(
                f"{self.directory}/{step}: cannot be read; delete that folder and start again, "
                "the checkpoint before it is taken."
            ) from error
        return jax.tree_util.tree_map_with_path(lambda path, _: _at(loaded, path), like)

    def close(self) -> None:
        """Waits for the last write."""
        with self._refuse_to_lose():
            self._orbax.close()

    @contextlib.contextmanager
    def _refuse_to_lose(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            found = [words for words in LOST if words in str(error)]
            if isinstance(error, ValueError) and not found:
                raise
            reason = LOST[found[0]] if found else str(error).splitlines()[0]
            raise RunError(
                f"{self.directory}: a checkpoint could not be written ({reason}); make room or "
                "mend permissions and start the same line again, it goes on from the last one."
            ) from error


@contextlib.contextmanager
def open_checkpoints(run: str | Path, keep: int, *, write: bool = True) -> Iterator[Checkpoints]:
    """The run's checkpoints; every write is complete when the block ends."""
    checkpoints = Checkpoints(run, keep, write=write)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def _weights_alone() -> ocp.Context:
    loading = ocp.options.PyTreeOptions.Loading(partial_load=True)
    # All tensors at once would need their encoded bytes beside them, half of the weights again.
    memory = ocp.options.MemoryOptions(read_concurrent_bytes=READ_AT_ONCE)
    return ocp.Context(
        pytree_options=ocp.options.PyTreeOptions(loading=loading), memory_options=memory
    )


def _as_dict(state: Any) -> Any:
    """A state as plain nested dicts: what is on disk must outlive our classes."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    nested: dict[str, Any] = {}
    for path, leaf in leaves:
        names = [_name(key) for key in path]
        place = nested
        for name in names[:-1]:
            place = place.setdefault(name, {})
        place[names[-1]] = leaf
    return nested


def _at(nested: dict[str, Any], path: tuple[Any, ...]) -> Any:
    for key in path:
        nested = nested[_name(key)]
    return nested


def _name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
