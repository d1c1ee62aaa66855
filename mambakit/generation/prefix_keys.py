"""Keys of a prefix cache: the SHA-256 of the model and of the first tokens of a prompt."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from mambakit.generation.fingerprint import fingerprint
from mambakit.generation.token_ids import text_ids


class PrefixKey(NamedTuple):
    """Names the state after exactly these tokens, read by exactly this model."""

    model: str
    position: int  # how many tokens have been read
    digest: str  # of the model, the salt and those tokens


def model_name(model: Any) -> str:
    """Names a model's configuration, weights and dtype."""
    return f"{fingerprint(model)[:32]}-{str(model.dtype).removeprefix('torch.')}"


def prefix_keys(model: str, tokens: list[int], salt: str = "") -> Callable[[int], PrefixKey]:
    """position -> key of the first ``position`` tokens; while positions rise, each token is hashed once.

    Keys of different salts are different.
    """
    begin = model.encode() + (b"\0" + salt.encode() if salt else b"")
    digest, done = hashlib.sha256(begin), 0
    content = memoryview(array("q", tokens)).cast("B")

    def key(position: int) -> PrefixKey:
        nonlocal digest, done
        if position < done:
            digest, done = hashlib.sha256(begin), 0
        digest.update(content[8 * done : 8 * position])
        done = position
        return PrefixKey(model, position, digest.hexdigest())

    return key


def prefix_tokens(ids: Tensor | Sequence[int], vocab_size: int) -> list[int]:
    """The tokens of one prompt (l,), l >= 1.

    Raises:
        TypeError: they are no whole numbers.
        ValueError: another shape, no tokens, or a token outside of the vocabulary.
    """
    tokens: list[int] = text_ids("a prompt", ids, vocab_size).tolist()
    return tokens
