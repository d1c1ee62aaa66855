"""The causal depthwise convolution, one output at a time in float64: the oracle of the tests.

The short convolution of the Mamba block (Gu & Dao 2023, arXiv 2312.00752, figure 3).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def causal_conv1d(x, weight, bias=None, activation="silu", initial_state=None):
    """(y (b, l, d), final_state (b, d, k - 1)), float64, of one call of `mambakit.ops.causal_conv1d` without packing.

    y_t = act(bias + sum_j weight[:, j] x_{t-k+1+j})
    """
    x, weight = x.double(), weight.double()
    b, length, d = x.shape
    k = weight.shape[1]
    state = x.new_zeros(b, d, k - 1) if initial_state is None else initial_state.double()
    inputs = torch.cat([state.transpose(1, 2), x], 1)  # (b, k - 1 + l, d): x_t is inputs[:, t + k - 1]
    ys = [(inputs[:, t : t + k] * weight.T).sum(1) for t in range(length)]
    y = torch.stack(ys, 1) if ys else x
    if bias is not None:
        y = y + bias.double()
    if activation == "silu":
        y = F.silu(y)
    return y, inputs[:, length:].transpose(1, 2)  # the last k - 1 inputs
