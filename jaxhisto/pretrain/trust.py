"""trust_ratios.csv: how far LARS or LAMB moves each layer in a run's first step."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxhisto.config import OptimConfig
from jaxhisto.distributed import is_main
from jaxhisto.optim import decayed
from jaxhisto.runlog import write_atomically
from jaxhisto.weights import torch_name

FILE = "trust_ratios.csv"


@dataclass(frozen=True)
class TrustRatio:
    """One parameter's part in a step.

    `parameter` is its PyTorch name. `trust_ratio` multiplies the learning rate, 1 where the
    optimizer does not adapt; `adapted` and `decayed` say whether it does and whether weight
    decay applies. Norms are L2.
    """

    parameter: str
    weight_norm: float
    gradient_norm: float
    trust_ratio: float
    adapted: bool
    decayed: bool


def trust_ratios(config: OptimConfig, params: Any, norms: np.ndarray) -> list[TrustRatio]:
    """The trust ratios of a step (LARS: You et al. 2017; LAMB: You et al. 2020).

    LARS: coefficient ||w|| / ||g + decay w||, as google-research/simclr, biases and BatchNorm
    exempt. LAMB: ||w|| / ||u + decay w|| with Adam's direction u, nothing exempt. 1 where a norm
    is zero, as in optax.

    Args:
      params: a tree of the same structure.
      norms: (3, P), of `optim.trust_norms`.
    """
    leaves = jax.tree_util.tree_flatten_with_path(decayed(params))[0]
    found = []
    for (path, decays), (weight, gradient, whole) in zip(leaves, norms.T.tolist(), strict=True):
        adapts = decays or config.name == "lamb"
        coefficient = config.trust_coefficient if config.name == "lars" else 1.0
        ratio = coefficient * weight / whole if adapts and weight and whole else 1.0
        name = torch_name(tuple(str(key.key) for key in path))
        found.append(TrustRatio(name, weight, gradient, ratio, adapts, decays))
    return found


def report_trust_ratios(
    config: OptimConfig, out: Path, params: Any, metrics: Mapping[str, Any]
) -> str:
    """Writes OUT/trust_ratios.csv from the metrics of a step, and says what is in it."""
    if "trust_norms" not in metrics:
        return f"no {FILE}: {config.name} has no trust ratios"
    ratios = trust_ratios(config, params, np.asarray(metrics["trust_norms"]))
    if is_main():
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(TrustRatio.__dataclass_fields__)
        for r in ratios:
            writer.writerow([_cell(value) for value in vars(r).values()])
        write_atomically(out / FILE, text.getvalue())
    adapted = sorted((r for r in ratios if r.adapted), key=lambda r: r.trust_ratio)
    return (
        f"{out / FILE}: {len(adapted)} parameters adapted, {len(ratios) - len(adapted)} exempt; "
        f"trust ratios {adapted[0].trust_ratio:.3g} ({adapted[0].parameter}) to "
        f"{adapted[-1].trust_ratio:.3g} ({adapted[-1].parameter})"
    )


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.7g}" if isinstance(value, float) else value
