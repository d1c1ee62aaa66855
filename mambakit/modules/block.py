"""MambaBlock: norm, then mixer, with the residual addition fused into the next norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mambakit.modules.left_padding import LeftPadding
from mambakit.modules.mixers import MambaMixer, fused_layer, mixer_class
from mambakit.modules.norm import RMSNorm
from mambakit.modules.packing import Packing
from mambakit.modules.placement import CacheHandle, is_dispatched, opened
from mambakit.modules.state_cache import StateCache


class MambaBlock(nn.Module):
    """One layer, with the sequence mixer that the configuration names (`mambakit.modules.mixers.mixer_class`).

    It takes the previous mixer's output and the residual stream apart, and returns them apart: their sum is formed
    inside the next norm, so that the residual is read and written once per layer.
    """

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = mixer_class(config, layer_idx)(config, layer_idx)

    def reset_parameters(self) -> None:
        """Draw every parameter of the layer anew."""
        self.norm.reset_parameters()
        self.mixer.reset_parameters()

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        cache_params: StateCache | CacheHandle | None = None,
        packing: Packing | LeftPadding | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(b, l, h) mixer output of the layer before, at first the embeddings, and the residual stream, at first None.

        Returns this layer's mixer output, and the stream before it was added.
        """
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        residual_dtype = wide if self.residual_in_fp32 else self.norm.weight.dtype
        if not isinstance(packing, Packing) and not isinstance(cache_params, CacheHandle) and fused_layer.on_gpu(x):
            mixer: Any = self.mixer
            if isinstance(mixer, MambaMixer) and type(self.norm) is RMSNorm:
                found = fused_layer.run(self, self.norm, mixer, x, residual, residual_dtype, cache_params, packing)
                if found is not None:
                    return found  # type: ignore[return-value]
        if isinstance(self.mixer, MambaMixer) and type(self.mixer.in_proj) is not nn.Linear and fused_layer.on_gpu(x):
            from mambakit.modules.quantized_linear import normed_projection  # imports Triton

            projected = normed_projection(self.norm, self.mixer, x, residual, residual_dtype)
            if projected is not None:
                cache = opened(cache_params, self.mixer.layer_idx, x.device)
                return self.mixer.after_in_proj(projected[0], cache, packing), projected[1]
        y, residual = self.norm(x, residual, residual_dtype)
        if cache_params is not None and is_dispatched(self.mixer) and not isinstance(cache_params, CacheHandle):
            cache_params = CacheHandle(cache_params)
        return self.mixer(y, cache_params, packing), residual
