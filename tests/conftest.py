"""Settings and fixtures that every test shares."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Four devices on one CPU: tests of one-device behaviour ask for a mesh of one.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")


@pytest.fixture
def jaxhisto(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a line in this process; gives (exit code, stdout, stderr)."""

    def run(*args: object) -> tuple[int, str, str]:
        from jaxhisto import cli

        try:
            code = cli.main([str(a) for a in args])
        except SystemExit as stopped:
            code = stopped.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real slides and tiles, where there is one."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real slides and tiles are not here ({folder.parent.name}/{folder.name})")
    return folder


@pytest.fixture(scope="session")
def shared_docs() -> Path:
    """The folder with the paper's text, where there is one."""
    folder = ROOT.parent / "shared" / "docs"
    if not folder.is_dir():
        pytest.skip(f"the paper's text is not here ({folder.parent.name}/{folder.name})")
    return folder
