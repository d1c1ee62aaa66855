"""A chat as a tree of turns: where one is, what was said on the way there, and the forks that were left."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mambakit.errors import UsageError
from mambakit.quoting import brief, cut
from mambakit.writing import replacing

ROLES = ("system", "user", "assistant")
_FORMAT = "mambakit-chat-1"


@dataclass(eq=False)
class Turn:
    """
    Attributes:
        memory: what the model has kept of the text up to here; None where that is to be read again.
    """

    role: str
    text: str
    parent: Turn | None = None
    children: list[Turn] = field(default_factory=list)
    memory: Any = None

    def path(self) -> list[Turn]:
        """The turns from the first to this one."""
        found: list[Turn] = []
        turn: Turn | None = self
        while turn is not None and turn.parent is not None:
            found.append(turn)
            turn = turn.parent
        return found[::-1]


class Conversation:
    """
    Attributes:
        root: before the first turn; no turn itself.
        current: after which the next turn comes.
        forks: places with a name.
        kept: of a chat that was loaded: the text that the state in the file beside it has read; None: there is none.
    """

    def __init__(self) -> None:
        self.root = Turn("", "")
        self.current = self.root
        self.forks: dict[str, Turn] = {}
        self.kept: str | None = None

    def add(self, role: str, text: str) -> Turn:
        self.current = Turn(role, text, self.current)
        assert self.current.parent is not None
        self.current.parent.children.append(self.current)
        return self.current

    def fork(self, name: str = "") -> str:
        """Name this place, so that `back` finds it. Returns the name."""
        number = len(self.forks) + 1
        while not name:
            name = "" if str(number) in self.forks else f"fork{number}"
            number += 1
        if name.isdigit():
            raise UsageError(
                f"the fork's name is {brief(name)}, which /back would read as a number; begin with a letter"
            )
        self.forks[name] = self.current
        return name

    def back(self, where: str = "") -> Turn:
        """To a named place, or so many exchanges back (1): before the user's last words, which are returned.

        Raises:
            UsageError: there is no such place.
        """
        if where and not where.isdigit():
            if where not in self.forks:
                known = ", ".join(self.forks) or "none yet"
                raise UsageError(f"there is no fork {brief(where)}; there are: {known} (/fork NAME makes one)")
            self.current = self.forks[where]
            return self.current
        for _ in range(int(where or 1)):
            turn = self.current
            while turn.parent is not None and turn.role != "user":
                turn = turn.parent
            if turn.parent is None:
                raise UsageError("this is the beginning of the chat; there is nothing before it")
            self.current = turn.parent
        return self.current

    # -- files

    def save(self, file: str | os.PathLike, model: str, kept: str | None) -> None:
        """Write all turns as JSON.

        Args:
            kept: the text that the state in the file beside it has read; None: there is none.
        """
        numbers = {self.root: 0}
        turns = []
        for turn in self._all():
            numbers[turn] = len(numbers)
            assert turn.parent is not None
            turns.append({"role": turn.role, "text": turn.text, "after": numbers[turn.parent]})
        body = {
            "format": _FORMAT, "model": model, "turns": turns, "current": numbers[self.current],
            "forks": {name: numbers[turn] for name, turn in self.forks.items()}, "kept": kept,
        }  # fmt: skip
        with replacing(Path(file)) as temporary:
            temporary.write_text(json.dumps(body, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    def _all(self) -> Iterator[Turn]:
        waiting = list(self.root.children)
        while waiting:
            turn = waiting.pop(0)
            yield turn
            waiting[:0] = turn.children

    @classmethod
    def load(cls, file: str | os.PathLike) -> Conversation:
        """
        Raises:
            UsageError: the file is not there, or is none of `save`.
        """
        wrong = f"{cut(str(file))} is no chat that /save wrote"
        try:
            body = json.loads(Path(file).read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"{cut(str(file))} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{wrong} ({cut(str(error))})") from error
        if not isinstance(body, dict) or body.get("format") != _FORMAT:
            raise UsageError(f'{wrong} (its format is not "{_FORMAT}")')
        found = cls()
        turns = [found.root]
        try:
            for one in body["turns"]:
                found.current = turns[_index(one["after"], len(turns))]
                if one["role"] not in ROLES or not isinstance(one["text"], str):
                    raise ValueError("a turn has no role or no text")
                turns.append(found.add(one["role"], one["text"]))
            found.forks = {str(name): turns[_index(at, len(turns))] for name, at in body["forks"].items()}
            found.current = turns[_index(body["current"], len(turns))]
            found.kept = None if body["kept"] is None else str(body["kept"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"{wrong} ({type(error).__name__}: {cut(str(error))})") from error
        return found


def _index(value: Any, length: int) -> int:
    if type(value) is not int or not 0 <= value < length:
        raise ValueError(f"there is no turn {cut(str(value))}")
    return value
