"""Values in error messages: spelled as JSON or Python, in characters that every encoding has, and cut to a limit."""

from __future__ import annotations

import json
import reprlib
from typing import Any

LIMIT = 100


def quoted(value: Any, limit: int = LIMIT) -> str:
    """``value`` as JSON or else Python spells it, cut to ``limit`` characters.

    It never raises, and its cost does not grow with the value.
    """
    return cut(_spelled(value, limit), limit)


def brief(value: Any, limit: int = LIMIT) -> str:
    """``value`` as Python's `repr` spells it, cut to ``limit`` characters."""
    return cut(repr(value[: limit + 1]) if isinstance(value, str) else _bounded(value), limit)


def cut(text: str, limit: int = LIMIT) -> str:
    """``text`` cut to ``limit`` characters, with halves of surrogate pairs escaped."""
    text = printable(text[: limit + 1])
    return text if len(text) <= limit else text[: limit - 3] + "..."


def printable(text: str) -> str:
    """``text`` with halves of surrogate pairs, which no encoding has, escaped as ``\\ud800``."""
    return text.encode("utf-8", "backslashreplace").decode()


def _spelled(value: Any, limit: int, depth: int = 4) -> str:
    """The value's spelling: all of it, or a prefix longer than ``limit``."""
    if isinstance(value, str):
        return json.dumps(value[: limit + 1], ensure_ascii=False)
    if isinstance(value, bool) or value is None or type(value) is float:
        return json.dumps(value)
    if isinstance(value, int):
        # Python refuses to print numbers of thousands of digits.
        bits = value.bit_length()
        return (
            str(value) if bits < 256 else f"{'-' if value < 0 else ''}{hex(abs(value) >> (bits - 64))}... ({bits} bits)"
        )
    if type(value) in (list, dict):
        opening, closing = "[]" if type(value) is list else "{}"
        text = opening if depth or not value else f"{opening}..."
        for item in value if depth else ():
            if len(text) > limit:
                break
            text += ", " if len(text) > 1 else ""
            if type(value) is dict:
                text += f"{_spelled(item, limit)}: "
                item = value[item]
            text += _spelled(item, limit, depth - 1)
        return text + closing
    return _bounded(value)


def _bounded(value: Any) -> str:
    try:
        return _BOUNDED.repr(value)
    except Exception:  # a value's own __repr__ may raise anything; the error that quotes it matters more
        return f"<{type(value).__name__}>"


class _Repr(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        return _spelled(x, LIMIT)


_BOUNDED = _Repr()
_BOUNDED.maxstring = _BOUNDED.maxother = LIMIT
