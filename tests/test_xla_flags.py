"""The flags of a bit-exact run on a GPU: what is added, and that the user's own stay."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxhisto import xla_flags
from jaxhisto.errors import RunError
from jaxhisto.xla_flags import AUTOTUNE, check_deterministic, deterministic_flags, keep_autotune

FRESH = Path("/fresh/autotune.textproto")


def test_a_first_start_excludes_and_writes_what_autotuning_finds(tmp_path):
    assert deterministic_flags(tmp_path, "", FRESH).split() == [
        "--xla_gpu_exclude_nondeterministic_ops=true",
        f"--xla_gpu_dump_autotune_results_to={FRESH}",
    ]


def test_a_later_start_loads_what_was_found(tmp_path):
    (tmp_path / AUTOTUNE).write_text("version: 3")
    assert deterministic_flags(tmp_path, "--xla_dump_to=x", FRESH).split() == [
        "--xla_dump_to=x",
        "--xla_gpu_exclude_nondeterministic_ops=true",
        f"--xla_gpu_load_autotune_results_from={tmp_path / AUTOTUNE}",
    ]


@pytest.mark.parametrize(
    "given",
    [
        "--xla_gpu_exclude_nondeterministic_ops=false --xla_gpu_load_autotune_results_from=mine",
        "--xla_gpu_deterministic_ops=true --xla_gpu_dump_autotune_results_to=mine",
    ],
)
def test_a_flag_that_is_given_stays_as_it_is(tmp_path, given):
    assert deterministic_flags(tmp_path, given, FRESH) == given


def test_what_autotuning_found_is_kept_once(tmp_path, monkeypatch):
    found = tmp_path / "fresh" / AUTOTUNE
    found.parent.mkdir()
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.setenv("XLA_FLAGS", deterministic_flags(run, "--xla_dump_to=x", found))
    keep_autotune(run)  # on a CPU none is written
    assert list(run.iterdir()) == []
    found.write_text("version: 3")
    keep_autotune(run)
    found.write_text("version: 4")
    keep_autotune(run)
    assert [(p.name, p.read_text()) for p in run.iterdir()] == [(AUTOTUNE, "version: 3")]
    monkeypatch.delenv("XLA_FLAGS")
    keep_autotune(run)


def test_flags_that_came_too_late_are_refused_on_a_gpu(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    check_deterministic("cpu")
    with pytest.raises(RunError, match="must be set before JAX starts"):
        check_deterministic("gpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_exclude_nondeterministic_ops=true")
    check_deterministic("gpu")


def test_xla_knows_every_flag_and_the_module_needs_no_jax(tmp_path):
    """XLA ends the process at a flag that it does not know: a release may rename them."""
    script = (
        "import sys; from jaxhisto import xla_flags\n"
        f"xla_flags.make_deterministic({str(tmp_path)!r})\n"
        "assert 'jax' not in sys.modules\n"
        "import os, jax\n"
        "print(os.environ['XLA_FLAGS'], float(jax.numpy.zeros(()) + 1))"
    )
    (tmp_path / AUTOTUNE).write_text("version: 3")
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"{xla_flags.EXCLUDE}=true {xla_flags.LOAD}={tmp_path / AUTOTUNE} 1.0" in done.stdout
    env["XLA_FLAGS"] = "--xla_gpu_no_such_flag=1"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=env, check=False)
    assert done.returncode != 0  # so the first half could have failed
