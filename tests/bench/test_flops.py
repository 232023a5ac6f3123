"""Operations and bytes against torchvision's table, XLA's count and sums by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhisto.bench import flops, traffic
from jaxhisto.bench.ours import Point
from jaxhisto.distributed import make_mesh
from jaxhisto.models.convolution import convolutions
from jaxhisto.pretrain.step import init_state, make_loss_and_grads

TORCHVISION = {"resnet18": 1.814, "resnet34": 3.664, "resnet50": 4.089, "resnet101": 7.801}
"""Giga multiply-adds at 224 px: `_ops` of torchvision's ResNet*_Weights, with fc of 1000."""


@pytest.mark.parametrize("model", TORCHVISION)
def test_the_encoders_are_those_of_torchvisions_table(model):
    *encoder, hidden, _ = flops.layers(model, 224)
    fc = 2 * hidden.width * 1000
    found = (sum(layer.flops for layer in encoder) + fc) / 2e9
    assert round(found, 3) == TORCHVISION[model]


def test_a_convolution_counted_by_hand():
    """3x3, 2 -> 5 channels, 4 x 4 outputs: 16 places, 9 taps, 2 inputs, 5 outputs, times two."""
    layer = flops.Layer(4, 4, 9, 2, 5)
    assert layer.flops == 2 * 16 * 9 * 2 * 5
    assert layer.backward_flops == 2 * layer.flops
    assert flops.Layer(4, 4, 9, 2, 5, first=True).backward_flops == layer.flops


def test_a_convolution_as_xla_counts_it():
    """Without padding, where its count and ours are of the same taps."""
    x, k = jnp.zeros((1, 9, 9, 2)), jnp.zeros((3, 3, 2, 5))

    def conv(x, k):
        names = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, k, (2, 2), "VALID", dimension_numbers=names)

    counted = jax.jit(conv).lower(x, k).cost_analysis()["flops"]
    assert counted == flops.Layer(9, 4, 9, 2, 5).flops


def test_forward_and_backward_as_xla_counts_the_program():
    """XLA leaves taps on the padding out and counts what is no product too: a few per cent.

    Of its own convolutions; those of a CPU take fewer products.
    """
    config = Point("resnet10", 224, 2, "f32").config()
    mesh = make_mesh(1)
    with jax.set_mesh(mesh), convolutions("plain"):
        state = init_state(config, 10, 10, mesh)
        views = jax.ShapeDtypeStruct((2, 2, 224, 224, 3), np.float32)
        loss_and_grads = jax.jit(make_loss_and_grads(config))
        lowered = loss_and_grads.lower(state.params, state.batch_stats, views)
    ours = flops.step_flops("resnet10", 224, 2)
    assert 0.93 < lowered.cost_analysis()["flops"] / ours < 1.0


def test_parameters_are_the_models():
    assert flops.parameters("resnet18") == 11_504_832
    assert flops.parameters("resnet50") == 27_966_656


def test_the_least_bytes_of_a_step_by_hand(monkeypatch):
    """One 3x3 convolution of 2 -> 5 channels at 4 px, and a head of 5 -> 7."""
    made = [flops.Layer(4, 4, 9, 2, 5, first=True), flops.Layer(1, 1, 1, 5, 5),
            flops.Layer(1, 1, 1, 5, 7)]  # fmt: skip
    monkeypatch.setattr(flops, "layers", lambda *a: iter(made))
    weights = 9 * 2 * 5 + 2 * 5 + (5 * 5 + 5) + (5 * 7 + 7)
    # Forward: in and out; backward: in and the gradient of out; of the head the input's too.
    maps = 2 * (16 * 2 + 16 * 5) + (2 * (5 + 5) + 5) + (2 * (5 + 7) + 5)
    image = 2 * (maps * 2 + 2 * 4 * 3 * 16) + 3 * 16
    assert flops.parameters("made") == weights
    assert flops.least_bytes("made", 4, 3, "bf16") == 3 * image + 8 * 4 * weights


def test_the_bytes_of_a_program_are_its_operands_and_results():
    x = jnp.zeros((256, 256), jnp.float32)
    cost = traffic.cost(jax.jit(lambda x, y: x + y).lower(x, x).compile(), devices=2)
    assert cost["bytes"] == 2 * 3 * 256 * 256 * 4
    assert cost["flops"] == 2 * 256 * 256


HLO = """\
ENTRY %main (a: f32[2,3], b: bf16[4]) -> f32[2,3] {
  %a = f32[2,3]{1,0} parameter(0)
  %b = bf16[4]{0} parameter(1)
  %conv.1 = (f32[2,3]{1,0}, u8[16]{0}) custom-call(%a, %b), custom_call_target="__cudnn$conv"
  ROOT %out = f32[2,3]{1,0} get-tuple-element(%conv.1), index=0
}
"""


def test_library_calls_count_with_what_they_read_and_write():
    assert traffic.array_bytes("(f32[2,3]{1,0}, u8[16]{0})") == 24 + 16
    assert traffic.array_bytes("f32[]") == 4
    assert traffic.custom_call_bytes(HLO) == (24 + 8) + (24 + 16)
