"""The README's Python runs as it stands."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "export" / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_readme_code_runs(
    number: int, flat: Path, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(flat, tmp_path / "encoder.pth")
    shutil.copy(published, tmp_path / "published.pth")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(compile(BLOCKS[number], README.name, "exec"), scope)
    if "features" in scope:
        assert scope["features"].shape == (8, 512)


def test_there_is_code_to_run() -> None:
    assert len(BLOCKS) == 3
