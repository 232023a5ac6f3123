"""The roll call before a run of several processes, and the line between them during it.

Process 0 listens at the coordinator's address; every other process connects and says who it is.
When all have come and agree, the listening ends (JAX's coordination service takes the port) and
the connections stay: one that breaks says at once, and by name, which process is gone. JAX alone
would say it after its heartbeat's time-out, from C++, by ending the process; where a host is
missing at the start it does not say which.

Messages are JSON, one a line; nothing that is received is executed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import selectors
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxhisto.errors import RunError
from jaxhisto.launch import Launch

Message = dict[str, Any]

GREETING = "jaxhisto roll call 1"
LONGEST_LINE = 1 << 20
CLOCKS_APART_S = 60.0


@dataclass
class Peer:
    """A connection and what it has sent of a line so far."""

    connection: socket.socket
    unread: bytes = b""

    def lines(self) -> list[Message] | None:
        """What has arrived, none where the connection is at its end.

        Raises:
          ValueError: what arrived is no message.
        """
        try:
            data = self.connection.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        *whole, self.unread = (self.unread + data).split(b"\n")
        if len(self.unread) > LONGEST_LINE:
            raise ValueError("a line without end")
        return [_message(line) for line in whole]


@dataclass
class Line:
    """The open connections of a process: of process 0 to all others, of another to process 0."""

    peers: dict[int, Peer] = field(default_factory=dict)

    def send(self, message: Message, but: int | None = None) -> None:
        """Sends a message to all peers, or all but one; one that is gone gets none."""
        for index, peer in self.peers.items():
            if index != but:
                with contextlib.suppress(OSError):
                    _send(peer.connection, message)

    def receive(self, seconds: float) -> list[tuple[int, Message | None]]:
        """(peer, message) of what arrives within `seconds`; None for a connection that broke."""
        if not self.peers:
            time.sleep(seconds)
            return []
        with selectors.DefaultSelector() as selector:
            for index, peer in self.peers.items():
                selector.register(peer.connection, selectors.EVENT_READ, index)
            ready = [key.data for key, _ in selector.select(seconds)]
        arrived: list[tuple[int, Message | None]] = []
        for index in ready:
            try:
                found = self.peers[index].lines()
            except ValueError:
                found = None
            if found is None:
                self.peers.pop(index).connection.close()
                arrived.append((index, None))
            else:
                arrived += [(index, message) for message in found]
        return arrived

    def close(self) -> None:
        """Ends all connections."""
        for peer in self.peers.values():
            peer.connection.close()
        self.peers.clear()


@dataclass(frozen=True)
class Called:
    """The outcome of a roll call: the line, the hosts in the order of the processes, warnings."""

    line: Line
    hosts: list[str]
    warnings: list[str]


def call_roll(launch: Launch, record: Mapping[str, Any]) -> Called:
    """Waits until all processes have come, and compares what they bring.

    Args:
      launch: this process's place.
      record: `host`, `time` (seconds since the epoch), and what must be equal everywhere, as
        dicts of fields by kind: {"settings": {"seed": 0}, "versions": {...}}.

    Raises:
      RunError: on every process that came, in the same words: processes that did not come in
        `launch.start_timeout` seconds, by number; two that say they are the same; records that
        differ, naming the field; a port that is in use; a coordinator that does not answer.
    """
    mine = {"processes": launch.processes, "process": launch.process, **record}
    mine = json.loads(json.dumps(mine))  # as the others' arrive: tuples are lists
    return _lead(launch, mine) if launch.process == 0 else _follow(launch, mine)


def differing(records: Mapping[int, Mapping[str, Any]]) -> str:
    """The sentence on the first process whose record differs from process 0's, else empty.

    Only the dicts in a record are compared: settings, versions, data.
    """
    first = records[0]
    for index in sorted(records):
        theirs = records[index]
        kinds = [kind for kind, value in first.items() if isinstance(value, dict)]
        found = [
            f"{name}: {first[kind].get(name)} -> {theirs.get(kind, {}).get(name)}"
            for kind in kinds
            for name in dict.fromkeys([*first[kind], *theirs.get(kind, {})])
            if first[kind].get(name) != theirs.get(kind, {}).get(name)
        ]
        if found:
            return (
                f"process {index} ({theirs.get('host', '?')}) differs from process 0 "
                f"({first.get('host', '?')}) in {'; '.join(found)}; give every host the same "
                "line, data and versions."
            )
    return ""


def _lead(launch: Launch, mine: Message) -> Called:
    records, line = {0: mine}, Line()
    try:
        with _listen(launch) as server, contextlib.closing(Line()) as strangers:
            _gather(launch, server, strangers, records, line)
        refusal = differing(records)
        if refusal:
            raise RunError(refusal)
    except RunError as error:
        line.send({"refused": str(error)})
        line.close()
        raise
    hosts = [str(records[index]["host"]) for index in range(launch.processes)]
    warnings = _clocks(records)
    line.send({"go": hosts, "warnings": warnings})
    return Called(line, hosts, warnings)


def _gather(
    launch: Launch, server: socket.socket, strangers: Line, records: dict[int, Message], line: Line
) -> None:
    """Fills `records` and `line` until all processes have come."""
    deadline = time.monotonic() + launch.start_timeout
    server.setblocking(False)
    while len(records) < launch.processes:
        if time.monotonic() > deadline:
            raise RunError(_missing(launch, records))
        with contextlib.suppress(BlockingIOError):
            connection, _ = server.accept()
            strangers.peers[connection.fileno()] = _peer(connection, launch.heartbeat)
        for key, message in strangers.receive(0.05):
            if message is None or key not in strangers.peers:
                continue
            peer = strangers.peers.pop(key)
            if message.get("greeting") != GREETING:  # a port scanner, a browser
                peer.connection.close()
                continue
            refusal = _refusal(launch, records, message)
            # One that is refused hears why, as all the others do.
            index = -1 if refusal else message["process"]
            line.peers[index] = peer
            if refusal:
                raise RunError(refusal)
            records[index] = message | {"arrived": time.time()}
        if line.peers:  # one that gave up before the others came is missing again
            for index, message in line.receive(0.0):
                if message is None:
                    records.pop(index, None)


def _refusal(launch: Launch, records: Mapping[int, Message], message: Message) -> str:
    """Why a process cannot take part, by what it says it is; empty where it can."""
    index, count, host = (message.get(k) for k in ("process", "processes", "host"))
    if count != launch.processes:
        return (
            f"process {index} ({host}) was told of {count} processes, process 0 "
            f"({records[0]['host']}) of {launch.processes}; give every host the same "
            "--distributed.processes."
        )
    if not isinstance(index, int) or index in records or not 0 < index < launch.processes:
        other = records.get(index, {}).get("host", "?") if isinstance(index, int) else "?"
        return (
            f"two processes say that they are process {index} ({other} and {host}); give each "
            "its own --distributed.process."
        )
    return ""


def _missing(launch: Launch, records: Mapping[int, Message]) -> str:
    absent = [index for index in range(launch.processes) if index not in records]
    came = ", ".join(f"{index} ({records[index]['host']})" for index in sorted(records))
    word = "process" if len(absent) == 1 else "processes"
    return (
        f"{word} {', '.join(map(str, absent))} of {launch.processes} did not come to "
        f"{launch.coordinator} within {launch.start_timeout} s, where {came} did; start the same "
        "line there too, or raise --distributed.start-timeout."
    )


def _clocks(records: Mapping[int, Message]) -> list[str]:
    """A warning for each host whose clock is off process 0's: dates in logs would mislead."""
    said = []
    for index, record in records.items():
        sent = float(record["time"])
        off = sent - float(record.get("arrived", sent))
        if abs(off) > CLOCKS_APART_S:
            said.append(
                f"the clock of process {index} ({record['host']}) is {off:+.0f} s off that of "
                f"process 0 ({records[0]['host']}); dates of files and log lines will mislead."
            )
    return said


