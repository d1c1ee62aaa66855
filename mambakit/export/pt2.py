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

from mambakit.errors import CheckpointError
from mambakit.export import FAMILIES
from mambakit.modules.cache import MambaCache

LIMIT = 1e-4


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
    config = model.config
    if not hasattr(model, "lm_head") or config.model_type not in FAMILIES or not config.num_hidden_layers:
        raise CheckpointError(
            f"a causal language model ({', '.join(FAMILIES)}) with layers is exported, not a {type(model).__name__} "
            f"({config.model_type})"
        )
    module = _StateInStateOut(model.eval())
    cache = MambaCache(model.config, 2, model.device, model.dtype)
    ids = torch.zeros(2, 7, dtype=torch.int64, device=model.device)
    batch, length = Dim("batch", min=1, max=4096), Dim("length", min=1, max=1 << 20)
    with torch.no_grad():
        program = torch.export.export(
            module, (ids, cache.conv_states, cache.ssm_states),
            dynamic_shapes=({0: batch, 1: length}, {1: batch}, {1: batch}),
        )  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.export.save(program, file)


def check(model: Any, file: Path, tokens: int = 33) -> float:
    """Run the program beside the model, in two pieces and a step, at two batches.

    Returns:
        The largest difference, relative to the largest value of its tensor.

    Raises:
        CheckpointError: it is beyond `LIMIT`.
    """
    program = torch.export.load(file).module()
    worst = 0.0
    with torch.no_grad():
        for batch in (1, 3):
            generator = torch.Generator().manual_seed(batch)
            ids = torch.randint(
                0, model.config.vocab_size, (batch, tokens), generator=generator, dtype=torch.int64, device="cpu"
            ).to(model.device)
            cache = MambaCache(model.config, batch, model.device, model.dtype)
            states = cache.conv_states.clone(), cache.ssm_states.clone()
            for start, end in ((0, tokens - 8), (tokens - 8, tokens - 1), (tokens - 1, tokens)):
                piece = ids[:, start:end]
                expected = model(piece, cache_params=cache, use_cache=True).logits
                logits, *states = program(piece, *states)
                for found, wanted in zip(
                    (logits, *states), (expected, cache.conv_states, cache.ssm_states), strict=True
                ):
                    difference = (found.double() - wanted.double()).abs().max() / wanted.double().abs().max()
                    worst = max(worst, difference.item())
    if not worst <= LIMIT:
        raise CheckpointError(f"{file}: the program differs from the model by {worst:.1e}, more than {LIMIT:g}")
    return worst
