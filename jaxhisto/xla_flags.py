"""What must be set before XLA starts: the flags of a run that is bit-exact on a GPU.

Two things differ between two runs there: kernels that add in the order in which threads arrive,
and autotuning, which picks other kernels each time because it times them. The first are excluded;
what the second found is kept in the run folder and loaded by every later start. (XLA's own
xla_gpu_deterministic_ops excludes the first and switches the second off, which is slower.)
On CPU and TPU these flags change nothing. https://openxla.org/xla/determinism
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

from jaxhisto.errors import RunError

EXCLUDE = "--xla_gpu_exclude_nondeterministic_ops"
OWN = "--xla_gpu_deterministic_ops"
DUMP = "--xla_gpu_dump_autotune_results_to"
LOAD = "--xla_gpu_load_autotune_results_from"
AUTOTUNE = "autotune.textproto"


def deterministic_flags(run: str | Path, given: str, fresh: Path) -> str:
    """XLA_FLAGS with what a bit-exact run on a GPU needs; a flag that is given stays as it is.

    Args:
      run: the run folder; its autotune.textproto is loaded where there is one.
      given: XLA_FLAGS as they are.
      fresh: where XLA shall write what autotuning finds, where there is none yet.
    """
    names = {flag.split("=")[0] for flag in given.split()}
    kept = Path(run).resolve() / AUTOTUNE
    tuned = f"{LOAD}={kept}" if kept.is_file() else f"{DUMP}={fresh}"
    wanted = [] if OWN in names else [f"{EXCLUDE}=true"]
    if not {LOAD, DUMP} & names:
        wanted.append(tuned)
    return " ".join([given, *(flag for flag in wanted if flag.split("=")[0] not in names)]).strip()


def make_deterministic(run: str | Path) -> None:
    """Sets XLA_FLAGS for this process; call it before JAX is used."""
    # Not into the run folder: XLA writes at every compilation, a kill may fall into it, and a
    # half-written file would be loaded by the next start.
    folder = Path(tempfile.mkdtemp(prefix="jaxhisto-autotune-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = deterministic_flags(run, given, folder / AUTOTUNE)


def check_deterministic(platform: str) -> None:
    """Refuses a bit-exact run whose flags came too late or never.

    Raises:
      RunError: on a GPU, neither of the two flags that exclude nondeterministic kernels is set.
    """
    given = os.environ.get("XLA_FLAGS", "")
    if platform in ("gpu", "cuda", "rocm") and not any(flag in given for flag in (EXCLUDE, OWN)):
        raise RunError(
            f"--deterministic: XLA_FLAGS lack {EXCLUDE}=true, which must be set before JAX starts; "
            "run `jaxhisto pretrain`, or call jaxhisto.xla_flags.make_deterministic first."
        )


def keep_autotune(run: str | Path) -> None:
    """Moves what autotuning found into the run folder, once all is compiled; harmless elsewhere."""
    flags = dict(
        flag.split("=", 1) for flag in os.environ.get("XLA_FLAGS", "").split() if "=" in flag
    )
    found, kept = Path(flags.get(DUMP, "")), Path(run) / AUTOTUNE
    if found.name == AUTOTUNE and found.is_file() and not kept.exists():
        whole = kept.with_name(f".{AUTOTUNE}.{os.getpid()}")
        shutil.copyfile(found, whole)
        os.replace(whole, kept)
