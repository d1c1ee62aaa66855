"""What `mambakit::whole_layer`'s implementation on GPUs hands to a plan, and what it does not: each call's tensors are
looked at anew. The plans here note what they are given."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import nn

from mambakit.ops._backends import dispatch
from mambakit.ops.fused_mixer import layer, layer_op, layer_schema, signature
from mambakit.ops.fused_mixer.layout import Layout
from mambakit.ops.fused_mixer.signature import LayerWeights
from mambakit.ops.selective_scan.schema import CHECKPOINT_INTERVAL
from tests.ops.closeness import relative_error
from tests.ops.fused_mixer.test_layer_op import IDS, LAST, NORMS, arguments

BF16, F32 = torch.bfloat16, torch.float32
B, L, H, D, N, R, K = 2, 5, 16, 32, 8, 4, 4
KINDS = [nn.Parameter, torch.Tensor.detach]
"""A model's weights, and what `functional_call` brings."""


class NotingPlan:
    """Notes (pass, signature, x or dy, residual or dtotal, weights) of each call, and computes nothing."""

    calls: list[tuple] = []

    def __init__(self, s):
        self.signature = s
        self.layout = o = Layout(s, {name: i for i, name in enumerate(("x", "kept", "y", *LayerWeights._fields))})
        o.keep(o.b * -(-o.length // CHECKPOINT_INTERVAL) * o.d * o.n)

    def forward(self, x, residual, w):
        self.calls.append(("forward", self.signature, x, residual, w))
        o, s = self.layout, self.signature
        total = torch.empty(s.shape, dtype=s.kept, device="cpu") if o.normed else None
        kept = torch.arange(o.kept_count + 64, dtype=s.dtype, device="cpu")
        return torch.empty(o.b, o.length, o.out, dtype=s.dtype, device="cpu"), total, kept

    def backward(self, dy, dtotal, saved, w, needs):
        self.calls.append(("backward", self.signature, dy, dtotal, w, saved))
        s = self.signature
        dx, dresidual = (torch.empty(s.shape, dtype=dtype, device="cpu") for dtype in (s.dtype, s.kept))
        given = dx, dresidual, *w
        return tuple(torch.zeros_like(t) if needed else None for t, needed in zip(given, needs, strict=True))


class Named(torch.Tensor):
    pass


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Those of the plans, and ("parts", arguments) of calls that go by parts."""
    seen: list[tuple] = []
    monkeypatch.setattr(NotingPlan, "calls", seen)
    monkeypatch.setattr(layer, "Plan", NotingPlan)
    monkeypatch.setattr(layer, "_plans", {})
    monkeypatch.setattr(layer_op, "_kinds", {})
    monkeypatch.setattr(signature, "unavailable", lambda: None)
    monkeypatch.setattr(signature, "_too_large", lambda *a: None)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)
    monkeypatch.setattr(layer_op, "plain_version", lambda name: lambda *a: seen.append(("parts", a)))
    return seen


def weights_of(make=nn.Parameter, **others) -> LayerWeights:
    shapes = {
        "norm": (H,), "in_proj": (2 * D, H), "conv": (D, 1, K), "conv_bias": (D,), "x_proj": (R + 2 * N, D),
        "dt_proj": (D, R), "dt_bias": (D,), "A_log": (D, N), "D": (D,), "out_proj": (H, D),
    }  # fmt: skip
    made = {name: make(torch.randn(shape)) for name, shape in shapes.items()}
    return LayerWeights(**{"in_bias": None, "out_bias": None, **made, **others})


def forward(w, x=None, residual=None, gradient=True):
    x = torch.randn(B, L, H).to(BF16) if x is None else x
    residual = torch.randn(x.shape) if residual is None else residual
    return layer_op.forward(x, residual, *w, 1e-5, F32, BF16, gradient, None)


def backward(w, dy=None, dtotal=None, total=None, memory=None, needs=None):
    total = torch.randn(B, L, H) if total is None else total
    memory = torch.randn(4096).to(BF16) if memory is None else memory
    needs = [True, True, *(t is not None for t in w)] if needs is None else needs
    return layer_op.backward(dy, dtotal, None, True, *w, total, memory, 1e-5, F32, BF16, BF16, needs, None)


PASSES = [forward, backward]


def unaligned(t: torch.Tensor) -> torch.Tensor:
    """The same values, from an address that is no multiple of 16 on."""
    memory = torch.empty(t.numel() + 1, dtype=t.dtype)[1:]
    return memory.copy_(t.detach().flatten()).view(t.shape)


def across(t: torch.Tensor) -> torch.Tensor:
    """The same values, not contiguous."""
    return t.detach().mT.contiguous().mT


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("call", PASSES)
def test_weights_as_they_are_go_to_the_plan(call, make, calls):
    w = weights_of(make)
    for _ in range(2):
        call(w)
        assert calls[-1][0] == call.__name__
        assert all(mine is theirs for mine, theirs in zip(calls[-1][4], w, strict=True))
    assert calls[0][1] is calls[1][1]


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("call", PASSES)
def test_the_same_address_with_another_shape_dtype_or_absence(call, make, calls):
    w = weights_of(make)
    flat = w._replace(conv=make(w.conv.detach().view(D, K)))
    half = w.x_proj.detach().view(BF16).flatten()[: w.x_proj.numel()].view(w.x_proj.shape)
    rounded = w._replace(x_proj=make(half))
    bare, biased = w._replace(conv_bias=None), w._replace(out_bias=make(torch.randn(H)))
    for given in (w, flat, w, rounded, w, bare, w, biased, w):
        call(given)
        assert calls[-1][0] == call.__name__
        assert calls[-1][1].weights.each == tuple(None if t is None else (t.dtype, t.shape) for t in given)
    assert flat.conv.data_ptr() == w.conv.data_ptr()
    assert rounded.x_proj.data_ptr() == w.x_proj.data_ptr()


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("call", PASSES)
@pytest.mark.parametrize("moved", [unaligned, across])
def test_a_copy_where_kernels_cannot_read(call, make, moved, calls):
    """A new one for each call: of the values that the weight has then."""
    w = weights_of(make)
    call(w)
    other = w._replace(x_proj=make(moved(w.x_proj)))
    for value in (1.0, 2.0):
        other.x_proj.data.fill_(value)
        call(other)
        name, _, _, _, given, *_ = calls[-1]
        assert name == call.__name__
        assert given.in_proj is w.in_proj
        assert given.x_proj.is_contiguous()
        assert given.x_proj.data_ptr() % 16 == 0
        assert torch.equal(given.x_proj, torch.full_like(given.x_proj, value))


@pytest.mark.parametrize("moved", [unaligned, across])
def test_what_is_no_weight_is_copied_too(moved, calls):
    w = weights_of()
    x, residual, dy, dtotal, total = (torch.randn(B, L, H) for _ in range(5))
    x, dy, memory = x.to(BF16), dy.to(BF16), torch.randn(64, 64).to(BF16)
    forward(w, moved(x), moved(residual))
    backward(w, moved(dy), moved(dtotal), moved(total), moved(memory))
    (_, _, x_read, residual_read, _), (_, _, dy_read, dtotal_read, _, (_, total_read, memory_read)) = calls
    found = x_read, residual_read, dy_read, dtotal_read, total_read, memory_read
    for mine, theirs in zip(found, (x, residual, dy.view(-1, H), dtotal, total, memory), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.is_contiguous()
        assert mine.data_ptr() % 16 == 0


def freed(t):
    t = t.detach().clone()
    t.untyped_storage().resize_(0)
    return t


SPECIAL = {
    "freed": freed, "subclass": lambda t: t.detach().as_subclass(Named), "meta": lambda t: t.to("meta"),
    "negated": lambda t: torch.complex(t.detach(), t.detach()).conj().imag,
    "zeros without memory": lambda t: torch._efficientzerotensor(t.shape), "sparse": lambda t: t.detach().to_sparse(),
    "functional": lambda t: torch._to_functional_tensor(t.detach()),
}  # fmt: skip


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("call", PASSES)
@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_plain_memory_goes_by_parts(call, make, kind, calls):
    if make is nn.Parameter and kind in ("negated", "zeros without memory"):
        pytest.skip("the dispatcher hands on none")
    w = weights_of(make)
    for name in ("x_proj", "in_proj"):
        call(w)
        call(w._replace(**{name: make(SPECIAL[kind](getattr(w, name)))}))
        assert [c[0] for c in calls] == [call.__name__, "parts"]
        calls.clear()


@pytest.mark.parametrize("kind", SPECIAL)
def test_nor_do_activations_without_plain_memory(kind, calls):
    w, special = weights_of(), SPECIAL[kind]
    rows = torch.randn(B, L, H)
    forward(w, x=special(rows) if kind == "negated" else special(rows.to(BF16)))
    forward(w, residual=special(rows))
    for name in ("dy", "dtotal", "total"):
        backward(w, **{name: special(rows)})
    backward(w, memory=special(torch.randn(4096)))
    assert [c[0] for c in calls] == ["parts"] * 6


@pytest.mark.parametrize("call", PASSES)
@pytest.mark.parametrize("make", KINDS)
def test_tensors_inside_a_transform_go_by_parts(call, make, calls):
    w = weights_of(make)
    call(w)

    def run(t):
        call(w._replace(x_proj=make(t)))
        return t.sum()

    torch.func.vmap(run, randomness="same")(torch.randn(3, *w.x_proj.shape))
    assert [c[0] for c in calls] == [call.__name__, "parts"]


def test_nor_do_activations_inside_a_transform(calls):
    w = weights_of()

    def run(rows, memory):
        forward(w, x=rows.to(BF16))
        forward(w, residual=rows)
        for name in ("dtotal", "total"):
            backward(w, **{name: rows})
        backward(w, dy=rows.to(BF16))
        backward(w, memory=memory)
        return rows.sum()

    torch.func.vmap(run, randomness="same")(torch.randn(3, B, L, H), torch.randn(3, 4096).to(BF16))
    assert [c[0] for c in calls] == ["parts"] * 6


def test_parts_compute_in_the_dtype_of_the_call(monkeypatch):
    """Not in autocast's."""
    monkeypatch.setattr(layer_op, "plain_version", dispatch.plain_version)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1)
    w, x, residual = weights_of(torch.Tensor.detach), torch.randn(B, L, H), torch.randn(B, L, H)
    given = x, residual, *w, 1e-5, F32, F32, True, None
    expected, total, memory = layer_op.forward(*given)
    needs = [True, True, *(t is not None for t in w)]
    rest = torch.randn(B, L, H), None, None, True, *w, total, memory, 1e-5, F32, F32, F32, needs, None
    gradients = layer_op.backward(*rest)
    with torch.autocast("cpu", BF16):
        assert torch.equal(layer_op.forward(*given)[0], expected)
        assert all(map(torch.equal, layer_op.backward(*rest), gradients))


def test_what_is_to_be_negated_comes_resolved_from_the_dispatcher(calls):
    w = weights_of()
    forward(w)
    w.x_proj.data = torch.complex(w.x_proj.detach(), w.x_proj.detach()).conj().imag
    assert w.x_proj.is_neg()
    here = torch.library.Library("mambakit", "IMPL")
    try:
        here.impl("whole_layer_forward", layer_op.forward, "CPU")
        with torch.no_grad():
            x, residual = torch.randn(B, L, H).to(BF16), torch.randn(B, L, H)
            torch.ops.mambakit.whole_layer_forward(x, residual, *w, 1e-5, F32, BF16, True, None)
    finally:
        here._destroy()
    name, _, _, _, given = calls[-1]
    assert name == "forward"
    assert not given.x_proj.is_neg()
    assert torch.equal(given.x_proj, w.x_proj.detach().resolve_neg())


@pytest.mark.parametrize("call", PASSES)
@pytest.mark.parametrize("make", KINDS)
def test_another_device_goes_by_parts(call, make, calls, monkeypatch):
    """A context is the current device's, and a weight elsewhere is no address there."""
    w = weights_of(make)
    call(w)
    of = torch.Tensor.get_device
    for elsewhere in (w.x_proj, w.in_proj):
        monkeypatch.setattr(torch.Tensor, "get_device", lambda t, e=elsewhere: 1 if t is e else of(t))
        call(w)
    monkeypatch.setattr(torch.Tensor, "get_device", of)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1)
    call(w)
    assert [c[0] for c in calls] == [call.__name__, *["parts"] * 3]


