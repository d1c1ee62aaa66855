"""The inner functions against a float64 computation of the whole, with the gradient of every argument."""

from __future__ import annotations

import pytest
import torch

from mambakit.compat.inner import MambaInnerFn, bimamba_inner_fn, mamba_inner_fn, mamba_inner_fn_no_out_proj
from mambakit.compat.surface import MODULES
from tests.compat.oracles import error, gradients, inner, leaves, wide


def weights(h=5, d=6, n=3, r=2, k=4):
    """conv weight and bias, x_proj, dt_proj, A, D, delta_bias, out_proj weight and bias."""
    return (
        torch.randn(d, 1, k), torch.randn(d), torch.randn(r + 2 * n, d), torch.randn(d, r), -torch.rand(d, n) - 0.1,
        torch.randn(d), torch.randn(d) - 2, torch.randn(h, d), torch.randn(h),
    )  # fmt: skip


def out(y, weight, bias):
    return torch.einsum("hd,bdl->blh", weight, y) + bias


def compare(found, mine, expected, exact, tolerance):
    assert error(found, expected) < tolerance
    dy = torch.randn(found.shape)
    for a, b in zip(gradients(found, mine, dy), gradients(expected, exact, dy), strict=True):
        assert error(a, b) < 4 * tolerance


@pytest.mark.parametrize("norms", [False, True])
def test_mamba_inner_fn(norms):
    """With norms: of B and C before the scan, of delta after its projection, and every weight has its gradient."""
    rms = [torch.rand(3) + 0.5, torch.rand(3) + 0.5, torch.rand(6) + 0.5] if norms else [None] * 3
    arguments = [torch.randn(2, 12, 9), *weights(), *rms]
    mine, exact = leaves(*arguments), leaves(*map(wide, arguments))

    def run(xz, conv, conv_bias, x, dt, A, D, bias, weight, out_bias, b=None, c=None, delta=None):
        return mamba_inner_fn(
            xz, conv, conv_bias, x, dt, weight, out_bias, A, None, None, D, bias, b_rms_weight=b, c_rms_weight=c,
            dt_rms_weight=delta, b_c_dt_rms_eps=1e-4,
        )  # fmt: skip

    compare(run(*mine), mine, out(inner(*exact[:8], exact[10:], 1e-4), *exact[8:10]), exact, 2e-6)
    assert error(run(*arguments), run(*mine)) < 1e-6  # without gradients


def test_the_names_for_the_same():
    xz, (conv, conv_bias, x, dt, A, D, bias, weight, out_bias) = torch.randn(2, 12, 9), weights()
    arguments = (xz, conv, conv_bias, x, dt, weight, out_bias, A, None, None, D, bias)
    y = mamba_inner_fn(*arguments)
    assert torch.equal(MambaInnerFn.apply(*arguments), y)
    given = MODULES["mamba_ssm.ops.selective_scan_interface"]
    for name in ("mamba_inner", "bimamba_inner"):
        assert given[f"{name}_ref"] == given[f"{name}_fn"]
    inside = mamba_inner_fn_no_out_proj(xz, conv, conv_bias, x, dt, A, None, None, D, bias)
    assert inside.shape == (2, 6, 9)
    assert error(out(inside, weight, out_bias), y) < 1e-6


def test_both_directions():
    """The second scan runs backwards over the first one's selection; z has the gradient of both."""
    arguments = [torch.randn(2, 12, 9), *weights(), -torch.rand(6, 3) - 0.1]
    mine, exact = leaves(*arguments), leaves(*map(wide, arguments))
    xz, conv, conv_bias, x, dt, A, D, bias, weight, out_bias, A_b = mine
    found = bimamba_inner_fn(xz, conv, conv_bias, x, dt, weight, out_bias, A, A_b, None, None, D, bias)

    def backwards(xz, conv, conv_bias, x, dt, A, D, bias):
        from tests.compat import oracles

        u, z = xz.chunk(2, 1)
        u = oracles.convolution(u, conv.squeeze(1), conv_bias, "silu")
        step, B, C = torch.einsum("rd,bdl->brl", x, u).split([2, 3, 3], 1)
        delta = torch.einsum("dr,brl->bdl", dt, step)
        flipped = (t.flip(-1) for t in (u, delta, B, C, z))
        u, delta, B, C, z = flipped
        return oracles.scan(u, delta, A, B, C, D, z, bias, True)[0].flip(-1)

    xz, conv, conv_bias, x, dt, A, D, bias, weight, out_bias, A_b = exact
    both = inner(xz, conv, conv_bias, x, dt, A, D, bias) + backwards(xz, conv, conv_bias, x, dt, A_b, D, bias)
    compare(found, mine, out(both, weight, out_bias), exact, 2e-6)


