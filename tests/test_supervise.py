"""What the parent of each process says when another one, or its own child, is gone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from pods import free_port

from jaxhisto import supervise
from jaxhisto.launch import Launch
from jaxhisto.rollcall import call_roll
from jaxhisto.supervise import Child, Signals, Supervisor, newest_checkpoint

SLEEP = "import time; time.sleep(60)"
REFUSE = "import sys; print('jaxhisto pretrain: no.', file=sys.stderr); sys.exit(1)"
SILENT = """
import os, sys
print('E1124 23:43:52.111521    8042 coordination_service.cc:1549] [63] Use error polling to '
 'propagate the following error to all tasks: UNAVAILABLE: The following tasks are unhealthy '
 '(stopped sending heartbeats):\\n1\\nThe tasks have crashed. Check', file=sys.stderr)
print('F1124 23:43:52.112225    8053 client.h:80] Terminating process because the JAX distributed '
 'service detected fatal errors. absl::Status: UNAVAILABLE: The following tasks are unhealthy '
 '(stopped sending heartbeats):\\n1\\nThe tasks have crashed. Check', file=sys.stderr)
print('    @     0x7f2102040634  absl::Flush()', file=sys.stderr, flush=True)
os.abort()
"""


@dataclass
class End:
    """How one process ended."""

    code: int
    seconds: float


@pytest.fixture(autouse=True)
def no_patience(monkeypatch):
    monkeypatch.setattr(supervise, "GRACE_S", 0.5)


def run(*programs: str, disturb=None, before=lambda: None) -> list[End]:
    """Supervises a program a process; `disturb(children, lines)` is called once all run."""
    port, count = free_port(), len(programs)
    children: dict[int, Child] = {}
    lines = {}
    started = threading.Barrier(count + 1)

    def one(process: int) -> End:
        launch = Launch(f"127.0.0.1:{port}", count, process, start_timeout=10)
        called = call_roll(launch, {"host": f"host{process}", "time": time.time()})
        children[process] = Child([sys.executable, "-c", programs[process]], launch, debug=False)
        lines[process] = called.line
        parent = Supervisor(launch, called, "pretrain", "", Signals())
        started.wait(10)
        began = time.monotonic()
        code = parent.watch(children[process])
        return End(code, time.monotonic() - began)

    with ThreadPoolExecutor(count) as pool:
        ends = [pool.submit(one, process) for process in range(count)]
        started.wait(10)
        if disturb:
            disturb(children, lines)
        return [end.result(30) for end in ends]


def said(capfd) -> list[str]:
    return [t for t in capfd.readouterr().err.splitlines() if t.startswith("jaxhisto pretrain")]


@pytest.mark.parametrize("code", [0, 75])
def test_all_end_in_good_order(code, capfd):
    ends = run(*[f"import sys; sys.exit({code})"] * 3)
    assert [end.code for end in ends] == [code] * 3
    assert said(capfd) == []


def test_one_that_ends_earlier_in_good_order_is_no_loss(capfd):
    ends = run("import time; time.sleep(1)", "", "import time; time.sleep(0.5)")
    assert [end.code for end in ends] == [0, 0, 0]
    assert said(capfd) == []


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_child_is_named_by_all(victim, capfd):
    def kill(children, lines):
        children[victim].kill()

    ends = run(SLEEP, SLEEP, SLEEP, disturb=kill)
    assert [end.code for end in ends] == [1, 1, 1]
    assert max(end.seconds for end in ends) < 10
    sentences = said(capfd)
    assert len(sentences) == 3
    assert len(set(sentences)) == 1
    assert f"process {victim} of 3 (host{victim}) was ended by SIGKILL" in sentences[0]
    assert "start the same line again on every host" in sentences[0]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_host_that_is_gone_is_named_by_the_others(victim, capfd):
    def switch_off(children, lines):
        lines[victim].send = lambda *_, **__: None  # a dead host tells nobody what it sees
        for peer in list(lines[victim].peers.values()):
            peer.connection.shutdown(socket.SHUT_RDWR)
        children[victim].kill()

    ends = run(SLEEP, SLEEP, SLEEP, disturb=switch_off)
    assert [end.code for end in ends] == [1, 1, 1]
    named = [s for s in said(capfd) if f"process {victim} of 3 (host{victim}) is gone" in s]
    assert len(named) == 2


def test_a_refusal_of_one_is_told_to_the_others(capfd):
    ends = run(SLEEP, REFUSE)
    assert [end.code for end in ends] == [1, 1]
    assert sorted(said(capfd)) == [
        "jaxhisto pretrain: no.",
        "jaxhisto pretrain: process 1 of 2 (host1) stopped: no.",
    ]


def test_a_refusal_of_all_is_said_once_by_each(capfd):
    ends = run(REFUSE, REFUSE, REFUSE)
    assert [end.code for end in ends] == [1, 1, 1]
    assert said(capfd) == ["jaxhisto pretrain: no."] * 3


def test_a_silent_process_is_named_and_jaxs_own_words_are_not_shown(capfd):
    ends = run(SILENT, SLEEP)
    assert [end.code for end in ends] == [1, 1]
    err = capfd.readouterr().err
    assert err.count("process 1 of 2 (host1) was silent for 20 s and counts as lost") == 2
    assert "client.h" not in err
    assert "absl" not in err
    assert "crashed" not in err


def test_the_first_signal_asks_and_the_second_kills(capfd):
    patient = "import signal, time; signal.signal(15, lambda *a: None); print(1); time.sleep(60)"
    child = Child([sys.executable, "-c", patient], Launch("127.0.0.1:1", 2, 0), debug=False)
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    try:
        signals = Signals()
        signals.hand_to(child)
        deadline = time.monotonic() + 10
        while "1" not in capfd.readouterr().out:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)
        assert child.wait(0.2) is None
        os.kill(os.getpid(), signal.SIGINT)  # an echo of the first, as `timeout` sends it
        assert child.wait(1.2) is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert child.wait(5) == -signal.SIGKILL
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)


def test_a_child_ends_when_its_parent_is_killed():
    child = "import os, time; from jaxhisto.supervise import end_with_the_parent as end; "
    child += "end(os.getppid()); print(os.getpid(), flush=True); time.sleep(60)"
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    with subprocess.Popen(
        [sys.executable, "-c", parent, child], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline()
        process.kill()
        # The pipe is at its end when nobody holds it any more, the child neither.
        began = time.monotonic()
        assert process.stdout.read() == ""
        assert time.monotonic() - began < 10


def test_the_newest_checkpoint_is_read_off_the_folder(tmp_path):
    assert newest_checkpoint("") is None
    assert newest_checkpoint(str(tmp_path)) is None
    for name in ("4", "12", "8", "16.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_checkpoint(str(tmp_path)) == 12
