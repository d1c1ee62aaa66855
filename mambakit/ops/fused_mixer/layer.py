"""A whole Mamba layer, its norm included, as one autograd function over a `Plan`."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from mambakit.ops._autocast import autocast_dtype
from mambakit.ops._backends.memory import PLAIN_TYPES, observed, transformed
from mambakit.ops._backends.prepared_triton import NotPreparedError
from mambakit.ops._once import differentiated_once
from mambakit.ops.fused_mixer.api import MixerWeights, fused_mixer
from mambakit.ops.fused_mixer.by_parts import gradients
from mambakit.ops.fused_mixer.plan import NO_SCALES, Plan
from mambakit.ops.fused_mixer.signature import ALIGNED, Kinds, LayerWeights, PackedParts, Signature, kinds_of, unserved

# Plans, and None for signatures that none serves.
_plans: dict[Signature, Any] = {}
_ABSENT, _MOST = object(), 1024
_MISALIGNED = ALIGNED - 1
# What a layer computes has its gradient here, in the dtypes that the code names: torch's own machinery for both is
# passed over, which is a third of the host's time of a product.
_BelowAutograd, _NoAutocast = torch._C._AutoDispatchBelowAutograd, torch._C._DisableAutocast


def on_gpu(x: Tensor) -> bool:
    """Whether x is where layers run as plans."""
    return x.is_cuda


class KnownWeights:
    """What the last call's weights were, so that the next one's are compared with it and not looked up."""

    def __init__(self) -> None:
        self._kinds: Kinds | None = None

    def kinds(self, weights: LayerWeights, device: int) -> Kinds | None:
        """Dtypes and shapes of the weights, or None where a kernel may not read one of them."""
        known = self._kinds  # another thread may keep others meanwhile
        if known is not None:
            for t, kind in zip(weights, known.each, strict=True):
                if t is None or kind is None:
                    if t is not kind:
                        break
                elif type(t) is nn.Parameter:  # which stays what it is but for its .data
                    if not (
                        t.dtype is kind[0] and t.shape == kind[1] and t.get_device() == device and t.is_contiguous()
                        and (address := t.data_ptr()) and not address & _MISALIGNED
                    ):  # fmt: skip
                        break
                elif t.dtype is not kind[0] or t.shape != kind[1] or not _readable(t, device):
                    break
            else:
                return known
        if not all(t is None or _readable(t, device) for t in weights):
            return None
        known = self._kinds = kinds_of(tuple(None if t is None else (t.dtype, t.shape) for t in weights))
        return known


def fused_layer(
    x: Tensor, residual: Tensor | None, weights: LayerWeights, eps: float = 0.0, kept: torch.dtype | None = None,
    states: tuple[Tensor, Tensor] | None = None, log: bool = True, known: KnownWeights | None = None,
    mixer_eps: float | None = None, packed: PackedParts | None = None,
    pads: Tensor | None = None,
) -> tuple[Tensor, Tensor | None] | None:  # fmt: skip
    """A layer on whole rows, on an NVIDIA GPU, without torch's dispatcher between its parts.

    Args:
        x: (b, l, h); in_proj's output (b, l, 2 d) where ``weights`` have none.
        residual: (b, l, h), added to x before the norm, or None.
        weights: without a norm, x enters the mixer as it is.
        eps: the norm's.
        kept: the dtype of the residual stream that is returned; that of x when absent.
        states: (slots, d, k - 1) and (slots, d, n) float32, from which the first b rows continue and which are updated
            in place, without gradients. Rows begin from zeros when absent.
        log: ``weights.A_log`` is log(-A), else A.
        known: of a caller that calls again with the same weights.
        mixer_eps: of the norms of dt, B and C; None: there are none.
        packed: of weights that are packed; there is no plan with gradients.
        pads: (b,) int64 on the GPU, columns of padding on the left of each row, which change no state; there are
            states then.

    Returns:
        (b, l, h), or (b, l, d) without out_proj, in the dtype that linear layers compute in, that of x without
        in_proj; and the residual stream (b, l, h), None without a norm.
        Differentiable once in x, residual and weights. None where no plan serves the call: another device, tensors
        that are no plain contiguous memory (x may have any strides: it is copied), a call that is traced or observed,
        dtypes and sizes that `unserved` names.
    """
    if not on_gpu(x) or transformed() or observed():
        return None
    device, index = x.device, x.get_device()
    if device.index != torch._C._cuda_getDevice():  # kernels are launched in the current device's context
        return None
    half = autocast_dtype(device)
    if weights.in_proj is None or (packed is not None and packed.kinds[0] is not None):
        dtype = x.dtype if weights.norm is None else half or weights.norm.dtype
    else:
        dtype = half or weights.in_proj.dtype
    if weights.in_proj is None and weights.out_proj is not None and dtype != (half or weights.out_proj.dtype):
        return None  # out_proj computes in another dtype
    if packed is not None and half not in (None, dtype):
        return None  # autocast casts the inputs of plain weights alone
    if pads is not None and (states is None or not _readable(pads, index)):
        return None
    kinds = (known or KnownWeights()).kinds(weights, index)
    if kinds is None:
        return None
    if not x.is_contiguous():  # as the products would, of a (b, h, l) that was transposed
        x = x.contiguous()
    if not _readable(x, index):
        return None
    if residual is not None and not (residual.shape == x.shape and _readable(residual, index)):
        return None
    gradient = torch.is_grad_enabled() and (
        x.requires_grad or any(t is not None and t.requires_grad for t in (residual, *weights))
    )
    scales, packed_kinds = (NO_SCALES, None) if packed is None else (packed.scales, packed.kinds)
    if packed is not None and (gradient or not all(t is None or _readable(t, index) for t in scales)):
        return None
    of_states = None
    if states is not None:
        if gradient or not all(_readable(t, index) for t in states):
            return None
        of_states = (states[0].dtype, states[0].shape), (states[1].dtype, states[1].shape)
    signature = Signature(
        x.shape, x.dtype, None if residual is None else residual.dtype, kept or x.dtype, dtype, kinds, eps, device,
        gradient, log, of_states, mixer_eps, packed_kinds, pads is not None,
    )  # fmt: skip
    plan = plan_of(signature)
    if plan is None:
        return None
    if weights.norm is None and x.dtype != dtype:
        x = x.to(dtype)
    if not gradient:
        with _BelowAutograd(), _NoAutocast():
            y, total, _ = plan.forward(x, residual, weights, states, scales, pads)
            return y, total
    return _apply(plan, x, residual, *weights)


def mix_rows(xz: Tensor, weights: MixerWeights, mixer_eps: float | None = None) -> Tensor:
    """`fused_mixer`'s y alone, (b, l, d), of rows that begin from zero states."""
    conv, conv_bias, x_proj, dt_proj, A_log, D, dt_bias, *norms = weights
    parts = LayerWeights(None, None, None, conv, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, None, None, *norms)
    found = fused_layer(xz, None, parts, mixer_eps=mixer_eps)
    return fused_mixer(xz, weights, mixer_eps=mixer_eps)[0] if found is None else found[0]


