"""The Python side of selective_scan's kernels: outputs, strides and pointers."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mambakit.ops import _checks
from mambakit.ops._backends import native
from mambakit.ops._backends.memory import empty
from mambakit.ops._backends.structures import (
    FLOAT32,
    FLOAT32_OR_BFLOAT16,
    INT32,
    address,
    address_of_rows,
    as_float32,
    channels_adjacent,
    check,
    is_half,
    row_strides,
    structure,
)
from mambakit.ops._layout import dense_as
from mambakit.ops.selective_scan import selection

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


def _serves(args, u: int) -> bool:
    if any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args):
        return False
    return selection.is_plain(args[u], args[u + 1], args[u + 3], args[u + 4], args[u + 6])


def serves(*args) -> bool:
    """float64 is the reference's."""
    return _serves(args, 0)


def serves_backward(*args) -> bool:
    return _serves(args, 2)


class _Call:
    """The inputs of one call as the kernels take them; float16 becomes float32."""

    def __init__(self, u, delta, A, B, C, D, z, delta_bias, softplus, cu_seqlens):
        if cu_seqlens is not None:  # the kernel reads where it says, and not every caller comes through the op's checks
            _checks.cu_seqlens("selective_scan", cu_seqlens, u.shape[0], u.shape[1])
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
        return empty(*shape, dtype=self.u.dtype)

    def out(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype)

    def arguments(self, initial, slots, final_state, checkpoints, y, interval):
        channels, states, dtype = (self.b, self.l, self.d), (self.b, self.l, self.n), (self.u.dtype,)
        size = self.d * self.n
        # In place the states are a pool, of which there may be more than rows.
        rows = initial.shape[0] if initial is not None and initial is final_state else self.sequences
        count = -(-self.l // interval) if interval else 0
        return Arguments(
            address_of_rows(self.u, FLOAT32_OR_BFLOAT16, channels), address_of_rows(self.delta, dtype, channels),
            address(self.A, FLOAT32, size), address_of_rows(self.B, dtype, states),
            address_of_rows(self.C, dtype, states), address(self.D, FLOAT32, self.d),
            address_of_rows(self.z, dtype, channels), address(self.bias, FLOAT32, self.d),
            address(initial, FLOAT32, rows * size), address(slots, INT32, self.sequences),
            address(self.cu, INT32, self.sequences + 1), address(final_state, FLOAT32, rows * size),
            address(checkpoints, FLOAT32, self.b * count * size), address(y, dtype, self.b * self.l * self.d),
            self.b, self.l, self.d, self.n, self.sequences, interval, self.softplus, native.threads(),
            *row_strides(self.u), *row_strides(self.delta), *row_strides(self.z), *row_strides(self.B),
            *row_strides(self.C),
        )  # fmt: skip

    def run(self, arguments) -> None:
        check(native.kernel("selective_scan")(ctypes.byref(arguments), self.half))


def forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, checkpoint_interval):
    """`mambakit::selective_scan`."""
    call = _Call(u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens)
    initial = as_float32(initial_state)
    final = empty(call.sequences, call.d, call.n, dtype=torch.float32)
    y = call.empty(call.b, call.l, call.d)
    if checkpoint_interval:
        count = -(-call.l // checkpoint_interval)
        checkpoints = empty(call.b, count, call.d, call.n, dtype=torch.float32)
    else:
        checkpoints = empty(0, dtype=torch.float32)
    call.run(call.arguments(initial, None, final, checkpoints, y, checkpoint_interval))
    return dense_as(y, u), final, checkpoints


def forward_(state, slot_indices, u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens):
    """`mambakit::selective_scan_`."""
    call = _Call(u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens)
    pool = state.contiguous()
    _checks.slots("selective_scan_", slot_indices, call.sequences, pool.shape[0])
    slots = None if slot_indices is None else slot_indices.contiguous()
    y = call.empty(call.b, call.l, call.d)
    call.run(call.arguments(pool, slots, pool, None, y, 0))
    if pool is not state:
        state.copy_(pool)
    return dense_as(y, u)


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
    if interval < 1:
        raise ValueError(f"selective_scan_backward: the interval of checkpoints is {interval}; it must be 1 or more")
    call = _Call(u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens)
    b, length, d, n = call.b, call.l, call.d, call.n
    dy = channels_adjacent(dy.to(call.u.dtype))
    initial, dfinal, checkpoints = as_float32(initial_state), as_float32(dfinal), checkpoints.contiguous()
    groups = _groups(-(-d // _VECTOR), b)
    du, ddelta = call.empty(b, length, d), call.empty(b, length, d)
    dB, dC = call.empty(b, length, n), call.empty(b, length, n)
    wide = torch.float32
    absent = empty(0, dtype=wide)
    dz = None if z is None else call.empty(b, length, d)
    dA, dA_rows = empty(d, n, dtype=wide), empty(b, d, n, dtype=wide)
    dD, dD_rows = None if D is None else empty(d, dtype=wide), empty(b, d, dtype=wide)
    dbias, dbias_rows = None if delta_bias is None else empty(d, dtype=wide), empty(b, d, dtype=wide)
    dinitial = None if initial is None else empty(*initial.shape, dtype=wide)
    partial = empty(2, groups, b, n, length, dtype=wide)
    dtype, channels, states = (call.u.dtype,), b * length * d, call.sequences * d * n
    gradients = _Gradients(
        address_of_rows(dy, dtype, (b, length, d)), address(dfinal, FLOAT32, states),
        address(checkpoints, FLOAT32, b * -(-length // interval) * d * n), address(du, dtype, channels),
        address(ddelta, dtype, channels), address(dA, FLOAT32, d * n), address(dB, dtype, b * length * n),
        address(dC, dtype, b * length * n), address(dD, FLOAT32, d), address(dz, dtype, channels),
        address(dbias, FLOAT32, d), address(dinitial, FLOAT32, states), address(partial, FLOAT32, partial.numel()),
        address(dA_rows, FLOAT32, b * d * n), address(dD_rows, FLOAT32, b * d), address(dbias_rows, FLOAT32, b * d),
        groups, *row_strides(dy),
    )  # fmt: skip
    arguments = call.arguments(initial, None, None, None, None, interval)
    check(native.kernel("selective_scan_backward")(ctypes.byref(arguments), ctypes.byref(gradients), call.half))
    return (
        dense_as(du, u), dense_as(ddelta, delta), dA, call.out(dB), call.out(dC),
        absent if dD is None else dD, call.out(absent) if dz is None else dense_as(dz, z),
        absent if dbias is None else dbias,
        absent if dinitial is None else dinitial,
    )  # fmt: skip
