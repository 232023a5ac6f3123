"""PyTorch SimCLR beside ours: each peer in a process of its own, taking its turns with ours.

A process of its own, because a peer may need other packages than ours (`pythons`), because forking
a DataLoader's workers out of a process that runs JAX is not safe, and because what it takes of
memory is then its own. The process works only between a line that asks and the line that answers.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxhisto.bench.peer_job import AUTOTUNED, OUT_OF_MEMORY, PeerJob
from jaxhisto.bench.record import Row
from jaxhisto.bench.runner import CannotRun, Runner
from jaxhisto.errors import ConfigError, RunError

PACKAGE = Path(__file__).resolve().parents[1]
BOOT = """
import importlib.util, sys
root = sys.argv.pop(1)
places = {"submodule_search_locations": [root]}
spec = importlib.util.spec_from_file_location("jaxhisto", root + "/__init__.py", **places)
sys.modules["jaxhisto"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
from jaxhisto.bench.peer_child import main
main()
"""
"""Makes our package known to a peer's Python by its place alone: putting its folder on the path
would let that Python see all other packages of our environment too."""

COMPILE_LIMIT_S = 900.0
"""Longest preparation of a peer; torch.compile of a ResNet18 took 260 s on one busy core."""
AUTOTUNE_LIMIT_S = 300.0
"""Of the one that tries kernels out, which is another row than torch.compile as it comes."""
TURN_LIMIT_S = 3600.0


@dataclass(frozen=True)
class Peer:
    """What a peer can be measured at, and how it is installed."""

    stages: tuple[str, ...]
    packages: str


OF_DATA = ("read", "pipeline")
STEP = ("forward", "backward", "optimizer", "step", "pipeline")
PEERS = {
    "pytorch": Peer(STEP, "torch torchvision"),
    "pytorch-compiled": Peer(("forward", "backward", "step"), "torch torchvision"),
    "pytorch-autotuned": Peer(("step",), "torch torchvision"),
    "lightly": Peer(("optimizer", "step"), "lightly torch torchvision"),
    "torchvision": Peer(("augment",), "torch torchvision"),
    "kornia": Peer(("augment",), "kornia torch"),
    "files+torchvision": Peer(("read",), "torch torchvision"),
    "files+pillow": Peer(("read",), "pillow torch"),
    "files+simplejpeg": Peer(("read",), "simplejpeg torch"),
    "store+torchvision": Peer(("read",), "tensorflow-datasets array-record torch torchvision"),
    "store+tfds": Peer(("read",), "tensorflow-datasets array-record torch"),
}


def peers_of(stage: str) -> tuple[str, ...]:
    """Names of the peers that a stage has, in the order of their turns."""
    return tuple(name for name, peer in PEERS.items() if stage in peer.stages)


def peer_envs(items: Iterable[str]) -> dict[str, str]:
    """`NAME=PYTHON` of --peer-env to interpreters by name.

    Raises:
      ConfigError: no such peer, or no interpreter there.
    """
    found = {}
    for item in items:
        name, _, python = item.partition("=")
        if name not in PEERS:
            raise ConfigError(f"--peer-env {item}: no peer {name!r}; one of {', '.join(PEERS)}.")
        if not (Path(python).is_file() and os.access(python, os.X_OK)):
            raise ConfigError(
                f"--peer-env {item}: no interpreter there; write NAME=VENV/bin/python."
            )
        found[name] = str(Path(python).absolute())  # not resolved: a venv's python is a link
    return found


def job_of(stage: str, who: str, settings: Mapping[str, Any]) -> PeerJob:
    """A stage's settings as a peer takes them; those that it does not know are ours alone."""
    known = {
        k: v
        for k, v in settings.items()
        if k in PeerJob.__dataclass_fields__ and k not in ("stage", "who")
    }
    batch = int(known.get("batch", PeerJob.batch))
    usual = {"rate": 0.3 * batch / 256, "side": known.get("tile_px", PeerJob.side)}
    return PeerJob(stage, who, **{**usual, **known})


def prepare_peer(
    stage: str,
    settings: Mapping[str, Any],
    who: str,
    pythons: Mapping[str, str] | None = None,
    limit_s: float | None = None,
) -> Runner | Row:
    """A peer ready to take its turns, or the row that says why there is none.

    Args:
      stage: one of the peer's stages.
      settings: fields of `PeerJob`; others are kept for the record alone. `devices` above one, or
        `platform` tpu, has no peer.
      who: a key of PEERS.
      pythons: the interpreter of a peer that has an environment of its own, by name.
      limit_s: longest preparation, compilation included; None: COMPILE_LIMIT_S, or less for the
        peer that is tuned.
    """
    job, named = job_of(stage, who, settings), said(settings)
    why = unfit(job, settings)
    if why:
        return Row(stage, who, named, why=why)
    own = (pythons or {}).get(who) or (pythons or {}).get(who.partition("-")[0])
    usual = AUTOTUNE_LIMIT_S if job.mode == AUTOTUNED else COMPILE_LIMIT_S
    try:
        process = PeerProcess(job, own or sys.executable, limit_s or usual)
    except CannotRun as error:
        return Row(stage, who, named, why=str(error))
    return Runner(
        stage=stage,
        who=who,
        run=process.turn,
        images=job.images if stage in OF_DATA else job.batch * job.calls,
        settings={**named, "peer": process.settings},
        close=process.close,
        peak=lambda: process.peak,
        child=True,
    )


def said(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without paths of a machine."""
    return {k: v for k, v in settings.items() if k not in ("store", "files")}


def unfit(job: PeerJob, settings: Mapping[str, Any]) -> str:
    """Why no peer is measured at these settings; empty where one is."""
    devices = int(settings.get("devices", 1))
    if devices > 1:
        return f"not measured: the PyTorch peers run on one device, not on {devices}"
    if settings.get("platform") == "tpu":
        return "not measured: the PyTorch peers run on a CPU or a GPU"
    if job.mode == AUTOTUNED and settings.get("platform") != "gpu":
        return "not measured: torch.compile tries kernels out on a GPU"
    if job.stage in OF_DATA and not job.files:
        return "not measured: the DataLoaders read the JPEGs of one tile store, and there is none"
    return ""


class PeerProcess:
    """The child that measures a peer.

    Attributes:
      settings: how the peer was set up.
      peak: bytes that it held at most in its last turn.
    """

    def __init__(self, job: PeerJob, python: str, limit_s: float) -> None:
        """Starts and prepares it.

        Raises:
          CannotRun: with the reason of the row.
        """
        self.who = job.who
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        self._process = subprocess.Popen(
            [python, "-c", BOOT, str(PACKAGE), job.to_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=environment(job, own=python != sys.executable),
        )
        self._read = b""
        answer = self._answer(limit_s)
        self.settings: dict[str, Any] = answer["settings"]
        self.peak: int | None = None
        self.settings["prepare_s"] = round(answer["waited_s"], 2)

    def turn(self) -> tuple[float, float]:
        """One turn, timed by the child: seconds by the clock, and those that cores worked.

        Raises:
          CannotRun: it failed, or ran out of memory.
        """
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # it ended: the answer says how
            self._process.stdin.write(b"turn\n")
            self._process.stdin.flush()
        answer = self._answer(TURN_LIMIT_S)
        self.peak = answer["peak_bytes"]
        return answer["seconds"], answer["cpu_seconds"]

    def close(self) -> None:
        """Ends it; it was asked for no more, so it is idle."""
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._said.close()

    def _answer(self, limit_s: float) -> dict[str, Any]:
        """Its next line; closes it and raises where there is none, or one that says why."""
        began = time.monotonic()
        line = self._line(began + limit_s)
        if line is None:
            self._process.kill()
            why = f"not ready after {limit_s:.0f} s"
        elif not line:
            why = self._ended()
        else:
            answer: dict[str, Any] = json.loads(line) | {"waited_s": time.monotonic() - began}
            if "missing" not in answer and "why" not in answer:
                return answer
            why = answer.get("why", "") or not_installed(self.who, answer["missing"])
        self.close()
        raise CannotRun(why)

    def _line(self, deadline: float) -> bytes | None:
        """A line, b"" at the end, None when the time is up."""
        assert self._process.stdout
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._read:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                return None
            new = os.read(pipe, 65536)
            if not new:
                return b""
            self._read += new
        line, _, self._read = self._read.partition(b"\n")
        return line

    def _ended(self) -> str:
        """Why a process that gave no answer is gone."""
        code = self._process.wait()
        if code == -9:  # nobody but Linux's out-of-memory killer ends it so
            return OUT_OF_MEMORY
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return f"its process ended with {code}: {lines[-1][:300] if lines else 'no message'}"


def environment(job: PeerJob, own: bool) -> dict[str, str]:
    """Of the child: threads as told, and of our own paths nothing where it has its own packages."""
    environ = {**os.environ, "OMP_NUM_THREADS": str(job.threads)}
    if own:
        environ.pop("PYTHONPATH", None)
    return environ


def not_installed(who: str, module: str) -> str:
    """What to do about a module that is not there."""
    return (
        f"not installed ({module}): pip install {PEERS[who].packages}, or in an environment of "
        f"its own and --peer-env {who}=VENV/bin/python"
    )


def jpeg_folder(store: str, folder: Path, limit: int = 8192) -> str:
    """A store's JPEGs as files for a DataLoader, at most `limit`; gives the folder.

    Raises:
      RunError: there is no room for them.
    """
    from jaxhisto.data.store import TileStore

    tiles = TileStore(store, verify=False)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for i in range(min(limit, len(tiles))):
            (folder / f"{i:06}.jpg").write_bytes(tiles.image(i))
    except OSError as error:
        raise RunError(
            f"{folder}: the peers' JPEG files cannot be written ({error.strerror}); make room "
            "there or set TMPDIR."
        ) from error
    return str(folder)
