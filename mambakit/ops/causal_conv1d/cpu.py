"""The Python side of causal_conv1d's kernels: outputs, strides and pointers."""

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
from mambakit.ops._layout import dense_as, empty_as, is_transposed

Arguments = structure(
    "Arguments",
    "x weight bias initial slots cu final_state y",
    "b l d k sequences silu state_half threads x_b x_l x_c",
)
_Gradients = structure("_Gradients", "dy dfinal dx dweight dbias dinitial dweight_rows dbias_rows", "dy_b dy_l dy_c")


def _serves(weight: Tensor, *tensors: Tensor | None) -> bool:
    """float64 and filters that are not 2 to 8 wide are the reference's."""
    if not 2 <= weight.shape[1] <= 8:
        return False
    return all(t is None or t.dtype != torch.float64 for t in (weight, *tensors))


def serves(x, weight, bias, activation, initial_state, cu_seqlens) -> bool:
    return _serves(weight, x, bias, initial_state)


def serves_backward(dy, dfinal, x, weight, bias, activation, initial_state, cu_seqlens) -> bool:
    return _serves(weight, dy, dfinal, x, bias, initial_state)


def serves_in_place(state, slot_indices, x, weight, bias, activation, cu_seqlens) -> bool:
    return _serves(weight, state, x, bias)


def _without_float16(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def _address(x: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, int, int]) -> int | None:
    """Of a (b, l, d) tensor whose channels, or whose tokens, are adjacent."""
    if is_transposed(x):
        return address_of_rows(x.transpose(1, 2), dtypes, (shape[0], shape[2], shape[1]))
    return address_of_rows(x, dtypes, shape)


def _channel_stride(x: Tensor) -> int:
    """0 where channels are adjacent."""
    return x.stride(2) if is_transposed(x) else 0


class _Call:
    """The inputs of one call as the kernels take them; float16 becomes float32."""

    def __init__(self, x, weight, bias, activation, initial, cu_seqlens):
        if cu_seqlens is not None:  # the kernel reads where it says, and not every caller comes through the op's checks
            _checks.cu_seqlens("causal_conv1d", cu_seqlens, x.shape[0], x.shape[1])
        self.dtype = x.dtype
        x = _without_float16(x)
        self.x = x if is_transposed(x) else channels_adjacent(x)
        self.weight, self.bias = as_float32(weight), as_float32(bias)
        self.initial = None if initial is None else _without_float16(initial).contiguous()
        self.cu = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.silu = activation == "silu"
        self.b, self.l, self.d = x.shape
        self.k = weight.shape[1]
        self.sequences = self.b if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.half = ctypes.c_int64(is_half(self.x))

    def arguments(self, initial, slots, final_state, y):
        state = final_state if initial is None else initial
        # In place the states are a pool, of which there may be more than rows.
        rows = initial.shape[0] if initial is not None and initial is final_state else self.sequences
        states, dtype, shape = rows * self.d * (self.k - 1), (self.x.dtype,), (self.b, self.l, self.d)
        state_dtype = FLOAT32_OR_BFLOAT16 if state is None else (state.dtype,)
        return Arguments(
            _address(self.x, FLOAT32_OR_BFLOAT16, shape),
            address(self.weight, FLOAT32, self.d * self.k), address(self.bias, FLOAT32, self.d),
            address(initial, FLOAT32_OR_BFLOAT16, states), address(slots, INT32, self.sequences),
            address(self.cu, INT32, self.sequences + 1), address(final_state, state_dtype, states),
            None if y is None else _address(y, dtype, shape), self.b, self.l, self.d, self.k, self.sequences,
            self.silu, state is not None and is_half(state), native.threads(), *row_strides(self.x),
            _channel_stride(self.x),
        )  # fmt: skip

    def run(self, arguments) -> None:
        check(native.kernel("causal_conv1d")(ctypes.byref(arguments), self.half))


def forward(x, weight, bias, activation, initial_state, cu_seqlens):
    """`mambakit::causal_conv1d`."""
    # The kernel reads and writes states of one dtype; the final state is x's.
    initial = None if initial_state is None else initial_state.to(x.dtype)
    call = _Call(x, weight, bias, activation, initial, cu_seqlens)
    y = empty_as(call.x)
    final = empty(call.sequences, call.d, call.k - 1, dtype=call.x.dtype)
    call.run(call.arguments(call.initial, None, final, y))
    return y.to(call.dtype), final.to(call.dtype)


def forward_(state, slot_indices, x, weight, bias, activation, cu_seqlens):
    """`mambakit::causal_conv1d_`."""
    call = _Call(x, weight, bias, activation, state, cu_seqlens)
    pool = call.initial
    assert pool is not None
    _checks.slots("causal_conv1d_", slot_indices, call.sequences, pool.shape[0])
    slots = None if slot_indices is None else slot_indices.contiguous()
    y = empty_as(call.x)
    call.run(call.arguments(pool, slots, pool, y))
    if pool is not state:
        state.copy_(pool)
    return y.to(call.dtype)


def backward(dy, dfinal, x, weight, bias, activation, initial_state, cu_seqlens):
    """`mambakit::causal_conv1d_backward`."""
    call = _Call(x, weight, bias, activation, initial_state, cu_seqlens)
    b, d, k = call.b, call.d, call.k
    # Both have one layout: a gradient that arrives in the other one is copied.
    dy = dy.to(call.x.dtype)
    dy = dense_as(dy, call.x) if is_transposed(dy) != is_transposed(call.x) else dy
    dy = dy if is_transposed(dy) else channels_adjacent(dy)
    dfinal = None if dfinal is None else dfinal.to(call.x.dtype).contiguous()
    dx = empty_as(call.x)
    wide = torch.float32
    dweight, dweight_rows = empty(d, k, dtype=wide), empty(b, d, k, dtype=wide)
    dbias, dbias_rows = None if bias is None else empty(d, dtype=wide), empty(b, d, dtype=wide)
    dinitial = None if call.initial is None else empty(*call.initial.shape, dtype=call.initial.dtype)
    states, kernel_dtype = call.sequences * d * (k - 1), (call.x.dtype,)
    gradients = _Gradients(
        _address(dy, kernel_dtype, tuple(call.x.shape)), address(dfinal, kernel_dtype, states),
        _address(dx, kernel_dtype, tuple(call.x.shape)), address(dweight, FLOAT32, d * k), address(dbias, FLOAT32, d),
        address(dinitial, FLOAT32_OR_BFLOAT16, states), address(dweight_rows, FLOAT32, b * d * k),
        address(dbias_rows, FLOAT32, b * d), *row_strides(dy), _channel_stride(dy),
    )  # fmt: skip
    arguments = call.arguments(call.initial, None, None, None)
    check(native.kernel("causal_conv1d_backward")(ctypes.byref(arguments), ctypes.byref(gradients), call.half))
    return (
        dx.to(call.dtype),
        dweight.to(weight.dtype),
        weight.new_empty(0) if dbias is None else dbias.to(bias.dtype),
        x.new_empty(0) if dinitial is None else dinitial.to(initial_state.dtype),
    )
