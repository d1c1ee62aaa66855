"""The token that a document starts with, for scores and for empty prompts alike. Imports no torch."""

from __future__ import annotations

from typing import Any


def find_start_token(tokenizer: Any) -> int | None:
    """The tokenizer's bos, or its eos (end-of-text), which stands between documents; None where it has neither."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def start_token(tokenizer: Any) -> int:
    """`find_start_token`.

    Raises:
        ValueError: the tokenizer has neither.
    """
    found = find_start_token(tokenizer)
    if found is None:
        raise ValueError("the tokenizer has neither a bos nor an eos token to start a document with; set one")
    return found
