"""One token through a whole model in float64, layer by layer from the ops' references: the oracle of the tests."""

from __future__ import annotations

import torch

from mambakit.ops.causal_conv1d.reference import causal_conv1d
from mambakit.ops.linear.reference import linear
from mambakit.ops.rms_norm.reference import rms_norm
from mambakit.ops.selection_norm.reference import selection_norm
from mambakit.ops.selective_scan.reference import selective_scan


def decode(x, layers, final_norm, head, eps, conv_states, ssm_states, mixer_eps=None, *, x_in_16_bits=False):
    """(logits (b, v), conv_states (layers, b, d, k - 1), ssm_states (layers, b, d, n)), float64.

    The block of Gu & Dao 2023 (arXiv 2312.00752, figure 3) with its selection (algorithm 2), in a residual stream that
    is normalised before every block.

    Args:
        x: (b, h), the token's embeddings; the other arguments are those of `mambakit.ops.decode.cpu.DecodeStep`.
        x_in_16_bits: inputs of int8 and int4 weights are rounded as the CPU kernels round them.
    """
    options = {"x_in_16_bits": x_in_16_bits}
    x, residual, after = x.double(), None, []
    for w, conv_state, ssm_state in zip(layers, conv_states, ssm_states, strict=True):
        y, residual = rms_norm(x, w.norm, eps, residual)  # the residual stream takes up the last block's output
        u, z = linear(y, w.in_proj, w.in_proj_bias, **options).chunk(2, -1)  # figure 3: the two branches
        u, conv_state = causal_conv1d(u[:, None], w.conv, w.conv_bias, "silu", conv_state)
        u = u[:, 0]
        r, n = w.dt_proj.in_features, w.A.shape[1]
        selected = linear(u, w.x_proj, **options)  # algorithm 2, lines 2 and 3
        if mixer_eps is not None:  # FalconMamba's and Jamba's norms
            selected = selection_norm(selected, r, mixer_eps, *w.norms())
        dt, B, C = selected.split([r, n, n], -1)
        delta = linear(dt, w.dt_proj, **options)  # line 4
        y, ssm_state = selective_scan(
            u[:, None], delta[:, None], w.A, B[:, None], C[:, None], w.D, z[:, None], w.dt_bias, True, ssm_state
        )
        x = linear(y[:, 0], w.out_proj, w.out_proj_bias, **options)
        after.append((conv_state, ssm_state))
    y, _ = rms_norm(x, final_norm, eps, residual)
    conv_after, ssm_after = zip(*after, strict=True)
    return linear(y, head, **options), torch.stack(conv_after), torch.stack(ssm_after)
