"""Every signature of the compiled extensions, by its number of arguments, as upstream's releases call them."""

from __future__ import annotations

import pytest
import torch

from mambakit.compat import convolution_extension as conv
from mambakit.compat import scan_extensions
from tests.compat.oracles import convolution, error, gradients, leaves, scan, wide


def operands(groups=1, dtype=torch.float32):
    """u, delta, A, B, C, D, z, delta_bias as mamba_ssm's Python hands them to the extension."""
    u, delta, z = (torch.randn(2, 6, 9).to(dtype) for _ in range(3))
    B, C = (torch.randn(2, groups, 3, 9).to(dtype) for _ in range(2))
    return [u, delta, -torch.rand(6, 3), B, C, torch.randn(6), z, torch.randn(6) - 2]


TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 1.2e-2}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("gated", [True, False])
def test_selective_scan_cuda(gated, dtype):
    """9 arguments forward and 14 backward; without z two results and seven gradients, with it one more of each."""
    arguments = operands(2, dtype)
    if not gated:
        arguments[6] = None
    *first, z, bias = arguments
    exact = leaves(*map(wide, arguments))
    expected, last = scan(*exact, True)
    found = scan_extensions.scan_fwd(*first, z, bias, True)
    assert len(found) == 3 if gated else 2
    out, x = found[:2]
    assert not out.requires_grad
    assert error(out, scan(*[t for i, t in enumerate(map(wide, arguments)) if i < 6], None, bias, True)[0]) < 1.2e-2
    assert error(found[-1] if gated else out, expected) < TOLERANCE[dtype]
    assert x.shape == (2, 6, 1, 6)
    assert error(x[:, :, -1, 1::2], last) < TOLERANCE[dtype]
    dout = torch.randn(2, 6, 9).to(dtype)
    right = dict(zip([i for i in range(8) if exact[i] is not None], gradients(expected, exact, dout), strict=True))
    given = torch.empty_like(z) if gated else None
    for dz, recompute in ((None, False), (given, True)):
        if recompute and not gated:
            continue
        grads = scan_extensions.scan_bwd(*first, z, bias, dout, x, out, dz, True, recompute)
        assert len(grads) == 7 + gated + recompute
        order = [*range(6), 7, *([6] if gated else [])]  # du, ddelta, dA, dB, dC, dD, ddelta_bias, dz
        for i, value in zip(order, grads, strict=False):
            assert value.dtype == arguments[i].dtype
            assert error(value, right[i]) < 4 * TOLERANCE[dtype]
        if dz is not None:
            assert grads[7] is dz
            assert error(grads[8], expected) < TOLERANCE[dtype]


def test_absent_arguments_have_no_gradient():
    u, delta, A, B, C, *_ = operands()
    grads = scan_extensions.scan_bwd(u, delta.abs(), A, B, C, None, None, None, u, None, None, None, False, False)
    assert grads[5] is None
    assert grads[6] is None


def test_states_of_long_sequences_are_the_last_chunk_s():
    u, delta, A, B, C, D, *_ = operands()
    long = [t.repeat(*[1] * (t.dim() - 1), 240) for t in (u, delta, B, C)]
    _, x = scan_extensions.scan_fwd(long[0], long[1], A, long[2], long[3], D, None, None, True)
    assert x.shape == (2, 6, 2, 6)  # 2,160 tokens
    assert error(x[:, :, -1, 1::2], scan(long[0], long[1], A, long[2], long[3], D, None, None, True)[1]) < 4e-6
    assert x[:, :, 0].isnan().all()


@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize("out_float", [True, False])
def test_selective_scan_cuda_oflex(out_float, shared):
    """10 arguments forward, 11 backward; delta may have fewer channels than u."""
    u, delta, A, B, C, D, _, bias = operands(2, torch.bfloat16)
    delta, bias = delta[:, ::shared], bias[::shared]
    exact = leaves(*map(wide, (u, delta, A, B, C, D, bias)))
    steps, offset = (exact[i].repeat_interleave(shared, dim) for i, dim in ((1, 1), (6, 0)))
    expected, last = scan(exact[0], steps, *exact[2:6], None, offset, True)
    out, x = scan_extensions.oflex_fwd(u, delta, A, B, C, D, bias, True, 1, out_float)
    assert out.dtype == (torch.float32 if out_float else torch.bfloat16)
    assert error(out, expected) < (4e-6 if out_float else 1.2e-2)
    assert error(x[:, :, -1, 1::2], last) < 4e-6
    dout = torch.randn(out.shape).to(out.dtype)
    grads = scan_extensions.oflex_bwd(u, delta, A, B, C, D, bias, dout, x, True, 1)
    for found, given, right in zip(grads, (u, delta, A, B, C, D, bias), gradients(expected, exact, dout), strict=True):
        assert found.dtype == given.dtype
        assert error(found, right) < 3e-2
    with pytest.raises(ValueError, match="4 channels of delta do not divide the 6 of u"):
        scan_extensions.oflex_fwd(u, u[:, :4], A, B, C, D, bias, True, 1, True)


