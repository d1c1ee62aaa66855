"""The selective scan on NVIDIA GPUs: CUDA C++ (`kernel.cu`), compiled at run time for the shape at hand.

This file implements the ops and says which calls others serve: Triton (`triton.py`) where CUDA C++ cannot be compiled,
after one warning, and one token in place; plain PyTorch (`chunked.py`) float64 and empty inputs. `plan.py` chooses a
kernel's layout, `cuda_forward.py` and `cuda_backward.py` launch it; how the kernels work is in `common.cuh`,
`forward.cuh` and `backward.cuh`.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch
from torch import Tensor

from mambakit.ops._backends import nvrtc
from mambakit.ops._layout import dense_as
from mambakit.ops.selective_scan import chunked, cuda_launch, selection
from mambakit.ops.selective_scan.cuda_backward import BackwardLaunch
from mambakit.ops.selective_scan.cuda_forward import ForwardLaunch
from mambakit.ops.selective_scan.plan import backward_plan


@functools.cache
def _slower(reason: str):
    """The Triton kernels, after one warning per reason."""
    warnings.warn(
        f"mambakit: the selective scan runs on its slower Triton kernels: {reason}", UserWarning, stacklevel=4
    )
    from mambakit.ops.selective_scan import triton

    return triton


@functools.cache
def _plain(reason: str):
    """Plain PyTorch, after one warning per reason."""
    warnings.warn(
        f"mambakit: the selective scan of this call runs in plain PyTorch, which is many times slower: {reason}, and "
        "the Triton kernels take B and C of (b, l, n) and operands of one dtype",
        UserWarning,
        stacklevel=4,
    )
    return chunked


@functools.cache
def _one_token():
    """The Triton kernel, if installed.

    One token is bound by the states, which it reads as whole lines: twice as fast.
    """
    if importlib.util.find_spec("triton") is None:
        return None
    from mambakit.ops.selective_scan import triton

    return triton


def other_implementation(u: Tensor, A: Tensor, *operands):
    """The module that serves this call instead of CUDA C++, or None; ``operands`` are delta, B, C and z."""
    given = (u, *operands)
    if any(x is not None and x.dtype == torch.float64 for x in given) or u.numel() == 0 or A.shape[1] == 0:
        return chunked
    reason = nvrtc.available()
    if reason is None and A.shape[1] > 256:
        reason = f"A has {A.shape[1]} states, the CUDA C++ kernels take 256"
    return None if reason is None else _instead(reason, u, *operands)


def _instead(reason: str, u: Tensor, *operands):
    return _slower(reason) if not operands or selection.is_plain(u, *operands) else _plain(reason)


def _other_gradient(u: Tensor, A: Tensor, *operands):
    """As `other_implementation`; many states need more shared memory than a CTA has on cards before Hopper."""
    other = other_implementation(u, A, *operands)
    if other is not None:
        return other
    shared = nvrtc.shared_memory(u.device.index)
    multiprocessors = cuda_launch.multiprocessors(u.device.index)
    needed = backward_plan(*u.shape, A.shape[1], multiprocessors, shared).backward_bytes
    if needed <= shared:
        return None
    reason = (
        f"the gradient of {A.shape[1]} states takes {needed} bytes of shared memory, and a block of this GPU has "
        f"{shared}"
    )
    return _instead(reason, u, *operands)


def _on_its_device(function):
    """Run with the device of the first tensor current: kernels launch in the current device's context."""

    @functools.wraps(function)
    def call(first, *rest):
        if first.device.index == torch._C._cuda_getDevice():
            return function(first, *rest)
        with torch.cuda.device(first.device):
            return function(first, *rest)

    return call


def _of_one_dtype(u, delta, B, C, z, *more):
    """The kernels read one dtype: where operands differ, float32. Constants of B and C may have any."""
    length = u.shape[1]
    rows = (delta, z, *more, *(x for x in (B, C) if selection.varies(x, length)))
    if all(x is None or x.dtype == u.dtype for x in rows):
        return (u, delta, B, C, z, *more)
    return tuple(None if x is None else x.float() for x in (u, delta, B, C, z, *more))


