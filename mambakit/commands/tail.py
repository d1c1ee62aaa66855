"""Complete lines of a file as they are appended to it, through rotation and truncation, and of standard input."""

from __future__ import annotations

import glob
import os
import select
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mambakit.errors import UsageError

# A line longer than this is cut: memory must not grow with what never ends.
LONGEST_LINE = 1 << 16
# So many bytes before the place are compared after a restart: another file under the name is then noticed.
_MARK = 64


class Tail:
    """The lines of a file from a place on.

    A file that was replaced (another one under its name) is read to its end, and then the new one from its start, once
    there is something in it: a program may write to the old one until it opens the new one. One that was cut short is
    read from its start. A line counts once its end is there.

    Args:
        path: the file; it need not be there yet.
        place: where an earlier `place` was. Where the file is not the same one any more, the earlier one is looked for
            beside it, under names that begin with its own (app.log.1), and read to its end first.
        from_end: begin behind what is there now.

    Attributes:
        anew: whether ``place`` was not found again: the file is read from its start.
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
        inode = 0 if self._file is None else os.fstat(self._file.fileno()).st_ino
        return {"offset": self._offset, "mark": self._mark.hex(), "inode": inode}

    def read(self, most: int) -> list[bytes]:
        """The next complete lines, line ends included, of about ``most`` bytes.

        [] where there are none yet: all that is there was read then. A line longer than ``most`` is read to its end.
        """
        while self._opened():
            if not self._unchanged():
                self._start_again()
            data = self._file.read(most)
            if data:
                lines = self._lines(data)
            elif self._replaced():
                lines = self.rest()
                self.close()
            else:
                return []
            if lines:
                return lines
        return []

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
            self._file = _open(self.path)
            self._offset, self._mark = 0, b""
        return self._file is not None

    def _unchanged(self) -> bool:
        """Whether what was read is still there: a file may have been cut short, and have grown again since."""
        here = self._file.tell()
        return self._size() >= here and _mark_at(self._file, self._offset, here) == self._mark

    def _replaced(self) -> bool:
        """At the end: whether another file has the name by now, and nothing more has come to this one."""
        try:
            there = os.stat(self.path)
        except FileNotFoundError:  # between two files
            return False
        here = os.fstat(self._file.fileno())
        another = (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino)
        # The last lines may have come between the end of the file and the look at its name.
        return another and there.st_size > 0 and self._size() == self._file.tell()

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _start_again(self) -> None:
        self._file.seek(0)
        self._offset, self._mark, self._unfinished = 0, b"", b""

    def _find(self, place: dict[str, Any]) -> None:
        offset, mark = place["offset"], bytes.fromhex(place["mark"])
        if self._opened() and _mark_at(self._file, offset, offset) == mark:
            self._skip_to(offset)
            return
        earlier = _earlier_file(self.path, offset, mark, place.get("inode"))
        self.anew = earlier is None and offset > 0
        if earlier is not None:
            self.close()
            self._file = earlier
            self._skip_to(offset)
        elif self._file is not None:
            self._start_again()

    def _skip_to(self, offset: int) -> None:
        self._mark = _mark_at(self._file, offset, offset)
        self._offset = offset

    # -- lines ---------------------------------------------------------------------------------------------------------

    def _lines(self, data: bytes) -> list[bytes]:
        data = self._unfinished + data
        lines = [piece for line in _split(data) for piece in _pieces(line)]
        self._unfinished = lines.pop() if lines and not data.endswith(b"\n") else b""
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

    def place(self) -> dict[str, Any]:
        return {"offset": self._offset, "mark": self._mark.hex()}

    def read(self, most: int) -> list[bytes]:
        lines: list[bytes] = []
        while not lines and not self.ended and select.select([sys.stdin.fileno()], [], [], 0)[0]:
            data = os.read(sys.stdin.fileno(), most)
            self.ended = not data
            lines = self._lines(data)
        return lines


def _open(path: Path) -> Any:
    """A file without a buffer, which would hold what is no longer there once it was cut short; None: there is none."""
    try:
        return open(path, "rb", buffering=0)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


def _mark_at(file: Any, offset: int, then: int) -> bytes:
    """The last bytes before ``offset``, fewer where the file ends earlier; the file is at ``then`` afterwards."""
    start = max(0, offset - _MARK)
    file.seek(start)
    mark: bytes = file.read(offset - start)
    file.seek(then)
    return mark


def _earlier_file(path: Path, offset: int, mark: bytes, inode: int | None) -> Any:
    """The file that was followed as ``path`` before it was renamed, or copied and cut short; None: it is not there.

    A file of the same inode, else a copy: the latest one with the same bytes before the place, if those are many.
    """
    if not offset:
        return None
    found = []
    for other in path.parent.glob(f"{glob.escape(path.name)}?*"):
        file = _open(other) if other.is_file() and os.access(other, os.R_OK) else None
        if file is None:
            continue
        with file:
            status = os.fstat(file.fileno())
            same = status.st_ino == inode
            if (same or len(mark) == _MARK) and _mark_at(file, offset, 0) == mark:
                found.append((same, status.st_mtime, other))
    return _open(max(found)[2]) if found else None


def _pieces(line: bytes) -> Iterator[bytes]:
    """A line, or parts of one that is too long: where it is cut depends on its bytes alone, and splits no character."""
    while len(line) > LONGEST_LINE:
        end = next((i for i in range(LONGEST_LINE, LONGEST_LINE - 4, -1) if line[i] & 0xC0 != 0x80), LONGEST_LINE)
        yield line[:end]
        line = line[end:]
    yield line


def _split(data: bytes) -> list[bytes]:
    """Lines end at newlines alone: a carriage return is part of a line."""
    parts = data.split(b"\n")
    return [part + b"\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])
