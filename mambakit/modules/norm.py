"""RMS norms as modules: a block's, which also adds to the residual stream, and those of dt, B and C within a mixer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mambakit.ops import rms_norm
from mambakit.ops._autocast import autocast_dtype


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467) with a learned weight (h,).

    ``norm(x, residual, residual_dtype=...)`` returns ``(y, residual)``: the norm of the sum, and the sum. y has the
    dtype that the next linear layer computes in (the weight's, or autocast's), so that nothing is cast twice.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, residual_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        return rms_norm(
            x,
            self.weight,
            self.eps,
            residual=residual,
            residual_dtype=residual_dtype,
            out_dtype=compute_dtype(x.device, self.weight.dtype),
        )

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class MixerNorm(nn.Module):
    """RMS norm of dt, B or C within a mixer, with a learned weight (size,); ``norm(x)`` has the dtype of x.

    A mixer runs its three as one op (`mambakit.ops.selection_norm`) unless a call of one is hooked or replaced.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)[0]

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def compute_dtype(device: torch.device, default: torch.dtype) -> torch.dtype:
    """The dtype that linear layers compute in on ``device``: autocast's where it is on, else ``default``."""
    return autocast_dtype(device) or default
