"""causal_conv1d's functions: channels first, packed sequences by ``seq_idx``, and the update of a rolling state."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.compat.forms import require, require_integers, require_tensors
from mambakit.ops import causal_conv1d, causal_conv1d_


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Any:
    """A depthwise causal convolution of any width, in causal_conv1d's layout.

    Args:
        x: (b, d, l); weight (d, k); bias (d,); any floating dtypes, the arithmetic is float32 (float64 in float64).
        seq_idx: (b, l) integers: a run of equal numbers is a sequence, and nothing passes from one to the next.
            Outputs of negative numbers are 0.
        initial_states: (b, d, k - 1), the inputs before the first.
        return_final_states: also return the last k - 1 inputs, (b, d, k - 1), through which gradients flow.
        final_states_out: (b, d, k - 1), into which the final states are written.
        activation: None, "silu" or "swish".

    Returns:
        (b, d, l) in x's dtype.

    Raises:
        ValueError: shapes that do not fit; an activation that is not known; ``seq_idx`` together with states.
    """
    op = "causal_conv1d_fn"
    kind = _activation(op, activation)
    if isinstance(seq_idx, str) or isinstance(initial_states, str):  # (x, weight, bias, activation) of release 1.0
        raise TypeError(f"{op}: seq_idx is {seq_idx!r}; pass activation= by name")
    require_tensors(op, x=x, weight=weight)
    require(x.dim() == 3, f"{op}: x has shape {tuple(x.shape)}, expected (b, d, l)")
    if seq_idx is not None:
        require(
            initial_states is None and not return_final_states and final_states_out is None,
            f"{op}: seq_idx packs whole sequences, which have no initial or final states; drop one of the two",
        )
        return _packed(x, weight, bias, seq_idx, kind)
    y, final = causal_conv1d(x.transpose(1, 2), weight, bias, kind, initial_state=initial_states)
    y = y.transpose(1, 2).contiguous() if x.stride(-1) == 1 else y.transpose(1, 2)
    if not return_final_states and final_states_out is None:
        return y
    if final_states_out is not None:
        final_states_out.copy_(final)
        final = final_states_out
    return (y, final) if return_final_states else y


def _activation(op: str, name: str | None) -> str | None:
    require(name in (None, "silu", "swish"), f"{op}: activation {name!r} is not known; use None, 'silu' or 'swish'")
    return None if name is None else "silu"


def _packed(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor, activation: str | None) -> Tensor:
    """All rows as one packed row; where a number differs from the one before, a sequence starts."""
    b, d, length = x.shape
    require_integers("causal_conv1d_fn", "seq_idx", seq_idx, "(b, l)", (b, length))
    if b * length == 0:
        return x.clone()
    starts = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0), value=True)
    end = torch.full((1,), b * length, dtype=torch.int32, device=x.device)
    cu_seqlens = torch.cat([starts.flatten().nonzero().flatten().to(torch.int32), end])
    row = x.transpose(1, 2).reshape(1, b * length, d)
    y, _ = causal_conv1d(row, weight, bias, activation, cu_seqlens=cu_seqlens)
    y = y.view(b, length, d).masked_fill((seq_idx < 0)[..., None], 0)
    return y.transpose(1, 2).contiguous()


class CausalConv1dFn:
    """causal_conv1d's autograd function, of which callers use ``apply``."""

    apply = staticmethod(causal_conv1d_fn)


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Any:
    """`causal_conv1d_fn` by PyTorch's convolution; arguments as there."""
    kind = _activation("causal_conv1d_ref", activation)
    d, k = weight.shape
    before = x.new_zeros((*x.shape[:2], k - 1)) if initial_states is None else initial_states
    whole = torch.cat([before.to(weight.dtype), x.to(weight.dtype)], -1)  # (b, d, k - 1 + l)
    out = F.conv1d(whole, weight[:, None], bias, groups=d)
    out = (out if kind is None else F.silu(out)).to(x.dtype)
    if not return_final_states:
        return out
    final = whole[..., whole.shape[-1] - (k - 1) :].to(x.dtype)
    if final_states_out is not None:
        final_states_out.copy_(final)
        final = final_states_out
    return out, final


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The convolution of new tokens, with the inputs before them from ``conv_state``, which is updated in place.

    Args:
        x: (b, d), or (b, d, l) of several tokens.
        conv_state: (b, d, s) with s >= k - 1, the last s inputs, or (slots, d, s) with ``conv_state_indices``.
        cache_seqlens: (b,) integers: the state is a circular buffer, whose next place is ``cache_seqlens % s``.
        conv_state_indices: (b,) integers, the slot of each row; the output of a negative slot is 0.

    Returns:
        (b, d) or (b, d, l) in x's dtype. Where gradients are recorded they flow through the states, too.
    """
    op = "causal_conv1d_update"
    kind = _activation(op, activation)
    require_tensors(op, x=x, conv_state=conv_state, weight=weight)
    require(x.dim() in (2, 3), f"{op}: x has shape {tuple(x.shape)}, expected (b, d) or (b, d, l)")
    tokens = x[..., None] if x.dim() == 2 else x
    b, d, length = tokens.shape
    require(
        weight.dim() == 2 and weight.shape[0] == d, f"{op}: weight has shape {tuple(weight.shape)}, expected (d, k)"
    )
    k, size = weight.shape[1], conv_state.shape[-1]
    rows = "slots" if conv_state_indices is not None else b
    require(
        conv_state.dim() == 3 and conv_state.shape[1] == d and size >= k - 1 and rows in ("slots", conv_state.shape[0]),
        f"{op}: conv_state has shape {tuple(conv_state.shape)}, expected ({rows}, d, s) with d = {d} and s >= {k - 1}",
    )
    for name, numbers in (("cache_seqlens", cache_seqlens), ("conv_state_indices", conv_state_indices)):
        if numbers is not None:
            require_integers(op, name, numbers, "(b,)", (b,))
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, conv_state, weight, bias))
    if size == k - 1 and not recorded and cache_seqlens is None and conv_state_indices is None:
        y, _ = causal_conv1d_(tokens.transpose(1, 2), weight, bias, kind, state=conv_state)
        return y[:, 0] if x.dim() == 2 else y.transpose(1, 2)
    if conv_state_indices is not None:
        conv_state_indices = conv_state_indices.long()
        held = conv_state[conv_state_indices.clamp(min=0)]
    else:
        held = conv_state.clone()  # it is written below
    order = None
    ordered = held
    if cache_seqlens is not None:
        order = (
            cache_seqlens[:, None].long() + torch.arange(size, dtype=torch.int64, device=x.device)
        ) % size  # (b, s), oldest first
        order = order[:, None].expand(b, d, size)
        ordered = held.gather(2, order)
    y, _ = causal_conv1d(tokens.transpose(1, 2), weight, bias, kind, initial_state=ordered[..., size - (k - 1) :])
    whole = torch.cat([ordered, tokens.to(conv_state.dtype)], -1)
    if order is None:
        after = whole[..., whole.shape[-1] - size :]
    else:  # token i goes to place (cache_seqlens + i) % s
        after = whole[..., length : length + size].roll(length % size, -1) if size else whole[..., :0]
        after = torch.empty_like(held).scatter(2, order, after)
    y = y.transpose(1, 2)
    if conv_state_indices is None:
        conv_state.copy_(after)
    else:
        kept = conv_state_indices >= 0
        y = y.masked_fill(~kept[:, None, None], 0)
        conv_state[conv_state_indices[kept]] = after[kept]
    return y[..., 0] if x.dim() == 2 else y


def causal_conv1d_update_ref(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:
    """`causal_conv1d_update` one token after the other in plain PyTorch; arguments as there."""
    kind = _activation("causal_conv1d_update_ref", activation)
    tokens = x[..., None] if x.dim() == 2 else x
    k, size = weight.shape[1], conv_state.shape[-1]
    outputs = []
    for t in range(tokens.shape[2]):
        token = tokens[..., t].to(conv_state.dtype)
        if cache_seqlens is None:
            window = torch.cat([conv_state, token[..., None]], -1)
            conv_state.copy_(window[..., 1:].clone())
        else:
            position = cache_seqlens.long() + t
            places = (
                position[:, None] + torch.arange(-(k - 1), 0, dtype=torch.int64, device=x.device)
            ) % size  # (b, k - 1)
            before = conv_state.gather(2, places[:, None].expand(-1, x.shape[1], -1))
            window = torch.cat([before, token[..., None]], -1)
            conv_state.scatter_(2, (position % size)[:, None, None].expand(-1, x.shape[1], 1), token[..., None])
        y = (window[..., window.shape[-1] - k :].to(weight.dtype) * weight).sum(-1)
        y = y if bias is None else y + bias
        outputs.append((y if kind is None else F.silu(y)).to(x.dtype))
    return outputs[0] if x.dim() == 2 else torch.stack(outputs, 2)


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last ``state_len`` inputs of each sequence of a packed row, after zeros where it is shorter.

    Args:
        x: (total, d); cu_seqlens: (s + 1,) integers, rising from 0.

    Returns:
        (s, d, state_len).
    """
    require(state_len >= 0, f"causal_conv1d_varlen_states: state_len is {state_len}; it must be 0 or more")
    if x.shape[0] == 0:
        return x.new_zeros((cu_seqlens.shape[0] - 1, x.shape[1], state_len))
    ends = cu_seqlens[1:, None].long()  # (s, 1)
    places = ends + torch.arange(-state_len, 0, dtype=torch.int64, device=x.device)  # (s, state_len)
    inside = places >= cu_seqlens[:-1, None]
    return (x[places.clamp(min=0)] * inside[..., None].to(x.dtype)).transpose(1, 2)
