"""Weights that a run starts from when they are not the seed's."""

from __future__ import annotations

import json
from typing import Any

from jaxhisto import weights
from jaxhisto.config import PretrainConfig
from jaxhisto.errors import RunError

Tree = dict[str, Any]


def starting_weights(config: PretrainConfig) -> tuple[Tree, Tree] | None:
    """(params, batch_stats) of the encoder file `config.init`; none where it is empty.

    The projection is left out where its width is not the config's: the run then draws its own.

    Raises:
      ExportError: a file that is no encoder of ours.
      RunError: an encoder of another depth, or one that wants to be fed otherwise.
    """
    if not config.init:
        return None
    params, stats, metadata = weights.read_encoder(config.init)
    model = config.model
    if metadata["arch"] != model.name:
        raise RunError(
            f"{config.init}: is a {metadata['arch']}, where the run trains a {model.name}; pass "
            f"--model.name {metadata['arch']}, or another file."
        )
    for name in ("mean", "std"):
        wanted = json.loads(metadata[name])
        if list(getattr(model, name)) != wanted:
            raise RunError(
                f"{config.init}: wants {name} {wanted}, where the run feeds "
                f"{list(getattr(model, name))}; pass --model.{name} "
                f"{' '.join(f'{value:g}' for value in wanted)}."
            )
    if metadata["projection_width"] != str(model.projection):
        params = {name: tree for name, tree in params.items() if name != "projection"}
    return params, stats
