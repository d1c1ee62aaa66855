"""States of prompts that were read before, found again by what the tokens are.

A key is the SHA-256 of the model and of all tokens up to a position. So a hit at position p means that exactly these p
tokens were read by exactly this model: in an earlier call, another conversation, or another process through the folder.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.chunks import SNAPSHOT_CHUNK
from mambakit.decoding.prefill import prefill_states
from mambakit.decoding.transfers import integers
from mambakit.generation.prefix_files import PrefixFiles
from mambakit.generation.prefix_keys import PrefixKey, model_name, prefix_keys, prefix_tokens
from mambakit.generation.state import State, fill_cache
from mambakit.modules import StateCache
from mambakit.quoting import brief

# Snapshots of one prompt are the denser the nearer its end: so many in each doubling of the distance. A prompt of a
# million tokens does not push out everything else, and one that is edited near its end is mostly known.
_SNAPSHOTS = 4
# States that may wait for the disk; more are not written.
_BEHIND = 64


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


class PrefixReading:
    """The reading of a prompt that may be known in part: ``cache`` has read the first ``position`` of its tokens."""

    def __init__(
        self,
        prefixes: PrefixCache,
        tokens: list[int],
        keys: Callable[[int], PrefixKey],
        position: int,
        cache: StateCache,
        owner: str,
    ):
        self.tokens, self.position, self.cache = tokens, position, cache
        self._prefixes, self._keys, self._owner = prefixes, keys, owner

    def stops(self) -> Iterator[int]:
        """Where each forward ends: at multiples of the chunk size, and before the last token."""
        position, size, end = self.position, self._prefixes.chunk_size, len(self.tokens) - 1
        while position < end:
            position = min(end, (position // size + 1) * size)
            yield position

    def reached(self, position: int) -> None:
        """``cache`` has read so many tokens."""
        self.position, end = position, len(self.tokens) - 1
        if position == end or (position < end and position % self._prefixes._stride(end - position) == 0):
            self._prefixes._keep(self._keys(position), self.cache, 0, self._owner)


class PrefixCache:
    """The longest known beginning of a prompt, at the price of copying a state.

    Snapshots are taken at multiples of ``chunk_size``, of a power of two times it far from the prompt's end (four in
    each doubling of the distance), and at the prompt's last token but one, so that both the same prompt again and
    prompts that begin alike are found. Beyond a budget, the states that have not been used for longest are dropped,
    first those of the owner that has the most: one owner's prompts do not push out another's.

    It is safe to use from several threads, and the folder from several processes at once. The folder holds only tensors
    and hashes, no text.

    Where texts have a ``salt``, only texts of the same salt find them: who does not know it cannot learn, by the time
    that a prompt takes, whether somebody else has sent the same.

    Args:
        model: a causal language model in eval mode; states of another model, of other weights or of another dtype are
            never found. Weights that change later are noticed.
        memory_bytes: budget of the states held in memory; 0 keeps none there.
        folder: keep them in files, too; None for memory alone. Made when it does not exist.
        disk_bytes: budget of this model's files.
        chunk_size: prompt tokens per forward, and the distance of snapshots.
        device: where states are held; "cpu" by default, where they cost no GPU memory and a hit copies a few megabytes.
        write_behind: whether a thread writes the files, so that nobody waits for the disk; what is kept last may be
            lost when the process is killed.

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
        self._entries: OrderedDict[PrefixKey, dict[str, Tensor]] = OrderedDict()  # least recently used first
        self._owners: dict[PrefixKey, str] = {}
        self._bytes: Counter[str] = Counter()  # of the states in memory, by owner
        self._unwritten: queue.Queue[tuple[PrefixKey, dict[str, Tensor], str]] | None = None
        if write_behind and self._files is not None:
            self._unwritten = queue.Queue(_BEHIND)
            threading.Thread(target=self._write_behind, args=(self._unwritten, self._files), daemon=True).start()
        self._fresh: tuple[PrefixKey, dict[str, Tensor], torch.cuda.Event] | None = None
        self._lock = threading.RLock()

    @torch.no_grad()
    def read(self, ids: Tensor | Sequence[int], *, progress: Callable[[int], None] | None = None) -> State:
        """The state after a prompt (l,): what is known is copied, the rest is read, and kept for next time.

        ``progress`` is called with the number of tokens done, those that were found among them. The result is the state
        that `State.read` gives, with the bits of reading the prompt in chunks from where it was found.

        Raises:
            ValueError: an empty prompt.
        """
        reading = self.begin(ids)
        device = self.model.device
        for stop in reading.stops():
            part = integers(device, [reading.tokens[reading.position : stop]])
            prefill_states(self.model, part, reading.cache)
            reading.reached(stop)
            if progress is not None:
                progress(stop)
        return State(reading.cache, integers(device, [reading.tokens[-1:]]))

    def begin(self, ids: Tensor | Sequence[int], salt: str = "", owner: str = "") -> PrefixReading:
        """What `read` does, with the reading itself left to the caller, who may do something else in between."""
        tokens = prefix_tokens(ids, self.model.config.vocab_size)
        keys = self._keys(tokens, salt)
        position, cache = self._find(tokens, keys)
        return PrefixReading(self, tokens, keys, position, cache, owner)

    def lookup(self, ids: Tensor | Sequence[int]) -> tuple[int, StateCache]:
        """(p, a cache of one row that has read the first p tokens), for the largest known p below l; p may be 0."""
        tokens = prefix_tokens(ids, self.model.config.vocab_size)
        return self._find(tokens, self._keys(tokens))

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
            self._fresh = None
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

    def _stride(self, distance: int) -> int:
        """The distance of snapshots so far from a prompt's end."""
        stride = self.chunk_size
        while distance > 2 * _SNAPSHOTS * stride:
            stride *= 2
        return stride

    def _find(self, tokens: list[int], keys: Callable[[int], PrefixKey]) -> tuple[int, StateCache]:
        model = model_name(self.model)
        with self._lock:
            files: dict[PrefixKey, Path] = {} if self._files is None else self._files.keys(model)
            known = {k.position for k in (*self._entries, *files) if k.model == model and k.position < len(tokens)}
            candidates = [keys(position) for position in sorted(known)]
            self.statistics.lookups += 1
            self.statistics.tokens_asked += len(tokens)
            for key in reversed(candidates):
                tensors = self._entries.get(key)
                if tensors is not None:
                    self._entries.move_to_end(key)
                elif key in files:
                    tensors = self._from_file(files[key], key)
                    self.statistics.disk_hits += tensors is not None
                if tensors is None:
                    continue
                if self._files is not None and key in files:
                    self._files.touch(files[key])
                self.statistics.hits += 1
                self.statistics.tokens_saved += key.position
                return key.position, fill_cache(self.model, tensors, key.position)
        return 0, self.model.backbone.new_cache(1)

    def _keep(self, key: PrefixKey, cache: StateCache, row: int, owner: str = "") -> None:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return
            self._move_fresh()
            # Always a copy: later tokens change the cache in place.
            states = {n: t[:, row : row + 1].detach() for n, t in cache.tensors().items()}
            if (
                self._files is None
                and self.device.type == "cpu"
                and all(type(t) is Tensor and t.is_cuda for t in states.values())
            ):
                tensors = {n: t.clone() for n, t in states.items()}
                ready = torch.cuda.Event()
                ready.record(torch.cuda.current_stream(cache.device))
                self._fresh = key, tensors, ready
            else:
                tensors = {n: t.to(self.device, copy=True) for n, t in states.items()}
            self._hold(key, tensors, owner)
            if self._unwritten is not None:
                with contextlib.suppress(queue.Full):
                    self._unwritten.put_nowait((key, tensors, owner))
            elif self._files is not None:
                self._write(self._files, key, tensors, owner)

    def _write_behind(
        self, unwritten: queue.Queue[tuple[PrefixKey, dict[str, Tensor], str]], files: PrefixFiles
    ) -> None:
        """A thread."""
        while True:
            self._write(files, *unwritten.get())

    def _write(self, files: PrefixFiles, key: PrefixKey, tensors: dict[str, Tensor], owner: str) -> None:
        try:
            self.statistics.evictions += files.write(key, tensors, self.disk_bytes, owner)
        except OSError as error:  # as of a full disk; the state is still in memory
            warnings.warn(f"a prefix cache's file could not be written: {error}", stacklevel=2)

    def _move_fresh(self) -> None:
        """Copy the last snapshot, which is still on the GPU, to where states are held.

        When it is taken, the copy would wait for the prompt to be read. Now it runs on a stream of its own, beside the
        GPU's other work.
        """
        if self._fresh is None:
            return
        (key, tensors, ready), self._fresh = self._fresh, None
        if self._entries.get(key) is tensors:
            device = next(iter(tensors.values())).device
            with torch.cuda.stream(torch.cuda.Stream(device)):
                ready.wait()
                self._entries[key] = {n: t.to(self.device) for n, t in tensors.items()}  # waits for this copy alone

    def _hold(self, key: PrefixKey, tensors: dict[str, Tensor], owner: str = "") -> None:
        size = _bytes_of(tensors)
        if size > self.memory_bytes:
            return
        self._entries[key], self._owners[key] = tensors, owner
        self._bytes[owner] += size
        while self.nbytes > self.memory_bytes:
            (most, _), *_ = self._bytes.most_common(1)
            oldest = next(key for key in self._entries if self._owners[key] == most)
            self._bytes[most] -= _bytes_of(self._entries.pop(oldest))
            del self._owners[oldest]
            self.statistics.evictions += 1

    def _from_file(self, path: Path, key: PrefixKey) -> dict[str, Tensor] | None:
        assert self._files is not None, "its keys were listed"
        stacks = self.model.backbone.new_cache(0).spec.stacks
        tensors = self._files.read(path, key, [stack.key for stack in stacks], self.device)
        if tensors is not None:
            self._hold(key, tensors)
        return tensors


def _bytes_of(tensors: dict[str, Tensor]) -> int:
    return sum(t.nbytes for t in tensors.values())
