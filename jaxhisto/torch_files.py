"""Where the two packages meet: a run to a PyTorch file, and its verification.

The only module of `jaxhisto` that imports `jaxhisto_export`, inside its functions, since torch
is an extra.
"""

from __future__ import annotations

import importlib.util
import sys

from jaxhisto.config import ExportConfig
from jaxhisto.errors import ExportError


def export_run(config: ExportConfig) -> None:
    """Writes the newest checkpoint of a run in a PyTorch layout, golden features beside it.

    Raises:
      ExportError, ExportFileError: torch is missing, the run has no checkpoint, or the file
        cannot be written.
    """
    _need_torch()
    from jaxhisto.pretrain.encoder import write_encoder
    from jaxhisto_export.layouts import convert

    encoder, golden = write_encoder(config.run, config.licence, config.stains or None)
    for path in convert(encoder, config.layout, config.out, golden=golden, fc=config.fc):
        print(f"wrote {path}")


def verify_file(path: str) -> int:
    """Prints what was checked, problems on stderr; returns 0, or 1 with a problem."""
    _need_torch()
    from jaxhisto_export.verify import verify

    result = verify(path)
    print("\n".join(result.lines))
    for problem in result.problems:
        print(f"jaxhisto verify: {problem}", file=sys.stderr)
    return 0 if result.ok else 1


def _need_torch() -> None:
    """Says so before any work is done that needs it."""
    if importlib.util.find_spec("torch") is None:
        raise ExportError("torch is not installed; pip install 'jaxhisto[export]'.")
