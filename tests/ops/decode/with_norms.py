"""Models with norms of dt, B and C within the mixer: FalconMamba's without weights, Jamba's with."""

from __future__ import annotations

from typing import Any

import torch

from mambakit import MambaConfig, MambaForCausalLM


def with_norms(fields: dict[str, Any]) -> MambaForCausalLM:
    """A model of a `MambaConfig`'s fields and of ``mixer_rms_eps`` and ``mixer_norm_weights``, which a family's
    configuration has or a `LayerConfig`. Weights of norms are not all 1, where a mistake could hide."""
    norms = ("mixer_rms_eps", "mixer_norm_weights")
    config = MambaConfig(**{name: value for name, value in fields.items() if name not in norms})
    for name in norms:
        if name in fields:
            setattr(config, name, fields[name])
    model = MambaForCausalLM(config)
    with torch.no_grad():
        for block in model.backbone.layers:
            for norm in block.mixer.norms():
                norm.weight.add_(torch.randn_like(norm.weight) * 0.3)
    return model
