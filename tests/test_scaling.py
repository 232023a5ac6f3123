"""docs/scaling.md holds what benchmarks/scaling.py computes, of models that are ours."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxhisto.models import resnet, simclr

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks" / "scaling.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = module
    spec.loader.exec_module(module)
    return module


def test_the_tables_in_the_docs_are_the_scripts(scaling):
    text = scaling.DOC.read_text(encoding="utf-8")
    assert text.split(scaling.BEGIN)[1].split(scaling.END)[0] == scaling.tables()


def test_the_models_figures_are_the_models(scaling, monkeypatch):
    outputs: list[int] = []
    convolve = resnet.Conv.__call__

    def counted(self, *args, **kwargs):
        out = convolve(self, *args, **kwargs)
        outputs.append(out.size)
        return out

    monkeypatch.setattr(resnet.Conv, "__call__", counted)
    for model in scaling.MODELS:
        graphdef, params, stats = simclr.structure(model.name.lower(), scaling.PROJECTION)
        sizes = [int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params)]
        channels = [leaf.size for leaf in jax.tree.leaves(stats)]
        assert sum(sizes) == model.parameters
        assert (sum(channels) // 2, len(channels) // 2) == (model.channels, model.norms)
        outputs.clear()
        image = jax.ShapeDtypeStruct((1, scaling.SIDE, scaling.SIDE, 3), np.float32)
        jax.eval_shape(
            lambda p, s, x, g=graphdef: simclr.project(g, p, s, x, train=True)[0],
            params, stats, image,
        )  # fmt: skip
        assert sum(outputs) == model.outputs


def test_a_sum_over_a_group_and_between_groups(scaling):
    """By hand: 8 GB over 16 devices in two groups of 8."""
    machine = scaling.Machine("made", 1.0, 1.0, 1, group=8, near=100e9, far=10e9, latency_s=0.0)
    inside = 2 * 7 / 8 * 8e9 / 100e9
    between = 2 * 1 / 2 * (8e9 / 8) / 10e9
    assert scaling.all_reduce_s(8e9, 16, machine) == pytest.approx(inside + between)
    assert scaling.all_reduce_s(8e9, 8, machine) == pytest.approx(inside)
    assert scaling.all_reduce_s(8e9, 1, machine) == 0.0
    late = scaling.Machine("late", 1.0, 1.0, 1, group=8, near=1e30, far=1e30, latency_s=1.0)
    assert scaling.all_reduce_s(8.0, 512, late) == pytest.approx(18.0)
