"""Which processes train together: from flags, from the environment, or as JAX finds them.

Needs no JAX where the flags or the environment say it all, and none on a laptop.
"""

from __future__ import annotations

import dataclasses
import glob
import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jaxhisto.config import DistributedConfig
from jaxhisto.errors import ConfigError

ALONE = "pass --distributed.processes 1 to run on this host alone"
BY_HAND = "--distributed.coordinator HOST:PORT --distributed.processes N --distributed.process I"
MEMBER = "JAXHISTO_MEMBER"
"""Environment variable by which the supervisor tells the process it starts who it is."""


@dataclass(frozen=True)
class Launch:
    """One process's place among those that train together.

    Attributes:
      coordinator: "host:port" where process 0 listens.
      processes, process: how many there are, and which one this is, from 0.
      local_devices: the accelerators this process drives; none: all it sees.
      start_timeout, heartbeat: seconds, as in `DistributedConfig`.
      parent: process id of the supervisor; 0 where there is none.
    """

    coordinator: str
    processes: int
    process: int
    local_devices: tuple[int, ...] | None = None
    start_timeout: int = 300
    heartbeat: int = 20
    parent: int = 0

    @property
    def address(self) -> tuple[str, int]:
        """The coordinator's host and port."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)

    def to_environment(self) -> dict[str, str]:
        """What `inherited` reads in the process that is started with it."""
        return {MEMBER: json.dumps(dataclasses.asdict(self))}


def inherited(environ: Mapping[str, str]) -> Launch | None:
    """The place that a supervisor gave to this process, none where there is no supervisor."""
    if MEMBER not in environ:
        return None
    fields = json.loads(environ[MEMBER])
    devices = fields.pop("local_devices")
    return Launch(local_devices=devices and tuple(devices), **fields)


def find(config: DistributedConfig, environ: Mapping[str, str]) -> Launch | None:
    """This process's place, or none where it trains alone.

    Flags come first, then JAXHISTO_COORDINATOR, JAXHISTO_PROCESSES and JAXHISTO_PROCESS, then
    what JAX finds: Slurm, Open MPI, Kubernetes, Cloud TPU. A job of one task is no cluster.

    Raises:
      ConfigError: half an answer, or a cluster that JAX cannot read.
    """
    coordinator = config.coordinator or environ.get("JAXHISTO_COORDINATOR", "")
    processes = _number(config.processes, environ, "JAXHISTO_PROCESSES")
    process = _number(config.process, environ, "JAXHISTO_PROCESS")
    if processes == 1:
        return None
    if coordinator or processes is not None or process is not None:
        found = _complete(coordinator, processes, process)
    else:
        cluster = next((name for name, there in CLUSTERS.items() if there(environ)), None)
        if cluster is None:
            return None
        found = _as_jax_finds(cluster, environ, config.start_timeout)
        if found.processes < 2:
            return None
    return dataclasses.replace(
        found, start_timeout=config.start_timeout, heartbeat=config.heartbeat
    )


def _number(flag: int | None, environ: Mapping[str, str], name: str) -> int | None:
    if flag is not None or not environ.get(name):
        return flag
    if not environ[name].isdecimal():
        raise ConfigError(f"{name}={environ[name]}: is no number; give a whole one.")
    return int(environ[name])


def _complete(coordinator: str, processes: int | None, process: int | None) -> Launch:
    """Checks what flags and environment say together."""
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [f"--distributed.{name}" for name, value in given.items() if value in ("", None)]
    if processes is None or process is None or not coordinator:
        raise ConfigError(
            f"{' and '.join(missing)}: missing, where the others are given; pass {BY_HAND}, or "
            "set JAXHISTO_COORDINATOR, JAXHISTO_PROCESSES and JAXHISTO_PROCESS."
        )
    if process >= processes:
        raise ConfigError(
            f"--distributed.process {process}: there are {processes}, counted from 0; give "
            f"0..{processes - 1}."
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"--distributed.coordinator {coordinator}: is no host:port; name the host of process "
            "0 and a free port on it, as in node1:29500."
        )
    return Launch(coordinator, processes, process)


def _in_slurm(environ: Mapping[str, str]) -> bool:
    # The interactive shell of `salloc -n 4` is a step of one task, though SLURM_NTASKS says 4.
    tasks = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS", "1")
    needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    return tasks.isdecimal() and int(tasks) > 1 and all(name in environ for name in needed)


def _in_open_mpi(environ: Mapping[str, str]) -> bool:
    return int(environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1


def _in_kubernetes(environ: Mapping[str, str]) -> bool:
    # A notebook's pod has the first variable too; only an Indexed Job has the second.
    return "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ


def _on_cloud_tpu(environ: Mapping[str, str]) -> bool:
    platforms = environ.get("JAX_PLATFORMS", "")
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    wanted = not platforms or "tpu" in platforms.split(",")
    return bool(wanted and chips and importlib.util.find_spec("libtpu"))


CLUSTERS: dict[str, Callable[[Mapping[str, str]], bool]] = {
    "Slurm": _in_slurm,
    "Open MPI": _in_open_mpi,
    "Cloud TPU": _on_cloud_tpu,
    "Kubernetes": _in_kubernetes,
}


def _as_jax_finds(cluster: str, environ: Mapping[str, str], timeout: int) -> Launch:
    """The place that JAX's own detection gives this process in a cluster."""
    if cluster == "Open MPI" and "OMPI_MCA_orte_hnp_uri" not in environ:
        raise ConfigError(
            "Open MPI 5 does not say where process 0 runs; set JAXHISTO_COORDINATOR=HOST:PORT, "
            "JAXHISTO_PROCESSES=$OMPI_COMM_WORLD_SIZE and JAXHISTO_PROCESS=$OMPI_COMM_WORLD_RANK."
        )
    if cluster == "Kubernetes" and importlib.util.find_spec("kubernetes") is None:
        raise ConfigError(
            "this pod belongs to an Indexed Job, and the package that JAX asks about it is "
            f"missing; pip install kubernetes, pass {BY_HAND}, or {ALONE}."
        )
    try:
        # The public jax.distributed.initialize finds the same, but never says what; and where a
        # host is missing it ends the process from C++, so the roll call has to come before it.
        from jax._src.clusters import ClusterEnv

        coordinator, processes, process, devices = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, timeout
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{cluster}: JAX cannot find this process's place ({type(error).__name__}: {reason}); "
            f"pass {BY_HAND}, or {ALONE}."
        ) from error
    if coordinator is None or processes is None or process is None:
        raise ConfigError(
            f"{cluster}: JAX does not find this process's place; pass {BY_HAND}, or {ALONE}."
        )
    return Launch(coordinator, processes, process, _devices(devices, environ))


def _devices(found: Sequence[int] | None, environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """The GPUs of a task: JAX's answer, put right where it does not fit the allocation.

    JAX takes the one GPU whose number is the task's on its node. A task that was given one GPU
    of its own sees it as number 0, and the only task of a node should drive all of its GPUs.
    """
    if found is None or environ.get("JAX_LOCAL_DEVICE_IDS"):
        return None  # of the second, jax.distributed.initialize takes care itself
    visible = [d for d in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
    if len(visible) == 1:
        return (0,)
    tasks_here = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")
    if tasks_here.split("(")[0] == "1" and "," not in tasks_here:
        return tuple(range(len(visible))) if visible else None
    return tuple(found)


def hostname() -> str:
    """This host's name, for sentences."""
    return os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "?")
