"""Matrix products in wider arithmetic than the dtype of their factors."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.ops._autocast import no_autocast
from mambakit.ops._backends import native
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


# Up to so many rows torch's product of bfloat16 takes no longer than widening the weight.
_FEW_ROWS = 16
_WIDENED_BYTES = 8 << 20  # of the weight at once: what is widened stays in the caches


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`; of many rows of bfloat16 in float32 arithmetic on a processor without instructions for bfloat16.

    There torch's own product takes 2.5 to 4.5 times as long. Both are rounded once, from float32. With gradients it is
    `F.linear`.
    """
    if not _is_emulated(x, weight, bias):
        return F.linear(x, weight, bias)
    rows, (out, columns) = x.reshape(-1, x.shape[-1]).float(), weight.shape
    y = torch.empty(len(rows), out, dtype=x.dtype, device=x.device)
    step = max(1, _WIDENED_BYTES // (4 * columns))
    for at in range(0, out, step):
        wide_bias = None if bias is None else bias[at : at + step].float()
        y[:, at : at + step] = F.linear(rows, weight[at : at + step].float(), wide_bias)
    return y.view(*x.shape[:-1], out)


def may_be_emulated(x: Tensor) -> bool:
    """Whether torch may emulate products of ``x``. Not where it is traced: a trace with gradients is compared with one
    without."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16:
        return False
    return not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def _is_emulated(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether torch would emulate this product of bfloat16, and nothing else than its result is asked for."""
    if not may_be_emulated(x):
        return False
    return (
        x.numel() > _FEW_ROWS * x.shape[-1]
        and all(t is None or t.dtype == torch.bfloat16 for t in (weight, bias))
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and all_plain((x, weight, bias))
        and native.lacks_bfloat16_products()
    )
