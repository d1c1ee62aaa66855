"""MambaStack beside a float64 loop written from the equations, and beside torch.nn.LSTM's shapes."""

from __future__ import annotations

import copy
import io
import random
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

from mambakit.nn import MambaStack
from mambakit.ops._releases import RELEASE

# float32 beside float64, or sums in another order: values are of order 1.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


# Older releases' torch.compile cannot trace how a state is laid out; eagerly a stack runs from 2.4 on.
traced = pytest.mark.skipif(RELEASE < (2, 9), reason="torch.compile traces a stack from torch 2.9 on")


def make(bidirectional=False, layers=3, **options) -> MambaStack:
    torch.manual_seed(1)
    return MambaStack(5, 16, layers, bidirectional, **options)


# -- the loop ----------------------------------------------------------------------------------------------------------


def mixer_loop(mixer, x, conv, h):
    """(l, hidden) -> (l, hidden), token by token; the state (d, k - 1), (d, n) is the one before the first."""
    out, A, r, n = [], -torch.exp(mixer.A_log), mixer.time_step_rank, mixer.ssm_state_size
    for token in x:
        u, z = (mixer.in_proj.weight @ token).chunk(2)
        window = torch.cat([conv, u[:, None]], 1)
        conv = window[:, 1:]
        u = F.silu((window * mixer.conv1d.weight[:, 0]).sum(1) + mixer.conv1d.bias)
        dt, B, C = (mixer.x_proj.weight @ u).split([r, n, n])
        delta = F.softplus(mixer.dt_proj.weight @ dt + mixer.dt_proj.bias)
        h = torch.exp(delta[:, None] * A) * h + (delta * u)[:, None] * B
        out.append(mixer.out_proj.weight @ ((h @ C + mixer.D * u) * F.silu(z)))
    return torch.stack(out), conv, h


def norm_loop(norm, x):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + norm.eps) * norm.weight


def loop(stack, x, state=None):
    """One sequence (l, f) -> (y (l, features), conv, ssm), in the dtype of ``x``."""
    if state is None:
        state = tuple(t[:, 0].to(x.dtype) for t in stack.zero_state(1))
    stream, after = F.linear(x, stack.in_proj.weight, stack.in_proj.bias), []
    for index, layer in enumerate(stack.layers):
        entered, outputs = norm_loop(layer.norm, stream), []
        for direction, mixer in enumerate(layer.mixers):
            number = index * stack.directions + direction
            turned = entered.flip(0) if direction else entered
            out, *states = mixer_loop(mixer, turned, state[0][number], state[1][number])
            outputs.append(out.flip(0) if direction else out)
            after.append(states)
        if index < stack.num_layers - 1:
            stream = stream + sum(outputs)
    y = torch.cat([norm_loop(n, stream + out) for n, out in zip(stack.norms, outputs, strict=True)], -1)
    return y, torch.stack([s[0] for s in after]), torch.stack([s[1] for s in after])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("length", [1, 9])
def test_values_and_gradients_are_the_loops(bidirectional, length):
    stack = make(bidirectional)
    wide = copy.deepcopy(stack).double()
    x = torch.randn(length, 2, 5, requires_grad=True)
    conv, ssm = (torch.randn_like(t).mul(0.3).requires_grad_() for t in stack.zero_state(2))
    y, (conv_after, ssm_after) = stack(x, (conv, ssm))
    weights = [torch.randn_like(t) for t in (y, conv_after, ssm_after)]
    sum((w * t).sum() for w, t in zip(weights, (y, conv_after, ssm_after), strict=True)).backward()

    given = [t.detach().double().requires_grad_() for t in (x, conv, ssm)]
    found = [loop(wide, given[0][:, i], (given[1][:, i], given[2][:, i])) for i in range(2)]
    expected = [torch.stack(column, 1) for column in zip(*found, strict=True)]
    sum((w.double() * t).sum() for w, t in zip(weights, expected, strict=True)).backward()
    for ours, theirs in zip((y, conv_after, ssm_after), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, **CLOSE)
    pairs = [("x", x, given[0]), ("conv", conv, given[1]), ("ssm", ssm, given[2])]
    pairs += [(name, p, q) for (name, p), q in zip(stack.named_parameters(), wide.parameters(), strict=True)]
    for name, ours, theirs in pairs:
        scale = float(theirs.grad.abs().max())
        assert float((ours.grad.double() - theirs.grad).abs().max()) <= 1e-4 * scale + 1e-6, name