def test_selective_scan_cuda_core():
    u, delta, A, B, C, D, _, bias = operands(2)
    out, x = scan_extensions.core_fwd(u, delta, A, B, C, D, bias, True, 1)
    expected, last = scan(u, delta, A, B, C, D, None, bias, True)
    assert error(out, expected) < 4e-6
    assert error(x[:, :, -1, 1::2], last) < 4e-6


X, W, BIAS = torch.randn(2, 6, 9), torch.randn(6, 4), torch.randn(6)
BEFORE, SEQUENCES = torch.randn(2, 6, 3), torch.zeros(2, 9, dtype=torch.int32)


@pytest.mark.parametrize("silu", [True, False])
def test_causal_conv1d_fwd(silu):
    """4 arguments (release 1.0), 5 (1.1), 7 (1.2 to 1.5), 8 (1.6: into ``out``, nothing returned)."""
    kind = "silu" if silu else None
    expected, continued = convolution(X, W, BIAS, kind), convolution(X, W, BIAS, kind, BEFORE)
    final, out = torch.empty(2, 6, 3), torch.empty_like(X)
    assert error(conv.conv_fwd(X, W, BIAS, silu), expected) < 1e-6
    assert error(conv.conv_fwd(X, W, BIAS, SEQUENCES, silu), expected) < 1e-6
    assert error(conv.conv_fwd(X, W, BIAS, None, BEFORE, final, silu), continued) < 1e-6
    assert torch.equal(final, X[..., -3:])
    assert conv.conv_fwd(X, W, BIAS, None, BEFORE, out, None, silu) is None
    assert error(out, continued) < 1e-6
    assert error(conv.conv_fwd_function(X, W, None, None, None, None, silu), convolution(X, W, None, kind)) < 1e-6


def test_causal_conv1d_bwd():
    """6, 7, 10 and 12 arguments; the last fill what they are given."""
    dout, dfinal = torch.randn_like(X), torch.randn(2, 6, 3)
    exact = leaves(*map(wide, (X, W, BIAS, BEFORE)))
    y = convolution(*exact[:3], "silu", exact[3])
    continued = torch.autograd.grad((y, exact[0][..., -3:]), exact, (dout.double(), dfinal.double()))
    whole = gradients(convolution(*exact[:3], "silu"), exact[:3], dout)
    dx = torch.empty_like(X)
    for arguments in ((X, W, BIAS, dout, dx, True), (X, W, BIAS, dout, SEQUENCES, None, True)):
        found = conv.conv_bwd(*arguments)
        assert len(found) == 3
        for value, right in zip(found, whole, strict=True):
            assert error(value, right) < 4e-6
    assert error(dx, whole[0]) < 4e-6
    assert conv.conv_bwd(X, W, None, dout, None, True)[2] is None
    found = conv.conv_bwd(X, W, BIAS, dout, None, BEFORE, dfinal, dx, True, True)
    assert found[0] is dx
    for value, right in zip(found, continued, strict=True):
        assert error(value, right) < 4e-6
    assert conv.conv_bwd_function(X, W, BIAS, dout, None, BEFORE, dfinal, None, False, True)[3] is None
    filled = [torch.empty_like(X), torch.zeros(6, 4), torch.zeros(6), torch.empty(2, 6, 3)]
    assert conv.conv_bwd(X, W, BIAS, dout, None, BEFORE, dfinal, *filled, True) is None
    for value, right in zip(filled, continued, strict=True):
        assert error(value, right) < 4e-6


def test_causal_conv1d_update():
    """5, 6, 7 and 8 arguments: buffers, slots, and an output to fill."""
    expected = convolution(X, W, BIAS, "silu", BEFORE)
    token = X[..., 0]
    forms = [(), (None,), (None, None), (torch.tensor([0, 0]), None), (None, torch.tensor([0, 1]))]
    for extra in forms:
        state = BEFORE.clone()
        y = conv.conv_update(token, state, W, BIAS, True, *extra)
        assert error(y, expected[..., 0]) < 1e-6
        after = torch.cat([BEFORE[..., 1:], X[..., :1]], -1)
        if extra[:1] and extra[0] is not None:  # the buffer goes round: its oldest place is overwritten
            after = after.roll(1, -1)
        assert torch.equal(state, after)
    out, state = torch.empty_like(X), BEFORE.clone()
    assert conv.conv_update(X, state, W, BIAS, out, True, None, None) is None
    assert error(out, expected) < 1e-6
    assert error(conv.conv_update_function(X, BEFORE.clone(), W, BIAS, True, None, None), expected) < 1e-6


def test_another_number_of_arguments_is_refused():
    with pytest.raises(TypeError, match="4: x, weight, bias, silu; 5: .* and got 6"):
        conv.conv_fwd(X, W, BIAS, None, None, True)
    with pytest.raises(TypeError, match="and got 8"):
        conv.conv_bwd(*[None] * 8)
    with pytest.raises(TypeError, match="and got 4"):
        conv.conv_update(*[None] * 4)
