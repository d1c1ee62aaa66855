"""Text that commands read: files, and standard input as "-"."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TextIO

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


def open_text(name: str) -> TextIO:
    """A UTF-8 text file, or standard input for "-", line ends as they are."""
    if name == "-":
        return os.fdopen(os.dup(sys.stdin.fileno()), encoding="utf-8", newline="")
    return open(name, encoding="utf-8", newline="")


def read_text(name: str, what: str) -> str:
    """The whole of a UTF-8 text file, or of standard input for "-"; line ends become newlines."""
    if name != "-":
        require_file(name, what)
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        where = "standard input" if name == "-" else name
        raise UsageError(f"{where} is not UTF-8 text ({error})") from error
