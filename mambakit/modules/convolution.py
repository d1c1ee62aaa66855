"""The convolution by its own module, for who has put a hook, a forward or an adapter on it; else `causal_conv1d` runs.

The module is a depthwise `nn.Conv1d` without padding. It is called once, on (b, d, k - 1 + l): every sequence with the k - 1 inputs that
came before it in front, so that its outputs are those of the tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def convolve(
    module: nn.Module, k: int, x: Tensor, activation: str | None, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`mambakit.ops.causal_conv1d` by ``module``: x (b, l, d) -> y (b, l, d), and the last k - 1 inputs, (b, d, k - 1) or (s, d, k - 1).

    Raises:
        ValueError: the module does not answer with one output for each window of k inputs.
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
    tokens = tokens + lead * (
        1 + torch.repeat_interleave(number, cu.diff(), output_size=length)
    )  # where the tokens are
    offsets = torch.arange(lead, dtype=torch.int64, device=device)
    before = (cu[:-1] + lead * number)[:, None] + offsets  # (s, k - 1), where each sequence's state is
    last = (cu[1:] + lead * number)[:, None] + offsets
    inputs = x.new_zeros(length + lead * sequences, d)
    inputs = inputs.index_put((before,), state.transpose(1, 2)).index_put((tokens,), x[0])  # (k - 1 apart)
    y = _call(module, inputs.T[None], inputs.shape[0] - lead, activation)[0].T  # output i ends at input i + k - 1
    return y[tokens - lead][None].to(x.dtype), inputs[last].transpose(1, 2).contiguous()


def convolve_(
    module: nn.Module, k: int, x: Tensor, activation: str | None, pool: Tensor, rows: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:  # fmt: skip
    """`mambakit.ops.causal_conv1d_` by ``module``: y; of the ``pool`` of states (slots, d, k - 1) ``rows`` are read and written, all when
    None, negative ones neither."""
    if rows is None:
        count = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        y, last = convolve(module, k, x, activation, pool[:count], cu_seqlens)
        pool[:count] = last.to(pool.dtype)
        return y
    owned = rows >= 0
    state = torch.where(owned[:, None, None], pool[rows.clamp(min=0)], 0)
    y, last = convolve(module, k, x, activation, state, cu_seqlens)
    # By a shape that does not depend on the rows, for a call that is traced: what is dropped goes into a row beyond the last.
    beyond = torch.cat([pool, torch.zeros_like(pool[:1])])
    pool.copy_(beyond.index_put((torch.where(owned, rows, len(pool)),), last.to(pool.dtype))[: len(pool)])
    return y


def _call(module: nn.Module, inputs: Tensor, outputs: int, activation: str | None) -> Tensor:
    y = module(inputs)
    expected = (*inputs.shape[:2], outputs)
    if not isinstance(y, Tensor) or tuple(y.shape) != expected:
        found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"conv1d answered {found} for inputs {tuple(inputs.shape)}, expected {expected}: they have the k - 1 inputs before the "
            "tokens in front, and must not be padded further; see what was put in place of mixer.conv1d"
        )
    return F.silu(y) if activation == "silu" else y
