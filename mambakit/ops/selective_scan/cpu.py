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
    row_strides,
    structure,
)
from mambakit.ops._layout import empty_as, is_transposed
from mambakit.ops.selective_scan import selection

Arguments = structure(
    "Arguments",
    "u delta A B C D z bias initial slots cu final_state checkpoints y",
    "b l d n sequences interval softplus threads u_b u_l delta_b delta_l z_b z_l B_b B_l C_b C_l"
    " u_c delta_c z_c y_c delta_other z_other B_other C_other groups B_g C_g B_n C_n B_constant C_constant",
)
_Gradients = structure(
    "_Gradients",
    "dy dfinal checkpoints du ddelta dA dB dC dD dz dbias dinitial partial dA_rows dD_rows dbias_rows",
    "groups dy_b dy_l dy_c du_c ddelta_c dz_c dB_other dC_other",
)


def serves(*args) -> bool:
    """float64 is the reference's."""
    return not any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args)


def _without_float16(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float16 else x


class _Channels:
    """u, delta, z or a gradient as the kernels take it: channels or tokens adjacent, float32 or bfloat16.

    Attributes:
        place, b, l, c: its address and strides; ``c`` is 0 where channels are adjacent.
        other: whether its format is not ``dtype``.
    """

    def __init__(self, x: Tensor | None, dtype: torch.dtype, shape: tuple[int, int, int]):
        self.place, self.b, self.l, self.c, self.other = None, 0, 0, 0, 0
        if x is None:
            return
        x = _without_float16(x)
        transposed = is_transposed(x)
        self.held = x = x if transposed else channels_adjacent(x)
        self.b, self.l = row_strides(x)
        self.other = x.dtype != dtype
        if transposed:
            self.c = x.stride(2)
            self.place = address_of_rows(x.transpose(1, 2), FLOAT32_OR_BFLOAT16, (shape[0], shape[2], shape[1]))
        else:
            self.place = address_of_rows(x, FLOAT32_OR_BFLOAT16, shape)


def _output_stride(x: Tensor) -> int:
    """The stride over channels of a dense result (b, l, d); 0 where they are adjacent."""
    return x.shape[1] if is_transposed(x) else 0


def _output(x: Tensor | None) -> tuple[int | None, int]:
    """Address, and stride over channels, of a dense result."""
    if x is None:
        return None, 0
    dense = x.transpose(1, 2) if is_transposed(x) else x
    return address(dense, FLOAT32_OR_BFLOAT16, x.numel()), _output_stride(x)


class _Selection:
    """B or C as the kernels take it: of every row and token, by strides, or a constant of each channel in float32.

    Attributes:
        groups: of channels. constant: whether it does not depend on time.
    """

    def __init__(self, x: Tensor, dtype: torch.dtype, b: int, length: int, d: int, n: int):
        self.shape, self.dtype = x.shape, x.dtype
        self.groups, self.constant = selection.groups(x), not selection.varies(x, length)
        rows = b if x.shape[0] == b else 1
        if self.constant:
            x = selection.of_channels(x, d)
            self.held, self.other, self.strides = x, 0, (d * n if x.shape[0] > 1 else 0, 0, 0, 0)
            self.place = address(x, FLOAT32, rows * d * n)
            return
        x = _without_float16(x)
        x = x[:, :, None] if x.dim() == 3 else x
        if not (x.stride(3) == 1 or (x.stride(1) == 1 and x.stride(3) > 1)):  # a stride of 0 is for adjacent states
            x = x.contiguous()
        self.held, self.other = x, x.dtype != dtype
        row, token, group, state = x.stride()
        self.strides = (row if x.shape[0] > 1 else 0, token, group if self.groups > 1 else 0, state)
        shape = rows, length, self.groups, n
        if state == 1:
            self.place = address_of_rows(x, FLOAT32_OR_BFLOAT16, shape)
        else:
            shape = rows, n, self.groups, length
            self.place = address_of_rows(x.transpose(1, 3), FLOAT32_OR_BFLOAT16, shape)

    def gradient(self, b: int, length: int, d: int, groups: int, dtype: torch.dtype) -> Tensor:
        """Memory for what the kernel makes: (b, l, groups, n), or float32 (b, d, n) of a constant."""
        n = self.shape[-1]
        if self.constant:
            return empty(b, d, n, dtype=torch.float32)
        whole = self.groups == groups and self.shape[0] == b and self.dtype != torch.float16
        return empty(b, length, groups, n, dtype=self.dtype if whole else torch.float32)


class _Call:
    """The inputs of one call as the kernels take them; float16 becomes float32."""

    def __init__(self, u, delta, A, B, C, D, z, delta_bias, softplus, cu_seqlens):
        if cu_seqlens is not None:  # the kernel reads where it says, and not every caller comes through the op's checks
            _checks.cu_seqlens("selective_scan", cu_seqlens, u.shape[0], u.shape[1])
        self.dtype = torch.float32 if u.dtype == torch.float16 else u.dtype
        self.shape = self.b, self.l, self.d = u.shape
        self.n = A.shape[1]
        self.u, self.delta, self.z = (_Channels(x, self.dtype, self.shape) for x in (u, delta, z))
        self.B, self.C = (_Selection(x, self.dtype, self.b, self.l, self.d, self.n) for x in (B, C))
        self.groups = selection.common_groups(B, C, self.l, self.d)
        # Held here: a structure of addresses keeps no tensor alive.
        self.A, self.D, self.bias = A.contiguous(), as_float32(D), as_float32(delta_bias)
        self.cu = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.softplus = softplus
        self.sequences = self.b if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.half = ctypes.c_int64(self.dtype == torch.bfloat16)

    def output(self, x: Tensor) -> Tensor:
        """Memory for a result in the layout of ``x``; float16 is made from float32."""
        return empty_as(x, torch.float32 if x.dtype == torch.float16 else x.dtype)

    def arguments(self, initial, slots, final_state, checkpoints, y, interval):
        size = self.d * self.n
        # In place the states are a pool, of which there may be more than rows.
        rows = initial.shape[0] if initial is not None and initial is final_state else self.sequences
        count = -(-self.l // interval) if interval else 0
        u, delta, z, B, C = self.u, self.delta, self.z, self.B, self.C
        y_place, y_c = _output(y)
        (B_b, B_l, B_g, B_n), (C_b, C_l, C_g, C_n) = B.strides, C.strides
        return Arguments(
            u.place, delta.place, address(self.A, FLOAT32, size), B.place, C.place, address(self.D, FLOAT32, self.d),
            z.place, address(self.bias, FLOAT32, self.d),
            address(initial, FLOAT32, rows * size), address(slots, INT32, self.sequences),
            address(self.cu, INT32, self.sequences + 1), address(final_state, FLOAT32, rows * size),
            address(checkpoints, FLOAT32, self.b * count * size), y_place,
            self.b, self.l, self.d, self.n, self.sequences, interval, self.softplus, native.threads(),
            u.b, u.l, delta.b, delta.l, z.b, z.l, B_b, B_l, C_b, C_l,
            u.c, delta.c, z.c, y_c, delta.other, z.other, B.other, C.other, self.groups if self.groups > 1 else 0,
            B_g, C_g, 0 if B_n == 1 else B_n, 0 if C_n == 1 else C_n, B.constant, C.constant,
        )  # fmt: skip

    def run(self, arguments) -> None:
        check(native.kernel("selective_scan")(ctypes.byref(arguments), self.half))


def forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, checkpoint_interval):
    """`mambakit::selective_scan`."""
    call = _Call(u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens)
    initial = as_float32(initial_state)
    final = empty(call.sequences, call.d, call.n, dtype=torch.float32)
    y = call.output(u)
    if checkpoint_interval:
        count = -(-call.l // checkpoint_interval)
        checkpoints = empty(call.b, count, call.d, call.n, dtype=torch.float32)
    else:
        checkpoints = empty(0, dtype=torch.float32)
    call.run(call.arguments(initial, None, final, checkpoints, y, checkpoint_interval))
    return y.to(u.dtype), final, checkpoints


def forward_(state, slot_indices, u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens):
    """`mambakit::selective_scan_`."""
    call = _Call(u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens)
    pool = state.contiguous()
    _checks.slots("selective_scan_", slot_indices, call.sequences, pool.shape[0])
    slots = None if slot_indices is None else slot_indices.contiguous()
    y = call.output(u)
    call.run(call.arguments(pool, slots, pool, None, y, 0))
    if pool is not state:
        state.copy_(pool)
    return y.to(u.dtype)


def _parts(blocks: int, b: int) -> int:
    """Parts of the channels that sum dB and dC apart: enough work items for many threads, few enough to be small.

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
    b, length, d, n, groups = call.b, call.l, call.d, call.n, call.groups
    out = _Channels(dy.to(call.dtype), call.dtype, call.shape)
    initial, dfinal, checkpoints = as_float32(initial_state), as_float32(dfinal), checkpoints.contiguous()
    parts = _parts(-(-d // groups // _VECTOR), b * groups)
    du, ddelta, dz = call.output(u), call.output(delta), None if z is None else call.output(z)
    dB, dC = (x.gradient(b, length, d, groups, call.dtype) for x in (call.B, call.C))
    wide = torch.float32
    absent = empty(0, dtype=wide)
    dA, dA_rows = empty(d, n, dtype=wide), empty(b, d, n, dtype=wide)
    dD, dD_rows = None if D is None else empty(d, dtype=wide), empty(b, d, dtype=wide)
    dbias, dbias_rows = None if delta_bias is None else empty(d, dtype=wide), empty(b, d, dtype=wide)
    dinitial = None if initial is None else empty(*initial.shape, dtype=wide)
    constant = call.B.constant and call.C.constant
    partial = empty(0 if constant else 2, groups, parts, b, n, length, dtype=wide)
    states = call.sequences * d * n
    (du_place, du_c), (ddelta_place, ddelta_c), (dz_place, dz_c) = map(_output, (du, ddelta, dz))
    gradients = _Gradients(
        out.place, address(dfinal, FLOAT32, states),
        address(checkpoints, FLOAT32, b * -(-length // interval) * d * n), du_place, ddelta_place,
        address(dA, FLOAT32, d * n), address(dB, FLOAT32_OR_BFLOAT16, dB.numel()),
        address(dC, FLOAT32_OR_BFLOAT16, dC.numel()), address(dD, FLOAT32, d), dz_place,
        address(dbias, FLOAT32, d), address(dinitial, FLOAT32, states), address(partial, FLOAT32, partial.numel()),
        address(dA_rows, FLOAT32, b * d * n), address(dD_rows, FLOAT32, b * d), address(dbias_rows, FLOAT32, b * d),
        parts, out.b, out.l, out.c, du_c, ddelta_c, dz_c, dB.dtype != call.dtype, dC.dtype != call.dtype,
    )  # fmt: skip
    arguments = call.arguments(initial, None, None, None, None, interval)
    check(native.kernel("selective_scan_backward")(ctypes.byref(arguments), ctypes.byref(gradients), call.half))
    return (
        du.to(u.dtype), ddelta.to(delta.dtype), dA, selection.reduced(dB, B), selection.reduced(dC, C),
        absent if dD is None else dD, absent.to(u.dtype) if dz is None else dz.to(z.dtype),
        absent if dbias is None else dbias, absent if dinitial is None else dinitial,
    )  # fmt: skip
