"""Checkpoints of a run: written in the background, atomic, and checked before they are believed.

    RUN/checkpoints/STEP/contents.json   what is in it: tensors, and each file with its sha256
    RUN/checkpoints/STEP/state/          the arrays, by Orbax
    RUN/checkpoints/STEP.writing/        not whole yet; renamed when it is, swept by the next start
    RUN/checkpoints/STEP.damaged/        was not what its contents.json says; set aside, never used

The storage below Orbax sums its indexes and not the arrays: a flipped bit in these comes back as
another number. So every file is summed here when it is written and before it is read.

The state is the same on every device, so process 0 alone writes and reads it, from and to the
host, and hands what it read to the others. No process waits for another while writing: a disk
that is full on one host cannot stop the rest. (Orbax's v1 interface makes all of them take part
in each save, and leaves them at a barrier for 20 minutes where one fails, hence its v0 here.)
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxhisto.console import warn
from jaxhisto.contents import (
    Contents,
    Damaged,
    by_name,
    check,
    compare,
    describe,
    flat_names,
    in_groups,
    nested_dict,
    seal,
    sync_folder,
)
from jaxhisto.distributed import is_main
from jaxhisto.errors import RunError
from jaxhisto.late_writes import ignore_late_writes

State = TypeVar("State")
Arrays = dict[str, np.ndarray]

WRITING, DROPPED, DAMAGED = ".writing", ".dropped", ".damaged"

LOST = {
    "No space left on device": "the disk is full",
    "Disk quota exceeded": "the quota is used up",
    "PERMISSION_DENIED": "writing is not permitted",
    "Permission denied": "writing is not permitted",
    "Read-only file system": "the file system is read-only",
}
"""What the storage library says when nothing can be written, in words."""

READ_AT_ONCE = 8 * 2**20
"""Bytes of a checkpoint that are read together."""


class SaveError(RunError):
    """A checkpoint could not be written; what was there before is untouched."""


class Checkpoints:
    """The checkpoints under RUN/checkpoints: plain nested dicts, no framework objects.

    Every process makes one and calls the same methods; process 0 alone touches the disk.
    """

    def __init__(
        self, run: str | Path, keep: int, keep_every: int = 0, *, write: bool = True
    ) -> None:
        """Opens the folder.

        Args:
          run: the run folder.
          keep: newest checkpoints kept.
          keep_every: checkpoints of steps divisible by this are kept besides; 0: none.
          write: False for a reader, which changes nothing in the folder and may ask for some of
            a state's fields.
        """
        self.directory = Path(run).resolve() / "checkpoints"
        self._keep, self._keep_every, self._writes = keep, keep_every, write
        # Orbax logs whole tracebacks of what it raises too; the user gets our one sentence.
        if not logging.getLogger("jaxhisto").isEnabledFor(logging.DEBUG):
            logging.getLogger("absl").setLevel(logging.CRITICAL)
        ignore_late_writes()
        self._orbax = _process_0s_orbax()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._failure: SaveError | None = None
        if write and is_main():
            for path in self._sweep():
                warn(f"{path}: was not written to its end; removed")

    @property
    def steps(self) -> list[int]:
        """The steps of the complete checkpoints on disk, ascending."""
        if not self.directory.is_dir():
            return []
        return sorted(int(p.name) for p in self.directory.iterdir() if p.name.isdigit())

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, none when there is none."""
        steps = self.steps
        return steps[-1] if steps else None

    def save_async(self, step: int, state: Any, metadata: dict[str, Any]) -> None:
        """Copies the state off the device, then writes it while training goes on.

        Waits for the write before it; how that one went, `failure` says.

        Args:
          step: names the checkpoint; one that is there already is left as it is.
          state: pytree of arrays, each the same on every device.
          metadata: what else `restore` shall compare; JSON.
        """
        self.settle()
        self._failure = None
        if is_main() and step not in self.steps:
            arrays = _to_host(state)
            self._writing = self._pool.submit(self._write, step, arrays, metadata)

    def failure(self) -> SaveError | None:
        """Why the last checkpoint was not written; none while it is being written, or when it was.

        Never waits.
        """
        if self._writing is not None and self._writing.done():
            self.settle()
        return self._failure

    def settle(self) -> None:
        """Waits for the write in flight; how it went, `failure` says."""
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        error = writing.exception()
        if isinstance(error, SaveError) or error is None:
            self._failure = error
        else:
            raise error

    def wait(self) -> None:
        """Returns when all that was handed over is on disk.

        Raises:
          SaveError: the last checkpoint could not be written.
        """
        self.settle()
        if self._failure is not None:
            raise self._failure

    def restore(
        self, like: State, metadata: Mapping[str, Any] | None = None
    ) -> tuple[int, State] | None:
        """The newest sound state, with the shapes and shardings of `like`.

        Checkpoints that are damaged are passed over in one line on stderr; a writer also sets
        them aside, so that their steps can be written again.

        Args:
          like: a state of arrays or of `jax.ShapeDtypeStruct` with sharding; of a reader
            (`write=False`) also a dict with some of a state's fields.
          metadata: what the checkpoint's must agree with, key by key.

        Returns:
          (step, state), or none where no checkpoint was written yet.

        Raises:
          RunError: all are damaged, or the newest sound one holds other tensors, or says
            something else than `metadata`.
        """
        names = by_name(like)
        step, arrays, failed = -1, None, None
        if is_main():
            try:
                found = self._read(names, metadata or {})
                step, arrays = (-1, None) if found is None else found
            except RunError as error:
                failed = error
        step, sentence = _from_main(step, "" if failed is None else str(failed))
        if sentence:
            raise failed or RunError(sentence)
        if step < 0:
            return None
        placed = _place(arrays, names)
        leaves = [placed[name] for name in names]
        return step, jax.tree.unflatten(jax.tree.structure(like), leaves)

    def close(self) -> None:
        """Waits for the last write, whatever comes of it."""
        self.settle()
        self._pool.shutdown()
        self._orbax.close()

    def _write(self, step: int, arrays: Arrays, metadata: dict[str, Any]) -> None:
        """Writes under another name and renames when all is there; runs beside training."""
        writing, final = self._named(step, WRITING), self._named(step)
        try:
            self._sweep()
            writing.mkdir(parents=True)
            self._orbax.save(writing / "state", args=ocp.args.PyTreeSave(nested_dict(arrays)))
            tensors = {name: describe(array) for name, array in arrays.items()}
            seal(writing, step, tensors, metadata)
            os.rename(writing, final)
            sync_folder(self.directory)
        except (OSError, ValueError) as error:
            # Frees the room it took; the storage library may still be writing into it, then the
            # next save or start sweeps the rest.
            shutil.rmtree(writing, ignore_errors=True)
            raise SaveError(
                f"{self.directory}: checkpoint {step} could not be written ({_reason(error)})"
            ) from error
        self._drop_old()

    def _drop_old(self) -> None:
        """Removes what the policy does not keep; renamed first, so that no half counts as one."""
        for step in self.steps[: -self._keep]:
            if not self._keep_every or step % self._keep_every:
                dropped = self._named(step, DROPPED)
                with contextlib.suppress(OSError):
                    os.rename(self._named(step), dropped)
                shutil.rmtree(dropped, ignore_errors=True)

    def _sweep(self) -> list[Path]:
        """Removes what was not written, and not removed, to its end; returns the former."""
        found = self.directory.iterdir() if self.directory.is_dir() else ()
        halves = sorted(path for path in found if path.suffix in (WRITING, DROPPED))
        for path in halves:
            shutil.rmtree(path, ignore_errors=True)
        return [path for path in halves if path.suffix == WRITING]

    def _read(
        self, names: Mapping[str, Any], metadata: Mapping[str, Any]
    ) -> tuple[int, Arrays] | None:
        """(step, arrays by name) of the newest sound checkpoint."""
        contents = self._newest_sound()
        if contents is None:
            return None
        path = self._named(contents.step)
        compare(path, contents, names, metadata, partial=not self._writes)
        arrays: Arrays = {}
        try:
            # All at once, their encoded bytes would lie beside them: half of the weights again.
            for some in in_groups(names, READ_AT_ONCE):
                item = nested_dict({name: np.zeros((), names[name].dtype) for name in some})
                how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
                args = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
                arrays |= flat_names(self._orbax.restore(path / "state", args=args))
        except (OSError, ValueError, KeyError) as error:
            if not path.exists():  # dropped by the run beside this reader
                return self._read(names, metadata)
            raise RunError(
                f"{path}: is whole and cannot be read ({_reason(error)}); install the "
                "orbax-checkpoint that wrote it (RUN/env.json names it)."
            ) from error
        return contents.step, arrays

    def _newest_sound(self) -> Contents | None:
        """The contents of the newest checkpoint that is what it says; sets aside those before it.

        Raises:
          RunError: there are some, and none is sound.
        """
        bad: dict[int, str] = {}
        for step in reversed(self.steps):
            try:
                contents = check(self._named(step))
            except Damaged as error:
                if self._named(step).exists():  # else the run beside this reader dropped it
                    bad[step] = str(error)
                continue
            for other, fact in bad.items():
                aside = f"; set aside as {self._set_aside(other)}" if self._writes else ""
                warn(
                    f"{self._named(other)}: damaged ({fact}){aside}; going on from the one before, "
                    f"step {step}"
                )
            return contents
        if not bad and not self._all_set_aside():
            return None
        facts = "; ".join(f"{step}: {fact}" for step, fact in bad.items()) or "set aside earlier"
        raise RunError(
            f"{self.directory}: no checkpoint is sound ({facts}); put a copy of one back, or begin "
            "again in another --out."
        )

    def _all_set_aside(self) -> bool:
        folders = self.directory.iterdir() if self.directory.is_dir() else ()
        return any(DAMAGED in path.name for path in folders)

    def _set_aside(self, step: int) -> str:
        """Renames a damaged checkpoint, never over an earlier one; returns its new name."""
        aside, count = self._named(step, DAMAGED), 1
        while aside.exists():
            count += 1
            aside = self._named(step, f"{DAMAGED}{count}")
        os.rename(self._named(step), aside)
        return aside.name

    def _named(self, step: int, suffix: str = "") -> Path:
        return self.directory / f"{step}{suffix}"


