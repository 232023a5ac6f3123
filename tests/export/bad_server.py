"""A real HTTP server on this machine that misbehaves as it is told."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from jaxhisto_export import ExportFileError, zoo

BODY = np.random.default_rng(0).bytes(300_000)
HALF = len(BODY) // 2
ASSET = "tiny_resnet18.ckpt"

Act = Callable[["Handler"], None]


class Handler(http.server.BaseHTTPRequestHandler):
    """Does the next act of the server's plan; the last one again and again."""

    server: Server

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Range")))
        plan = self.server.plan
        act = plan.pop(0) if len(plan) > 1 else plan[0]
        # The client may have what it wants, or be killed.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            act(self)
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""

    def start(self) -> int:
        """First byte asked for."""
        given = self.headers.get("Range")
        return int(given.removeprefix("bytes=").removesuffix("-")) if given else 0

    def send(
        self, body: bytes, length: int | None = None, status: int = 200, **headers: str
    ) -> None:
        """A whole answer; `length` is what it says of itself."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)


class Server(http.server.ThreadingHTTPServer):
    """On a free port."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan: list[Act] = [ranged()]
        self.asked: list[tuple[str, str | None]] = []
        self.release = threading.Event()

    @property
    def base(self) -> str:
        """Address of a folder on it."""
        return f"http://127.0.0.1:{self.server_port}/releases"

    def ranges(self) -> list[str | None]:
        """The header Range of each request so far."""
        return [given for _, given in self.asked]


def ranged(upto: int = len(BODY), pause: float = 0.0) -> Act:
    """A proper server that knows Range, but breaks off before byte `upto`."""

    def act(handler: Handler) -> None:
        start = handler.start()
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")
        handler.send_header("Content-Length", str(len(BODY) - start))
        handler.end_headers()
        for first in range(start, upto, 30_000):
            handler.wfile.write(BODY[first : min(upto, first + 30_000)])
            time.sleep(pause)

    return act


def whole(body: bytes = BODY, length: int | None = None, status: int = 200) -> Act:
    """A server that ignores Range."""
    return lambda handler: handler.send(body, length, status)


def hanging(upto: int, length: int = len(BODY)) -> Act:
    """Sends so much and then keeps the connection open without a byte."""

    def act(handler: Handler) -> None:
        handler.send(BODY[:upto], length)
        handler.server.release.wait(10)

    return act


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A server in a thread, until the block is left."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    thread.join()
    server.server_close()


def entry(url: str, checked: bool = True) -> zoo.Entry:
    """The server's file, as the registry would name it."""
    return zoo.Entry(
        name="tiny" if checked else "tiny-unchecked",
        architecture="resnet18",
        title="A test's bytes",
        url=f"{url}/{ASSET}",
        bytes=len(BODY) if checked else None,
        sha256=hashlib.sha256(BODY).hexdigest() if checked else None,
        layout="published",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        licence="MIT",
        citation="",
        note="",
    )


def left(folder: Path) -> set[str]:
    """What is in the cache, without the lock."""
    return {p.name for p in folder.iterdir() if p.suffix != ".lock"}


def refusal(call: Callable[[], object]) -> str:
    """The one sentence of an error."""
    with pytest.raises(ExportFileError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text
