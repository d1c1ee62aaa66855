"""How single tokens are spelled: for log-probabilities, which name each. Imports no torch."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any


class TokenTexts:
    """Spellings of a tokenizer's tokens, each found once.

    Args:
        tokenizer: a tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}
        self._bytes: dict[int, tuple[int, ...]] = {}

    def text(self, token: int) -> str:
        """Its text. A part of a character is spelled ``bytes:\\xe6``, as OpenAI's completions API does."""
        found = self._texts.get(token)
        if found is None:
            found = self._tokenizer.decode([token])
            if "\ufffd" in found and (parts := self._spelled(token)) is not None:
                found = "bytes:" + "".join(f"\\x{byte:02x}" for byte in parts)
            self._texts[token] = found
        return found

    def bytes(self, token: int) -> tuple[int, ...]:
        """Its bytes: those of its text in UTF-8, or of a part of a character."""
        found = self._bytes.get(token)
        if found is None:
            text: str = self._tokenizer.decode([token])
            parts = self._spelled(token) if "\ufffd" in text else None
            found = self._bytes[token] = tuple(text.encode()) if parts is None else parts
        return found

    def offsets(self, tokens: Iterable[int]) -> list[int]:
        """The number of characters before each of the tokens of a text."""
        from mambakit.generation.stream import _TextDecoder

        decoder, at, found = _TextDecoder(self._tokenizer), 0, []
        for token in tokens:
            found.append(at)
            at += len(decoder.push(token))
        return found

    def _spelled(self, token: int) -> tuple[int, ...] | None:
        """The bytes of a byte-level vocabulary's token, which spells each as a letter of its own; None for another."""
        spelled = self._tokenizer.convert_ids_to_tokens(token)
        letters = _byte_letters()
        return tuple(letters[letter] for letter in spelled) if all(letter in letters for letter in spelled) else None


@functools.cache
def _byte_letters() -> dict[str, int]:
    """Letter -> byte, as GPT-2's tokenizer spells bytes: printable ones as themselves, the others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
