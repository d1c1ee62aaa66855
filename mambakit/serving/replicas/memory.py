"""Memory that a replica's process has freed goes back to the system.

States come and go in pieces of a megabyte or so, between objects that stay. glibc keeps the holes: beside 1,000 streams
resident memory grew by 50 MB a minute. A higher limit for what is mapped by itself would serve, too, but every
activation of that size would then be mapped anew.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable

# A call takes 7 ms beside 1,000 streams, and free memory grows by 5 MB a second.
SECONDS = 2.0


def trimmer() -> Callable[[], None] | None:
    """glibc's `malloc_trim` of all that is free; None where another allocator serves."""
    if not sys.platform.startswith("linux"):
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
    return None if trim is None else lambda: trim(0)


def release_free_memory(seconds: float = SECONDS, trim: Callable[[], None] | None = None) -> bool:
    """Start the thread that does so every ``seconds``. Returns False where there is nothing to call."""
    call = trim or trimmer()
    if call is None:
        return False

    def run() -> None:
        waiting = threading.Event()
        while not waiting.wait(seconds):
            call()

    threading.Thread(target=run, daemon=True, name="release free memory").start()
    return True
