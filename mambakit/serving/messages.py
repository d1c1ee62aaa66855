"""What the front and a replica's process say to each other over a pipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class WorkerOptions:
    """What a replica's process needs to know to begin.

    Attributes:
        model: hub id or folder.
        device: "cpu", "cuda:0", ...
        dtype: of the weights: "auto", "float32", ...; None is float32 on a CPU, the checkpoint's elsewhere.
        rows: how many texts it writes together.
        sharers: how many replicas compute on this machine's processors; each takes its part of the threads.
        chunk_size: prompt tokens per forward; None is 512 on a CPU and 2,048 elsewhere.
        prefix_cache_bytes: budget of the states of known prefixes; 0 keeps none.
        heartbeat_seconds: a replica that says nothing for so long is taken for dead.
        progress_seconds: so is one that has work and does not get on with it.
        load_seconds: so is one that takes longer to load.
    """

    model: str
    device: str = "cpu"
    dtype: str | None = None
    rows: int = 8
    sharers: int = 1
    chunk_size: int | None = None
    prefix_cache_bytes: int = 0
    heartbeat_seconds: float = 20.0
    progress_seconds: float = 300.0
    load_seconds: float = 1800.0


@dataclass(frozen=True)
class Task:
    """Front to worker: write one text."""

    id: int
    prompt_ids: bytes
    """int64, l >= 1 of them; bytes, because a list of a million numbers takes a second to pickle."""
    sampling: dict[str, Any]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    share: tuple[Any, ...] = ()
    """Whose it is, from the outside in: rows are divided evenly at every level."""


@dataclass(frozen=True)
class Cancel:
    """Front to worker: nobody reads this text any more."""

    id: int


@dataclass(frozen=True)
class Stop:
    """Front to worker: exit."""


@dataclass(frozen=True)
class Ready:
    """Worker to front: the model is loaded and warm."""


@dataclass(frozen=True)
class Failed:
    """Worker to front: why the process is about to end."""

    reason: str


class Beat(NamedTuple):
    """Worker to front, at short intervals: it runs."""

    steps: int
    """Of its main thread, so far."""
    busy: bool
    """Whether there is anything to do."""


class Piece(NamedTuple):
    """What a text has gained."""

    id: int
    text: str = ""
    tokens: int = 0
    finish_reason: str = ""
    """"" while it goes on; then "stop", "length", "cancelled" or "error"."""
    cached_tokens: int = 0
    """Of the prompt, those whose state was known; said with the end."""
    error: str = ""
    """What went wrong with this text; those beside it go on."""
    status: int = 500
    """Of HTTP, with an error: 400 where the request was at fault."""


class Batch(NamedTuple):
    """Worker to front: what some steps have made, and how full the replica is."""

    busy: int
    waiting: int
    pieces: list[Piece]
