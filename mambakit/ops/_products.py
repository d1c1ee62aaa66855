"""Matrix products whose result is wider than their factors."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from mambakit.ops._autocast import no_autocast
from mambakit.ops._backends.memory import all_plain
from mambakit.ops._releases import RELEASE


def product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
    """out (+)= a @ b, rounded once, to the dtype of ``out``, whatever the dtype of a and b; returns ``out``, or a new
    tensor under vmap."""
    if not all_plain((a, b)):  # gradients of several outputs at once; vmap writes into no memory that is given
        with no_autocast(a.device):
            wide = a.to(out.dtype) @ b.to(out.dtype)
        return out + wide if accumulate else wide
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=float(accumulate), out=out)
    elif not _widens(a.is_cuda):
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=float(accumulate), out=out)
    elif not accumulate:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif torch.__version__ >= "2.10":  # compared as versions, not as strings
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out += torch.mm(a, b, out_dtype=out.dtype)  # before 2.10 addmm wants `out` in the dtype of a
    return out


@functools.cache
def product_into(dtype: torch.dtype, wide: torch.dtype, on_gpu: bool) -> Callable[..., object]:
    """A function ``f(a, b, out=out)`` of plain tensors: out = a @ b, factors of ``dtype``, ``out`` of dtype ``wide``,
    rounded once."""
    if dtype == wide:
        return torch.mm
    if _widens(on_gpu):
        return functools.partial(torch.mm, out_dtype=wide)
    return lambda a, b, out: torch.mm(a.to(wide), b.to(wide), out=out)


def _widens(on_gpu: bool) -> bool:
    """Whether there is a product that widens its result: not on the CPU (under Triton's interpreter, too), on ROCm, and
    before 2.8."""
    return on_gpu and not torch.version.hip and RELEASE >= (2, 8)
