"""The public selective scan: contract, checks, and the one entry to `mambakit::selective_scan`."""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.ops import _checks
from mambakit.ops._autocast import no_autocast
from mambakit.ops._backends.memory import in_functorch
from mambakit.ops._releases import is_exporting
from mambakit.ops.selective_scan import chunked, selection
from mambakit.ops.selective_scan.schema import CHECKPOINT_INTERVAL, state_dtype


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The selective state space recurrence (arXiv 2312.00752, equation 2 and algorithm 2).

        h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t
        y_t = (C_t . h_t + D u_t) * silu(z_t)

    Args:
        u, delta, z: (b, l, d), each of any floating dtype. ``delta`` is the step before ``delta_bias`` and softplus.
            Transposed views of (b, d, l) memory are read in place.
        A: (d, n), the continuous-time diagonal (its real part is negative for a state that decays). Complex: below.
        B, C: (b, l, n), or (b, l, g, n) with g groups of channels: channel c has group ``c // (d / g)``. Any floating
            dtype. Both have the same number of groups, or one has 1, or one is constant over time. A constant has 1
            for l (or b), or is expanded (stride 0): a (d, n) constant is ``x[None, None]``, of shape (1, 1, d, n), and
            its gradient has that shape. No tensor of b * l * d * n elements is made.
        D, delta_bias: (d,).
        delta_softplus: pass ``delta + delta_bias`` through softplus, ``log1p(exp(x))`` in float32.
        initial_state: (b, d, n), the state before the first token; zeros when absent.
        cu_seqlens: (s + 1,) int32. The batch is one row of s packed sequences, sequence i being tokens
            ``cu_seqlens[i]:cu_seqlens[i + 1]``; no state passes between them, and states are (s, d, n).

    Returns:
        y (b, l, d) in the dtype and layout of ``u``, and the state after the last token, (b, d, n) or (s, d, n)
        float32.

    Differentiable in every floating input and through the final state; the gradient is deterministic, and has the
    dtype and layout of its input. Arithmetic is float32 whatever the inputs are: A, D, delta_bias and initial_state of
    other dtypes are cast (float64 as soon as u, delta, B, C or z is float64, in plain PyTorch). Second derivatives
    raise.

    A complex A is half of conjugate pairs (S4D, arXiv 2206.11893), so ``y_t = (2 Re(C_t . h_t) + D u_t) silu(z_t)``. B
    and C are then real or complex, the states complex64 (complex128). It runs in plain PyTorch, whose autograd keeps
    b * l * d * n complex elements; any derivative exists.

    Raises:
        ValueError: shapes, devices or cu_seqlens that do not fit each other.
        TypeError: dtypes outside the contract.
    """
    op = "selective_scan"
    _check(op, u, delta, A, B, C, D, z, delta_bias, cu_seqlens, A.is_complex())
    if initial_state is not None:
        rows = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        letters = "(b, d, n)" if cu_seqlens is None else "(s, d, n)"
        _checks.shape(op, "initial_state", initial_state, (rows, u.shape[2], A.shape[1]), letters)
        _checks.dtype(op, "initial_state", initial_state, _checks.FLOATING + (_COMPLEX if A.is_complex() else ()))
        _checks.same_device(op, u.device, initial_state=initial_state)
    if A.is_complex():
        with no_autocast(u.device):
            return chunked.forward(
                u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, 0
            )[:2]  # fmt: skip
    dtype = state_dtype(u, delta, B, C, z)
    A = A.to(dtype)
    D, delta_bias, initial_state = (None if t is None else t.to(dtype) for t in (D, delta_bias, initial_state))
    differentiable = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    _checks.no_forward_mode(op, *differentiable)
    if in_functorch():
        return chunked.forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, 0)[:2]
    B, C = selection.matched(op, u.shape[1], selection.compact(B), selection.compact(C))
    # A program that is exported or traced is for inference (its gradient still works: it recomputes the checkpoints).
    needs_grad = (
        torch.is_grad_enabled()
        and not (is_exporting() or (torch._C._get_tracing_state() is not None and not torch.compiler.is_compiling()))
        and any(t is not None and t.requires_grad for t in differentiable)
    )
    y, final_state, _ = torch.ops.mambakit.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens,
        CHECKPOINT_INTERVAL if needs_grad else 0,
    )  # fmt: skip
    return y, final_state


def selective_scan_(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    state: Tensor,
    slot_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_scan` that continues from, and updates in place, a pool of states. For inference.

    Args:
        state: (slots, d, n) float32 (float64 where the computation is), read and written. bfloat16 is widened, all
            slots of it, and rounded again after the last token.
        slot_indices: (b,) int32, or (s,) when packed: the slot of each row. Row i uses slot i when absent. A negative
            slot starts from a zero state and keeps nothing (the padding rows of a captured graph).

    The other arguments, and what is raised, are those of `selective_scan`; any l >= 1. A is real.

    Returns:
        y (b, l, d), and ``state`` itself.
    """
    op = "selective_scan_"
    _check(op, u, delta, A, B, C, D, z, delta_bias, cu_seqlens, False)
    _checks.no_grad_needed(op, u, delta, A, B, C, D, z, delta_bias, state)
    _checks.require(
        state.dim() == 3 and state.shape[1:] == (u.shape[2], A.shape[1]),
        f"{op}: state has shape {tuple(state.shape)}, expected (slots, d, n) = (slots, {u.shape[2]}, {A.shape[1]})",
    )
    dtype = state_dtype(u, delta, B, C, z)
    _checks.dtype(op, "state", state, (dtype, torch.bfloat16))
    _checks.same_device(op, u.device, state=state, slot_indices=slot_indices)
    rows = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    _checks.slots(op, slot_indices, rows, state.shape[0])
    A = A.to(dtype)
    D, delta_bias = (None if t is None else t.to(dtype) for t in (D, delta_bias))
    B, C = selection.matched(op, u.shape[1], selection.compact(B), selection.compact(C))
    wide = state.to(dtype)
    y = torch.ops.mambakit.selective_scan_(
        wide, slot_indices, u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens
    )
    if wide is not state:
        state.copy_(wide)
    return y, state


