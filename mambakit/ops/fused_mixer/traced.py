"""What a trace of torch.compile asks of whole layers. Only a trace imports this module: it loads torch._dynamo, which
takes a second."""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.ops._autocast import autocast_dtype
from mambakit.ops.fused_mixer import layer_schema  # noqa: F401, defines the op
from mambakit.ops.fused_mixer.signature import Kinds, LayerWeights, Signature, unserved

_LONGEST_ROW, _MOST_STATES = 64, 64  # of those the gradient fits into every GPU's shared memory


@torch.compiler.assume_constant_result
def _served(
    h: int, x: torch.dtype, residual: torch.dtype | None, kept: torch.dtype, dtype: torch.dtype, kinds: tuple,
    device: int, gradient: bool, mixer_eps: float | None,
) -> bool:  # fmt: skip
    """Whether there are plans for rows of any number and length."""
    sizes = tuple(None if kind is None else (kind[0], torch.Size(kind[1])) for kind in kinds)
    shape = torch.Size((1, _LONGEST_ROW, h))
    signature = Signature(
        shape, x, residual, kept, dtype, Kinds(sizes), 1e-5, torch.device("cuda", device), gradient, True, None,
        mixer_eps,
    )  # fmt: skip
    return sizes[8] is not None and sizes[8][1][1] <= _MOST_STATES and unserved(signature) is None


def fused_layer(
    x: Tensor, residual: Tensor | None, w: LayerWeights, eps: float, kept: torch.dtype | None,
    mixer_eps: float | None = None,
) -> tuple[Tensor, Tensor | None] | None:  # fmt: skip
    """`layer.fused_layer` as one op of the graph."""
    assert w.in_proj is not None
    dtype = autocast_dtype(x.device) or w.in_proj.dtype
    gradient = torch.is_grad_enabled() and (
        x.requires_grad or any(t is not None and t.requires_grad for t in (residual, *w))
    )
    kept = kept or x.dtype
    kinds = tuple([None if t is None else (t.dtype, tuple(t.shape)) for t in w])
    of_residual = None if residual is None else residual.dtype
    device = 0 if x.device.index is None else x.device.index
    if not _served(x.shape[2], x.dtype, of_residual, kept, dtype, kinds, device, gradient, mixer_eps):
        return None
    found = torch.ops.mambakit.whole_layer(x, residual, *w, eps, kept, dtype, gradient, mixer_eps)
    return found[0], None if w.norm is None else found[1]
