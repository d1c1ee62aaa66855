"""mamba_ssm's block from release 2.0 on: the addition to the residual stream, the norm, the mixer, and an MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mambakit.compat.mamba import Mamba
from mambakit.compat.norm import RMSNorm, layer_norm_fn
from mambakit.modules.mixers.fused_layer import on_gpu, run


def added_and_normalized(
    norm: Any, x: Tensor, residual: Tensor | None, fused: bool, residual_in_fp32: bool
) -> tuple[Tensor, Tensor]:
    """The norm of the residual stream after ``x`` is added to it, and the stream."""
    if fused:
        return layer_norm_fn(
            x, norm.weight, norm.bias, residual=residual, prenorm=True, residual_in_fp32=residual_in_fp32,
            eps=norm.eps, is_rms_norm=isinstance(norm, RMSNorm),
        )  # fmt: skip
    total = x if residual is None else x + residual
    y = norm(total.to(norm.weight.dtype))
    return y, total.to(torch.float32) if residual_in_fp32 and total.dtype != torch.float64 else total


def whole(
    owner: nn.Module, norm: Any, mixer: Any, x: Tensor, residual: Tensor | None, fused: bool, residual_in_fp32: bool
) -> tuple[Tensor, Any] | None:
    """A block's norm and mixer as one function on a GPU (`mambakit.modules.mixers.fused_layer`), or None.

    The stream that is not ``fused`` has the dtype of the sum; its norm is of the sum before that is rounded.
    """
    if not (type(norm) is RMSNorm and norm.drop is None and type(mixer) is Mamba) or not on_gpu(x):
        return None
    if mixer.init_layer_scale is not None:
        return None
    if fused and residual is not None:
        stream = residual.dtype
    else:
        stream = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        stream = torch.float32 if residual_in_fp32 and stream != torch.float64 else stream
    return run(owner, norm, mixer, x, residual, stream)


def require_known_norm(norm: nn.Module) -> None:
    if not isinstance(norm, (nn.LayerNorm, RMSNorm)):
        raise ValueError(
            f"fused_add_norm knows nn.LayerNorm and mamba_ssm's RMSNorm, not {type(norm).__name__}; pass "
            "fused_add_norm=False"
        )


class Block(nn.Module):
    """``mamba_ssm.modules.block.Block`` of releases from 2.0: add, norm, mixer, and where there is an MLP add, norm,
    MLP.

    Args:
        dim: h. mixer_cls, norm_cls: called with it.
        mlp_cls: called with it, too, or ``nn.Identity`` for none.
        fused_add_norm: the addition and the norm as one op.
        residual_in_fp32: keep the stream in float32.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        mlp_cls: Callable[[int], nn.Module],
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ):
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.norm = norm_cls(dim)
        self.mixer: Any = mixer_cls(dim)
        self.mlp: Any = None
        if mlp_cls is not nn.Identity:
            self.norm2 = norm_cls(dim)
            self.mlp = mlp_cls(dim)
        if fused_add_norm:
            require_known_norm(self.norm)

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None = None, inference_params: Any = None, **mixer_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The last sublayer's output, and the residual stream before it is added: (b, l, h) each."""
        how = (self.fused_add_norm, self.residual_in_fp32)
        found = None
        if inference_params is None and not mixer_kwargs:
            found = whole(self, self.norm, self.mixer, hidden_states, residual, *how)
        if found is not None:
            y, residual = found
        else:
            y, residual = added_and_normalized(self.norm, hidden_states, residual, *how)
            y = self.mixer(y, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is None:
            return y, residual
        y, residual = added_and_normalized(self.norm2, y, residual, *how)
        return self.mlp(y), residual

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
