"""The causal depthwise convolution in plain PyTorch, all tokens at once: it serves where no kernel does.

    y_t = act(bias + sum_j weight[:, j] x_{t-k+1+j})

Every sequence is preceded by k - 1 earlier inputs (its state, or zeros). An output is then a sum of k shifted slices,
the final state is the last k - 1 columns, and a packed row is no special case.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.ops._layout import dense_as


class _Extended:
    """(b, l, d) inputs with k - 1 earlier inputs before every sequence: (b, L, d)."""

    def __init__(self, x: Tensor, k: int, initial_state: Tensor | None, cu_seqlens: Tensor | None):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        b, length, d = x.shape
        lead, device = k - 1, x.device
        if cu_seqlens is None:
            state = x.new_zeros(b, lead, d) if initial_state is None else initial_state.transpose(1, 2)
            self.values = torch.cat([state.to(dtype), x.to(dtype)], 1)
            self.tokens = torch.arange(lead, lead + length, dtype=torch.int64, device=device)  # where the tokens are
            self.state_rows = torch.arange(b, dtype=torch.int64, device=device)[:, None]
            self.before = torch.arange(lead, dtype=torch.int64, device=device)[
                None
            ]  # where each sequence's initial state is
            self.last = torch.arange(length, length + lead, dtype=torch.int64, device=device)[
                None
            ]  # where its final state is
        else:
            cu = cu_seqlens.long()
            s = cu.shape[0] - 1
            each = torch.arange(s, dtype=torch.int64, device=device)
            sequence = torch.repeat_interleave(each, cu[1:] - cu[:-1], output_size=length)
            self.tokens = torch.arange(length, dtype=torch.int64, device=device) + lead * (sequence + 1)
            offsets = torch.arange(lead, dtype=torch.int64, device=device)
            self.before = (cu[:-1] + lead * torch.arange(s, dtype=torch.int64, device=device))[:, None] + offsets
            self.last = (cu[1:] + lead * torch.arange(s, dtype=torch.int64, device=device))[:, None] + offsets
            self.state_rows = torch.zeros(s, 1, dtype=torch.long, device=device)
            # Not in place: torch.func.vmap may have batched what is written alone.
            self.values = torch.zeros(1, length + lead * s, d, dtype=dtype, device=device)
            self.values = self.values.index_copy(1, self.tokens, x.to(dtype))
            if initial_state is not None:
                before = initial_state.transpose(1, 2).to(dtype)
                self.values = self.values.index_put((self.state_rows, self.before), before)

    def states(self, at: Tensor, values: Tensor) -> Tensor:
        """The (b or s, d, k - 1) states at the given columns."""
        return values[self.state_rows, at].transpose(1, 2)


def _preactivation(ext: _Extended, weight: Tensor, bias: Tensor | None) -> Tensor:
    w = weight.to(ext.values.dtype)
    k = w.shape[1]
    count = max(0, ext.values.shape[1] - (k - 1))
    total = torch.zeros_like(ext.values[:, :count])
    for j in range(k):
        total = total + w[:, j] * ext.values[:, j : j + count]
    total = total[:, ext.tokens - (k - 1)]  # column i is the output at L-position i + k - 1
    return total if bias is None else total + bias.to(total.dtype)


def forward(x, weight, bias, activation, initial_state, cu_seqlens):
    """`mambakit::causal_conv1d`: (y, final_state)."""
    ext = _Extended(x, weight.shape[1], initial_state, cu_seqlens)
    y = _preactivation(ext, weight, bias)
    if activation == "silu":
        y = F.silu(y)
    return dense_as(y, x), ext.states(ext.last, ext.values).to(x.dtype).contiguous()


def backward(dy, dfinal, x, weight, bias, activation, initial_state, cu_seqlens):
    """`mambakit::causal_conv1d_backward`: (dx, dweight, dbias, dinitial_state)."""
    k = weight.shape[1]
    ext = _Extended(x, k, initial_state, cu_seqlens)
    dtype = ext.values.dtype
    grad = dy.to(dtype)
    if activation == "silu":
        y = _preactivation(ext, weight, bias)
        sigmoid = torch.sigmoid(y)
        grad = grad * sigmoid * (1 + y * (1 - sigmoid))
    spread = torch.zeros_like(ext.values)  # the gradient of the output at each L-position
    spread[:, ext.tokens] = grad
    dvalues = torch.zeros_like(ext.values)
    w = weight.to(dtype)
    dweight = torch.zeros_like(w)
    count = max(0, ext.values.shape[1] - (k - 1))
    for j in range(k):
        dvalues[:, j : j + count] += w[:, j] * spread[:, k - 1 :]
        dweight[:, j] = (spread[:, k - 1 :] * ext.values[:, j : j + count]).sum((0, 1))
    if dfinal is not None and k > 1:
        dvalues.index_put_((ext.state_rows, ext.last), dfinal.transpose(1, 2).to(dtype), accumulate=True)
    return (
        dense_as(dvalues[:, ext.tokens], x),
        dweight.to(weight.dtype),
        weight.new_empty(0) if bias is None else grad.sum((0, 1)).to(bias.dtype),
        x.new_empty(0)
        if initial_state is None
        else ext.states(ext.before, dvalues).to(initial_state.dtype).contiguous(),
    )


def forward_(state, slot_indices, x, weight, bias, activation, cu_seqlens):
    """`mambakit::causal_conv1d_`: y; ``state`` (slots, d, k - 1) is read and written at ``slot_indices``."""
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if slot_indices is None:
        initial = state[:rows]
    else:
        owned = (slot_indices >= 0)[:, None, None]
        initial = torch.where(owned, state[slot_indices.clamp(min=0).long()], 0.0)
    y, final = forward(x, weight, bias, activation, initial, cu_seqlens)
    if slot_indices is None:
        state[:rows] = final.to(state.dtype)
    else:
        keep = slot_indices >= 0
        state[slot_indices[keep].long()] = final[keep].to(state.dtype)
    return y
