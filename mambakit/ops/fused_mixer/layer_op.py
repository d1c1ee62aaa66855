"""`mambakit::whole_layer` and its gradient on NVIDIA GPUs: the plans that `layer.py` runs eagerly.

A compiled graph calls these once for each layer, and small layers are bound by the host: a tensor is looked at once.
What the last call's weights were is remembered as dtypes and shapes, without the tensors, and each call's weights are
compared with it: an address may be another tensor's by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from mambakit.ops._backends.dispatch import plain_version
from mambakit.ops._backends.memory import is_plain
from mambakit.ops.fused_mixer.layer import (
    _MISALIGNED,
    _MOST,
    _BelowAutograd,
    _NoAutocast,
    _readable,
    dense,
    plan_of,
)
from mambakit.ops.fused_mixer.signature import Kinds, LayerWeights, Signature, kinds_of

# Of the last weights with an in_proj of this dtype and shape.
_kinds: dict[tuple[torch.dtype, torch.Size], Kinds] = {}


class _UnservedError(Exception):
    """No plan serves the call, of which nothing was done yet."""


def _are(weights: Sequence[Tensor | None], kinds: Kinds, device: int) -> bool:
    """Whether the weights have these dtypes and shapes, and kernels may read each by its address."""
    for t, kind in zip(weights, kinds.each, strict=True):
        if t is None or kind is None:
            if t is not kind:
                return False
        elif type(t) is Parameter:  # the dispatcher hands on none that is sparse, nested or to be negated
            if not (
                t.dtype is kind[0] and t.shape == kind[1] and t.get_device() == device and t.is_contiguous()
                and (address := t.data_ptr()) and not address & _MISALIGNED
            ):  # fmt: skip
                return False
        elif not (t.dtype is kind[0] and t.shape == kind[1] and _readable(t, device)):
            return False
    return True


def _weights(weights: Sequence[Any], device: int) -> tuple[LayerWeights, Kinds]:
    """The weights as kernels read them."""
    key = weights[1].dtype, weights[1].shape
    kinds = _kinds.get(key)
    try:
        if kinds is not None and _are(weights, kinds, device):
            return LayerWeights._make(weights), kinds
    except RuntimeError:  # what torch answers where there is no memory
        raise _UnservedError from None
    found = [None if t is None else _copied(t, device) for t in weights]
    kinds = kinds_of(tuple([None if t is None else (t.dtype, t.shape) for t in weights]))
    if len(_kinds) >= _MOST:
        _kinds.clear()
    _kinds[key] = kinds
    return LayerWeights._make(found), kinds


def _read(t: Tensor | None, device: int) -> Any:
    """A tensor, or None, as kernels read it."""
    try:
        if t is None or _readable(t, device):
            return t
    except RuntimeError:
        raise _UnservedError from None
    return _copied(t, device)


def _copied(t: Tensor, device: int) -> Tensor:
    """As kernels read it: a copy where it is not contiguous or not aligned."""
    if not is_plain(t) or t.get_device() != device:
        raise _UnservedError
    return dense(t)


def _index(device: torch.device) -> int:
    """The GPU's index as tensors say it."""
    if device.index != torch._C._cuda_getDevice():  # kernels are launched in the current device's context
        raise _UnservedError
    return -1 if device.index is None else device.index


def _plan(signature: Signature) -> Any:
    plan = plan_of(signature)
    if plan is None:
        raise _UnservedError
    return plan


def forward(x, residual, *rest):
    """`mambakit::whole_layer`."""
    *weights, eps, kept, dtype, gradient, mixer_eps = rest
    device, of_residual = x.device, None if residual is None else residual.dtype
    try:
        with _BelowAutograd(), _NoAutocast():
            index = _index(device)
            w, kinds = _weights(weights, index)
            entering, residual_read = _read(x, index), _read(residual, index)
            if residual is not None and residual.shape != x.shape:
                raise _UnservedError
            plan = _plan(
                Signature(
                    x.shape, x.dtype, of_residual, kept, dtype, kinds, eps, device, gradient, True, None, mixer_eps
                )
            )
            if w.norm is None and x.dtype != dtype:
                entering = entering.to(dtype)
            y, total, memory = plan.forward(entering, residual_read, w)
            if total is None:
                total = x.new_empty(0, dtype=kept)
            if not gradient:
                memory = x.new_empty(0, dtype=dtype)
            elif memory.shape[0] != plan.layout.kept_count:  # behind that is what the forward alone needs
                memory.resize_(plan.layout.kept_count)
            return y, total, memory
    except _UnservedError:
        return plain_version("whole_layer_forward")(x, residual, *rest)


def backward(dy, dtotal, x, has_residual, *rest):
    """`mambakit::whole_layer_backward`."""
    *weights, total, memory, eps, kept, dtype, x_dtype, needs, mixer_eps = rest
    like = x if weights[0] is None else total
    device, of_residual = like.device, kept if has_residual else None
    try:
        with _BelowAutograd(), _NoAutocast():
            index = _index(device)
            w, kinds = _weights(weights, index)
            entering, dy_read, dtotal_read = _read(like, index), _read(dy, index), _read(dtotal, index)
            saved: tuple = None, entering, _read(memory, index)
            plan = _plan(
                Signature(
                    like.shape, x_dtype, of_residual, kept, dtype, kinds, eps, device, True, True, None, mixer_eps
                )
            )
            o = plan.layout
            if w.norm is None:
                saved = entering if like.dtype == dtype else entering.to(dtype), None, saved[2]
            if dy is None:
                dy_read = like.new_zeros((o.rows, o.out), dtype=dtype)
            found = plan.backward(dy_read.view(o.rows, o.out), dtotal_read, saved, w, tuple(needs))
            found = [g for g in found if g is not None]
            if needs[0] and found[0].dtype != x_dtype:
                found[0] = found[0].to(x_dtype)
            return found
    except _UnservedError:
        return plain_version("whole_layer_backward")(dy, dtotal, x, has_residual, *rest)