def _follow(launch: Launch, mine: Message) -> Called:
    deadline = time.monotonic() + launch.start_timeout
    reason = "no answer"
    while time.monotonic() < deadline:
        try:
            connection = socket.create_connection(launch.address, timeout=5)
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(0.2)
            continue
        line = Line({0: _peer(connection, launch.heartbeat)})
        with contextlib.suppress(OSError):
            _send(connection, mine | {"greeting": GREETING, "time": time.time()})
        answer = _answer(line, deadline)
        if answer is None:
            line.close()
            reason = "what listens there is not jaxhisto"
            time.sleep(0.2)
            continue
        if "refused" in answer:
            line.close()
            raise RunError(str(answer["refused"]))
        return Called(line, list(answer["go"]), list(answer["warnings"]))
    raise RunError(
        f"process {launch.process} of {launch.processes}: process 0 did not answer at "
        f"{launch.coordinator} within {launch.start_timeout} s ({reason}); start the same line on "
        "that host, and see that the name and the port are right and no firewall lies between."
    )


def _answer(line: Line, deadline: float) -> Message | None:
    # Process 0 waits for the last to come; its answer arrives a little after its deadline.
    while time.monotonic() < deadline + 10:
        for _, message in line.receive(0.5):
            return message
    return None


def _listen(launch: Launch) -> socket.socket:
    """A socket that listens on the coordinator's port, on all addresses as JAX's will."""
    _, port = launch.address
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
            )
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        fact = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be had ({error})"
        raise RunError(
            f"--distributed.coordinator {launch.coordinator}: port {port} {fact} on this host; "
            "name a free port, the same on every host."
        ) from error


def _peer(connection: socket.socket, heartbeat: int) -> Peer:
    connection.setblocking(True)
    connection.settimeout(10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A host that loses its power says no goodbye: the kernel asks whether it is there.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    each = max(1, heartbeat // 4)
    for name, value in (("TCP_KEEPIDLE", each), ("TCP_KEEPINTVL", each), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return Peer(connection)


def _send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _message(line: bytes) -> Message:
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError("no message")
    return message
