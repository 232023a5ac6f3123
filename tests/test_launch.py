"""Who trains with whom: flags, environment, clusters, and a laptop that is none of them."""

from __future__ import annotations

import json
import os

import pytest

from jaxhisto.config import DistributedConfig
from jaxhisto.errors import ConfigError
from jaxhisto.launch import Launch, find, inherited

BY_HAND = DistributedConfig(coordinator="node1:29500", processes=4, process=2)
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}


@pytest.fixture
def in_slurm(monkeypatch):
    """Slurm's variables also where JAX reads them."""

    def set_up(**changes: str) -> dict[str, str]:
        environ = SLURM | changes
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        return environ

    return set_up


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"JAX_PLATFORMS": "cpu"},
        SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},
        # the interactive shell of `salloc -n 16`
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},
        # a batch script, which is no step
        {k: v for k, v in SLURM.items() if not k.startswith("SLURM_STEP")},
        {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "1"},
        # a notebook in a pod
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        {"JAXHISTO_PROCESSES": "1"},
    ],
)
def test_one_process_stays_one(environ):
    assert find(DistributedConfig(), environ) is None


def test_one_process_may_be_asked_for_in_any_cluster():
    assert find(DistributedConfig(processes=1), SLURM) is None


def test_flags_and_environment_say_the_same():
    environ = {
        "JAXHISTO_COORDINATOR": "node1:29500",
        "JAXHISTO_PROCESSES": "4",
        "JAXHISTO_PROCESS": "2",
    }
    expected = Launch("node1:29500", 4, 2)
    assert find(BY_HAND, {}) == find(DistributedConfig(), environ) == expected
    assert expected.address == ("node1", 29500)
    # A flag wins over the environment, and both over a cluster.
    assert find(DistributedConfig(process=3), SLURM | environ).process == 3
    assert Launch("[fe80::1]:29500", 2, 0).address == ("fe80::1", 29500)


def test_slurm_is_read_as_jax_reads_it(in_slurm):
    found = find(DistributedConfig(heartbeat=7), in_slurm())
    assert (found.processes, found.process, found.heartbeat) == (16, 11, 7)
    # The first node, and a port that is a function of the job: JAX's rule.
    assert found.coordinator == f"node07:{4711 % 4096 + 65535 - 4096 + 1}"
    assert found.local_devices == (3,)


@pytest.mark.parametrize(
    ("changes", "devices"),
    [
        # --gpus-per-task=1: the task's only GPU is number 0 to it, whatever its local id
        ({"CUDA_VISIBLE_DEVICES": "3"}, (0,)),
        # one task a node drives all of the node's GPUs
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x16)", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, (0, 1, 2, 3)),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x16)"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, (3,)),
        # what the user says, which jax.distributed.initialize reads itself
        ({"JAX_LOCAL_DEVICE_IDS": "5"}, None),
    ],
)
def test_a_slurm_task_drives_the_gpus_it_was_given(in_slurm, changes, devices):
    assert find(DistributedConfig(), in_slurm(**changes)).local_devices == devices


@pytest.mark.parametrize(
    ("config", "environ", "said"),
    [
        (DistributedConfig(coordinator="a:1", processes=2), {}, "--distributed.process: missing"),
        (DistributedConfig(processes=2, process=0), {}, "--distributed.coordinator: missing"),
        (DistributedConfig("node1", 2, 0), {}, "is no host:port"),
        (DistributedConfig("node1:99999", 2, 0), {}, "is no host:port"),
        (DistributedConfig("node1:1", 2, 2), {}, "--distributed.process 2: there are 2"),
        (DistributedConfig(), {"JAXHISTO_PROCESSES": "two"}, "JAXHISTO_PROCESSES=two"),
        # Open MPI 5 no longer sets what JAX reads: each rank would train alone, unseen
        (DistributedConfig(), {"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI 5"),
        (
            DistributedConfig(),
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"},
            "pip install kubernetes",
        ),
    ],
)
def test_half_an_answer_is_refused(config, environ, said):
    with pytest.raises(ConfigError) as refused:
        find(config, environ)
    assert said in str(refused.value)


def test_a_cluster_that_jax_cannot_read_is_refused_with_the_way_round_it(in_slurm):
    with pytest.raises(ConfigError, match=r"Slurm: JAX cannot find .* --distributed.processes 1"):
        find(DistributedConfig(), in_slurm(SLURM_JOB_ID="none"))


def test_a_child_reads_what_its_supervisor_wrote():
    for launch in (Launch("a:1", 2, 1, (0, 3), 60, 9, os.getpid()), Launch("a:1", 2, 0)):
        assert inherited(json.loads(json.dumps(launch.to_environment()))) == launch
    assert inherited({}) is None
