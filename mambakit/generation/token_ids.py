"""Checks of token ids that callers pass in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambakit.quoting import quoted


def token_ids(name: str, value: Any, least: int = 1) -> Tensor:
    """A copy as (l,) int64, l >= ``least``, of a tensor, an array or a sequence of whole numbers.

    Raises:
        TypeError: not whole numbers.
        ValueError: too few, or not one sequence.
    """
    if not isinstance(value, Tensor):
        try:
            value = (
                torch.as_tensor(value, device="cpu") if len(value) else torch.empty(0, dtype=torch.int64, device="cpu")
            )
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise TypeError(f"{name} is {quoted(value)}; give a tensor (l,) of token ids, int64") from error
    if value.dim() != 1 or len(value) < least:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected (l,) with l >= {least}")
    if not len(value):
        return value.new_empty(0, dtype=torch.int64)
    if value.dtype == torch.bool or value.is_floating_point() or value.is_complex():
        raise TypeError(f"{name} is of {value.dtype}; token ids are whole numbers: give int64")
    return value.detach().to(torch.int64, copy=True)


def require_in_vocabulary(name: str, ids: Tensor, vocab_size: int) -> None:
    """Raises ValueError where one of ``ids`` (l,) is outside a vocabulary of ``vocab_size``."""
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise ValueError(f"{name} has token {int(outside[0])}; the model's are 0 to {vocab_size - 1}")
