"""The registry of published encoders, and where a name leads."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_server import (
    BODY,
    Server,
    entry,
    refusal,
    serving,
)

from jaxhisto_export import download, zoo


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture(autouse=True)
def _registry(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = (entry(server.base), entry(server.base, checked=False))
    monkeypatch.setattr(zoo, "entries", lambda: tiny)
    monkeypatch.setattr(download, "PAUSE_S", 0.01)


def test_locate_takes_what_is_there_first(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXHISTO_CACHE", str(tmp_path / "cache"))
    assert zoo.locate("tiny") == tmp_path / "cache" / "tiny.ckpt"
    (tmp_path / "tiny").mkdir()
    assert zoo.locate("tiny") == Path("tiny")
    assert len(server.asked) == 1
    text = refusal(lambda: zoo.locate("tini"))
    assert "neither a file that is there nor a published encoder" in text
    assert "did you mean tiny" in text
    refusal(lambda: zoo.locate(""))


def test_find_and_known() -> None:
    tiny = zoo.find("tiny")
    assert tiny.sha256 is not None
    assert zoo.known(tiny.sha256.upper(), len(BODY)) == tiny
    assert zoo.known(tiny.sha256, len(BODY) + 1) is None
    assert zoo.known("0" * 64, len(BODY)) is None
    assert "tiny, tiny-unchecked" in refusal(lambda: zoo.find("swin"))


class TestRegistry:
    """zoo.json itself."""

    @pytest.fixture(autouse=True)
    def _real(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()

    def test_it_is_what_was_published(self, shared_data: Path) -> None:
        page = (shared_data.parent / "docs" / "published-models.md").read_text(encoding="utf-8")
        row = r"^\| `(\w+)` \| `([\w.]+)`[^|]*\| ([\d,?]+) \| ([0-9a-f]{64}|\?) \|$"
        stated = {
            (tag, asset): (
                None if size == "?" else int(size.replace(",", "")),
                None if sha == "?" else sha,
            )
            for tag, asset, size, sha in re.findall(row, page, re.MULTILINE)
        }
        assert len(stated) == 3
        ours = {tuple(e.url.split("/")[-2:]): (e.bytes, e.sha256) for e in zoo.entries()}
        assert ours == stated
        base = "https://github.com/ozanciga/self-supervised-histopathology/releases/download/"
        assert all(e.url.startswith(base) for e in zoo.entries())
        assert {(e.mean, e.std) for e in zoo.entries()} == {((0.5,) * 3, (0.5,) * 3)}

    def test_names(self) -> None:
        names = [e.name for e in zoo.entries()]
        assert names == ["ciga-tenpercent", "ciga-tenpercent-native", "ciga-epoch1000"]
        assert len({e.cached for e in zoo.entries()}) == len(names)
        assert "did you mean ciga-tenpercent." in refusal(lambda: zoo.find("ciga-tenprcent"))

    def test_the_table_is_aligned(self) -> None:
        head, *rows = zoo.table().splitlines()
        assert len(rows) == 3
        for title in ("architecture", "licence", "what it is"):
            column = head.index(title)
            assert all(row[column - 1] == " " and row[column] != " " for row in rows)
        assert "92.1" in rows[0]
        assert "?" in rows[2]
        assert max(map(len, rows)) <= 120


def test_nothing_but_the_standard_library_is_imported() -> None:
    code = "import sys; from jaxhisto_export import zoo; zoo.table(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not {"pooch", "requests", "torch", "numpy", "jax", "safetensors"} & loaded
