"""mamba_ssm's functions as float64 loops, written for the tests: channels first, every form of B and C."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(t: Tensor | None) -> Tensor | None:
    if t is None:
        return None
    return t.to(torch.complex128 if t.is_complex() else torch.float64)


def by_channel(value: Tensor, u: Tensor, complex_A: bool) -> Tensor:
    """B or C as (b, d, n, l)."""
    b, d, length = u.shape
    if value.dim() == 2:
        return value[None, :, :, None].expand(b, d, -1, length)
    if complex_A:
        value = torch.view_as_complex(value.unflatten(-1, (-1, 2)).contiguous())
    value = value[:, None] if value.dim() == 3 else value
    return value.repeat_interleave(d // value.shape[1], 1)


def scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False) -> tuple[Tensor, Tensor]:
    """The output (b, d, l) and the last state (b, d, n), in float64."""
    u, delta, A, B, C, D, z, delta_bias = map(wide, (u, delta, A, B, C, D, z, delta_bias))
    B, C = (by_channel(t, u, A.is_complex()) for t in (B, C))
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = torch.log1p(torch.exp(delta))
    state = torch.zeros(u.shape[0], *A.shape, dtype=A.dtype)
    outputs = []
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]
        state = torch.exp(step * A) * state + step * B[..., t] * u[:, :, t, None]
        y = (C[..., t] * state).sum(-1)
        outputs.append(2 * y.real if y.is_complex() else y)
    y = torch.stack(outputs, -1)
    if D is not None:
        y = y + D[:, None] * u
    if z is not None:
        y = y * F.silu(z)
    return y, state


def convolution(x, weight, bias=None, activation=None, before=None) -> Tensor:
    """(b, d, l) in float64."""
    x, weight, bias, before = map(wide, (x, weight, bias, before))
    k = weight.shape[1]
    before = x.new_zeros((*x.shape[:2], k - 1)) if before is None else before
    whole = torch.cat([before, x], -1)
    y = sum(weight[:, j, None] * whole[..., j : j + x.shape[-1]] for j in range(k))
    y = y if bias is None else y + bias[:, None]
    return y if activation is None else F.silu(y)


def inner(xz, conv_weight, conv_bias, x_weight, dt_weight, A, D, dt_bias, norms=(None, None, None), eps=1e-6):
    """What `mamba_inner_fn` computes before its output projection, (b, d, l) in float64."""
    xz, conv_weight, conv_bias, x_weight, dt_weight, A, D, dt_bias, *norms = map(
        wide, (xz, conv_weight, conv_bias, x_weight, dt_weight, A, D, dt_bias, *norms)
    )
    x, z = xz.chunk(2, 1)
    x = convolution(x, conv_weight.squeeze(1), conv_bias, "silu")
    selected = torch.einsum("rd,bdl->brl", x_weight, x)
    r, n = dt_weight.shape[1], A.shape[1]
    dt, B, C = selected.split([r, n, n], 1)
    delta = torch.einsum("dr,brl->bdl", dt_weight, dt)

    def normalized(t: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return t
        return t / torch.sqrt(t.square().mean(1, keepdim=True) + eps) * weight[:, None]

    B, C, delta = (normalized(t, w) for t, w in zip((B, C, delta), norms, strict=True))
    return scan(x, delta, A, B, C, D, z, dt_bias, True)[0]


def leaves(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def gradients(y: Tensor, tensors: list[Tensor | None], dy: Tensor) -> list[Tensor]:
    given = [t for t in tensors if t is not None]
    return list(torch.autograd.grad(y, given, dy.to(y.dtype)))


def error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference, relative to the norm of what is expected."""
    found, expected = wide(found.detach()), wide(expected.detach())
    assert found.shape == expected.shape, f"{tuple(found.shape)} != {tuple(expected.shape)}"
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))
