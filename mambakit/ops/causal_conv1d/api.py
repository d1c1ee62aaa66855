"""The public causal convolution: contract, checks, and the one entry to `mambakit::causal_conv1d`."""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.ops import _checks
from mambakit.ops._backends.memory import in_functorch
from mambakit.ops.causal_conv1d import (
    chunked,
    schema,  # noqa: F401, defines the op
)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = "silu",
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution over time with a short filter (arXiv 2312.00752, figure 3).

        y_t = act(bias + sum_j weight[:, j] x_{t-k+1+j})

    Args:
        x: (b, l, d), any floating dtype. A transposed view of (b, d, l) memory is read in place.
        weight: (d, k), any floating dtype; the last column multiplies the current token.
        bias: (d,), any floating dtype.
        activation: "silu" or None.
        initial_state: (b, d, k - 1), the inputs before the first token, oldest first; zeros when absent.
        cu_seqlens: (s + 1,) int32: the batch is one row of s packed sequences; states are then (s, d, k - 1).

    Returns:
        y (b, l, d) in the dtype and layout of ``x``, and the last k - 1 inputs, (b, d, k - 1) or (s, d, k - 1), in its
        dtype.

    Differentiable in every floating input and through the final state. Arithmetic is float32 (float64 for float64).

    Raises:
        ValueError: shapes, devices, activation or cu_seqlens that do not fit. TypeError: dtypes outside the contract.
    """
    op = "causal_conv1d"
    name = _check(op, x, weight, bias, activation, cu_seqlens)
    if initial_state is not None:
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        letters = "(b, d, k-1)" if cu_seqlens is None else "(s, d, k-1)"
        _checks.shape(op, "initial_state", initial_state, (rows, x.shape[2], weight.shape[1] - 1), letters)
        _checks.dtype(op, "initial_state", initial_state, _checks.FLOATING)
        _checks.same_device(op, x.device, initial_state=initial_state)
    _checks.no_forward_mode(op, x, weight, bias, initial_state)
    if in_functorch():
        return chunked.forward(x, weight, bias, name, initial_state, cu_seqlens)
    return torch.ops.mambakit.causal_conv1d(x, weight, bias, name, initial_state, cu_seqlens)


def causal_conv1d_(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = "silu",
    *,
    state: Tensor,
    slot_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`causal_conv1d` that continues from, and updates in place, a pool of states. For inference.

    Args:
        state: (slots, d, k - 1), any floating dtype, read and written.
        slot_indices: (b,) int32, or (s,) when packed: the slot of each row. Row i uses slot i when absent. A negative
            slot starts from zeros and keeps nothing (the padding rows of a captured graph).

    Returns:
        y (b, l, d), and ``state`` itself. The other arguments, and what is raised, are those of `causal_conv1d`.
    """
    op = "causal_conv1d_"
    name = _check(op, x, weight, bias, activation, cu_seqlens)
    _checks.no_grad_needed(op, x, weight, bias, state)
    expected = (x.shape[2], weight.shape[1] - 1)
    _checks.require(
        state.dim() == 3 and state.shape[1:] == expected,
        f"{op}: state has shape {tuple(state.shape)}, expected (slots, d, k-1) = (slots, {expected[0]}, {expected[1]})",
    )
    _checks.dtype(op, "state", state, _checks.FLOATING)
    _checks.same_device(op, x.device, state=state, slot_indices=slot_indices)
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    _checks.slots(op, slot_indices, rows, state.shape[0])
    y = torch.ops.mambakit.causal_conv1d_(state, slot_indices, x, weight, bias, name, cu_seqlens)
    return y, state


def _check(op, x, weight, bias, activation, cu_seqlens) -> str:
    _checks.require(x.dim() == 3, f"{op}: x has shape {tuple(x.shape)}, expected (b, l, d)")
    b, length, d = x.shape
    _checks.require(
        weight.dim() == 2 and weight.shape[0] == d and weight.shape[1] >= 1,
        f"{op}: weight has shape {tuple(weight.shape)}, expected (d, k) with d = {d}; squeeze a (d, 1, k) weight",
    )
    _checks.require(
        activation in (None, "silu"),
        f"{op}: activation {activation!r} is not known; use 'silu', or None and apply your own to y",
    )
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            _checks.dtype(op, name, tensor, _checks.FLOATING)
    if bias is not None:
        _checks.shape(op, "bias", bias, (d,), "(d,)")
    _checks.same_device(op, x.device, weight=weight, bias=bias, cu_seqlens=cu_seqlens)
    if cu_seqlens is not None:
        _checks.cu_seqlens(op, cu_seqlens, b, length)
    return activation or ""