def _launch_forward(u, delta, A, B, C, D, z, delta_bias, softplus, cu_seqlens, initial, final, slots, interval):
    given = u
    u, delta, B, C, z = _of_one_dtype(u, delta, B, C, z)
    # In place, another chunk of a packed row may overwrite an initial state before it is read.
    one_chunk = cu_seqlens is not None and initial is final
    launch = ForwardLaunch(
        u, delta, A, B, C, D, z, delta_bias, softplus, cu_seqlens, slots, interval, one_chunk, False
    )  # fmt: skip
    y, checkpoints = launch.new_outputs(A.shape[1], interval)
    launch.number_sequences(initial, None if initial is final else final)
    launch.launch(launch.kernel.phases, initial, y, final, checkpoints)
    return dense_as(y, given), checkpoints


@_on_its_device
def forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, checkpoint_interval):
    """`mambakit::selective_scan`."""
    other = other_implementation(u, A, delta, B, C, z)
    if other is not None:
        y, final, checkpoints = other.forward(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, checkpoint_interval
        )
        return dense_as(y, u), final, checkpoints  # Triton's is channels-last
    sequences = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = torch.empty((sequences, u.shape[2], A.shape[1]), dtype=torch.float32, device=u.device)
    y, checkpoints = _launch_forward(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, cuda_launch.dense_or_none(initial_state),
        final, None, checkpoint_interval,
    )  # fmt: skip
    return y, final, checkpoints


@_on_its_device
def forward_(state, slot_indices, u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens):
    """`mambakit::selective_scan_`."""
    other = other_implementation(u, A, delta, B, C, z)
    if other is None and u.shape[1] == 1 and cu_seqlens is None and selection.is_plain(u, delta, B, C, z):
        other = _one_token()
    if other is not None:
        y = other.forward_(state, slot_indices, u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens)
        return dense_as(y, u)
    pool = cuda_launch.dense(state)
    y, _ = _launch_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, pool, pool, slot_indices, 0)
    if pool is not state:
        state.copy_(pool)
    return y


@_on_its_device
def backward(
    dy, dfinal, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, checkpoints, interval,
    dz=None,
):  # fmt: skip
    """`mambakit::selective_scan_backward`; ``dz`` (b, l, d), if given, receives the gradient of z.

    Its channels are adjacent and its tokens less than 2**26 elements apart. Where d is a multiple of 4, so are its
    other strides and its offset in memory.
    """
    other = _other_gradient(u, A, delta, B, C, z)
    if other is not None:
        found = other.backward(
            dy, dfinal, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, checkpoints,
            interval,
        )  # fmt: skip
        found = _as_given(found, u, delta, B, C, z)
        return found if dz is None else (*found[:6], dz.copy_(found[6]), *found[7:])
    given = u, delta, B, C, z
    u, delta, B, C, z, dy = _of_one_dtype(*given, dy)
    launch = BackwardLaunch(
        dy, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, checkpoints, interval,
        False, dz,
    )  # fmt: skip
    dfinal = cuda_launch.dense_or_none(dfinal)
    launch.number_sequences(dfinal)
    if launch.kernel.chunks > 1 and not launch.kernel.chained:
        launch.launch_carries(dfinal)
    found = launch.gradients(dfinal)
    return found if dz is not None else _as_given(found, *given)


def _as_given(found, u, delta, B, C, z):
    """The gradients in the layouts and dtypes of their operands; usually they are."""
    du, ddelta, dA, dB, dC, dD, dz, *rest = found
    du, ddelta, dz = dense_as(du, u), dense_as(ddelta, delta), dz.to(u.dtype) if z is None else dense_as(dz, z)
    return du, ddelta, dA, dB.to(B.dtype), dC.to(C.dtype), dD, dz, *rest
