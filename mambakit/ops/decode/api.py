"""The public decode op: contract, checks, and the one entry to `mambakit::decode`."""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.ops import _checks
from mambakit.ops.decode import schema  # noqa: F401, defines the op
from mambakit.ops.decode.packed import PackedModel


def decode(x: Tensor, model: PackedModel, conv_states: Tensor, ssm_states: Tensor) -> Tensor:
    """One token of each row through a whole Mamba model: its logits, and the states after it in place. For inference.

    On a CPU up to 16 rows are one call into the native library, recorded at the first call with these tensors. A loop
    that makes a `mambakit.ops.decode.cpu.DecodeStep` of them saves the host time of passing all weights at every token.

    Args:
        x: (b, h), the token's embeddings, any floating dtype.
        model: the weights. Small ones (norms, biases, filters, A, D) float32 and contiguous for the native library.
            With ``mixer_eps`` dt, B and C are normalised (`mambakit.ops.selection_norm`).
        conv_states: (layers, b, d, k - 1), any floating dtype, read and written.
        ssm_states: (layers, b, d, n) float32, read and written.

    Returns:
        (b, v) float32 logits.

    Raises:
        ValueError: states that do not fit the model or the batch. RuntimeError: a gradient is asked for.
    """
    op = "decode_"
    _checks.no_grad_needed(op, x, conv_states, ssm_states)
    first, layers = model.layers[0], len(model.layers)
    (d, n), k = first.A.shape, first.conv.shape[1]
    _checks.shape("decode", "x", x, (x.shape[0], model.final_norm.shape[0]), "(b, h)")
    b = x.shape[0]
    _checks.shape("decode", "conv_states", conv_states, (layers, b, d, k - 1), "(layers, b, d, k - 1)")
    _checks.shape("decode", "ssm_states", ssm_states, (layers, b, d, n), "(layers, b, d, n)")
    _checks.dtype("decode", "ssm_states", ssm_states, (torch.float32,))
    _checks.same_device("decode", x.device, conv_states=conv_states, ssm_states=ssm_states)
    return torch.ops.mambakit.decode(x, conv_states, ssm_states, *model.flat())