def test_a_double_stack_is_the_loop():
    stack = make(True, layers=2).double()
    x = torch.randn(7, 1, 5, dtype=torch.float64)
    y, state = stack(x)
    expected = loop(stack, x[:, 0])
    torch.testing.assert_close(y[:, 0], expected[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state[1][:, 0], expected[2], rtol=1e-10, atol=1e-12)


# -- in the place of an LSTM -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_shapes_are_an_lstms(bidirectional, batch_first):
    lstm = nn.LSTM(5, 16, 2, bidirectional=bidirectional, batch_first=batch_first)
    stack = make(bidirectional, layers=2, batch_first=batch_first)
    for shape in ((7, 3, 5), (1, 1, 5), (4, 5)):
        x = torch.randn(shape)
        (ours, (conv, ssm)), (theirs, (h, _)) = stack(x), lstm(x)
        assert ours.shape == theirs.shape
        assert conv.shape[:-2] == ssm.shape[:-2] == h.shape[:-1]
        again, _ = stack(x, (conv, ssm))
        assert again.shape == ours.shape
        assert not torch.equal(again, ours)  # it goes on from there
    sequences = [torch.randn(n, 5) for n in (2, 6, 1, 4)]
    packed = pack_sequence(sequences, enforce_sorted=False)
    ours, theirs = stack(packed)[0], lstm(packed)[0]
    assert ours.data.shape == theirs.data.shape
    assert torch.equal(ours.batch_sizes, theirs.batch_sizes)


@pytest.mark.parametrize("grad", [True, False])
def test_chunks_and_steps_are_the_whole(grad):
    stack, x = make(), torch.randn(11, 2, 5)
    with torch.set_grad_enabled(grad):
        whole, last = stack(x)
        given = tuple(torch.zeros_like(t) for t in last)
        for cut in ([3, 1, 7], [1] * 11):
            state, parts = given, []
            for part in x.split(cut):
                before = [t.clone() for t in state]
                y, after = stack(part, state)
                assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))  # not written to
                parts.append(y)
                state = after
            torch.testing.assert_close(torch.cat(parts), whole, **CLOSE)
            torch.testing.assert_close(state, last, **CLOSE)
        state, parts = None, []
        for token in x:
            y, state = stack.step(token, state)
            parts.append(y)
        torch.testing.assert_close(torch.stack(parts), whole, **CLOSE)
        torch.testing.assert_close(state, last, **CLOSE)
        one, after = stack.step(x[0, 0])
        torch.testing.assert_close(one, whole[0, 0], **CLOSE)
        assert after[0].dim() == 3


def test_states_may_be_slices():
    stack, x = make(), torch.randn(3, 2, 5)
    state = tuple(torch.randn(*t.shape[:2], t.shape[3], t.shape[2]).transpose(2, 3) for t in stack.zero_state(4))
    some = tuple(t[:, 1::2] for t in state)
    expected = stack(x, tuple(t.contiguous() for t in some))
    with torch.no_grad():
        torch.testing.assert_close(stack(x, some), expected, **CLOSE)
        one = tuple(t[:, :1].expand(-1, 2, -1, -1) for t in state)
        torch.testing.assert_close(stack(x, one), stack(x, tuple(t.contiguous() for t in one)), **CLOSE)
        torch.testing.assert_close(stack.step(x[0], some), stack.step(x[0], tuple(t.clone() for t in some)), **CLOSE)


def test_gradients_flow_through_chunks():
    stack, x = make(), torch.randn(6, 2, 5, requires_grad=True)
    stack(x)[0].square().sum().backward()
    expected, x.grad = x.grad, None
    first, state = stack(x[:4])
    (first.square().sum() + stack(x[4:], state)[0].square().sum()).backward()
    torch.testing.assert_close(x.grad, expected, **CLOSE)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("grad", [True, False])
