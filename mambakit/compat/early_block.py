"""mamba_ssm's block of releases up to 1.2: the addition to the residual stream, the norm, the mixer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mambakit.compat.block import added_and_normalized, require_known_norm, whole


class Block(nn.Module):
    """``mamba_ssm.modules.mamba_simple.Block`` of releases up to 1.2: add, norm, mixer.

    Args:
        dim: h. mixer_cls, norm_cls: called with it.
        fused_add_norm: the addition and the norm as one op.
        residual_in_fp32: keep the stream in float32.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ):
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.mixer: Any = mixer_cls(dim)
        self.norm = norm_cls(dim)
        if fused_add_norm:
            require_known_norm(self.norm)

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None = None, inference_params: Any = None
    ) -> tuple[Tensor, Tensor]:
        """The mixer's output, and the residual stream before it is added: (b, l, h) each."""
        how = (self.fused_add_norm, self.residual_in_fp32)
        if inference_params is None:
            found = whole(self, self.norm, self.mixer, hidden_states, residual, *how)
            if found is not None:
                return found
        y, residual = added_and_normalized(self.norm, hidden_states, residual, *how)
        return self.mixer(y, inference_params=inference_params), residual

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
