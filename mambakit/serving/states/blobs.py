"""Files named by the SHA-256 of their contents. One that is there is whole and survives a power cut.

A file is written under a temporary name, synced, and renamed; then its folder is synced. Equal contents are one file.
Several processes may use one folder.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from mambakit.serving.errors import ApiError
from mambakit.writing import replacing

_NAME = re.compile(r"[0-9a-f]{64}")
_SUFFIX = ".safetensors"
_ABANDONED = 3600.0  # a temporary file this old (seconds) belongs to a process that was killed while it wrote


class Blobs:
    """A folder of such files, made with the first of them."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)

    def path(self, digest: str) -> Path:
        assert _NAME.fullmatch(digest)
        return self.folder / digest[:2] / f"{digest}{_SUFFIX}"

    def put(self, data: bytes) -> str:
        """Write ``data``, durably. Returns its SHA-256.

        Raises:
            ApiError: the disk is full, or cannot be written to; nothing is left of it.
        """
        digest = hashlib.sha256(data).hexdigest()
        path = self.path(digest)
        try:
            if path.exists():  # of the same contents, unless it is damaged
                if _read(path) == data:
                    os.utime(path)
                    return digest
                path.unlink(missing_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_bytes(data)
            sync_folder(path.parent)
            sync_folder(self.folder)
        except OSError as error:
            raise not_written(error, self.folder) from error
        return digest

    def get(self, digest: str) -> bytes:
        """The contents, checked.

        Raises:
            ApiError: the file is gone, or damaged; a damaged one is deleted.
        """
        path = self.path(digest)
        try:
            data = _read(path)
        except OSError as error:
            message = f"the state's file cannot be read ({error.strerror or error}); make the state again"
            raise ApiError(410, message, code="state_damaged") from error
        if hashlib.sha256(data).hexdigest() != digest:
            path.unlink(missing_ok=True)
            message = "the state's file is damaged (it is not what was written); make the state again"
            raise ApiError(410, message, code="state_damaged")
        return data

    def size(self, digest: str) -> int | None:
        """Bytes of a file; None where it is gone."""
        try:
            return self.path(digest).stat().st_size
        except OSError:
            return None

    def changed(self, digest: str) -> float:
        """When a file was written or touched, in seconds since 1970. Raises an OSError where it is gone."""
        return self.path(digest).stat().st_mtime

    def delete(self, digest: str) -> None:
        with contextlib.suppress(OSError):
            self.path(digest).unlink()

    def touch(self, digest: str) -> None:
        """Note a use, for all servers of the folder to see."""
        with contextlib.suppress(OSError):
            os.utime(self.path(digest))

    def digests(self) -> Iterator[str]:
        """Of all files. Files that were never finished are deleted."""
        if not self.folder.is_dir():
            return
        for path in self.folder.glob("[0-9a-f][0-9a-f]/*"):
            if path.suffix == _SUFFIX and _NAME.fullmatch(path.stem):
                yield path.stem
            else:
                delete_abandoned(path)


def delete_abandoned(path: Path) -> None:
    """Delete a temporary file that nobody will finish."""
    with contextlib.suppress(OSError):
        if path.suffix == ".tmp" and time.time() - path.stat().st_mtime > _ABANDONED:
            path.unlink(missing_ok=True)


def _read(path: Path) -> bytes:
    return path.read_bytes()


def not_written(error: OSError, folder: Path) -> ApiError:
    """What a client is told where a file could not be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    what = "the disk is full" if full else f"{error.strerror or error}"
    remedy = (
        "delete states (DELETE /v1/states/{id}; their files go once they are 15 minutes old), or serve with --states "
        "on another disk, or with a smaller --prefix-cache-disk-mb"
    )
    return ApiError(507, f"the state could not be kept: {what}; {remedy}", code="state_not_kept")


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
