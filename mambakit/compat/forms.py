"""The forms in which mamba_ssm's interface passes a scan's operands, brought to `mambakit.ops.selective_scan`'s.

mamba_ssm is channels first, ``(b, d, l)``; the views made here are channels last, without a copy.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states, and of the arithmetic, for operands of ``dtype``: float32, or float64 in float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def require_tensors(op: str, **given: object) -> None:
    """Each of these is a tensor, where upstream's callers pass arrays and None by mistake."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} is a {type(value).__name__}, expected a tensor")


def require_integers(op: str, name: str, value: Tensor, letters: str, shape: tuple[int, ...]) -> None:
    """Numbers of slots, sequences or tokens: a float's fraction would be dropped, another shape broadcast."""
    require_tensors(op, **{name: value})
    integral = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    require(integral, f"{op}: {name} is {value.dtype}, expected integers; convert it with .to(torch.int32)")
    found = tuple(value.shape)
    require(found == shape, f"{op}: {name} has shape {found}, expected {letters} = {shape}")


def grouped(op: str, name: str, value: Tensor, b: int, d: int, n: int, length: int) -> Tensor:
    """B or C as (b, l, n); as (b, l, g, n) where groups of channels have their own; as (1, 1, d, n) if constant.

    Args:
        value: (d, n), constant over time; (b, n, l); or (b, g, n, l).
    """
    if value.dim() == 2:
        require(tuple(value.shape) == (d, n), f"{op}: {name} has shape {tuple(value.shape)}, expected {(d, n)}, (d, n)")
        return value[None, None]
    require(
        value.dim() in (3, 4) and value.shape[0] == b and tuple(value.shape[-2:]) == (n, length),
        f"{op}: {name} has shape {tuple(value.shape)}, expected (d, n), (b, n, l) or (b, g, n, l) with b = {b}, "
        f"d = {d}, n = {n}, l = {length}",
    )
    if value.dim() == 3:
        return value.transpose(1, 2)
    require(
        value.shape[1] >= 1 and d % value.shape[1] == 0,
        f"{op}: {name} has {value.shape[1]} groups, which do not divide the {d} channels",
    )
    return value[:, 0].transpose(1, 2) if value.shape[1] == 1 else value.permute(0, 3, 1, 2)


def alike(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Both, of one token, with one number of groups: there a constant is not told from what is selected."""
    if B.shape[1] == C.shape[1] == 1 and B.dim() == C.dim() == 4 and B.shape[2] != C.shape[2]:
        groups = math.lcm(B.shape[2], C.shape[2])
        return tuple(t.repeat_interleave(groups // t.shape[2], 2) for t in (B, C))  # type: ignore[return-value]
    return B, C


def as_complex(value: Tensor) -> Tensor:
    """(b, n, 2 l) or (b, g, n, 2 l) of real and imaginary parts in turn as complex numbers; others as they are."""
    if value.dim() == 2 or value.is_complex():
        return value
    require(value.shape[-1] % 2 == 0, f"a complex B or C of last dimension {value.shape[-1]}, expected 2 l")
    wide = value.to(parameter_dtype(value.dtype))
    return torch.complex(wide[..., 0::2], wide[..., 1::2])
