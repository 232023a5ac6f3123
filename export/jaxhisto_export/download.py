"""Downloading one file over HTTP so that nothing that came is asked for twice."""

from __future__ import annotations

import errno
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from jaxhisto_export.errors import ExportFileError

TIMEOUT_S = 30.0  # without a byte from the server
TRIES = 3  # in a row without a new byte; a connection that breaks off but advances goes on
PAUSE_S = 0.5  # before the second try, doubled for each further one
CHUNK = 1 << 18
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)  # ours, not the network's fault


def say(text: str) -> None:
    """One line on stderr, at once."""
    print(text, file=sys.stderr, flush=True)


def reason(error: BaseException) -> str:
    """What a library says, as a clause on one line."""
    inner = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
    return " ".join(str(inner).split()).rstrip(".") or type(error).__name__


@dataclass
class Download:
    """A downloader for pooch that goes on where an earlier one broke off; pooch's do not."""

    name: str
    """For what is said."""
    asset: str
    """File name at the publisher's."""
    size: int | None
    """The published one in bytes; None where nobody wrote it down."""
    part: Path
    """What has come so far; outlives a failure."""
    shown: float = field(default=0.0, init=False)

    def __call__(self, url: str, output_file: str, pooch: Any) -> None:
        """Downloads `url` into the part file, then renames that to `output_file`."""
        if not sys.stderr.isatty():
            say(f"{self.name}: downloading {url}")
        if self.size is None or self._have() > self.size:  # nothing would tell a wrong beginning
            self.part.unlink(missing_ok=True)
        failures, most = 0, self._have()
        whole = most == self.size
        while not whole:
            try:
                whole = self._request(url)
                why = "the connection broke off"
            except (http.client.HTTPException, OSError, ValueError) as error:
                why = self._judge(url, error)
            # Against the most there ever was: a server without Range begins anew each time.
            failures = 0 if self._have() > most else failures + 1
            most = max(most, self._have())
            if not whole and failures >= TRIES:
                raise self._failure(url, why)
            if not whole and failures:
                time.sleep(PAUSE_S * 2 ** (failures - 1))
        os.replace(self.part, output_file)

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _judge(self, url: str, error: Exception) -> str:
        """The reason, if another try may help."""
        if isinstance(error, urllib.error.HTTPError):
            with error:  # closes the connection
                why = f"the server answers {error.code} {reason(error)}"
            if error.code == 416:  # our part is no part of theirs
                self.part.unlink(missing_ok=True)
            elif error.code < 500:  # its last word; what is wrong on its side may pass
                raise self._failure(url, why) from error
            return why
        if isinstance(error, ValueError):  # no address at all
            raise self._failure(url, reason(error)) from error
        if isinstance(error, OSError) and error.errno in DISK:
            raise error
        return reason(error)

    def _failure(self, url: str, why: str) -> ExportFileError:
        have = self._have()
        kept = f" after {have / 1e6:.1f} MB, which are kept for the next time" if have else ""
        return ExportFileError(
            f"{self.name}: cannot be downloaded from {url} ({why}){kept}, try again "
            f"later or give a copy of {self.asset} with --from."
        )

    def _request(self, url: str) -> bool:
        """Appends what one request brings; True once the file is whole as far as size tells."""
        have = self._have()
        headers = {"User-Agent": "jaxhisto", "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            range_given = answer.headers.get("Content-Range", "")
            goes_on = answer.status == 206 and range_given.startswith(f"bytes {have}-")
            if answer.status == 206 and not goes_on:
                self.part.unlink(missing_ok=True)  # the next request asks for all of it
                return False
            length = answer.headers.get("Content-Length", "")
            start = have if goes_on else 0
            promised = start + int(length) if length.isdecimal() else None
            if None not in (self.size, promised) and promised != self.size:
                raise self._failure(url, f"{promised} bytes there, {self.size} were published")
            with self.part.open("ab" if goes_on else "wb") as file:
                self._copy(answer, file, start)
        wanted = promised if self.size is None else self.size
        return wanted is None or self._have() == wanted

    def _copy(self, answer: http.client.HTTPResponse, file: BinaryIO, done: int) -> None:
        """Appends to the part file, no further than the published size."""
        total = self.size
        while total is None or done < total:
            chunk = answer.read1(CHUNK if total is None else min(CHUNK, total - done))
            if not chunk:
                break
            file.write(chunk)
            done += len(chunk)
            self._show(done)

    def _show(self, done: int) -> None:
        """A progress line on a terminal, ten times a second."""
        total, now = self.size, time.monotonic()
        if not sys.stderr.isatty() or (now - self.shown < 0.1 and done != total):
            return
        self.shown = now
        of = f" of {total / 1e6:.1f} MB, {done / total:4.0%}" if total else " MB"
        end = "\n" if done == total else ""
        print(f"\r{self.name}: {done / 1e6:.1f}{of}", end=end, file=sys.stderr, flush=True)
