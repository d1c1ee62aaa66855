"""Blocks that tests of whole layers run."""

from __future__ import annotations

import torch

from mambakit.modules import LayerConfig
from mambakit.modules.block import MambaBlock


def block_of(fields: dict, device: str = "cpu", dtype: torch.dtype = torch.float32) -> MambaBlock:
    """Of one layer, every norm and bias its own, in training mode."""
    torch.manual_seed(0)
    block = MambaBlock(LayerConfig(num_hidden_layers=1, **fields), 0).train()
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if parameter.dim() == 1 and name != "mixer.dt_proj.bias":
                parameter += 0.1 * torch.randn_like(parameter)
    return block.to(device, dtype)
