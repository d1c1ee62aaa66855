"""The convolution computed by calling its module, where a hook, another forward or an adapter is on it.

Elsewhere `mambakit.ops.causal_conv1d` reads the module's weight. The module is a depthwise `nn.Conv1d` without padding.
It is called once, on (b, d, k - 1 + l): each sequence after the k - 1 inputs before it, so that there is one output for
each token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def convolve(
    module: nn.Module, k: int, x: Tensor, activation: str | None, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`mambakit.ops.causal_conv1d`, computed by ``module``.

    Args:
        k: width of the convolution.
        x: (b, l, d).
        state: the inputs before x, (b, d, k - 1), or (s, d, k - 1) with ``cu_seqlens``; zeros when None.

    Returns:
        y (b, l, d) and the last k - 1 inputs, shaped as ``state``.

    Raises:
        ValueError: the module does not return one output for each window of k inputs.
    """
    b, length, d = x.shape
    device, lead = x.device, k - 1
    sequences = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = x.new_zeros(sequences, d, lead) if state is None else state.to(x.dtype)
    if length == 0:
        return x.clone(), state.clone()
    if cu_seqlens is None:
        inputs = torch.cat([state, x.transpose(1, 2)], 2)  # (b, d, k - 1 + l)
        return _call(module, inputs, length, activation).to(x.dtype).transpose(1, 2), inputs[:, :, length:].contiguous()
    cu = cu_seqlens.long()
    number = torch.arange(sequences, dtype=torch.int64, device=device)
    tokens = torch.arange(length, dtype=torch.int64, device=device)
    # Columns of the inputs: the tokens', and those of each sequence's state.
    tokens = tokens + lead * (1 + torch.repeat_interleave(number, cu.diff(), output_size=length))
    offsets = torch.arange(lead, dtype=torch.int64, device=device)
    before = (cu[:-1] + lead * number)[:, None] + offsets  # (s, k - 1)
    last = (cu[1:] + lead * number)[:, None] + offsets
    inputs = x.new_zeros(length + lead * sequences, d)
    inputs = inputs.index_put((before,), state.transpose(1, 2)).index_put((tokens,), x[0])
    y = _call(module, inputs.T[None], inputs.shape[0] - lead, activation)[0].T  # output i ends at input i + k - 1
    return y[tokens - lead][None].to(x.dtype), inputs[last].transpose(1, 2).contiguous()


def convolve_(
    module: nn.Module,
    k: int,
    x: Tensor,
    activation: str | None,
    pool: Tensor,
    rows: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """`mambakit.ops.causal_conv1d_`, computed by ``module``; returns y.

    Args:
        pool: states (slots, d, k - 1), updated in place. rows: the slot of each sequence: a negative one starts from
        zeros and is not written. None: slot i of sequence i.
    """
    if rows is None:
        count = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        y, last = convolve(module, k, x, activation, pool[:count], cu_seqlens)
        pool[:count] = last.to(pool.dtype)
        return y
    owned = rows >= 0
    state = torch.where(owned[:, None, None], pool[rows.clamp(min=0)], 0)
    y, last = convolve(module, k, x, activation, state, cu_seqlens)
    # A trace cannot see the values of rows, so no shape may depend on them: dropped states go to a slot after the last.
    beyond = torch.cat([pool, torch.zeros_like(pool[:1])])
    pool.copy_(beyond.index_put((torch.where(owned, rows, len(pool)),), last.to(pool.dtype))[: len(pool)])
    return y


def _call(module: nn.Module, inputs: Tensor, outputs: int, activation: str | None) -> Tensor:
    y = module(inputs)
    expected = (*inputs.shape[:2], outputs)
    if not isinstance(y, Tensor) or tuple(y.shape) != expected:
        found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"conv1d answered {found} for inputs {tuple(inputs.shape)}, expected {expected}: the inputs begin with the "
            "k - 1 before the first token, and must not be padded further; check the module that replaced mixer.conv1d"
        )
    return F.silu(y) if activation == "silu" else y
