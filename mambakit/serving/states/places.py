"""Where states are kept: a folder, or a URL of fsspec."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeAlias

from mambakit.serving.states.blobs import Blobs
from mambakit.serving.states.records import Records
from mambakit.serving.states.remote import RemoteBlobs, RemoteRecords, is_url

AnyBlobs: TypeAlias = "Blobs | RemoteBlobs"
AnyRecords: TypeAlias = "Records | RemoteRecords"


def blobs_of(folder: str | os.PathLike) -> AnyBlobs:
    """The files of a `StateStore`'s folder or URL."""
    return RemoteBlobs(f"{folder}/blobs") if is_url(folder) else Blobs(Path(folder) / "blobs")


def records_of(folder: str | os.PathLike) -> AnyRecords:
    return RemoteRecords(f"{folder}/records") if is_url(folder) else Records(Path(folder) / "records")
