"""The public fused head and cross-entropy: contract, checks, and the one entry to `mambakit::linear_cross_entropy`."""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.ops import _checks
from mambakit.ops._autocast import autocast_dtype
from mambakit.ops._backends.memory import in_functorch
from mambakit.ops.linear_cross_entropy import chunked, schema  # noqa: F401  (defines the op)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    num_items: Tensor | int | float | None = None,
) -> Tensor:
    """Mean cross-entropy of ``hidden @ weight.T`` against ``targets``, a chunk of tokens at a time.

        loss = sum_t [target_t != ignore_index] (logsumexp_i z_ti - z_t,target_t) / num_items,   z = hidden weight^T

    The (tokens, v) logits are never held whole: memory beyond the gradients is bounded by a fixed number of logits
    (2^27 on a GPU, 768 MiB with bfloat16 inputs), whatever the length. The gradients are formed while a chunk's logits
    are at hand, so the backward pass only scales them. Under autocast ``hidden`` is cast as a linear layer's input
    would be. The products take the dtype of ``hidden``; logits, softmax, loss and the weight's gradient summed over
    chunks are float32 (float64 for float64), so a float32 master weight gets a float32 gradient.

    Args:
        hidden: (tokens, h), any floating dtype.
        weight: (v, h), any floating dtype.
        targets: (tokens,) int64, each in [0, v) or ``ignore_index``. Any other value raises on the CPU and gives a NaN
            loss on a GPU, where raising would stall the stream. Shift them before the call.
        ignore_index: tokens with this target count in neither the loss nor the gradients.
        num_items: divisor of the summed loss, a number or a tensor of one element: the tokens of all the
            micro-batches of a step, for gradient accumulation. The number of targets not ignored when absent; as in
            `torch.nn.functional.cross_entropy`, the loss is then NaN if all are.

    Returns:
        The loss, a tensor of no dimensions, float32 (float64 for float64). Differentiable once, in ``hidden`` and
        ``weight``.

    Raises:
        ValueError: shapes or devices that do not fit. TypeError: dtypes outside the contract.
    """
    op = "linear_cross_entropy"
    _checks.require(
        hidden.dim() == 2, f"{op}: hidden has shape {tuple(hidden.shape)}, expected (tokens, h); flatten (b, l, h)"
    )
    _checks.require(
        weight.dim() == 2 and weight.shape[1] == hidden.shape[1] and weight.shape[0] > 0,
        f"{op}: weight has shape {tuple(weight.shape)}, expected (v, h) with v > 0 and h = {hidden.shape[1]}",
    )
    _checks.dtype(op, "hidden", hidden, _checks.FLOATING)
    _checks.dtype(op, "weight", weight, _checks.FLOATING)
    _checks.shape(op, "targets", targets, (hidden.shape[0],), "(tokens,)")
    _checks.dtype(op, "targets", targets, (torch.int64,))
    _checks.same_device(op, hidden.device, weight=weight, targets=targets)
    _checks.no_forward_mode(op, hidden, weight)
    if isinstance(num_items, Tensor):
        _checks.require(
            num_items.numel() == 1, f"{op}: num_items has shape {tuple(num_items.shape)}, expected one element"
        )
    if (dtype := autocast_dtype(hidden.device)) is not None:
        hidden = hidden.to(dtype)
    training = torch.is_grad_enabled()
    if in_functorch():
        total, _, _ = chunked.forward(hidden, weight, targets, ignore_index, False, False)
    else:
        total, _, _ = torch.ops.mambakit.linear_cross_entropy(
            hidden, weight, targets, ignore_index, training and hidden.requires_grad, training and weight.requires_grad
        )
    if num_items is None:
        num_items = (targets != ignore_index).sum()
    elif isinstance(num_items, Tensor):
        num_items = num_items.to(total.device, non_blocking=True).reshape(())
    return total / num_items