def plan_of(signature: Signature) -> Plan | None:
    """The plan for a signature, or None where none serves it."""
    plan = _plans.get(signature, _ABSENT)
    if plan is _ABSENT:
        if len(_plans) >= _MOST:  # of rows of ever new lengths; one takes milliseconds to make
            _plans.clear()
        plan = _plans[signature] = _new_plan(signature)
    return plan


def _new_plan(signature: Signature) -> Plan | None:
    if unserved(signature) is not None:
        return None
    try:
        return Plan(signature)
    except NotPreparedError as error:
        _warn(str(error))
        return None


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(f"mambakit: layers run op by op, with more work for the host: {reason}", UserWarning, stacklevel=2)


def _readable(t: Tensor, device: int) -> bool:
    """Whether a kernel may read the tensor by its address, as the plan's kernels do.

    As `memory.is_plain`, for calls that no transform of torch's wraps.
    """
    if not (type(t) in PLAIN_TYPES and t.get_device() == device and t.layout is torch.strided and t.is_contiguous()):
        return False
    address = t.data_ptr()  # 0: sharded training frees the memory of weights between uses
    return address != 0 and not address & _MISALIGNED and not t.is_neg() and not t.is_nested


def _unwrapped(t: Tensor) -> bool:
    """Whether a gradient is one tensor in memory: under vmap it is many."""
    try:
        return type(t) is Tensor and t.data_ptr() != 0
    except RuntimeError:  # what torch answers where there is no memory
        return False


def dense(t: Tensor) -> Tensor:
    """A tensor as the kernels read it."""
    return t if t.is_contiguous() and not t.data_ptr() % ALIGNED else t.clone(memory_format=torch.contiguous_format)


def _by_parts(
    plan: Plan, dy: Tensor, dtotal: Tensor | None, entering: Tensor, w: LayerWeights, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """`Plan.backward` by autograd through the ops, for gradients of several outputs at once: vmap wraps ``dy``."""
    s = plan.signature
    dentering, dweights = gradients(dy, dtotal, entering, w, s.eps, s.dtype, s.log, s.mixer_eps)
    found = (dentering.to(s.x), dentering if s.residual is not None else None, *dweights)
    return tuple(g if needed else None for g, needed in zip(found, needs, strict=True))


_COUNT = len(LayerWeights._fields)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, x: Tensor, residual: Tensor | None, *weights: Tensor | None):
        with _BelowAutograd(), _NoAutocast():
            out, total, kept = plan.forward(x, residual, LayerWeights(*weights))  # type: ignore[arg-type]
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*weights, None if total is not None else x, total, kept)
        return out, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None):
        plan, saved = ctx.plan, ctx.saved_tensors  # asked for once: activation checkpointing unpacks each tensor once
        weights, kept = LayerWeights(*saved[:_COUNT]), saved[_COUNT:]
        with torch.no_grad():
            layout, signature = plan.layout, plan.signature
            if dy is None:
                shape = layout.b, layout.length, layout.out
                dy = torch.zeros(shape, dtype=signature.dtype, device=signature.device)
            if _unwrapped(dy) and (dtotal is None or _unwrapped(dtotal)):
                with _BelowAutograd(), _NoAutocast():
                    rows = dense(dy).view(layout.rows, layout.out)
                    read = None if dtotal is None else dense(dtotal)
                    found = plan.backward(rows, read, kept, weights, ctx.needs_input_grad[1:])
            else:
                entering = kept[0] if kept[1] is None else kept[1]
                found = _by_parts(plan, dy, dtotal, entering, weights, ctx.needs_input_grad[1:])
        # The input and the stream are among what was kept.
        return (None, *differentiated_once("fused_mixer", found, (dy, dtotal, *kept[:2], *weights)))


# `_Layer.apply` without the look through its arguments for functorch's wrappers, of which `fused_layer` finds none.
_apply = super(torch.autograd.Function, _Layer).apply