_COMPLEX = (torch.complex64, torch.complex128)


def _check(op, u, delta, A, B, C, D, z, delta_bias, cu_seqlens, may_be_complex) -> None:
    _checks.require(u.dim() == 3, f"{op}: u has shape {tuple(u.shape)}, expected (b, l, d)")
    b, length, d = u.shape
    _checks.require(A.dim() == 2, f"{op}: A has shape {tuple(A.shape)}, expected (d, n)")
    n = A.shape[1]
    if A.is_complex() and not may_be_complex:
        raise TypeError(f"{op}: A is {A.dtype}, expected a real dtype; selective_scan takes a complex A")
    _checks.shape(op, "delta", delta, (b, length, d), "(b, l, d)")
    _checks.shape(op, "A", A, (d, n), "(d, n)")
    selection.check(op, b, length, d, n, B, C)
    if z is not None:
        _checks.shape(op, "z", z, (b, length, d), "(b, l, d)")
    for name, vector in (("D", D), ("delta_bias", delta_bias)):
        if vector is not None:
            _checks.shape(op, name, vector, (d,), "(d,)")
    real = (("u", u), ("delta", delta), ("z", z), ("D", D), ("delta_bias", delta_bias))
    for name, tensor in real:
        if tensor is not None:
            _checks.dtype(op, name, tensor, _checks.FLOATING)
    for name, tensor in (("A", A), ("B", B), ("C", C)):
        _checks.dtype(op, name, tensor, _checks.FLOATING + (_COMPLEX if A.is_complex() else ()))
    _checks.same_device(
        op, u.device, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, cu_seqlens=cu_seqlens
    )
    if cu_seqlens is not None:
        _checks.cu_seqlens(op, cu_seqlens, b, length)
