"""Checks of token ids and texts that callers pass in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mambakit.quoting import brief, quoted


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


def text_ids(name: str, value: Any, vocab_size: int, least: int = 1) -> Tensor:
    """`token_ids` of a vocabulary of ``vocab_size``.

    Raises:
        TypeError, ValueError: as `token_ids`; a token outside of the vocabulary.
    """
    ids = token_ids(name, value, least)
    require_in_vocabulary(name, ids, vocab_size)
    return ids


def batch_ids(value: Any, vocab_size: int, device: torch.device) -> list[Tensor]:
    """Prompts of one token or more each, (l,), (b, l) or several (l_i,), as a list of (l_i,) int64 on ``device``.

    Raises:
        TypeError, ValueError: as `text_ids`; other shapes, or no prompt.
    """
    nested = isinstance(value, (list, tuple)) and any(isinstance(row, (Tensor, list, tuple)) for row in value)
    if isinstance(value, Tensor) and value.dim() != 1:
        if value.dim() != 2:
            raise ValueError(f"the tokens have shape {tuple(value.shape)}, expected (l,) or (b, l)")
        nested = True
    rows = list(value) if nested else [value]
    names = [f"text {index}" for index in range(len(rows))] if nested else ["the text"]
    found = [text_ids(name, row, vocab_size, least=0) for name, row in zip(names, rows, strict=True)]
    if not found or not all(map(len, found)):
        shapes = [tuple(row.shape) for row in found]
        raise ValueError(
            f"the tokens of the texts have shapes {shapes}; give at least one text, and a token in each, (l,)"
        )
    return [row.to(device) for row in found]


def texts(name: str, value: Any) -> Sequence[str]:
    """``value``, which must be several texts that are there to be read again: not one, whose characters would be taken.

    Raises:
        TypeError: one text, an iterator, or something that is no text in it.
        ValueError: half of a surrogate pair, which no tokenizer reads.
    """
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        example = value if isinstance(value, str) else "..."
        raise TypeError(f"{name} are {brief(value)}; give a list of texts, as [{brief(example)}]")
    for index, text in enumerate(value):
        if not isinstance(text, str):
            raise TypeError(f"{name}: number {index} is {brief(text)}; it must be text")
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(
                f"{name}: number {index} is {brief(text)}, with half of a surrogate pair; decode it as UTF-8"
            )
    return value


def require_in_vocabulary(name: str, ids: Tensor, vocab_size: int) -> None:
    """Raises ValueError where one of ``ids`` (l,) is outside a vocabulary of ``vocab_size``."""
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise ValueError(f"{name} has token {int(outside[0])}; the model's are 0 to {vocab_size - 1}")