def test_given_selections_and_their_biases():
    """B and C from outside, constant or by group; or selected, with a bias."""
    from tests.compat import oracles

    xz, (conv, conv_bias, x, dt, A, D, bias, *_) = torch.randn(2, 12, 9), weights()
    offset = torch.randn(3)
    found = mamba_inner_fn_no_out_proj(xz, conv, conv_bias, x, dt, A, None, None, D, bias, offset, -offset)
    u, z = xz.double().chunk(2, 1)
    u = oracles.convolution(u, conv.squeeze(1), conv_bias, "silu")
    step, B, C = torch.einsum("rd,bdl->brl", x.double(), u).split([2, 3, 3], 1)
    delta = torch.einsum("dr,brl->bdl", dt.double(), step)
    expected, _ = oracles.scan(u, delta, A, B + offset[:, None], C - offset[:, None], D, z, bias, True)
    assert error(found, expected) < 2e-6
    B, C = torch.randn(6, 3), torch.randn(2, 2, 3, 9)
    found = mamba_inner_fn_no_out_proj(xz, conv, conv_bias, x, dt, A, B, C, D, bias)
    assert error(found, oracles.scan(u, delta, A, B, C, D, z, bias, True)[0]) < 2e-6


def test_complex_A():
    from tests.compat import oracles

    xz, (conv, conv_bias, _, dt, A, D, bias, *_) = torch.randn(2, 12, 9), weights()
    A, x = torch.complex(A, torch.randn(6, 3)), torch.randn(2 + 4 * 3, 6)
    found = mamba_inner_fn_no_out_proj(xz, conv, conv_bias, x, dt, A, None, None, D, bias)
    u, z = xz.double().chunk(2, 1)
    u = oracles.convolution(u, conv.squeeze(1), conv_bias, "silu")
    step, B, C = torch.einsum("rd,bdl->brl", x.double(), u).split([2, 6, 6], 1)
    B, C = (t.unflatten(1, (3, 2)).transpose(2, 3).flatten(2, 3) for t in (B, C))  # (b, n, 2 l)
    delta = torch.einsum("dr,brl->bdl", dt.double(), step)
    assert error(found, oracles.scan(u, delta, A, B, C, D, z, bias, True)[0]) < 5e-6


def test_autocast():
    xz, (conv, conv_bias, x, dt, A, D, bias, weight, out_bias) = torch.randn(2, 12, 9), weights()
    arguments = (conv, conv_bias, x, dt, weight, out_bias, A, None, None, D, bias)
    with torch.autocast("cpu", torch.bfloat16):
        y = mamba_inner_fn(xz.bfloat16(), *arguments)
    assert y.dtype == torch.bfloat16
    assert error(y, mamba_inner_fn(xz, *arguments)) < 2e-2


def test_what_does_not_fit_is_refused():
    xz, (conv, conv_bias, x, dt, A, D, bias, weight, out_bias) = torch.randn(2, 10, 9), weights()
    with pytest.raises(ValueError, match=r"xz has shape \(2, 10, 9\), expected \(b, 2 d, l\) with d = 6"):
        mamba_inner_fn(xz, conv, conv_bias, x, dt, weight, out_bias, A, None, None, D, bias)
    with pytest.raises(ValueError, match="checkpoint_lvl is 2"):
        mamba_inner_fn(xz, conv, conv_bias, x, dt, weight, out_bias, A, checkpoint_lvl=2)
