"""`python -m jaxhisto_export` where JAX and torchvision are not: other processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import loaders
import pytest
from random_runs import Run

from jaxhisto_export.__main__ import main

# Refuses the packages as an environment without them would.
ABSENT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {names}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name.split('.')[0])
sys.meta_path.insert(0, Absent())
from jaxhisto_export.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
NO_JAX = ("jax", "flax", "jaxhisto", "torchvision", "timm")


def _without(names: tuple[str, ...], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ABSENT.format(names=names), *map(str, arguments)]
    # Threads that wait for each other cost more than they bring to networks this small.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_neither_jax_nor_jaxhisto_is_imported() -> None:
    code = (
        "import sys, pkgutil, importlib, jaxhisto_export as package\n"
        "names = [m.name for m in pkgutil.iter_modules(package.__path__)]\n"
        "for name in names: importlib.import_module(f'jaxhisto_export.{name}')\n"
        "print(*names, *{m.split('.')[0] for m in sys.modules})"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert {"layouts", "torch_resnet", "verify", "torch"} <= set(loaded.stdout.split())
    assert not {"jax", "jaxlib", "flax", "jaxhisto", "tensorflow"} & set(loaded.stdout.split())


def test_the_package_and_its_help_import_no_torch() -> None:
    code = (
        "import sys, jaxhisto_export\n"
        "from jaxhisto_export.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")


def test_convert_and_verify_without_jax_and_torchvision(run10: Run, tmp_path: Path) -> None:
    out = tmp_path / "encoder.pth"
    done = _without(NO_JAX, "convert", run10.encoder, "--layout", "torchvision", "--out", out)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"wrote {out}.golden.safetensors" in done.stdout
    done = _without(NO_JAX, "verify", out)
    assert (done.returncode, done.stderr) == (0, "")
    assert "plain ResNet (no torchvision here)" in done.stdout
    assert done.stdout.endswith("verified\n")


def test_every_layout_from_the_command_line(
    run10: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for column, name in loaders.LAYOUTS.items():
        layout, *fc = column.split()
        out = str(tmp_path / name)
        asked = ["convert", str(run10.encoder), "--layout", layout, "--out", out]
        assert main([*asked, *(["--fc", "zero"] if fc else [])]) == 0
        assert main(asked) == 1
        assert "exists, pass --force" in capsys.readouterr().err
        assert main([*asked, "--force"]) == 0
        assert main(["verify", out]) == 0
    raw = ["--layout", "onnx", "--normalise", "--out", str(tmp_path / "raw.onnx")]
    assert main(["convert", str(run10.encoder), *raw]) == 0
    assert main(["verify", str(tmp_path / "raw.onnx")]) == 0
    assert capsys.readouterr().err == ""


def test_missing_onnx_is_one_sentence(
    run10: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = run10.export("onnx", tmp_path / "whole.onnx")
    asked = ["convert", str(run10.encoder), "--layout", "onnx", "--out", str(tmp_path / "o.onnx")]
    monkeypatch.setitem(sys.modules, "onnx", None)  # importing it then fails as if it were absent
    for arguments in (asked, ["verify", str(whole)]):
        assert main(arguments) == 1
        said = "onnx is not installed: pip install 'jaxhisto[onnx]' (or onnx alone)\n"
        assert capsys.readouterr().err.removeprefix("problem: ") == said
    assert not (tmp_path / "o.onnx").exists()


def test_missing_onnxruntime_is_a_note(
    run10: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = run10.export("onnx", tmp_path / "whole.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["verify", str(whole)]) == 0
    assert "note: the graph was not run, onnxruntime is not" in capsys.readouterr().out


def test_a_problem_ends_with_code_1_and_no_traceback(tmp_path: Path) -> None:
    done = _without(NO_JAX, "verify", tmp_path / "nothing.pth")
    assert done.returncode == 1
    assert "there is no such file" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_codes_of_the_command_line(
    run10: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = ["convert", str(tmp_path / "nothing.safetensors"), "--out", str(tmp_path / "out")]
    assert main(missing) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(SystemExit) as usage:
        main(["convert", str(run10.encoder)])
    assert usage.value.code == 2


def test_missing_torch_is_one_sentence(run10: Run) -> None:
    done = _without(("torch",), "verify", run10.encoder)
    assert done.returncode == 1
    assert done.stderr == "torch is not installed: pip install torch numpy safetensors\n"
