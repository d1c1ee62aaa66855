"""Matrix products whose result is wider than their factors."""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.ops._autocast import no_autocast
from mambakit.ops._backends.memory import all_plain


def product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
    """out (+)= a @ b, rounded once, to the dtype of ``out``, whatever the dtype of a and b; returns ``out``, or a new
    tensor under vmap."""
    if not all_plain((a, b)):  # gradients of several outputs at once; vmap writes into no memory that is given
        with no_autocast(a.device):
            wide = a.to(out.dtype) @ b.to(out.dtype)
        return out + wide if accumulate else wide
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=float(accumulate), out=out)
    elif not a.is_cuda or torch.version.hip:
        # The CPU (under Triton's interpreter, too) and ROCm have no product that widens its result.
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=float(accumulate), out=out)
    elif not accumulate:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif torch.__version__ >= "2.10":  # compared as versions, not as strings
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out += torch.mm(a, b, out_dtype=out.dtype)  # before 2.10 addmm wants `out` in the dtype of a
    return out
