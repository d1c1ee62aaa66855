"""Options of the states that a server keeps."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

from mambakit.serving.states.store import StateStore

_log = logging.getLogger("mambakit.serving")


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


def open_store(folder: str | None, options: StatesOptions, keys: int, every: float = 900.0) -> StateStore | None:
    """The store of a folder, with what was there before; None without a folder.

    Args:
        keys: how many keys share it.
        every: seconds after which it is cleaned again.
    """
    if folder is None:
        return None
    store = StateStore(folder, budget=options.budget, keys=keys, seconds=options.seconds)
    threading.Thread(target=_clean, args=(store, every), daemon=True).start()
    return store


def _clean(store: StateStore, every: float) -> None:
    """Delete again and again what nobody needs: a server runs for months."""
    while True:
        try:
            store.clean()
        except OSError as error:  # as of a file system that does not answer; the next time it may
            _log.warning("states that have expired could not be cleared away: %s", error)
        time.sleep(every)
