"""States by their ids. One that was acknowledged is served until it is deleted or expires, whatever happens meanwhile.

``<folder>/blobs`` holds the files, ``<folder>/records`` what is known of each; several states may have one file. A
record is written after its file, both durably, so a process that is killed anywhere leaves at most a file without a
record, which is deleted later. Nothing is evicted to make room: where a budget is used up, a new state is refused.
Servers may share a folder: before a file is deleted, the folder is asked for others' records of it. All methods may be
called from several threads; they wait for the disk.
"""

from __future__ import annotations

import contextlib
import os
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import RLock

from mambakit.quoting import cut
from mambakit.serving.errors import ApiError
from mambakit.serving.messages import Kept, Layout
from mambakit.serving.states.places import blobs_of, records_of
from mambakit.serving.states.records import StateRecord, new_id
from mambakit.serving.states.remote import is_url
from mambakit.serving.states.tensors import StateFile, check, digest_of

# A file without a record may be of a text whose record is about to be written. After so many seconds it is not.
_UNCLAIMED = 900.0


class StateStore:
    """
    Args:
        folder: made with the first state; or a URL of fsspec, as s3://bucket/states.
        budget: bytes of all files.
        keys: how many keys divide the budget evenly; 1 where there are none.
        seconds: after which a state expires where its request says nothing; None: never.
        clock: gives the seconds since 1970.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        budget: int,
        keys: int = 1,
        seconds: float | None = None,
        clock: Callable[[], float] = time.time,
    ):
        self.folder = str(folder) if is_url(folder) else Path(folder)
        self.budget, self.seconds, self.clock = budget, seconds, clock
        self.blobs, self._files = blobs_of(folder), records_of(folder)
        self.share = budget // max(1, keys)
        self._lock = RLock()
        self._records: dict[str, StateRecord] = {}
        self._reserved: Counter[str] = Counter()  # bytes by owner, of states that are being made
        self._learn()
        self.sweep()

    # -- room ----------------------------------------------------------------------------------------------------------

    def used(self, owner: str | None = None) -> int:
        """Bytes of an owner's files, each counted once; None: of all."""
        with self._lock:
            files = {r.blob: r.bytes for r in self._records.values() if owner is None or r.owner == owner}
        return sum(files.values())

    def by_owner(self) -> dict[str, tuple[int, int]]:
        """How many states each owner has, and the bytes of their files."""
        counts: Counter[str] = Counter()
        files: dict[str, dict[str, int]] = {}
        with self._lock:
            for record in self._records.values():
                counts[record.owner] += 1
                files.setdefault(record.owner, {})[record.blob] = record.bytes
        return {owner: (count, sum(files[owner].values())) for owner, count in counts.items()}

    def count(self) -> int:
        return len(self._records)

    @contextlib.contextmanager
    def reserved(self, owner: str, nbytes: int) -> Iterator[None]:
        """A context in which so many bytes are kept free for a state that is being made.

        Raises:
            ApiError: the owner's share, or the whole budget, does not have them.
        """
        self.sweep()
        with self._lock:
            mine = self.used(owner) + self._reserved[owner] + nbytes
            total = self.used() + self._reserved.total() + nbytes
            if mine > self.share or total > self.budget:
                what, limit, value = (
                    ("your states", self.share, mine) if mine > self.share else ("all states", self.budget, total)
                )
                remedy = "(DELETE /v1/states/{id}), let them expire (expires_after), or serve with a larger --states-mb"
                message = f"{what} would have {value:,} bytes, and may have {limit:,}; delete some {remedy}"
                raise ApiError(507, message, code="states_full")
            self._reserved[owner] += nbytes
        try:
            yield
        finally:
            with self._lock:
                self._reserved[owner] -= nbytes

    # -- one state -----------------------------------------------------------------------------------------------------

    def get(self, owner: str, id: str) -> StateRecord:
        """
        Raises:
            ApiError: there is no such state of this owner, or it has expired.
        """
        with self._lock:
            if id in self._records and not self._files.has(id):  # another server of the folder has deleted it
                del self._records[id]
            record = self._records.get(id) or self._files.read(id)  # or made it
            if record is not None and record.owner == owner and not record.expired(self.clock()):
                self._records[id] = record
                return record
        message = f"there is no state {cut(id)!r}, or it has expired; GET /v1/states lists yours"
        raise ApiError(404, message, param="state", code="state_not_found")

    def add(
        self,
        owner: str,
        kept: Kept,
        fingerprint: str,
        *,
        origin: str,
        parent: str = "",
        expires_after: float | None = None,
        metadata: dict[str, str] | None = None,
    ) -> StateRecord:
        """Acknowledge a state whose file is there. Its record is durable when this returns.

        Raises:
            ApiError: the file is gone, or the record cannot be written.
        """
        record = StateRecord(
            owner, kept.blob, kept.bytes, kept.tokens, fingerprint, kept.digest, origin, parent,
            self._expiry(expires_after), metadata or {}, self.clock(),
        )  # fmt: skip
        return self._write(record)

    def fork(
        self,
        owner: str,
        id: str,
        expires_after: float | None = None,
        metadata: dict[str, str] | None = None,
        *,
        origin: str = "fork",
        parent: str = "",
    ) -> StateRecord:
        """Another state of the same file, which lives on its own. Its parent is this one, unless another is named."""
        old = self.get(owner, id)
        new = replace(
            old, id=new_id(), origin=origin, parent=parent or id,
            expires=self._expiry(expires_after), created=self.clock(),
            metadata=old.metadata if metadata is None else metadata,
        )  # fmt: skip
        return self._write(new)

    def _expiry(self, expires_after: float | None) -> float | None:
        seconds = self.seconds if expires_after is None else expires_after
        return None if seconds is None else self.clock() + seconds

    def _write(self, record: StateRecord) -> StateRecord:
        with self._lock:
            self.blobs.touch(record.blob)  # another server that is about to delete it waits for its record
            if self.blobs.size(record.blob) is None:
                message = "the state's file is gone, as if somebody emptied the folder; make the state again"
                raise ApiError(410, message, code="state_damaged")
            self._files.write(record)
            self._records[record.id] = record
        return record

    def delete(self, owner: str, id: str) -> None:
        with self._lock:
            record = self.get(owner, id)
            self._forget(record)
        self._delete_unclaimed([record.blob])

    def _forget(self, record: StateRecord) -> None:
        self._records.pop(record.id, None)
        self._files.delete(record.id)

    def _delete_unclaimed(self, blobs: Iterable[str]) -> None:
        """Delete the files of ``blobs`` that no record has, unless one was written so lately that a record of it may be
        on its way. Not called with the lock: folders are listed, which takes its time where they are remote."""
        rest = self._unclaimed(set(blobs))
        try:
            if rest:
                self._learn()
        except OSError:  # nothing is deleted that somebody may need
            return
        with self._lock:
            for blob in self._unclaimed(rest):
                with contextlib.suppress(OSError):
                    if self.clock() - self.blobs.changed(blob) > _UNCLAIMED:
                        self.blobs.delete(blob)

    def _unclaimed(self, blobs: set[str]) -> set[str]:
        with self._lock:
            return blobs - {record.blob for record in self._records.values()}

    def _learn(self) -> None:
        """Read the records that other servers of the folder have made, and forget those that they have deleted."""
        there = set(self._files.ids())
        with self._lock:
            for id in set(self._records) - there:
                if not self._files.has(id):
                    del self._records[id]
            for id in there - set(self._records):
                if (record := self._files.read(id)) is not None:
                    self._records[id] = record

    def list(self, owner: str, limit: int = 100, after: str = "") -> tuple[list[StateRecord], bool]:
        """(an owner's states, the newest first, from the one after ``after`` on; whether there are more)."""
        now = self.clock()
        with self._lock:
            mine = [r for r in self._records.values() if r.owner == owner and not r.expired(now)]
        mine.sort(key=lambda record: (-record.created, record.id))
        if after:
            self.get(owner, after)
            mine = mine[next(i for i, record in enumerate(mine) if record.id == after) + 1 :]
        return mine[:limit], len(mine) > limit

    # -- files ---------------------------------------------------------------------------------------------------------

    def export(self, owner: str, id: str) -> bytes:
        """The state's file, checked."""
        return self.blobs.get(self.get(owner, id).blob)

    def read(self, record: StateRecord, layout: Layout) -> StateFile:
        """What a state's file says of its text."""
        return check(self.blobs.get(record.blob), layout)

    def take(
        self,
        owner: str,
        data: bytes,
        layout: Layout,
        expires_after: float | None = None,
        metadata: dict[str, str] | None = None,
    ) -> StateRecord:
        """Keep a file that a client has sent.

        Raises:
            ApiError: it is no state of this model, is not whole, or there is no room. Nothing is kept then.
        """
        file = check(data, layout)
        with self.reserved(owner, len(data)):
            blob = self.blobs.put(data)
            kept = Kept(blob, len(data), file.length, file.digest)
            return self.add(
                owner, kept, layout.fingerprint, origin="import", expires_after=expires_after, metadata=metadata
            )

    def nearest(self, owner: str, tokens: array[int], layout: Layout) -> StateRecord | None:
        """The state of this owner that has read the most of ``tokens``, and nothing else, and whose file is whole; None
        where none has any."""
        fingerprint = layout.fingerprint
        with self._lock:
            mine = [
                r for r in self._records.values()
                if r.owner == owner and r.digest and 0 < r.tokens <= len(tokens) and r.fingerprint == fingerprint
            ]  # fmt: skip
        digests: dict[int, str] = {}
        for record in sorted(mine, key=lambda r: -r.tokens):
            if record.tokens not in digests:
                digests[record.tokens] = digest_of(tokens[: record.tokens])
            if record.digest == digests[record.tokens] and not record.expired(self.clock()):
                with contextlib.suppress(ApiError):  # damaged; another may do
                    self.read(record, layout)
                    return record
        return None

    # -- all of them ---------------------------------------------------------------------------------------------------

    def sweep(self) -> None:
        """Forget expired states. Done before there is no room, too."""
        with self._lock:
            now = self.clock()
            expired = [record for record in self._records.values() if record.expired(now)]
            for record in expired:
                self._forget(record)
        self._delete_unclaimed([record.blob for record in expired])

    def clean(self) -> None:
        """`sweep`, and delete the files that no record has: of texts whose client did not wait for the answer, and of
        states that were deleted soon after they were made. Lists the whole folder: for a start, and every 15 minutes.
        """
        self.sweep()
        self._learn()
        self._delete_unclaimed(list(self.blobs.digests()))
