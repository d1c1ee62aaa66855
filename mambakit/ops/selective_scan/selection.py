"""B and C of the selective scan: groups of channels, constants over the batch or over time, and their shapes.

The op takes B and C as (b, l, n), one group, or (b, l, g, n): group i serves channels i d / g to (i + 1) d / g.
Of both, b and l may be 1: then they do not depend on the batch, or on time. Gradients have those shapes, so they are
sums over what was not told apart, made in the kernel: nothing of b * l * d * n elements exists for constants.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mambakit.ops import _checks


def check(op: str, b: int, length: int, d: int, n: int, B: Tensor, C: Tensor) -> None:
    """Raise ValueError for shapes outside the contract."""
    for name, x in (("B", B), ("C", C)):
        shape = tuple(x.shape)
        fits = x.dim() in (3, 4) and all(s == size or s == 1 for s, size in zip(shape[:2], (b, length), strict=True))
        _checks.require(
            fits and shape[-1] == n,
            f"{op}: {name} has shape {shape}, expected (b, l, n) = {(b, length, n)} or (b, l, g, n) with g groups of "
            "channels; b and l may be 1, for a constant. Transpose (b, n, l); pass a constant (d, n) as x[None, None]",
        )
        g = groups(x)
        _checks.require(
            g >= 1 and d % g == 0,
            f"{op}: {name} has {g} groups, and the {d} channels of u are no multiple of them; pass a number of groups "
            "that divides d",
        )


def groups(x: Tensor) -> int:
    """Groups of channels of B or C."""
    return 1 if x.dim() == 3 else x.shape[2]


def varies(x: Tensor, length: int) -> bool:
    """Whether B or C depends on time."""
    return x.shape[1] == length


def compact(x: Tensor) -> Tensor:
    """B or C with an expanded dimension (stride 0) as one element of it, and without its groups where it has one.

    Its gradient is expanded again: each of the elements that are one in memory has an equal share of the sum, so that
    the gradient of the tensor that was expanded is right, and takes no memory. Shares are rounded to the dtype: where
    that matters (float16), pass the tensor before it is expanded.
    """
    axes = tuple(i for i in range(x.dim() - 1) if x.stride(i) == 0 and x.shape[i] > 1)
    if axes:
        x = _Compact.apply(x, axes) if torch.is_grad_enabled() and x.requires_grad else _first(x, axes)
    return x.squeeze(2) if x.dim() == 4 and x.shape[2] == 1 else x


def matched(op: str, length: int, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """B and C, made compact, as the op takes them: of one token, which may be a constant's, with as many groups.

    Raises:
        ValueError: both depend on time and have different numbers of groups.
    """
    of_B, of_C = groups(B), groups(C)
    if of_B == of_C or of_B == 1 or of_C == 1 or varies(B, length) != varies(C, length):
        return B, C
    if not varies(B, length) or length == 1:
        common = math.lcm(of_B, of_C)
        return B.repeat_interleave(common // of_B, 2), C.repeat_interleave(common // of_C, 2)
    raise ValueError(
        f"{op}: B has {of_B} groups and C has {of_C}, expected the same number or 1; repeat_interleave one over its "
        "dimension 2"
    )


def _first(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    for axis in axes:
        x = x.narrow(axis, 0, 1)
    return x


class _Compact(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, axes: tuple[int, ...]) -> Tensor:
        return _first(x, axes)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, axes = inputs
        ctx.shape, ctx.count = x.shape, 1
        for axis in axes:
            ctx.count *= x.shape[axis]

    @staticmethod
    def backward(ctx, gradient):
        return (gradient / ctx.count).expand(ctx.shape), None


def common_groups(B: Tensor, C: Tensor, length: int, d: int) -> int:
    """Groups of channels that a kernel tells apart: of constants every channel has its own states.

    Raises:
        ValueError: groups that do not divide the channels, or of different numbers.
    """
    found = {groups(x) for x in (B, C) if varies(x, length)} | {1}
    largest = max(found)
    if len(found) > 2 or d % largest:
        raise ValueError(f"selective_scan: B has {groups(B)} groups and C {groups(C)}, of {d} channels")
    return largest


def of_channels(x: Tensor, d: int) -> Tensor:
    """A constant B or C, (b, 1, g, n), as float32 (b, d, n): the states of each channel. b may be 1."""
    g, n = groups(x), x.shape[-1]
    return x.reshape(x.shape[0], g, n).float().repeat_interleave(d // g, 1).contiguous()


def reduced(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient of B or C from what a kernel makes: (b, l, groups, n), or (b, d, n) of a constant."""
    g = groups(x)
    if gradient.dim() == 3:  # over the channels of a group
        gradient = gradient.unflatten(1, (g, -1)).sum(2)[:, None]
    elif gradient.shape[2] != g:
        gradient = gradient.sum(2, keepdim=True)
    if gradient.shape[0] != x.shape[0]:
        gradient = gradient.sum(0, keepdim=True)
    return gradient.reshape(x.shape).to(x.dtype)


def is_plain(u: Tensor, delta: Tensor, B: Tensor, C: Tensor, z: Tensor | None) -> bool:
    """Whether B and C are (b, l, n) and all have one dtype."""
    given = (delta, B, C) if z is None else (delta, B, C, z)
    return all(x.dtype == u.dtype for x in given) and all(x.shape[:-1] == u.shape[:2] for x in (B, C))
