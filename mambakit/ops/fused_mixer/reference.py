"""What lies between a Mamba layer's projections, from the ops' references in float64: the oracle of the tests."""

from __future__ import annotations

import torch

from mambakit.ops.causal_conv1d.reference import causal_conv1d
from mambakit.ops.selection_norm.reference import selection_norm
from mambakit.ops.selective_scan.reference import selective_scan


def fused_mixer(xz, weights, conv_state=None, ssm_state=None, mixer_eps=None):
    """(y (b, l, d), conv_state, ssm_state), float64. Gu & Dao 2023, arXiv 2312.00752, figure 3 and algorithm 2."""
    w = weights
    r, n = w.dt_proj.shape[1], w.A_log.shape[1]
    x, z = xz.double().chunk(2, -1)  # figure 3: the two branches
    x, conv_state = causal_conv1d(x, w.conv, w.conv_bias, "silu", conv_state)
    selected = x @ w.x_proj.double().T  # algorithm 2, lines 2 and 3
    if mixer_eps is not None:  # FalconMamba's and Jamba's norms
        selected = selection_norm(selected, r, mixer_eps, w.dt_norm, w.B_norm, w.C_norm)
    dt, B, C = selected.split([r, n, n], -1)
    delta = dt @ w.dt_proj.double().T  # line 4; the scan adds the bias and takes the softplus
    A = -torch.exp(w.A_log.double())  # line 1
    y, ssm_state = selective_scan(x, delta, A, B, C, w.D, z, w.dt_bias, True, ssm_state)  # lines 5 and 6
    return y, conv_state, ssm_state
