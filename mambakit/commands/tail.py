"""Complete lines of a file as they are appended to it, through rotation and truncation, and of standard input."""

from __future__ import annotations

import os
import select
import sys
from pathlib import Path
from typing import Any

from mambakit.errors import UsageError

# A line longer than this is cut: memory must not grow with what never ends.
LONGEST_LINE = 1 << 16
# So many bytes before the place are compared after a restart: another file under the name is then noticed.
_MARK = 64


class Tail:
    """The lines of a file from a place on.

    A file that was replaced (another one under its name) is read to its end, and then the new one from its start; one
    that was cut short is read from its start. A line counts once its end is there.

    Args:
        path: the file; it need not be there yet.
        place: where an earlier `place` was. The file is read from its start where it is not the same one any more.
        from_end: begin behind what is there now.

    Attributes:
        anew: whether ``place`` was not found again in this file.
    """

    def __init__(self, path: str, place: dict[str, Any] | None = None, from_end: bool = False):
        self.path, self.anew = Path(path), False
        self._file: Any = None  # a binary file
        self._offset = 0  # of the first byte that is not part of a line yet
        self._unfinished = b""
        self._mark = b""
        if place is not None:
            self._find(place)
        elif from_end and self._opened():
            self._skip_to(self._size())

    def place(self) -> dict[str, Any]:
        """Where the next line begins, as JSON has it."""
        return {"offset": self._offset, "mark": self._mark.hex()}

    def read(self, most: int) -> list[bytes]:
        """The next complete lines, line ends included, of about ``most`` bytes; [] where there are none yet."""
        if not self._opened():
            return []
        data = self._file.read(most)
        if data:
            return self._lines(data)
        left = self._changed(most)
        return left + (self._lines(self._file.read(most)) if self._opened() else [])

    def rest(self) -> list[bytes]:
        """The last line, which has no end."""
        line, self._unfinished = self._unfinished, b""
        return self._taken([line] if line else [])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    # -- the file ------------------------------------------------------------------------------------------------------

    def _opened(self) -> bool:
        if self._file is None:
            try:
                self._file = open(self.path, "rb")  # noqa: SIM115, open as long as it is followed
            except FileNotFoundError:
                return False
            except OSError as error:
                raise UsageError(f"{self.path} cannot be read: {error.strerror}") from error
            self._offset, self._mark = 0, b""
        return True

    def _changed(self, most: int) -> list[bytes]:
        """At the end: whether another file has the name by now, or this one was cut short. Returns what was left."""
        here = os.fstat(self._file.fileno())
        if here.st_size < self._file.tell():
            self._start_again()
            return []
        try:
            there = os.stat(self.path)
        except FileNotFoundError:  # between two files
            return []
        if (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino):
            return []
        left = self._lines(self._file.read(most))  # what was written before it was replaced
        if not left:
            left = self.rest()
            self.close()
        return left

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _start_again(self) -> None:
        self._file.seek(0)
        self._offset, self._mark, self._unfinished = 0, b"", b""

    def _find(self, place: dict[str, Any]) -> None:
        if not self._opened():
            self.anew = place["offset"] > 0
            return
        offset, mark = place["offset"], bytes.fromhex(place["mark"])
        self._skip_to(min(offset, self._size()))
        if (self._offset, self._mark) != (offset, mark):
            self._start_again()
            self.anew = True

    def _skip_to(self, offset: int) -> None:
        self._file.seek(max(0, offset - _MARK))
        self._mark = self._file.read(min(offset, _MARK))
        self._offset = offset

    # -- lines ---------------------------------------------------------------------------------------------------------

    def _lines(self, data: bytes) -> list[bytes]:
        data = self._unfinished + data
        lines = _split(data)
        self._unfinished = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
        while len(self._unfinished) >= LONGEST_LINE:
            lines.append(self._unfinished[:LONGEST_LINE])
            self._unfinished = self._unfinished[LONGEST_LINE:]
        return self._taken(lines)

    def _taken(self, lines: list[bytes]) -> list[bytes]:
        whole = b"".join(lines)
        self._offset += len(whole)
        self._mark = (self._mark + whole)[-_MARK:]
        return lines


class StandardInput(Tail):
    """Standard input as a `Tail`; ``ended`` once its other end was closed."""

    def __init__(self) -> None:
        super().__init__("-")
        self.ended = False

    def read(self, most: int) -> list[bytes]:
        if self.ended or not select.select([sys.stdin.fileno()], [], [], 0)[0]:
            return []
        data = os.read(sys.stdin.fileno(), most)
        self.ended = not data
        return self._lines(data)

    def _opened(self) -> bool:
        return True


def _split(data: bytes) -> list[bytes]:
    """Lines end at newlines alone: a carriage return is part of a line."""
    parts = data.split(b"\n")
    return [part + b"\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])
