"""A model's reply in a chat, while it is written: what it thinks, what it says, and which tools it calls.

Thoughts stand between ``<think>`` and ``</think>``, calls between ``<tool_call>`` and ``</tool_call>`` as JSON with a
name and arguments. Both are looked for only where the model's chat template writes them so.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

_THINK, _CALL = ("<think>", "</think>"), ("<tool_call>", "</tool_call>")


@dataclass(frozen=True)
class ReplyForm:
    """How a model's replies are written.

    Attributes:
        thinks: whether there may be thoughts.
        calls: whether there may be calls of tools.
        begins_thinking: whether the prompt ends inside of a thought.
    """

    thinks: bool = False
    calls: bool = False
    begins_thinking: bool = False


class Call(NamedTuple):
    """A call of a tool."""

    name: str
    arguments: str
    """As JSON."""


class Said(NamedTuple):
    """What a reply has gained."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()

    def plus(self, more: Said) -> Said:
        return Said(self.content + more.content, self.reasoning + more.reasoning, self.calls + more.calls)


class ReplyReader:
    """Reads one reply, piece by piece.

    Args:
        form: how it is written.
    """

    def __init__(self, form: ReplyForm):
        self._form = form
        self._part = "reasoning" if form.begins_thinking else "content"
        self._buffer = ""
        self._begun = False  # whether the part has more than white space
        self.called = False
        """Whether there was a call."""

    def push(self, piece: str) -> Said:
        """Read more of the text. White space around thoughts and calls is dropped."""
        self._buffer += piece
        said = Said()
        while (found := self._next_marker()) is not None:
            at, marker = found
            before, self._buffer = self._buffer[:at], self._buffer[at + len(marker) :]
            said = said.plus(self._of_part(before, whole=True))
            self._part = {_THINK[0]: "reasoning", _CALL[0]: "call"}.get(marker, "content")
            self._begun = False
        if self._part == "call":
            return said
        kept = self._held()
        before, self._buffer = self._buffer[: len(self._buffer) - kept], self._buffer[len(self._buffer) - kept :]
        return said.plus(self._of_part(before))

    def end(self) -> Said:
        """The rest of the text. A call that is not complete is text."""
        rest, self._buffer = self._buffer, ""
        if self._part == "call":
            return Said(content=_CALL[0] + rest)
        return self._of_part(rest)

    def _markers(self) -> list[str]:
        """Those that end this part."""
        if self._part == "reasoning":
            return [_THINK[1]]
        if self._part == "call":
            return [_CALL[1]]
        return [_THINK[0]] * self._form.thinks + [_CALL[0]] * self._form.calls

    def _next_marker(self) -> tuple[int, str] | None:
        places = [(at, marker) for marker in self._markers() if (at := self._buffer.find(marker)) >= 0]
        return min(places, default=None)

    def _held(self) -> int:
        """How many characters at the buffer's end may belong to a marker, or to white space before one."""
        text, markers = self._buffer, self._markers()
        if not markers:
            return 0
        lengths = (n for marker in markers for n in range(1, len(marker)) if text.endswith(marker[:n]))
        held = max(lengths, default=0)
        before = text[: len(text) - held]
        return held + len(before) - len(before.rstrip())

    def _of_part(self, text: str, whole: bool = False) -> Said:
        if self._part == "call":
            call = _call(text)
            self.called = self.called or call is not None
            return Said(content=f"{_CALL[0]}{text}{_CALL[1]}") if call is None else Said(calls=(call,))
        if self._markers() and not self._begun:
            text = text.lstrip()
        if whole:
            text = text.rstrip()
        self._begun = self._begun or bool(text)
        return Said(content=text) if self._part == "content" else Said(reasoning=text)


def _call(text: str) -> Call | None:
    """None where it is no call: where it is not JSON, or holds what JSON and UTF-8 cannot."""
    try:
        found: Any = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, str) and not _is_unicode(written):
        written = json.dumps(arguments)  # half a surrogate pair, as the escape that it was
    return Call(found["name"], written) if _is_unicode(found["name"] + written) else None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _finite(number: str) -> float:
    found = float(number)
    return found if math.isfinite(found) else _refuse(number)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