@pytest.mark.parametrize("call", PASSES)
def test_a_thread_between_the_look_and_the_call(call, calls, monkeypatch):
    """Another's weights with the same in_proj, remembered after ours were compared."""
    w = weights_of()
    other = w._replace(conv_bias=None)
    call(w)
    compare = layer_op._are

    def interrupted(*a):
        same = compare(*a)
        monkeypatch.setattr(layer_op, "_are", compare)
        thread = threading.Thread(target=call, args=(other,))
        thread.start()
        thread.join()
        return same

    monkeypatch.setattr(layer_op, "_are", interrupted)
    call(w)
    for (*_, s, _, _, given), expected in zip([c[:5] for c in calls], (w, other, w), strict=True):
        assert given == expected
        assert s.weights.each == tuple(None if t is None else (t.dtype, t.shape) for t in expected)


def test_threads(calls):
    w = weights_of()
    several = [w, w._replace(conv_bias=None), w._replace(conv=nn.Parameter(w.conv.detach().view(D, K)))]

    def run(given):
        for _ in range(50):
            forward(given)

    threads = [threading.Thread(target=run, args=(each,)) for each in several * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 300
    for _, s, _, _, given in calls:
        assert s.weights.each == tuple(None if t is None else (t.dtype, t.shape) for t in given)


@pytest.mark.parametrize("call", PASSES)
def test_nothing_is_kept_of_the_weights(call, calls):
    w = weights_of()
    w = w._replace(x_proj=nn.Parameter(across(w.x_proj)))
    call(w)
    copy = weakref.ref(calls[-1][4].x_proj)
    watched = [copy, *(weakref.ref(t) for t in w if t is not None)]
    calls.clear()
    del w
    gc.collect()
    assert [each() for each in watched] == [None] * len(watched)


def test_shapes_without_end(calls, monkeypatch):
    monkeypatch.setattr(layer_op, "_MOST", 4)
    for h in range(16, 16 * 12, 16):
        w = weights_of()._replace(
            norm=torch.randn(h), in_proj=torch.randn(2 * D, h), out_proj=torch.randn(h, D)
        )  # fmt: skip
        forward(w, torch.randn(B, L, h).to(BF16))
        assert calls[-1][0] == "forward"
        assert len(layer_op._kinds) <= 4


def test_a_residual_of_another_shape_or_dtype_goes_by_parts(calls):
    w = weights_of()
    forward(w, residual=torch.randn(B, L + 1, H))
    forward(w, residual=torch.randn(B, L, H).to(BF16))
    assert [c[0] for c in calls] == ["parts"] * 2


def test_results():
    """Those of the schema: memory of the size that is kept, and the gradients that are needed."""
    w = weights_of()
    x, residual = torch.randn(B, L, H).to(BF16), torch.randn(B, L, H)
    numbers = 1e-5, F32, BF16, True, None
    y, total, memory = forward(w, x, residual)
    for mine, theirs in zip((y, total, memory), layer_schema._fake(x, residual, *w, *numbers), strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
    assert torch.equal(memory, torch.arange(len(memory), dtype=BF16))
    assert forward(w, x, residual, gradient=False)[2].numel() == 0
    every = [True, True, *(t is not None for t in w)]
    for needs in (every, [False] * 2 + every[2:], every[:4] + [False] * len(every[4:])):
        found = backward(w, needs=needs)
        given = None, None, None, True, *w, total, memory, 1e-5, F32, BF16, BF16, needs, None
        expected = layer_schema._backward_fake(*given)
        assert [(g.shape, g.dtype) for g in found] == [(g.shape, g.dtype) for g in expected]
        assert len({g.data_ptr() for g in found}) == len(found) == sum(needs)


@pytest.mark.parametrize("by", ["grad", "func"])
@pytest.mark.parametrize("fields", NORMS, ids=IDS)
@pytest.mark.parametrize(("norm", "residual"), [(True, True), (False, False)], ids=["block", "mixer"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_several_outputs_at_once(by, fields, norm, residual):
    given = arguments(norm, residual, fields=fields)
    y, *_ = torch.ops.mambakit.whole_layer(*given)
    inputs = [t for t in given[:LAST] if t is not None]
    dys = torch.randn(3, *y.shape)

    def of_one(dy):
        return torch.autograd.grad(y, inputs, dy, retain_graph=True)

    if by == "grad":
        found = torch.autograd.grad(y, inputs, dys, retain_graph=True, is_grads_batched=True)
    else:
        found = torch.func.vmap(of_one)(dys)
    for mine, *theirs in zip(found, *map(of_one, dys), strict=True):
        assert relative_error(mine, torch.stack(theirs)) < 1e-5
