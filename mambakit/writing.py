"""Atomic writes: a file is written under a temporary name, then renamed. A reader sees the old file or the new one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mambakit.errors import UsageError


def replaceable(path: str | os.PathLike) -> Path:
    """The path to rename a new file to: ``path`` itself, or the target of a link.

    Raises:
        UsageError: it is a device, a pipe or a socket. A rename would replace /dev/null for every program.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file() and not target.is_dir():
        raise UsageError(f"{path} is a device, a pipe or a socket, which a file would replace; give the name of a file")
    return target


def require_place(path: str | os.PathLike) -> None:
    """UsageError where there cannot be a file ``path``: it is a folder, or in none."""
    target = Path(os.path.realpath(path))
    _require_no_folder(path, target)
    if not target.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {target.parent}; make it first, or name another")


def require_folder_place(path: str | os.PathLike) -> None:
    """UsageError where there cannot be a folder ``path``: it, or what it is in, is a file."""
    target = Path(os.path.realpath(path))
    there = next(place for place in (target, *target.parents) if place.exists())
    if not there.is_dir():
        inside = "" if there == target else f", and {path} would be in it"
        raise UsageError(f"{there} is a file{inside}; name another folder")


def _require_no_folder(path: str | os.PathLike, target: Path) -> None:
    if target.is_dir():
        raise UsageError(f"{path} is a folder; give the name of a file")


def replace_text(path: Path, text: str) -> None:
    """Write a text file as ``path`` with ".tmp", then rename it: a crash leaves the old file, or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def set_aside(path: Path) -> None:
    """Rename what is at ``path`` to the first free name of ``path`` with ".kept1", ".kept2", ..."""
    free = (path.with_name(f"{path.name}.kept{number}") for number in range(1, 10**6))
    path.rename(next(other for other in free if not other.exists()))


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name to write to; the file replaces ``path`` when the block ends, unless it raises.

    Raises:
        UsageError: ``path`` is a folder, a device, a pipe or a socket.
    """
    target = replaceable(path)
    _require_no_folder(path, target)
    temporary = target.with_name(f"{target.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # a rename that survives a power cut must not name an empty file
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
