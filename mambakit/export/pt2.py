"""`to_pt2`: a torch.export program of a causal language model, of any batch and length, state in and state out.

The program calls mambakit's ops (`torch.ops.mambakit.*`), so it runs where the package is imported: on the native
kernels of a CPU and the kernels of a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from mambakit.export.checks import LARGEST_BATCH, require_exportable, require_same
from mambakit.modules.cache import MambaCache


class _StateInStateOut(nn.Module):
    """(input_ids, conv_states, ssm_states) -> (logits, both states after the tokens)."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, conv_states: Tensor, ssm_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cache = MambaCache(self.model.config, input_ids.shape[0], input_ids.device, self.model.dtype)
        cache.conv_states.copy_(conv_states)
        cache.ssm_states.copy_(ssm_states)
        logits = self.model.lm_head(self.model.backbone(input_ids, cache_params=cache).last_hidden_state)
        return logits, cache.conv_states, cache.ssm_states


def to_pt2(model: Any, file: Path) -> None:
    """Write the program to ``file``; read it with ``torch.export.load`` after ``import mambakit.ops``.

    Raises:
        CheckpointError: no causal language model, or one without layers.
    """
    require_exportable(model)
    module = _StateInStateOut(model.eval())
    cache = MambaCache(model.config, 2, model.device, model.dtype)
    ids = torch.zeros(2, 7, dtype=torch.int64, device=model.device)
    batch, length = Dim("batch", min=1, max=LARGEST_BATCH), Dim("length", min=1, max=1 << 20)
    with torch.no_grad():
        program = torch.export.export(
            module, (ids, cache.conv_states, cache.ssm_states),
            dynamic_shapes=({0: batch, 1: length}, {1: batch}, {1: batch}),
        )  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.export.save(program, file)


def check(model: Any, file: Path, tokens: int = 33) -> float:
    """`require_same` of the program, in two pieces and a step."""
    return require_same(model, f"{file}: the program", torch.export.load(file).module(), (tokens - 8, 7, 1))
