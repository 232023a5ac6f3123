"""The roll call over loopback: who is missing, who differs, what else listens there."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

from pods import free_port

from jaxhisto import rollcall
from jaxhisto.errors import RunError
from jaxhisto.launch import Launch
from jaxhisto.rollcall import Called, call_roll


def call(port: int, process: int, processes: int, timeout: int = 10, **record: Any) -> Called | str:
    """The outcome of one process's roll call, or the sentence it was refused with."""
    launch = Launch(f"127.0.0.1:{port}", processes, process, start_timeout=timeout)
    try:
        return call_roll(launch, {"host": f"host{process}", "time": time.time()} | record)
    except RunError as error:
        return str(error)


def together(*calls: dict[str, Any], port: int | None = None) -> list[Called | str]:
    port = port or free_port()
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda kwargs: call(port, **kwargs), calls))


def close(outcomes: list[Called | str]) -> None:
    for outcome in outcomes:
        if isinstance(outcome, Called):
            outcome.line.close()


def test_all_come_and_stay_connected():
    outcomes = together(
        *({"process": i, "processes": 3, "settings": {"a": (1, 2)}} for i in range(3))
    )
    try:
        assert [o.hosts for o in outcomes] == [["host0", "host1", "host2"]] * 3
        assert [o.warnings for o in outcomes] == [[]] * 3
        first, second, third = (o.line for o in outcomes)
        second.send({"left": 0})
        assert first.receive(5) == [(1, {"left": 0})]
        third.close()
        assert first.receive(5) == [(2, None)]
        first.send({"lost": "2"})
        assert second.receive(5) == [(0, {"lost": "2"})]
    finally:
        close(outcomes)


def test_jax_may_listen_where_the_roll_was_called():
    """The connections stay on the coordinator's port, on which its service starts afterwards."""
    port = free_port()
    outcomes = together(*({"process": i, "processes": 2} for i in range(2)), port=port)
    try:
        with socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True):
            pass
    finally:
        close(outcomes)


def test_who_did_not_come_is_said_to_all_who_did():
    outcomes = together(
        {"process": 0, "processes": 4, "timeout": 1}, {"process": 2, "processes": 4}
    )
    assert outcomes[0] == outcomes[1]
    assert "processes 1, 3 of 4 did not come" in outcomes[0]
    assert "0 (host0), 2 (host2) did" in outcomes[0]


def test_one_that_gave_up_counts_as_missing():
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        main = pool.submit(call, port, 0, 3, timeout=2)
        # It says who it is, and is gone.
        deadline = time.monotonic() + 5
        while True:
            try:
                gone = socket.create_connection(("127.0.0.1", port))
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
        message = {"greeting": rollcall.GREETING, "process": 1, "processes": 3, "host": "x"}
        gone.sendall(json.dumps(message | {"time": time.time()}).encode() + b"\n")
        time.sleep(0.5)
        gone.close()
        assert "processes 1, 2 of 3 did not come" in main.result()


def test_process_0_that_does_not_come_is_named():
    said = call(free_port(), 1, 2, timeout=1)
    assert "process 1 of 2: process 0 did not answer at 127.0.0.1:" in said
    assert "Connection refused" in said


def test_differing_settings_are_refused_everywhere_naming_the_field():
    outcomes = together(
        {"process": 0, "processes": 3, "settings": {"seed": 0, "batch_size": 8}},
        {"process": 1, "processes": 3, "settings": {"seed": 0, "batch_size": 8}},
        {"process": 2, "processes": 3, "settings": {"seed": 5, "batch_size": 8}},
    )
    assert len(set(outcomes)) == 1
    assert "process 2 (host2) differs from process 0 (host0) in seed: 0 -> 5;" in outcomes[0]


def test_differing_versions_are_refused_also_where_one_has_a_field_more():
    outcomes = together(
        {"process": 0, "processes": 2, "versions": {"jax": "0.10.2"}},
        {"process": 1, "processes": 2, "versions": {"jax": "0.11.0", "new": 1}},
    )
    assert "in jax: 0.10.2 -> 0.11.0; new: None -> 1;" in outcomes[0]
    assert outcomes[0] == outcomes[1]


def test_two_with_the_same_number_are_refused():
    outcomes = together(*({"process": i, "processes": 3} for i in (0, 1, 1)))
    assert len(set(outcomes)) == 1
    assert "two processes say that they are process 1" in outcomes[0]


def test_two_counts_are_refused():
    outcomes = together({"process": 0, "processes": 2}, {"process": 1, "processes": 3})
    assert len(set(outcomes)) == 1
    assert "process 1 (host1) was told of 3 processes, process 0 (host0) of 2" in outcomes[0]


def test_a_port_in_use_is_refused():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        assert f"port {port} is in use" in call(port, 0, 2)


def test_another_program_at_the_coordinators_port_is_seen():
    with socket.create_server(("127.0.0.1", 0)) as other, ThreadPoolExecutor(1) as pool:
        said = pool.submit(call, other.getsockname()[1], 1, 2, timeout=1)
        connection, _ = other.accept()
        connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
        connection.close()
        other.close()
        assert "process 0 did not answer" in said.result()


def test_strangers_do_not_disturb(monkeypatch):
    monkeypatch.setattr(rollcall, "LONGEST_LINE", 1000)
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        main = pool.submit(call, port, 0, 2)
        strangers = []
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"process": 1}\n', b"x" * 5000, b""):
            deadline = time.monotonic() + 5
            while True:
                try:
                    strangers.append(socket.create_connection(("127.0.0.1", port)))
                    break
                except ConnectionRefusedError:
                    assert time.monotonic() < deadline
            strangers[-1].sendall(words)
        outcomes = [call(port, 1, 2), main.result()]
    for stranger in strangers:
        stranger.close()
    assert all(isinstance(outcome, Called) for outcome in outcomes), outcomes
    close(outcomes)


def test_clocks_that_differ_are_said(monkeypatch):
    real = time.time

    class Clock(SimpleNamespace):
        """The module `time`, an hour behind in the thread of that name."""

        @staticmethod
        def time() -> float:
            return real() - 3600 * (threading.current_thread().name == "behind")

    clock = Clock(monotonic=time.monotonic, sleep=time.sleep)
    monkeypatch.setattr(rollcall, "time", clock)
    port, outcomes = free_port(), []
    member = threading.Thread(target=lambda: outcomes.append(call(port, 1, 2)), name="behind")
    member.start()
    outcomes.append(call(port, 0, 2))
    member.join()
    for outcome in outcomes:
        assert [w[:43] for w in outcome.warnings] == ["the clock of process 1 (host1) is -3600 s o"]
    close(outcomes)
