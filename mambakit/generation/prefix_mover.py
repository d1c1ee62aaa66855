"""What a prefix cache does behind its callers: copy snapshots from a GPU to the host, and write files."""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from mambakit.generation.prefix_snapshot import Snapshot

# Snapshots that may wait on a GPU; more are not taken. Those of a 1.4b model have 12.6 MB each.
MOST_MOVING = 32
# Snapshots that may wait for the disk; more are not written.
MOST_UNWRITTEN = 64
# So long the interpreter's exit waits for those that are not written yet.
_EXIT_SECONDS = 2.0


@dataclass(eq=False)
class _Job:
    snapshot: Snapshot
    failed: Callable[[], None] | None
    """Called where the snapshot cannot be copied. None: there is nothing to copy."""
    write: Callable[[], None] | None


class Mover:
    """A thread, begun with the first snapshot, for which nobody waits.

    Snapshots are copied in the order in which they came, and written when none is left to be copied.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()  # reentrant: `end` may be called by a garbage collection in here
        self._moving: deque[_Job] = deque()
        self._unwritten: deque[_Job] = deque()
        self._current: _Job | None = None
        self._thread: threading.Thread | None = None
        self._ending = False

    def has_room(self) -> bool:
        """Whether another snapshot may wait on the GPU."""
        with self._changed:
            copying = self._current is not None and self._current.failed is not None
            return len(self._moving) + copying < MOST_MOVING

    def move(self, snapshot: Snapshot, failed: Callable[[], None], write: Callable[[], None] | None) -> None:
        """Copy a snapshot to the host, then call ``write``. Where it cannot be copied, ``failed`` is called instead."""
        self._add(self._moving, _Job(snapshot, failed, write))

    def write(self, snapshot: Snapshot, write: Callable[[], None]) -> None:
        """Call ``write``, unless too many are waiting for that."""
        with self._changed:
            if len(self._unwritten) < MOST_UNWRITTEN:
                self._add(self._unwritten, _Job(snapshot, None, write))

    def clear(self) -> None:
        """Forget what waits, and wait for what is being done."""
        with self._changed:
            self._moving.clear()
            self._unwritten.clear()
            if (current := self._current) is not None:
                current.write = None
                self._changed.wait_for(lambda: self._current is not current)

    def end(self) -> None:
        """Let the thread end once nothing waits."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()

    def join(self, seconds: float) -> None:
        """Wait for the thread's end."""
        if self._thread is not None:
            self._thread.join(max(0.0, seconds))

    def _add(self, jobs: deque[_Job], job: _Job) -> None:
        with self._changed:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="prefix cache", daemon=True)
                thread.start()
                self._thread = thread
                _begun.add(self)
            jobs.append(job)
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._moving or self._unwritten or self._ending)
                if not self._moving and not self._unwritten:
                    return
                self._current = job = (self._moving or self._unwritten).popleft()
            try:
                self._do(job)
            except Exception as error:
                with contextlib.suppress(Warning):  # where warnings are errors: nobody could catch it
                    warnings.warn(f"a snapshot could not be kept: {type(error).__name__}: {error}", stacklevel=2)
            with self._changed:
                self._current = None
                self._changed.notify_all()
            del job  # not held while it waits

    def _do(self, job: _Job) -> None:
        if job.failed is None:
            with self._changed:
                write = job.write
            if write is not None:  # else it was cleared just now
                write()
            return
        try:
            job.snapshot.to_host()
        except Exception:
            job.failed()
            raise
        with self._changed:
            if job.write is not None:
                self.write(job.snapshot, job.write)


_begun: weakref.WeakSet[Mover] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """A thread that is at work when the interpreter goes would end the process with an error."""
    last = time.monotonic() + _EXIT_SECONDS
    movers = list(_begun)
    for mover in movers:
        mover.end()
    for mover in movers:
        mover.join(last - time.monotonic())