@contextlib.contextmanager
def open_checkpoints(
    run: str | Path, keep: int, keep_every: int = 0, *, write: bool = True
) -> Iterator[Checkpoints]:
    """The run's checkpoints; every write has ended when the block ends.

    Raises:
      SaveError: at the end of a block that raised nothing else, the last one was not written.
    """
    checkpoints = Checkpoints(run, keep, keep_every, write=write)
    try:
        yield checkpoints
        checkpoints.wait()
    finally:
        checkpoints.close()


def _process_0s_orbax() -> ocp.Checkpointer:
    """Orbax for one process, in whose saves and loads the others have no part."""
    alone = ocp.options.MultiprocessingOptions(
        primary_host=0, active_processes={0}, barrier_sync_key_prefix="jaxhisto"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _to_host(state: Any) -> Arrays:
    """Copies of a state's arrays by dotted name: the next step reuses the device's memory."""
    names = by_name(state)
    for leaf in names.values():
        leaf.copy_to_host_async()  # all of them on their way before the first is waited for
    return {name: np.array(leaf.addressable_data(0)) for name, leaf in names.items()}


def _place(arrays: Arrays | None, names: Mapping[str, Any]) -> dict[str, jax.Array]:
    """What process 0 read, on every device of every process, one array at a time."""
    placed: dict[str, jax.Array] = {}
    for name, leaf in names.items():
        host = np.zeros(leaf.shape, leaf.dtype) if arrays is None else arrays.pop(name)
        if jax.process_count() > 1:
            # As bytes: the broadcast is a sum with zeros, and -0.0 + 0.0 is not -0.0.
            whole = np.ascontiguousarray(host).reshape(-1).view(np.uint8)
            whole = np.asarray(multihost_utils.broadcast_one_to_all(whole))
            host = whole.view(leaf.dtype).reshape(leaf.shape)
        array = jax.make_array_from_callback(leaf.shape, leaf.sharding, host.__getitem__)
        placed[name] = array.block_until_ready()  # else all host copies wait for theirs at once
    return placed


def _from_main(step: int, sentence: str) -> tuple[int, str]:
    """Process 0's arguments, in every process."""
    if jax.process_count() == 1:
        return step, sentence
    numbers = np.zeros(4096, np.int32)
    text = sentence.encode()[: numbers.size - 2]
    numbers[:2] = step, len(text)
    numbers[2 : 2 + len(text)] = list(text)
    numbers = np.asarray(multihost_utils.broadcast_one_to_all(numbers))
    said = bytes(numbers[2 : 2 + int(numbers[1])].astype(np.uint8))
    return int(numbers[0]), said.decode(errors="replace")


def _reason(error: Exception) -> str:
    found = [words for words in LOST if words in str(error)]
    return LOST[found[0]] if found else " ".join(str(error).split())[:200]