def test_packed_sequences_are_separate_ones(bidirectional, grad):
    stack = make(bidirectional)
    sequences = [torch.randn(n, 5) for n in (3, 8, 1, 8, 5)]
    state = tuple(torch.randn_like(t) * 0.3 for t in stack.zero_state(5))
    with torch.set_grad_enabled(grad):
        for enforce in (False, True):
            order = range(5) if not enforce else [1, 3, 4, 0, 2]
            some = [sequences[i] for i in order]
            mine = tuple(t[:, list(order)] for t in state)
            y, after = stack(pack_sequence(some, enforce_sorted=enforce), mine)
            for i, (ours, sequence) in enumerate(zip(unpack_sequence(y), some, strict=True)):
                alone, (conv, ssm) = stack(sequence, tuple(t[:, i] for t in mine))
                torch.testing.assert_close(ours, alone, **CLOSE)
                torch.testing.assert_close((after[0][:, i], after[1][:, i]), (conv, ssm), **CLOSE)


def separate(stack, x, starts, state):
    """What resets mean: each episode of (l, f) alone; the state enters at the end that a direction reads first."""
    bounds = [0, *[t for t in range(1, len(x)) if starts[t]], len(x)]
    episodes = [x[a:b] for a, b in pairwise(bounds)]
    zero = tuple(torch.zeros_like(t) for t in state)
    outs, states = [], []
    for index, episode in enumerate(episodes):
        given = [t.clone() for t in zero]
        for number in range(stack.settings.num_hidden_layers):
            backward = stack.directions == 2 and number % 2
            enters = index == len(episodes) - 1 if backward else index == 0 and not starts[0]
            if enters:
                for mine, theirs in zip(given, state, strict=True):
                    mine[number] = theirs[number]
        y, after = stack(episode, tuple(given))
        outs.append(y)
        states.append(after)
    last = [t.clone() for t in states[-1]]
    if stack.directions == 2:
        for mine, theirs in zip(last, states[0], strict=True):
            mine[1::2] = theirs[1::2]
    return torch.cat(outs), last


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_resets_are_separate_sequences(bidirectional, seed):
    stack, draw = make(bidirectional), torch.Generator().manual_seed(seed)
    x, state = torch.randn(12, 4, 5), tuple(torch.randn_like(t) * 0.3 for t in stack.zero_state(4))
    starts = torch.rand(12, 4, generator=draw) < 0.25
    starts[:, 3] = False
    starts[0, 0], starts[0, 1] = True, False
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y, after = stack(x, state, starts)
        for i in range(4):
            expected, last = separate(stack, x[:, i], starts[:, i], tuple(t[:, i] for t in state))
            torch.testing.assert_close(y[:, i], expected, **CLOSE)
            torch.testing.assert_close([t[:, i] for t in after], last, **CLOSE)
    alone, _ = stack(x[:, 0], tuple(t[:, 0] for t in state), starts[:, 0])
    torch.testing.assert_close(alone, y[:, 0], **CLOSE)
    sizes = [12, 5, 9, 1]
    packed = pack_sequence([x[:n, i] for i, n in enumerate(sizes)], enforce_sorted=False)
    mask = pack_sequence([starts[:n, i] for i, n in enumerate(sizes)], enforce_sorted=False)
    y, after = stack(packed, state, mask)
    for i, (n, ours) in enumerate(zip(sizes, unpack_sequence(y), strict=True)):
        expected, last = separate(stack, x[:n, i], starts[:n, i], tuple(t[:, i] for t in state))
        torch.testing.assert_close(ours, expected, **CLOSE)
        torch.testing.assert_close([t[:, i] for t in after], last, **CLOSE)


