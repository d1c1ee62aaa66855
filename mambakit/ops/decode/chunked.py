"""One token through a whole model, op by op: any device, batch and dtype. It serves where no recorded step does."""

from __future__ import annotations

import torch

from mambakit.ops.decode.packed import PackedModel
from mambakit.ops.linear.api import linear


def decode(x, conv_states, ssm_states, weights, formats, groups, eps, mixer_eps):
    """`mambakit::decode`: logits (b, v) float32; the states are updated in place."""
    model = PackedModel.from_flat(weights, formats, groups, eps, mixer_eps)
    op, wide = torch.ops.mambakit, torch.float32
    x, residual = x.to(wide), None
    for w, conv_state, ssm_state in zip(model.layers, conv_states, ssm_states, strict=True):
        y, residual = op.rms_norm(x, w.norm, residual, eps, wide, wide)
        u, z = linear(y, w.in_proj, w.in_proj_bias)[:, None].chunk(2, -1)  # (b, 1, d) each
        u = op.causal_conv1d_(conv_state, None, u, w.conv, w.conv_bias, "silu", None)
        r, n = w.dt_proj.in_features, w.A.shape[1]
        selected = linear(u, w.x_proj)
        if mixer_eps is not None:
            selected = op.selection_norm(selected, *w.norms(), r, mixer_eps)
        dt, B, C = selected.split([r, n, n], -1)
        scan = (u, linear(dt, w.dt_proj), w.A, B, C, w.D, z, w.dt_bias, True, None)
        x = linear(op.selective_scan_(ssm_state, None, *scan)[:, 0], w.out_proj, w.out_proj_bias)
    y, _ = op.rms_norm(x, model.final_norm, residual, eps, wide, wide)
    return linear(y, model.head)
