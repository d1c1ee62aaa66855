"""Text that commands read: files, and standard input as "-"."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mambakit import opening
from mambakit.errors import UsageError


def require_file(name: str, what: str, remedy: str = "correct the name") -> None:
    """UsageError unless ``name`` is a file that can be read."""
    path, kind = Path(name), f"{what} file".strip()
    if path.is_dir():
        raise UsageError(f"{name} is a folder, not a {kind}")
    if not path.exists():
        raise UsageError(f"there is no {kind} {name}; {remedy}")
    if not os.access(path, os.R_OK):
        raise UsageError(f"the {kind} {name} cannot be read: permission denied")


@contextmanager
def opened_text(name: str) -> Iterator[IO[str]]:
    """A UTF-8 text file, plain or compressed, or standard input for "-"; line ends as they are.

    Raises:
        UsageError: while it is read, where it is damaged or no UTF-8 text.
    """
    if name == "-":
        file: IO[str] = os.fdopen(os.dup(sys.stdin.fileno()), encoding="utf-8", newline="")
    else:
        file = opening.open_text(Path(name), newline="")
    with opening.named_damage(f"{'standard input' if name == '-' else name} is not UTF-8 text"), file:
        yield file


def read_text(name: str, what: str) -> str:
    """The whole of a UTF-8 text file, plain or compressed, or of standard input for "-"; line ends become newlines."""
    if name != "-":
        require_file(name, what)
    with opening.named_damage(f"{'standard input' if name == '-' else name} is not UTF-8 text"):
        if name == "-":
            return sys.stdin.read()
        with opening.open_text(Path(name)) as file:
            return file.read()
