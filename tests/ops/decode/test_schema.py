"""`mambakit::decode` as torch's dispatcher knows it: fakes, mutation, compilation, and the steps that it has
recorded."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from mambakit.ops._backends import native
from mambakit.ops.decode import PackedModel, cpu, decode, reference
from mambakit.ops.linear import pack
from mambakit.ops.linear.packed import FORMATS
from tests.ops.closeness import relative_error
from tests.ops.decode.test_cpu import LAYERS, NORMS, VOCABULARY, D, H, K, N, make_layers

needs_native = pytest.mark.skipif(not native.is_available(), reason="the native library is not built")
# The dynamic-shape check draws graphs for minutes; the other three are fast.
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def make_model(format="float32", norms="plain") -> PackedModel:
    dtype, (mixer_eps, weighted) = torch.bfloat16 if format == "lossless16" else torch.float32, NORMS[norms]
    head = pack(torch.randn(VOCABULARY, H, dtype=dtype), format)
    return PackedModel(make_layers(format, weighted), torch.rand(H), head, 1e-5, mixer_eps)


def make_states(b):
    return torch.randn(LAYERS, b, D, K - 1), torch.randn(LAYERS, b, D, N)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("b", [3, 17])  # 17 rows: op by op
@pytest.mark.parametrize("norms", NORMS)
def test_tokens_in_a_row(format, b, norms):
    model, states = make_model(format, norms), make_states(b)
    want_states = [s.double() for s in states]
    # int8 and int4: x is rounded to 16 bits up to 16 rows; a number that differs by 1e-7 may go the other way.
    integers = format in ("int8", "int4")
    for _ in range(3):
        x = torch.randn(b, H)
        logits = decode(x, model, *states)
        want, *want_states = reference.decode(
            x, model.layers, model.final_norm, model.head, model.eps, *want_states, model.mixer_eps,
            x_in_16_bits=integers and b <= 16,
        )  # fmt: skip
        assert relative_error(logits, want) < (2e-4 if integers else 1e-5)
    for found, want in zip(states, want_states, strict=True):
        assert relative_error(found, want) < (2e-4 if integers else 1e-5)


@needs_native
@pytest.mark.parametrize("norms", NORMS)
def test_it_has_the_bits_of_a_prepared_step(norms):
    model, x = make_model("int8", norms), torch.randn(2, H)
    states = make_states(2)
    others = [s.clone() for s in states]
    step = cpu.DecodeStep(model.layers, model.final_norm, model.head, model.eps, *others, model.mixer_eps)
    for _ in range(3):
        assert torch.equal(decode(x, model, *states), step(x))
    assert torch.equal(states[1], others[1])


@pytest.mark.parametrize("format", ["float32", "int4", "lossless32"])
@pytest.mark.parametrize("b", [2, 17])
@pytest.mark.parametrize("norms", ["plain", "jamba"])
def test_opcheck(format, b, norms):
    arguments = (torch.randn(b, H), *make_states(b), *make_model(format, norms).flat())
    torch.library.opcheck(torch.ops.mambakit.decode.default, arguments, test_utils=CHECKS)


@needs_native
def test_opcheck_of_a_prepared_step():
    model, (conv, ssm) = make_model(), make_states(2)
    step = cpu.DecodeStep(model.layers, model.final_norm, model.head, model.eps, conv, ssm)
    y = step(torch.randn(2, H))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fake = step(torch.randn(2, H))
    assert (fake.shape, fake.dtype) == (y.shape, y.dtype)


@torch.no_grad()
def test_it_compiles_as_one_graph():
    torch._dynamo.reset()
    model, x, states = make_model("int8"), torch.randn(2, H), make_states(2)
    others = [s.clone() for s in states]
    flat = model.flat()

    def two(x, conv, ssm):
        first = torch.ops.mambakit.decode(x, conv, ssm, *flat)
        return first, torch.ops.mambakit.decode(x + 1, conv, ssm, *flat)

    found = torch.compile(two, fullgraph=True, backend="aot_eager")(x, *states)
    for got, want in zip((*found, *states), (*two(x, *others), *others), strict=True):
        torch.testing.assert_close(got, want)


@torch.no_grad()
def test_it_is_exported():
    class Step(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            weights, *self.rest = model.flat()
            self.names = [None if t is None else f"w{i}" for i, t in enumerate(weights)]
            for name, t in zip(self.names, weights, strict=True):
                if name is not None:
                    self.register_buffer(name, t)

        def forward(self, x, conv, ssm):
            weights = [None if name is None else getattr(self, name) for name in self.names]
            return torch.ops.mambakit.decode(x, conv, ssm, weights, *self.rest)

    model, x, states = make_model("int8"), torch.randn(2, H), make_states(2)
    others = [s.clone() for s in states]
    program = torch.export.export(Step(model), (x, *states)).module()
    assert torch.equal(program(x, *states), decode(x, model, *others))
    assert torch.equal(states[1], others[1])


@needs_native
def test_what_is_recorded_goes_with_the_state_and_follows_the_weights():
    model, x, states = make_model(), torch.randn(1, H), make_states(1)
    decode(x, model, *states)
    recorded = cpu._recorded[states[1]]
    before = [s.clone() for s in states]
    first = decode(x, model, *states)
    assert cpu._recorded[states[1]] is recorded
    model.final_norm.mul_(2)  # in place: the step reads it where it is
    for state, kept in zip(states, before, strict=True):
        state.copy_(kept)
    assert torch.allclose(decode(x, model, *states), 2 * first, rtol=1e-4)
    other = PackedModel(model.layers, model.final_norm / 2, model.head, model.eps)
    for state, kept in zip(states, before, strict=True):
        state.copy_(kept)
    assert torch.allclose(decode(x, other, *states), first, rtol=1e-4)
    assert cpu._recorded[states[1]] is not recorded
    step = weakref.ref(cpu._recorded[states[1]].step)
    del state, states
    gc.collect()
    assert step() is None, "a state that is gone holds no weights"


@needs_native
def test_a_prepared_step_that_is_gone_or_of_other_states():
    model, (conv, ssm) = make_model(), make_states(1)
    step = cpu.DecodeStep(model.layers, model.final_norm, model.head, model.eps, conv, ssm)
    x, handle = torch.randn(1, H), step.handle
    with pytest.raises(RuntimeError, match="make a DecodeStep of these"):
        torch.ops.mambakit.decode.prepared(x, conv, ssm.clone(), handle, VOCABULARY)
    del step
    gc.collect()
    with pytest.raises(RuntimeError, match="keep its DecodeStep"):
        torch.ops.mambakit.decode.prepared(x, conv, ssm, handle, VOCABULARY)


def test_half_weights_are_read_anew_at_every_call():
    """Where the native library would copy them it does not serve."""
    model, x, states = make_model(), torch.randn(1, H), make_states(1)
    half = PackedModel(model.layers, model.final_norm.bfloat16(), model.head, model.eps)
    kept = [s.clone() for s in states]
    first = decode(x, half, *states)
    half.final_norm.mul_(2)
    assert torch.allclose(decode(x, half, *kept), 2 * first, rtol=1e-4)


def test_what_does_not_fit():
    model, x, (conv, ssm) = make_model(), torch.randn(2, H), make_states(2)
    with pytest.raises(ValueError, match=r"decode: ssm_states has shape .* expected \(layers, b, d, n\)"):
        decode(x, model, conv, ssm[:, :1])
    with pytest.raises(RuntimeError, match="is for inference"):
        decode(x.requires_grad_(), model, conv, ssm)
    with pytest.raises(ValueError, match="a model of L layers has"):
        torch.ops.mambakit.decode(x.detach(), conv, ssm, [model.final_norm], ["float32"], [64], 1e-5, None)
