"""Options of the states that a server keeps."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from mambakit.serving.states.store import StateStore


@dataclass(frozen=True)
class StatesOptions:
    """
    Attributes:
        budget: bytes of all states; each key may have an even part of it.
        seconds: after which a state expires where its request says nothing; None: never.
        upload_bytes: of a state that is imported.
    """

    budget: int = 16 << 30
    seconds: float | None = None
    upload_bytes: int = 64 << 20


def open_store(folder: str | None, options: StatesOptions, keys: int) -> StateStore | None:
    """The store of a folder, with what was there before; None without a folder.

    Args:
        keys: how many keys share it.
    """
    if folder is None:
        return None
    store = StateStore(folder, budget=options.budget, keys=keys, seconds=options.seconds)
    threading.Thread(target=store.clean, daemon=True).start()
    return store
