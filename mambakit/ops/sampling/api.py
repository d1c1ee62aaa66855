"""The public sampling op: contract, checks, and the one entry to `mambakit::sample`."""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.ops import _checks
from mambakit.ops.sampling import schema  # noqa: F401, defines the op
from mambakit.ops.sampling.reference import NO_TOKEN as NO_TOKEN  # the result where logits are NaN

# Columns of `parameters`, and the value at which each filter is off.
COLUMNS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon")
OFF = (1.0, 0.0, 1.0, 0.0, 1.0, 0.0)


def sample(logits: Tensor, uniform: Tensor, parameters: Tensor) -> Tensor:
    """Choose the next token of every row.

    With w = exp((logits - max) / temperature), these filters apply in turn:

    - ``top_k``: keep the k largest w (arXiv 1805.04833).
    - ``top_p``: keep the fewest of the largest w that hold this share of the mass (arXiv 1904.09751).
    - ``min_p``: keep w >= min_p times the largest (arXiv 2407.01082).
    - ``typical_p``: keep the fewest tokens whose surprise is closest to the entropy and that hold this share of the
      mass (arXiv 2202.00666).
    - ``epsilon``: keep tokens of at least this probability (arXiv 2210.15191).

    Of equal w all or none are kept, and the most probable token is always kept. The result is the first token at which
    the cumulative sum of the kept w exceeds ``uniform`` times their total. The order of the sum is by token modulo
    4,096 (each lane of a GPU sums one remainder), then by token.

    A row's token has the same bits in any batch and at any place in it: it depends on that row alone.

    Args:
        logits: (b, v) float32, bfloat16, float16 or float64, last dimension contiguous.
        uniform: (b,) float64 in [0, 1), a random number for each row; ignored in greedy rows.
        parameters: (b, 6) float32, columns as in `COLUMNS`, `OFF` where a filter is off. Temperature 0 is greedy: the
            first of the largest logits, without filters.

    Returns:
        (b,) int64. `NO_TOKEN` where a logit is NaN, where none is finite or, in a row that is not greedy, where one is
        +inf.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: dtypes that are not supported.
    """
    op = "sample"
    _checks.require(logits.dim() == 2, f"{op}: logits have shape {tuple(logits.shape)}, expected (b, v)")
    _checks.require(logits.shape[1] >= 1, f"{op}: logits have shape {tuple(logits.shape)}; v must be 1 or more")
    _checks.dtype(op, "logits", logits, _checks.FLOATING)
    b = logits.shape[0]
    _checks.shape(op, "uniform", uniform, (b,), "(b,)")
    _checks.dtype(op, "uniform", uniform, (torch.float64,))
    _checks.shape(op, "parameters", parameters, (b, len(COLUMNS)), "(b, 6)")
    _checks.dtype(op, "parameters", parameters, (torch.float32,))
    _checks.same_device(op, logits.device, uniform=uniform, parameters=parameters)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    return torch.ops.mambakit.sample(logits, uniform, parameters)
