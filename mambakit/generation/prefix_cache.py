"""States of prompts that were read before, found again by what the tokens are.

A key is the SHA-256 of the model and of all tokens up to a position. So a hit at position p means that exactly these p
tokens were read by exactly this model: in an earlier call, another conversation, or another process through the folder.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.chunks import SNAPSHOT_CHUNK
from mambakit.decoding.prefill import prefill_states
from mambakit.decoding.transfers import integers, to_device
from mambakit.generation.prefix_files import PrefixFiles
from mambakit.generation.prefix_keys import PrefixKey, model_name, prefix_keys, prefix_tokens
from mambakit.generation.prefix_mover import Mover
from mambakit.generation.prefix_reading import Found, PrefixReading
from mambakit.generation.prefix_snapshot import LOGITS, Snapshot, bytes_of, on_gpu
from mambakit.generation.state import State, fill_cache
from mambakit.modules import StateCache
from mambakit.quoting import brief


@dataclass
class Statistics:
    """What a prefix cache has saved since it was made."""

    lookups: int = 0
    hits: int = 0
    disk_hits: int = 0
    """Hits whose state came from the folder."""
    tokens_asked: int = 0
    tokens_saved: int = 0
    """Prompt tokens that were not read, because their state was found."""
    evictions: int = 0


class PrefixCache:
    """The longest known beginning of a prompt, at the price of copying a state.

    Snapshots are taken at multiples of ``chunk_size``, of a power of two times it far from the prompt's end (four in
    each doubling of the distance), and at the prompt's end, so that both the same prompt again and prompts that begin
    alike are found. The logits after a whole prompt (`begin`) are kept with its state: to have the same prompt again,
    nothing is read. Beyond a budget, the states that have not been used for longest are dropped, first those of the
    owner that has the most: one owner's prompts do not push out another's.

    Nobody waits for a snapshot of a GPU to arrive on the host: a thread copies it beside the GPU's other work, unless a
    file of it must be written at once. While that thread falls far behind, no more are taken.

    It is safe to use from several threads, and the folder from several processes at once. The folder holds only tensors
    and hashes, no text.

    Where texts have a ``salt``, only texts of the same salt find them: who does not know it cannot learn, by the time
    that a prompt takes, whether somebody else has sent the same.

    Args:
        model: a causal language model in eval mode; states of another model, of other weights or of another dtype are
            never found. Weights that change later are noticed.
        memory_bytes: budget of the states held in memory, with their logits; 0 keeps none there.
        folder: keep them in files, too; None for memory alone. Made when it does not exist.
        disk_bytes: budget of this model's files.
        chunk_size: prompt tokens per forward, and the distance of snapshots.
        device: where states are held; "cpu" by default, where they cost no GPU memory and a hit copies a few megabytes.
        write_behind: whether that thread writes the files, too, so that nobody waits for the disk; what is kept last
            may be lost when the process is killed. Otherwise a file is there when a call returns.

    Raises:
        ValueError: a negative budget, a chunk_size below 1, or a folder that is a file.
    """

    def __init__(
        self,
        model: Any,
        *,
        memory_bytes: int = 1 << 30,
        folder: str | os.PathLike | None = None,
        disk_bytes: int = 4 << 30,
        chunk_size: int = SNAPSHOT_CHUNK,
        device: torch.device | str = "cpu",
        write_behind: bool = False,
    ):
        for name, value in (("memory_bytes", memory_bytes), ("disk_bytes", disk_bytes)):
            if value < 0:
                raise ValueError(f"{name} is {brief(value)}; it must be 0 or more")
        if chunk_size < 1:
            raise ValueError(f"chunk_size is {brief(chunk_size)}; it must be 1 or more")
        self.model, self.memory_bytes, self.disk_bytes, self.chunk_size = model, memory_bytes, disk_bytes, chunk_size
        self.device = torch.device(device)
        self.statistics = Statistics()
        self._files = None if folder is None else PrefixFiles(folder)
        self._entries: OrderedDict[PrefixKey, Snapshot] = OrderedDict()  # least recently used first
        self._owners: dict[PrefixKey, str] = {}
        self._bytes: Counter[str] = Counter()  # of the states in memory, by owner
        self._behind = write_behind or self._files is None
        self._mover = Mover()
        weakref.finalize(self, self._mover.end).atexit = False  # the mover sees to the interpreter's exit itself
        self._lock = threading.RLock()

    @torch.no_grad()
    def read(self, ids: Tensor | Sequence[int], *, progress: Callable[[int], None] | None = None) -> State:
        """The state after a prompt (l,): what is known is copied, the rest is read, and kept for next time.

        ``progress`` is called with the number of tokens done, those that were found among them. The result is the state
        that `State.read` gives, with the bits of reading the prompt in chunks from where it was found.

        Raises:
            ValueError: an empty prompt.
        """
        tokens = prefix_tokens(ids, self.model.config.vocab_size)
        reading, device = self._begin(tokens), self.model.device
        for stop in reading.stops():
            prefill_states(self.model, integers(device, [tokens[reading.position : stop]]), reading.cache)
            reading.reached(stop)
            if progress is not None:
                progress(stop)
        return State(reading.cache, integers(device, [tokens[-1:]]))

    def begin(self, ids: Tensor | Sequence[int], salt: str = "", owner: str = "") -> PrefixReading:
        """Look a prompt (l,) up, to be read to its end by the caller, who may do something else in between.

        Where the same prompt was read so before, nothing is left to be read.
        """
        tokens = prefix_tokens(ids, self.model.config.vocab_size)
        return self._begin(tokens, salt, owner, whole=True)

    def lookup(self, ids: Tensor | Sequence[int]) -> tuple[int, StateCache]:
        """(p, a cache of one row that has read the first p tokens), for the largest known p below l; p may be 0."""
        tokens = prefix_tokens(ids, self.model.config.vocab_size)
        found = self._find(tokens, self._keys(tokens))
        return found.position, found.cache

    def store(
        self, ids: Tensor | Sequence[int], cache: StateCache, row: int = 0, *, salt: str = "", owner: str = ""
    ) -> None:
        """Keep row ``row`` of a cache that has read exactly ``ids`` (l,), for example after a text was written."""
        tokens = prefix_tokens(ids, self.model.config.vocab_size)
        if not 0 <= row < cache.max_batch_size:
            raise ValueError(f"row is {brief(row)}, but the cache has {cache.max_batch_size} rows")
        self._keep(self._keys(tokens, salt)(len(tokens)), cache, row, owner)

    def clear(self) -> None:
        """Forget every state in memory and delete this model's files."""
        with self._lock:
            self._entries.clear()
            self._owners.clear()
            self._bytes.clear()
        self._mover.clear()
        if self._files is not None:
            self._files.clear(model_name(self.model))

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return self._bytes.total()

    def __len__(self) -> int:
        """States held in memory."""
        return len(self._entries)

    def _keys(self, tokens: list[int], salt: str = "") -> Callable[[int], PrefixKey]:
        return prefix_keys(model_name(self.model), tokens, salt)

    def _begin(self, tokens: list[int], salt: str = "", owner: str = "", *, whole: bool = False) -> PrefixReading:
        """The reading of all tokens, or of all but the last, after which nobody wants the logits."""
        keys = self._keys(tokens, salt)

        def keep(position: int, cache: StateCache, logits: Tensor | None) -> None:
            self._keep(keys(position), cache, 0, owner, logits)

        end = len(tokens) if whole else len(tokens) - 1
        return PrefixReading(tokens, end, self.chunk_size, self._find(tokens, keys, whole=whole), keep)

    def _find(self, tokens: list[int], keys: Callable[[int], PrefixKey], *, whole: bool = False) -> Found:
        """The largest known position below l; with ``whole`` also l, where the logits after it are known."""
        model, length = model_name(self.model), len(tokens)
        with self._lock:
            files: dict[PrefixKey, Path] = {} if self._files is None else self._files.keys(model)
            most = length if whole else length - 1
            known = {k.position for k in (*self._entries, *files) if k.model == model and k.position <= most}
            candidates = [keys(position) for position in sorted(known)]
            self.statistics.lookups += 1
            self.statistics.tokens_asked += length
            for key in reversed(candidates):
                snapshot, to_end = self._entries.get(key), key.position == length
                if snapshot is not None and (snapshot.has_logits or not to_end):
                    self._entries.move_to_end(key)
                elif key in files:
                    snapshot = self._from_file(files[key], key, with_logits=to_end)
                    self.statistics.disk_hits += snapshot is not None
                else:
                    continue
                if snapshot is None:
                    continue
                if self._files is not None and key in files:
                    self._files.touch(files[key])
                self.statistics.hits += 1
                self.statistics.tokens_saved += key.position
                tensors = snapshot.tensors()
                logits = to_device(self.model.device, tensors[LOGITS]).clone() if to_end else None
                return Found(key.position, fill_cache(self.model, tensors, key.position), logits)
        return Found(0, self.model.backbone.new_cache(1))

    def _keep(self, key: PrefixKey, cache: StateCache, row: int, owner: str = "", logits: Tensor | None = None) -> None:
        with self._lock:
            held = self._entries.get(key)
            if held is not None and (held.has_logits or logits is None):
                self._entries.move_to_end(key)
                return
            tensors = {name: t[:, row : row + 1].detach() for name, t in cache.tensors().items()}
            if logits is not None:
                tensors[LOGITS] = logits.detach().to(cache.device)
            if self._files is None and bytes_of(tensors) > self.memory_bytes:
                return
            moves = self._behind and self.device.type == "cpu" and on_gpu(tensors)
            if moves and not self._mover.has_room():
                return
            # Always a copy: later tokens change the cache in place.
            snapshot = Snapshot(
                {name: t.clone() if moves else t.to(self.device, copy=True) for name, t in tensors.items()}
            )
            self._hold(key, snapshot, owner)
            write = None
            if self._files is not None:
                write = partial(_write, self._files, key, snapshot, self.disk_bytes, owner, self.statistics, self._lock)
            if moves:
                self._mover.move(snapshot, partial(_forget, weakref.ref(self), key, snapshot), write)
            elif write is not None and self._behind:
                self._mover.write(snapshot, write)
            elif write is not None:
                write()

    def _hold(self, key: PrefixKey, snapshot: Snapshot, owner: str = "") -> None:
        if snapshot.nbytes > self.memory_bytes:
            return
        self._drop(key)  # one without logits
        self._entries[key], self._owners[key] = snapshot, owner
        self._bytes[owner] += snapshot.nbytes
        while self.nbytes > self.memory_bytes:
            (most, _), *_ = self._bytes.most_common(1)
            self._drop(next(key for key in self._entries if self._owners[key] == most))
            self.statistics.evictions += 1

    def _drop(self, key: PrefixKey) -> None:
        snapshot = self._entries.pop(key, None)
        if snapshot is not None:
            self._bytes[self._owners.pop(key)] -= snapshot.nbytes

    def _from_file(self, path: Path, key: PrefixKey, *, with_logits: bool) -> Snapshot | None:
        assert self._files is not None, "its keys were listed"
        names = [stack.key for stack in self.model.backbone.new_cache(0).spec.stacks]
        vocab_size = self.model.config.vocab_size
        tensors = self._files.read(path, key, names, vocab_size, self.device, with_logits=with_logits)
        if tensors is None:
            return None
        snapshot = Snapshot(tensors)
        self._hold(key, snapshot)
        return snapshot


# Neither holds the cache, which is freed when nobody uses it, whatever its thread has still to do.


def _write(
    files: PrefixFiles,
    key: PrefixKey,
    snapshot: Snapshot,
    budget: int,
    owner: str,
    statistics: Statistics,
    lock: threading.RLock,
) -> None:
    try:
        deleted = files.write(key, snapshot.on_host(), budget, owner)
    except OSError as error:  # as of a full disk; the state is still in memory
        warnings.warn(f"a prefix cache's file could not be written: {error}", stacklevel=2)
    else:
        with lock:
            statistics.evictions += deleted


def _forget(cache: weakref.ref[PrefixCache], key: PrefixKey, snapshot: Snapshot) -> None:
    """The snapshot could not be copied to the host."""
    if (prefixes := cache()) is not None:
        with prefixes._lock:
            if prefixes._entries.get(key) is snapshot:
                prefixes._drop(key)
