"""`torch.hub.load` from a clone that nobody installed, in processes without JAX."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_runs import Run, features_of, make_run, random_resnet

ROOT = Path(__file__).resolve().parents[2]

# An editable install would find the package by a path hook: it is taken out, as JAX is.
CHILD = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {'jax', 'jaxlib', 'flax', 'jaxhisto', 'torchvision'}:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name.split('.')[0])
sys.meta_path = [Absent()] + [f for f in sys.meta_path if 'editable' not in repr(f)]
sys.path = [p for p in sys.path if not p.startswith(ROOT) or 'site-packages' in p]
import torch
torch.set_num_threads(1)
try:
    import jaxhisto_export
except ModuleNotFoundError:
    print('not installed')
def load(entry, **arguments):
    return torch.hub.load(CLONE, entry, source='local', **arguments)
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hubconf.py and export/, as a clone has them, elsewhere."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copy(ROOT / "hubconf.py", folder)
    package = folder / "export" / "jaxhisto_export"
    shutil.copytree(
        ROOT / "export" / "jaxhisto_export", package, ignore=shutil.ignore_patterns("__pycache__")
    )
    return folder


def _child(clone: Path, code: str, folder: Path) -> str:
    setting = f"ROOT, CLONE = {str(ROOT)!r}, {str(clone)!r}\n"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", setting + CHILD + code],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.fixture(scope="module")
def run34(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of another depth."""
    return make_run(tmp_path_factory.mktemp("run34"), "resnet34", seed=3)


def test_features_are_torchvisions(
    clone: Path, published: Path, flat: Path, tmp_path: Path
) -> None:
    tiles = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
    torch.save(tiles, tmp_path / "tiles.pt")
    out = _child(
        clone,
        "tiles = torch.load('tiles.pt')\n"
        f"encoder = load('resnet18_histo', weights={str(published)!r})\n"
        f"bare = load('resnet18_histo', weights={str(flat)!r}, bare=True)\n"
        "import jaxhisto_export\n"
        "print(jaxhisto_export.__file__, encoder.training, list(bare.children())[-1])\n"
        "with torch.inference_mode():\n"
        "    x = (tiles.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5\n"
        "    torch.save([encoder.features(tiles), encoder(x), bare(x)], 'features.pt')\n",
        tmp_path,
    )
    home = clone / "export" / "jaxhisto_export" / "__init__.py"
    assert out.splitlines() == ["not installed", f"{home} False Identity()"]
    state = torch.load(flat, weights_only=True)
    oracle = random_resnet("resnet18", seed=0)
    oracle.load_state_dict(state, strict=True)
    expected = features_of(oracle, tiles.numpy())
    for found in torch.load(tmp_path / "features.pt"):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_another_depth_is_refused_with_the_right_entry(
    clone: Path, run34: Run, tmp_path: Path
) -> None:
    out = _child(
        clone,
        f"print(load('resnet34_histo', weights={str(run34.encoder)!r}).provenance['arch'])\n"
        "for weights in ('nothing.pth', " + repr(str(run34.encoder)) + "):\n"
        "    try: load('resnet50_histo', weights=weights)\n"
        "    except Exception as error: print(type(error).__name__, error)\n",
        tmp_path,
    )
    first, second, third, fourth = out.splitlines()
    assert (first, second) == ("not installed", "resnet34")
    assert third.startswith("ExportFileError nothing.pth: there is no such file")
    name = str(run34.encoder)
    assert fourth == f"ExportFileError {name}: is a resnet34, not a resnet50, use resnet34_histo."


def test_four_depths_with_help(clone: Path, tmp_path: Path) -> None:
    out = _child(
        clone,
        "sys.path.insert(0, CLONE)\n"
        "import hubconf\n"
        "print(*sorted(name for name in dir(hubconf) if name.endswith('_histo')))\n"
        "print(hubconf.dependencies, hubconf.resnet101_histo.__doc__)\n",
        tmp_path,
    )
    names = ["resnet101_histo", "resnet18_histo", "resnet34_histo", "resnet50_histo"]
    _, listed, helped = out.splitlines()
    assert listed.split() == names
    assert helped.startswith("['torch', 'numpy', 'safetensors'] A ResNet101 encoder")
