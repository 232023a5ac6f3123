"""Reports of the storage library that would hide the one line that counts."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from jaxhisto.late_writes import ignore_late_writes

ORBAX = """
async def write():
    raise ValueError("RESOURCE_EXHAUSTED: No space left on device")
"""


def forgotten(coroutine: Coroutine[Any, Any, None]) -> None:
    """Runs a task to its error, for which nobody asks."""

    async def main() -> None:
        asyncio.get_running_loop().create_task(coroutine)
        await asyncio.sleep(0)

    asyncio.run(main())
    gc.collect()


@pytest.mark.parametrize(("file", "told"), [("orbax/checkpoint/x.py", False), ("own/x.py", True)])
def test_a_second_failed_write_is_not_told_but_other_errors_are(
    file: str, told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scope: dict[str, Any] = {}
    exec(compile(ORBAX, str(tmp_path / file), "exec"), scope)
    ignore_late_writes()
    forgotten(scope["write"]())
    assert ("RESOURCE_EXHAUSTED" in caplog.text) is told


def test_python_prints_them_without_us(tmp_path: Path) -> None:
    code = (
        "import asyncio\n"
        f"{ORBAX}\n"
        "async def main():\n"
        "    asyncio.ensure_future(write()); await asyncio.sleep(0)\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "exception was never retrieved" in done.stderr
    assert "Traceback" in done.stderr
