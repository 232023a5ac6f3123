"""Downloads from a real server on this machine that misbehaves in every way we know."""

from __future__ import annotations

import hashlib
import io
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_server import (
    ASSET,
    BODY,
    HALF,
    Handler,
    Server,
    entry,
    hanging,
    left,
    ranged,
    refusal,
    serving,
    whole,
)

from jaxhisto_export import ExportFileError, download, zoo


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture(autouse=True)
def _registry(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = (entry(server.base), entry(server.base, checked=False))
    monkeypatch.setattr(zoo, "entries", lambda: tiny)
    monkeypatch.setattr(download, "PAUSE_S", 0.01)


def test_a_download_is_whole_said_once_and_kept(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = zoo.get("tiny", folder=tmp_path / "new" / "cache")
    assert path.read_bytes() == BODY
    said = capsys.readouterr()
    assert said.out == ""
    assert [line.split(":")[0] for line in said.err.splitlines()] == ["tiny", "tiny"]
    assert left(path.parent) == {"tiny.ckpt"}
    (tmp_path / "plain").touch()  # others may read the cache as they may any new file
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert zoo.get("tiny", folder=path.parent) == path
    assert server.asked == [(f"/releases/{ASSET}", None)]
    assert capsys.readouterr().err == ""


def test_a_file_that_is_there_needs_neither_network_nor_pooch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    (tmp_path / "tiny.ckpt").write_bytes(BODY)
    monkeypatch.setenv("JAXHISTO_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "pooch", None)
    assert zoo.get("tiny") == zoo.locate("tiny") == tmp_path / "tiny.ckpt"
    assert server.asked == []
    monkeypatch.delenv("JAXHISTO_CACHE")
    with pytest.raises(ExportFileError, match="pip install pooch"):
        zoo.get("tiny")


def test_the_systems_cache_folder_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAXHISTO_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    path = zoo.get("tiny")
    assert path.parent.name == "jaxhisto"
    assert path.is_relative_to(tmp_path)


def test_broken_off_and_gone_on(server: Server, tmp_path: Path) -> None:
    server.plan = [ranged(HALF), ranged(HALF + 60_000), ranged()]
    assert zoo.get("tiny", folder=tmp_path).read_bytes() == BODY
    assert server.ranges() == [None, f"bytes={HALF}-", f"bytes={HALF + 60_000}-"]


def test_many_breaks_that_advance_are_gone_through(server: Server, tmp_path: Path) -> None:
    server.plan = [ranged(n) for n in range(30_000, len(BODY), 30_000)] + [ranged()]
    assert len(server.plan) > download.TRIES * 2
    assert zoo.get("tiny", folder=tmp_path).read_bytes() == BODY


def test_a_part_of_an_earlier_process_is_gone_on_with(server: Server, tmp_path: Path) -> None:
    (tmp_path / "tiny.ckpt.part").write_bytes(BODY[:1000])
    assert zoo.get("tiny", folder=tmp_path).read_bytes() == BODY
    assert server.ranges() == ["bytes=1000-"]
    assert left(tmp_path) == {"tiny.ckpt"}


def test_a_whole_part_needs_no_request(server: Server, tmp_path: Path) -> None:
    (tmp_path / "tiny.ckpt.part").write_bytes(BODY)
    assert zoo.get("tiny", folder=tmp_path).read_bytes() == BODY
    assert server.asked == []


@pytest.mark.parametrize("part", [b"x" * 1000, b"x" * len(BODY), BODY + b"x"])
def test_a_wrong_part_is_never_handed_out(server: Server, tmp_path: Path, part: bytes) -> None:
    (tmp_path / "tiny.ckpt.part").write_bytes(part)
    if len(part) <= len(BODY):
        assert "SHA-256 and was deleted" in refusal(lambda: zoo.get("tiny", folder=tmp_path))
        assert left(tmp_path) == set()
    assert zoo.get("tiny", folder=tmp_path).read_bytes() == BODY


def test_a_server_that_ignores_range(server: Server, tmp_path: Path) -> None:
    server.plan = [whole(BODY[:HALF], len(BODY)), whole()]
    assert zoo.get("tiny", folder=tmp_path).read_bytes() == BODY
    assert server.ranges() == [None, f"bytes={HALF}-"]


def test_a_server_that_never_gets_further_ends(server: Server, tmp_path: Path) -> None:
    server.plan = [whole(BODY[:n], len(BODY)) for n in (20_000, 10_000) * 9]
    text = refusal(lambda: zoo.get("tiny", folder=tmp_path))
    assert "broke off" in text
    assert "--from" in text
    assert len(server.asked) == 1 + download.TRIES
    assert left(tmp_path) == {"tiny.ckpt.part"}


def test_a_range_from_elsewhere_is_not_appended(server: Server, tmp_path: Path) -> None:
    def other(handler: Handler) -> None:
        handler.send(BODY[500:], status=206, Content_Range=f"bytes 500-{len(BODY) - 1}/*")

    (tmp_path / "tiny.ckpt.part").write_bytes(BODY[:1000])
    server.plan = [other, ranged()]
    assert zoo.get("tiny", folder=tmp_path).read_bytes() == BODY
    assert server.ranges() == ["bytes=1000-", None]


def test_range_not_satisfiable_begins_anew(server: Server, tmp_path: Path) -> None:
    (tmp_path / "tiny.ckpt.part").write_bytes(BODY[:1000])
    server.plan = [whole(b"", status=416), ranged()]
    assert zoo.get("tiny", folder=tmp_path).read_bytes() == BODY


@pytest.mark.parametrize("length", [HALF, 10**12])
def test_a_size_other_than_published_is_refused_at_once(
    server: Server, tmp_path: Path, length: int
) -> None:
    server.plan = [hanging(HALF, length)]
    began = time.monotonic()
    text = refusal(lambda: zoo.get("tiny", folder=tmp_path))
    assert f"{length} bytes there, {len(BODY)} were published" in text
    assert time.monotonic() - began < 5
    assert left(tmp_path) == set()


def test_a_length_too_small_in_the_rest_is_refused(server: Server, tmp_path: Path) -> None:
    def short(handler: Handler) -> None:
        handler.send(BODY[HALF:-9], status=206, Content_Range=f"bytes {HALF}-{len(BODY) - 10}/*")

    server.plan = [ranged(HALF), short]
    assert "were published" in refusal(lambda: zoo.get("tiny", folder=tmp_path))
    assert left(tmp_path) == {"tiny.ckpt.part"}


@pytest.mark.parametrize("more", [0, 7])
def test_no_length_stated(server: Server, tmp_path: Path, more: int) -> None:
    def plain(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(BODY + bytes(more))  # beyond the published size nothing is read

    server.plan = [plain]
    assert zoo.get("tiny", folder=tmp_path).read_bytes() == BODY


def test_wrong_bytes_are_deleted_and_said(server: Server, tmp_path: Path) -> None:
    server.plan = [whole(b"x" * len(BODY))]
    text = refusal(lambda: zoo.get("tiny", folder=tmp_path))
    assert f"{server.base}/{ASSET} has not the published SHA-256 and was deleted" in text
    assert left(tmp_path) == set()


def test_a_page_instead_of_the_file_leaves_nothing(server: Server, tmp_path: Path) -> None:
    server.plan = [whole(b"<html>please log in</html>"), ranged()]
    assert "26 bytes there" in refusal(lambda: zoo.get("tiny", folder=tmp_path))
    assert zoo.get("tiny", folder=tmp_path).read_bytes() == BODY


def test_404_is_the_last_word(server: Server, tmp_path: Path) -> None:
    server.plan = [whole(b"", status=404)]
    text = refusal(lambda: zoo.get("tiny", folder=tmp_path))
    assert "the server answers 404 Not Found" in text
    assert len(server.asked) == 1


def test_503_may_pass(server: Server, tmp_path: Path) -> None:
    server.plan = [whole(b"", status=503), ranged()]
    assert zoo.get("tiny", folder=tmp_path).read_bytes() == BODY


def test_a_refused_connection_is_one_sentence(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        base = f"http://127.0.0.1:{closed.getsockname()[1]}"
    began = time.monotonic()
    text = refusal(lambda: zoo.get("tiny", base, tmp_path))
    assert time.monotonic() - began < 5
    assert f"cannot be downloaded from {base}/{ASSET} (" in text
    assert "Connection refused" in text
    assert f"give a copy of {ASSET} with --from" in text


@pytest.mark.parametrize("address", ["http://", "http://[", "http://a b", "https://nobody.invalid"])
def test_an_address_that_is_none(tmp_path: Path, address: str) -> None:
    assert "cannot be downloaded" in refusal(lambda: zoo.get("tiny", address, tmp_path))
    assert left(tmp_path) == set()


def test_a_slow_server_is_waited_for(server: Server, tmp_path: Path) -> None:
    server.plan = [ranged(pause=0.03)]
    assert zoo.get("tiny", folder=tmp_path).read_bytes() == BODY
    assert len(server.asked) == 1


def test_a_silent_server_is_left_and_gone_on_with(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "TIMEOUT_S", 0.3)
    server.plan = [hanging(HALF), ranged()]
    began = time.monotonic()
    assert zoo.get("tiny", folder=tmp_path).read_bytes() == BODY
    assert time.monotonic() - began < 5  # the server would wait for 10 s
    assert server.ranges() == [None, f"bytes={HALF}-"]


def test_a_redirect_keeps_the_range(server: Server, tmp_path: Path) -> None:
    def moved(handler: Handler) -> None:
        handler.send(b"", status=302, Location=f"{server.base}/elsewhere")

    (tmp_path / "tiny.ckpt.part").write_bytes(BODY[:1000])
    server.plan = [moved, ranged()]
    assert zoo.get("tiny", folder=tmp_path).read_bytes() == BODY
    assert server.asked[1] == ("/releases/elsewhere", "bytes=1000-")


def test_a_mirror_may_be_an_address_a_folder_or_the_file(server: Server, tmp_path: Path) -> None:
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    (mirror / ASSET).write_bytes(BODY)
    sources = [mirror, mirror / ASSET, f"{server.base}/mirror/", f"{server.base}/{ASSET}"]
    for number, source in enumerate(sources):
        assert zoo.get("tiny", str(source), tmp_path / str(number)).read_bytes() == BODY
    assert [path for path, _ in server.asked] == [f"/releases/mirror/{ASSET}", f"/releases/{ASSET}"]
    assert (mirror / ASSET).read_bytes() == BODY


def test_a_mirror_without_the_file_or_with_another(server: Server, tmp_path: Path) -> None:
    mirror, folder = tmp_path / "mirror", tmp_path / "cache"
    mirror.mkdir()
    assert f"holds no {ASSET}" in refusal(lambda: zoo.get("tiny", str(mirror), folder))
    (mirror / ASSET).write_bytes(BODY[:-1])
    assert f"{mirror / ASSET} has not" in refusal(lambda: zoo.get("tiny", str(mirror), folder))
    assert (mirror / ASSET).is_file()
    assert left(folder) == set()
    assert server.asked == []


def test_a_changed_file_in_the_cache_is_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.ckpt").write_bytes(BODY[:-1] + bytes([BODY[-1] ^ 1]))
    assert zoo.get("tiny", folder=tmp_path).read_bytes() == BODY
    assert "not the bytes that were published, deleted" in capsys.readouterr().err


def test_a_cache_that_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    text = refusal(lambda: zoo.get("tiny", folder=tmp_path / "file" / "cache"))
    assert "JAXHISTO_CACHE" in text


def test_unknown_bytes_only_when_asked_for(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "pass --unchecked" in refusal(lambda: zoo.get("tiny-unchecked", folder=tmp_path))
    assert server.asked == []
    (tmp_path / "tiny-unchecked.ckpt").write_bytes(b"")  # an accident, not a file
    (tmp_path / "tiny-unchecked.ckpt.part").write_bytes(b"of something else")
    server.plan = [ranged(HALF), ranged()]
    path = zoo.get("tiny-unchecked", folder=tmp_path, unchecked=True)
    assert path.read_bytes() == BODY
    assert server.ranges() == [None, f"bytes={HALF}-"]
    assert hashlib.sha256(BODY).hexdigest() in capsys.readouterr().err


CHILD = """
import sys
from pathlib import Path
from jaxhisto_export import zoo
url, sha256, size, folder = sys.argv[1:]
entry = zoo.Entry("tiny", "resnet18", "", url, int(size), sha256, "published",
                  (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "MIT", "", "")
zoo.entries = lambda: (entry,)
path = zoo.get("tiny", folder=Path(folder))
print(zoo._sha256(path) == sha256)
loaded = {m.split('.')[0] for m in sys.modules}
assert not {"torch", "jax", "jaxhisto"} & loaded, loaded
"""


def _child(server: Server, folder: Path) -> subprocess.Popen[str]:
    tiny = entry(server.base)
    arguments = [tiny.url, tiny.sha256, len(BODY), folder]
    command = [sys.executable, "-c", CHILD, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_share_one_download(server: Server, tmp_path: Path) -> None:
    server.plan = [ranged(pause=0.1)]
    children = [_child(server, tmp_path) for _ in range(2)]
    said = [child.communicate(timeout=60) for child in children]
    assert [out for out, _ in said] == ["True\n", "True\n"], said
    assert len(server.asked) == 1
    assert left(tmp_path) == {"tiny.ckpt"}


def test_a_killed_download_goes_on(server: Server, tmp_path: Path) -> None:
    server.plan = [hanging(HALF), ranged()]
    part = tmp_path / "tiny.ckpt.part"
    with _child(server, tmp_path) as child:
        end = time.monotonic() + 60
        while (not part.exists() or part.stat().st_size < HALF) and time.monotonic() < end:
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert zoo.get("tiny", folder=tmp_path).read_bytes() == BODY
    assert server.ranges() == [None, f"bytes={HALF}-"]


def test_progress_on_a_terminal_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    zoo.get("tiny", folder=tmp_path)
    progress, result = terminal.getvalue().splitlines()[-2:]
    assert progress.endswith("tiny: 0.3 of 0.3 MB, 100%")
    assert result.startswith("tiny: ")


def test_disk_full_is_one_sentence(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download.Download, "_copy", full)
    assert "No space left on device" in refusal(lambda: zoo.get("tiny", folder=tmp_path))
    assert len(server.asked) == 1
    shutil.rmtree(tmp_path)