def test_steps_with_resets_are_the_whole():
    stack, draw = make(batch_first=True), random.Random(0)
    x = torch.randn(3, 10, 5)
    starts = torch.tensor([[draw.random() < 0.3 for _ in range(10)] for _ in range(3)])
    whole, last = stack(x, None, starts)
    state, parts = None, []
    for t in range(10):
        y, state = stack.step(x[:, t], state, starts[:, t])
        parts.append(y)
    torch.testing.assert_close(torch.stack(parts, 1), whole, **CLOSE)
    torch.testing.assert_close(state, last, **CLOSE)


# -- as a module -------------------------------------------------------------------------------------------------------


def test_a_state_of_inference_mode_goes_on_under_autograd():
    """A rollout in `torch.inference_mode`, then an update from the states that it kept."""
    stack, x = make(), torch.randn(6, 2, 5)
    starts = torch.zeros(3, 2, dtype=torch.bool)
    starts[1, 0] = True
    with torch.inference_mode():
        _, state = stack(x[:3].clone())
    with torch.no_grad():
        _, plain = stack(x[:3])
    for call in (
        lambda s: stack(x[3:], s),
        lambda s: stack(x[3:], s, starts),
        lambda s: stack.step(x[3], s),
        lambda s: stack(pack_sequence([x[3:, 0], x[4:, 1]]), s),
    ):
        found = []
        for before in (state, plain):
            stack.zero_grad()
            y, after = call(before)
            (y.data if isinstance(y, nn.utils.rnn.PackedSequence) else y).sum().backward()
            found.append([*after, *(p.grad.clone() for p in stack.parameters())])
        assert all(map(torch.equal, *found))


def test_state_dict():
    stack, x = make(True), torch.randn(4, 2, 5)
    file = io.BytesIO()
    torch.save(stack.state_dict(), file)
    file.seek(0)
    torch.manual_seed(9)
    other = MambaStack(5, 16, 3, True)
    assert not torch.equal(other(x)[0], stack(x)[0])
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x)[0], stack(x)[0])
    other.reset_parameters()
    assert not torch.equal(other(x)[0], stack(x)[0])
    torch.manual_seed(1)
    other.reset_parameters()  # draws what a new one would
    assert torch.equal(other(x)[0], stack(x)[0])


def test_dropout_is_between_layers_in_training():
    stack, x = make(dropout=0.5), torch.randn(4, 2, 5)
    assert not torch.equal(stack(x)[0], stack(x)[0])
    assert torch.equal(stack.eval()(x)[0], stack(x)[0])
    with pytest.warns(UserWarning, match="num_layers is 1"):
        one = MambaStack(5, 16, 1, dropout=0.5)
    assert torch.equal(one(x)[0], one(x)[0])


def test_half_precision():
    stack, x = make(dtype=torch.bfloat16), torch.randn(9, 2, 5)
    assert stack.layers[0].mixers[0].A_log.dtype == torch.float32
    y, (conv, ssm) = stack(x.bfloat16())
    assert (y.dtype, conv.dtype, ssm.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    wide = copy.deepcopy(stack).float()
    torch.testing.assert_close(y.float(), wide(x)[0], rtol=0.05, atol=0.1)  # bfloat16 keeps 8 bits


@traced
@pytest.mark.parametrize("bidirectional", [False, True])
def test_compile(bidirectional):
    stack, x = make(bidirectional, layers=1), torch.randn(6, 2, 5)
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    y, state = stack(x)
    torch.testing.assert_close(compiled(x), (y, state), **CLOSE)
    stack.zero_grad()
    y.sum().backward()
    expected = [p.grad for p in stack.parameters()]
    stack.zero_grad()
    compiled(x)[0].sum().backward()
    torch.testing.assert_close([p.grad for p in stack.parameters()], expected, **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, state), stack(x, state), **CLOSE)


@traced
def test_compiling_a_step_and_resets():
    stack, x = make(layers=1), torch.randn(6, 2, 5)
    state = stack.zero_state(2)
    step = torch.compile(stack.step, fullgraph=True, backend="aot_eager")
    mask = torch.tensor([True, False])
    with torch.no_grad():
        torch.testing.assert_close(step(x[0], state, mask), stack.step(x[0], state, mask), **CLOSE)
    starts = torch.rand(6, 2) < 0.5
    compiled = torch.compile(stack, backend="aot_eager")
    torch.testing.assert_close(compiled(x, None, starts), stack(x, None, starts), **CLOSE)
    torch._dynamo.reset()
    whole = torch.compile(stack, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="a matter of values"):
        whole(x, None, starts)


