"""The Python side of selective_scan's kernels: outputs, strides and pointers."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mambakit.ops.native import library
from mambakit.ops.native.structures import (
    address,
    as_float32,
    channels_adjacent,
    check,
    is_half,
    row_strides,
    structure,
)

Arguments = structure(
    "Arguments",
    "u delta A B C D z bias initial slots cu final_state checkpoints y",
    "b l d n sequences interval softplus threads u_b u_l delta_b delta_l z_b z_l B_b B_l C_b C_l",
)
_Gradients = structure(
    "_Gradients",
    "dy dfinal checkpoints du ddelta dA dB dC dD dz dbias dinitial partial dA_rows dD_rows dbias_rows",
    "groups dy_b dy_l",
)


def serves(*args) -> bool:
    """float64 is the reference's."""
    return not any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args)


class _Call:
    """The inputs of one call as the kernels take them; float16 becomes float32."""

    def __init__(self, u, delta, A, B, C, D, z, delta_bias, softplus, cu_seqlens):
        inputs = [u, delta, B, C] if z is None else [u, delta, B, C, z]
        self.dtype = u.dtype
        if u.dtype == torch.float16:
            inputs = [t.float() for t in inputs]
        inputs = [channels_adjacent(t) for t in inputs]
        self.u, self.delta, self.B, self.C = inputs[:4]
        self.z = None if z is None else inputs[4]
        # Held here: a structure of addresses keeps no tensor alive.
        self.A, self.D, self.bias = A.contiguous(), as_float32(D), as_float32(delta_bias)
        self.cu = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.softplus = softplus
        self.b, self.l, self.d = u.shape
        self.n = A.shape[1]
        self.sequences = self.b if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.half = ctypes.c_int64(is_half(self.u))

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.u.dtype)

    def out(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype)

    def arguments(self, initial, slots, final_state, checkpoints, y, interval):
        return Arguments(
            address(self.u), address(self.delta), address(self.A), address(self.B), address(self.C), address(self.D),
            address(self.z), address(self.bias), address(initial), address(slots), address(self.cu),
            address(final_state), address(checkpoints), address(y),
            self.b, self.l, self.d, self.n, self.sequences, interval, self.softplus, library.threads(),
            *row_strides(self.u), *row_strides(self.delta), *row_strides(self.z), *row_strides(self.B),
            *row_strides(self.C),
        )  # fmt: skip

    def run(self, arguments) -> None:
        check(library.kernel("selective_scan")(ctypes.byref(arguments), self.half))


def forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, checkpoint_interval):
    """`mambakit::selective_scan`."""
    call = _Call(u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens)
    initial = as_float32(initial_state)
    final = torch.empty(call.sequences, call.d, call.n)
    y = call.empty(call.b, call.l, call.d)
    if checkpoint_interval:
        count = -(-call.l // checkpoint_interval)
        checkpoints = torch.empty(call.b, count, call.d, call.n)
    else:
        checkpoints = torch.empty(0)
    call.run(call.arguments(initial, None, final, checkpoints, y, checkpoint_interval))
    return call.out(y), final, checkpoints


def forward_(state, slot_indices, u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens):
    """`mambakit::selective_scan_`."""
    call = _Call(u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens)
    pool = state.contiguous()
    slots = None if slot_indices is None else slot_indices.contiguous()
    y = call.empty(call.b, call.l, call.d)
    call.run(call.arguments(pool, slots, pool, None, y, 0))
    if pool is not state:
        state.copy_(pool)
    return call.out(y)


def _groups(blocks: int, b: int) -> int:
    """Groups of channels that sum dB and dC apart: enough work items for many threads, few enough to be small.

    It depends on the shape alone, so the order of the sums, and every bit, is the same for any number of threads.
    """
    return max(1, min(blocks, max(8, min(32, 64 // max(1, b)))))


_VECTOR = 16  # the widest vector, in channels: no group is empty for any instruction set


def backward(
    dy, dfinal, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, checkpoints, interval
):  # fmt: skip
    """`mambakit::selective_scan_backward`."""
    call = _Call(u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens)
    b, length, d, n = call.b, call.l, call.d, call.n
    dy = channels_adjacent(dy.to(call.u.dtype))
    initial, dfinal, checkpoints = as_float32(initial_state), as_float32(dfinal), checkpoints.contiguous()
    groups = _groups(-(-d // _VECTOR), b)
    du, ddelta = call.empty(b, length, d), call.empty(b, length, d)
    dB, dC = call.empty(b, length, n), call.empty(b, length, n)
    absent = torch.empty(0)
    dz = None if z is None else call.empty(b, length, d)
    dA, dA_rows = torch.empty(d, n), torch.empty(b, d, n)
    dD, dD_rows = None if D is None else torch.empty(d), torch.empty(b, d)
    dbias, dbias_rows = None if delta_bias is None else torch.empty(d), torch.empty(b, d)
    dinitial = None if initial is None else torch.empty(initial.shape)
    partial = torch.empty(2, groups, b, n, length)
    gradients = _Gradients(
        address(dy), address(dfinal), address(checkpoints), address(du), address(ddelta), address(dA), address(dB),
        address(dC), address(dD), address(dz), address(dbias), address(dinitial), address(partial), address(dA_rows),
        address(dD_rows), address(dbias_rows), groups, *row_strides(dy),
    )  # fmt: skip
    arguments = call.arguments(initial, None, None, None, None, interval)
    check(library.kernel("selective_scan_backward")(ctypes.byref(arguments), ctypes.byref(gradients), call.half))
    return (
        call.out(du), call.out(ddelta), dA, call.out(dB), call.out(dC),
        absent if dD is None else dD, call.out(absent if dz is None else dz), absent if dbias is None else dbias,
        absent if dinitial is None else dinitial,
    )  # fmt: skip
