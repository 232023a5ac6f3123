"""The built wheel holds both packages and the recipes, and runs away from the sources."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the wheel's content, and nothing of the source tree on the path."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    wheel = next(folder.glob("*.whl"))
    target = folder / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    return target


def python(installed, code):
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=installed,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_both_packages_come_from_the_wheel(installed):
    code = "import jaxhisto, jaxhisto_export; print(jaxhisto.__file__, jaxhisto_export.__file__)"
    assert all(path.startswith(str(installed)) for path in python(installed, code).split())


@pytest.mark.slow
def test_the_recipes_are_inside(installed):
    code = "from jaxhisto.flags import shipped_configs; print(*shipped_configs())"
    expected = sorted(path.stem for path in (ROOT / "configs").glob("*.toml"))
    assert python(installed, code).split() == expected


@pytest.mark.slow
def test_the_command_line_answers(installed):
    code = "from jaxhisto.cli import main; raise SystemExit(main(['--help']))"
    assert "pretrain" in python(installed, code)


@pytest.mark.slow
def test_the_catalogue_is_inside(installed):
    code = "from jaxhisto.cli import main; raise SystemExit(main(['catalog']))"
    assert python(installed, code).splitlines()[-1].startswith("56 datasets: 22 of patches")
