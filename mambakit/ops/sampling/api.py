"""The public sampling op: contract, checks, and the one entry to `mambakit::sample`."""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.ops import _checks
from mambakit.ops.sampling import schema  # noqa: F401, defines the op
from mambakit.ops.sampling.reference import NO_TOKEN as NO_TOKEN  # what is chosen where the logits are no numbers

# Columns of `parameters`, and the value at which each filter is off.
COLUMNS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon")
OFF = (1.0, 0.0, 1.0, 0.0, 1.0, 0.0)


def sample(logits: Tensor, uniform: Tensor, parameters: Tensor) -> Tensor:
    """Choose the next token of every row.

    With w = exp((logits - max) / temperature), filters keep, one after another: the ``top_k`` largest w (arXiv 1805.04833); the fewest
    of the largest that hold ``top_p`` of the mass (arXiv 1904.09751); those with w >= ``min_p`` times the largest (arXiv 2407.01082);
    the fewest whose surprise is closest to the entropy and that hold ``typical_p`` of the mass (arXiv 2202.00666); those with a
    probability of ``epsilon`` or more (arXiv 2210.15191). Of equal w all or none are kept, and the most probable token always is.
    The token is the first at which the sum of the kept w exceeds ``uniform`` times that of all; tokens are walked by their remainder
    modulo 4,096 (a GPU's lane sums its own), and those of one remainder in the order of the vocabulary.

    A row's token depends on that row alone, to the bit: not on how many rows there are, nor on where in the batch it is.

    Args:
        logits: (b, v) float32, bfloat16, float16 or float64, last dimension contiguous.
        uniform: (b,) float64 in [0, 1), a random number for each row; not looked at in greedy rows.
        parameters: (b, 6) float32, columns as in `COLUMNS`, `OFF` where a filter is off. Temperature 0 is greedy: the first of the
            largest logits, no filter.

    Returns:
        (b,) int64; `NO_TOKEN` where a logit is NaN, where none is finite or, in a row that is not greedy, where one is +inf.

    Raises:
        ValueError: shapes or devices that do not fit. TypeError: dtypes.
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
