"""Operations and bytes against torchvision's table, XLA's count and sums by hand."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhisto.bench import flops, machine, traffic
from jaxhisto.bench.ours import Point, Setup
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
    assert traffic.custom_call_bytes(HLO) == (24 + 8) + 24  # and no workspace
    others = HLO.replace("__cudnn$conv", "TopK")  # its second result is one
    assert traffic.custom_call_bytes(others) == (24 + 8) + (24 + 16)


def test_operations_of_which_a_library_hides_some_are_not_told():
    class Compiled:
        text = HLO

        def cost_analysis(self):
            return {"flops": 5.0, "bytes accessed": 10.0}

        def as_text(self):
            return self.text

    assert traffic.cost(Compiled()) == {"bytes": 10.0 + 56}
    Compiled.text = "ENTRY %main () -> f32[] {\n}"
    assert traffic.cost(Compiled()) == {"bytes": 10.0, "flops": 5.0}


def test_what_a_block_and_its_shortcut_read_counts_once():
    first, second, shortcut = flops._block("resnet18", 8, 4, 64, 128)
    assert shortcut.inputs == first.inputs == 8 * 8 * 64
    assert (first.shares, second.shares, shortcut.shares) == (False, False, True)
    with_it = flops.least_bytes("resnet18", 64, 1, "bf16")
    maps = sum(one.inputs for one in flops.layers("resnet18", 64) if one.shares)
    assert maps == 16 * 16 * 64 + 8 * 8 * 128 + 4 * 4 * 256
    twice = [dataclasses.replace(one, shares=False) for one in flops.layers("resnet18", 64)]
    both = 2 * sum(2 * (one.inputs + one.outputs) + (not one.first) * one.inputs for one in twice)
    rest = 2 * 2 * flops.F32 * 3 * 64**2 + 3 * 64**2 + 32 * flops.parameters("resnet18")
    assert with_it == 2 * (both - 2 * 3 * maps) + rest


def test_a_products_matrices_are_no_constants_of_the_program(monkeypatch):
    """At side 8192 a captured one is 256 MB of the program's text."""
    seen = []
    jitted = jax.jit

    def spied(act, **more):
        found = jitted(act, **more)
        seen.append(lambda *args: found.lower(*args).as_text())
        return found

    monkeypatch.setattr(jax, "jit", spied)
    monkeypatch.setattr(machine, "GOES", 1)
    assert machine.matmul_flops(64, jnp.float32, 1) > 0
    a = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    text = seen[-1](a, a)
    assert "stablehlo.constant" not in text
    assert text.count("%arg") >= 2


@pytest.fixture(scope="module")
def setups():
    return [Setup(Point("resnet10", 32, 4, "f32"), calls=calls) for calls in (1, 3)]


def test_a_turn_of_many_calls_counts_them_all(setups):
    done = []
    for setup in setups:
        made = setup._made(
            "step", lambda setup=setup: setup._calls(lambda: done.append(1)),
            count=lambda model, side, batch: 5.0 * batch, moved=7.0,
        )  # fmt: skip
        assert made.run() is None
        found = (len(done), made.images, made.flops, made.bytes, made.settings.get("calls"))
        assert found == ((1, 4, 20.0, 7.0, None) if setup.calls == 1 else (3, 12, 60.0, 21.0, 3))
        done.clear()
    one, three = (setup.runner("to_device") for setup in setups)
    assert (three.images, three.bytes) == (3 * one.images, 3 * one.bytes)
    assert three.run() is None


def test_the_step_holds_no_views_beside_it(setups):
    setup = setups[0]
    setup.__dict__["views"] = "616 MB"
    setup.drop_views()
    assert "views" not in setup.__dict__
    setup.drop_views()