@traced
def test_export():
    stack, x = make(layers=1).eval(), torch.randn(6, 2, 5)
    state = stack.zero_state(2)
    length = torch.export.Dim("l", min=2)
    program = torch.export.export(stack, (x, state), dynamic_shapes=({0: length}, (None, None))).module()
    longer = torch.randn(17, 2, 5)
    torch.testing.assert_close(program(longer, state), stack(longer, state), **CLOSE)
    with pytest.raises(ValueError, match="starts"):
        torch.export.export(stack, (x, state, torch.rand(6, 2) < 0.5), strict=False)


def test_mistakes():
    stack = make()
    for call, message in (
        (lambda: MambaStack(0, 8), "input_size is 0"),
        (lambda: MambaStack(5, 8, 2.0), "num_layers is 2.0"),
        (lambda: MambaStack(5, 8, dropout=2), "dropout is 2"),
        (lambda: stack(torch.randn(4, 2, 6)), r"x has shape \(4, 2, 6\).*input_size = 5"),
        (lambda: stack(torch.randn(4, 2, 2, 5)), r"\(l, b, f\) or \(l, f\)"),
        (lambda: stack(torch.randn(0, 2, 5)), "nothing to read"),
        (lambda: stack(torch.zeros(4, 2, 5, dtype=torch.long)), "must be floating"),
        (lambda: stack(torch.randn(4, 2, 5).double()), "x is of torch.float64, the stack of torch.float32; cast"),
        (lambda: stack(pack_sequence([torch.randn(2, 5).half()])), "x is of torch.float16"),
        (lambda: stack.step(torch.randn(2, 5).bfloat16()), "x is of torch.bfloat16"),
        (lambda: stack.zero_state(2.5), "batch_size is 2.5"),
        (lambda: stack.zero_state(-1), "batch_size is -1"),
        (lambda: stack(torch.randn(4, 2, 5), torch.zeros(3)), "give the pair"),
        (lambda: stack(torch.randn(4, 2, 5), stack.zero_state(3)), r"conv has shape \(3, 3, 32, 3\).*2 sequences"),
        (lambda: stack(torch.randn(4, 2, 5), None, torch.zeros(4, 3, dtype=torch.bool)), r"must be \(4, 2\)"),
        (lambda: stack(torch.randn(4, 2, 5), None, torch.zeros(4, 2)), "must be bool"),
        (lambda: stack(pack_sequence([torch.randn(2, 5)]), None, torch.zeros(2).bool()), "must be a PackedSequence"),
        (lambda: make(True).step(torch.randn(2, 5)), "whole sequences"),
        (lambda: stack.step(torch.randn(2, 2, 5)), r"x has shape \(2, 2, 5\)"),
        (lambda: stack.step(torch.randn(2, 6)), r"x has shape \(2, 6\); it must be \(b, f\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="x is a list"):
        stack([1])


@pytest.mark.cuda
@pytest.mark.parametrize("bidirectional", [False, True])
def test_on_a_gpu(bidirectional):
    stack, x = make(bidirectional), torch.randn(70, 3, 5)
    starts = torch.rand(70, 3) < 0.1
    gpu = copy.deepcopy(stack).cuda()
    for mask in (None, starts):
        stack.zero_grad(), gpu.zero_grad()
        y, state = stack(x, None, mask)
        y.square().sum().backward()
        ours, after = gpu(x.cuda(), None, None if mask is None else mask.cuda())
        ours.square().sum().backward()
        torch.testing.assert_close(ours.cpu(), y, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close([t.cpu() for t in after], list(state), rtol=1e-3, atol=1e-3)
        for p, q in zip(gpu.parameters(), stack.parameters(), strict=True):
            scale = float(q.grad.abs().max())
            assert float((p.grad.cpu() - q.grad).abs().max()) <= 2e-3 * scale + 1e-5
