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


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name to write to; the file replaces ``path`` when the block ends, unless it raises.

    Raises:
        UsageError: ``path`` is a device, a pipe or a socket.
    """
    target = replaceable(path)
    temporary = target.with_name(f"{target.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # a rename that survives a power cut must not name an empty file
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
