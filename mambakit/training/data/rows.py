"""Rows of tokens for a step: packed to the last token, in an order that only the seed and the step determine."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from mambakit.training.data.store import TokenStore

_MASK = 2**64 - 1


class _Stream:
    """The documents concatenated without end: epoch after epoch, each in its own order.

    Memory is 16 bytes a document and epoch held, whatever the tokens.
    """

    def __init__(self, store: TokenStore, seed: int, shuffled: bool = True):
        self.store, self.seed, self.shuffled = store, seed, shuffled
        self.tokens = store.tokens
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents of an epoch in order, and where in the epoch each ends."""
        if epoch not in self._orders:
            for old in [e for e in self._orders if e < epoch - 1]:
                del self._orders[old]
            documents = np.arange(len(self.store))
            if self.shuffled:
                documents = np.random.default_rng([self.seed, epoch]).permutation(len(self.store))
            self._orders[epoch] = documents, np.cumsum(self.store.lengths[documents])
        return self._orders[epoch]

    def read(self, position: int, count: int, complement: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """``count`` tokens from ``position`` on: (count,) int64, and (count,) bool, where a document begins.

        With ``complement`` each document is read from either strand, whole, as a pseudo-random coin for it and the
        epoch decides.
        """
        tokens, begins = np.empty(count, dtype=np.int64), np.zeros(count, dtype=bool)
        epoch, offset = divmod(position, self.tokens)
        documents, ends = self.order(epoch)
        place = int(np.searchsorted(ends, offset, side="right"))
        done = 0
        while done < count:
            if place == len(documents):
                epoch, place = epoch + 1, 0
                documents, ends = self.order(epoch)
            document = int(documents[place])
            length = int(self.store.lengths[document])
            start = offset - (int(ends[place]) - length) if not done else 0
            stop = min(length, start + count - done)
            begins[done] = start == 0
            part = tokens[done : done + stop - start]
            if complement is not None and _coin(self.seed, epoch, document):
                part[:] = _other_strand(self.store, document, start, stop, complement)
            else:
                part[:] = self.store.read(document, start, stop)
            done += stop - start
            place += 1
        return tokens, begins


class ShuffledRows:
    """Rows of ``length`` + 1 tokens cut from the concatenated documents, shuffled.

    Every epoch joins the documents in a new order and visits the rows in a new order. The rows of all epochs tile one
    endless stream: no token is left out, and each is an input once an epoch. Step s is always the same rows, so that a
    resumed run sees what an uninterrupted one would have.

    Args:
        store: the documents.
        length: tokens in a row; one more is read, the last target.
        batch_size: rows of a step.
        seed: decides the order.
        device: where batches go.
        complement: the vocabulary's, to read each document's part of a row from either strand.
        end: the end token, which stays last in a part read from the other strand.
    """

    def __init__(
        self, store: TokenStore, length: int, batch_size: int, seed: int, device: torch.device,
        complement: np.ndarray | None = None, end: int = 0,
    ):  # fmt: skip
        _require_enough(store, length, batch_size)
        self.length, self.batch_size, self.seed, self.device = length, batch_size, seed, device
        self.complement, self.end = complement, end
        self.tokens_per_epoch = store.tokens
        self.steps_per_epoch = store.tokens / (length * batch_size)
        self.stream = _Stream(store, seed)
        self._rows: dict[int, np.ndarray] = {}

    def batch(self, step: int, first: int = 0, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Rows ``first`` to ``first + count`` of step ``step`` (all of them when absent).

        Returns:
            tokens (b, length + 1) int64, and (b, length + 1) bool, true where a document begins.
        """
        count = self.batch_size - first if count is None else count
        rows = []
        for number in range(step * self.batch_size + first, step * self.batch_size + first + count):
            tokens, begins = self.stream.read(self._row(number) * self.length, self.length + 1)
            if self.complement is not None:
                self._flip(number, tokens, begins)
            rows.append((tokens, begins))
        return _to_device(rows, self.device)

    def fresh(self, step: int) -> np.ndarray:
        """(batch_size,) bool, which rows of ``step`` start from a zero state: all."""
        return np.ones(self.batch_size, bool)

    def _row(self, number: int) -> int:
        """The place in the stream of the ``number``-th row visited: rows are permuted among those of their epoch."""
        epoch = number * self.length // self.tokens_per_epoch
        first = -(-epoch * self.tokens_per_epoch // self.length)
        if epoch not in self._rows:
            for old in [e for e in self._rows if e < epoch - 1]:
                del self._rows[old]
            after = -(-(epoch + 1) * self.tokens_per_epoch // self.length)
            self._rows[epoch] = np.random.default_rng([self.seed, epoch, 1]).permutation(after - first)
        return first + int(self._rows[epoch][number - first])

    def _flip(self, number: int, tokens: np.ndarray, begins: np.ndarray) -> None:
        """Read each document's part of a row from the other strand, as a coin decides; its end token stays last."""
        assert self.complement is not None
        cuts = [0, *(np.flatnonzero(begins[1:]) + 1).tolist(), len(tokens)]
        for index, (start, stop) in enumerate(pairwise(cuts)):
            if _coin(self.seed, number, index):
                stop -= int(tokens[stop - 1] == self.end)
                tokens[start:stop] = self.complement[tokens[start:stop]][::-1]


class StatefulRows:
    """Rows where row i of a step continues row i of the step before, for truncated backpropagation.

    The concatenated documents of an epoch are cut into ``batch_size`` equal lanes, read in parallel. A lane's last row
    runs past its end, into the next lane's beginning, so that no token is left out. Arguments and results are those of
    `ShuffledRows`; ``complement`` flips whole documents here, so that a document stays one. ``fresh_rows`` is the
    fraction of rows that start from a zero state all the same.
    """

    def __init__(
        self, store: TokenStore, length: int, batch_size: int, seed: int, device: torch.device,
        complement: np.ndarray | None = None, end: int = 0, fresh_rows: float = 0.0,
    ):  # fmt: skip
        _require_enough(store, length, batch_size)
        self.length, self.batch_size, self.device, self.complement = length, batch_size, device, complement
        self.seed, self.fresh_rows = seed, fresh_rows
        self.tokens_per_epoch = store.tokens
        self._steps = -(-store.tokens // (length * batch_size))
        self.steps_per_epoch = float(self._steps)
        self.stream = _Stream(store, seed)

    def batch(self, step: int, first: int = 0, count: int | None = None) -> tuple[Tensor, Tensor]:
        """As `ShuffledRows.batch`."""
        epoch, at = divmod(step, self._steps)
        count = self.batch_size - first if count is None else count
        rows = []
        for lane in range(first, first + count):
            begin = epoch * self.tokens_per_epoch + lane * self.tokens_per_epoch // self.batch_size
            rows.append(self.stream.read(begin + at * self.length, self.length + 1, self.complement))
        return _to_device(rows, self.device)

    def fresh(self, step: int) -> np.ndarray:
        """(batch_size,) bool: the rows of ``step`` that start from a zero state. All do at the start of an epoch, where
        the lanes move, else a fraction ``fresh_rows`` of them, drawn from the seed.
        """
        if step % self._steps == 0:
            return np.ones(self.batch_size, bool)
        return np.random.default_rng([self.seed, step, 2]).random(self.batch_size) < self.fresh_rows


def sample_rows(store: TokenStore, length: int, rows: int) -> Tensor:
    """At most ``rows`` rows (b, length + 1) int64, evenly spaced over the concatenated documents, unshuffled."""
    stream, total = _Stream(store, 0, shuffled=False), store.tokens
    length = min(length, total - 1)
    starts = np.linspace(0, total - length - 1, num=min(rows, max(1, (total - 1) // length))).astype(int)
    return torch.from_numpy(np.stack([stream.read(int(start), length + 1)[0] for start in starts]))


def cut_rows(tokens: Tensor, begins: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Rows (b, l + 1) cut into (b l / length, length + 1): each part's last target is the next part's first token."""
    if length == tokens.shape[1] - 1:
        return tokens, begins
    return tuple(t.unfold(1, length + 1, length).flatten(0, 1) for t in (tokens, begins))  # type: ignore[return-value]


def _other_strand(store: TokenStore, document: int, start: int, stop: int, complement: np.ndarray) -> np.ndarray:
    """Tokens ``start`` to ``stop`` of a document read backwards on the other strand; its end token stays last."""
    body = int(store.lengths[document]) - 1
    inside = min(stop, body)
    flipped = complement[store.read(document, body - inside, body - start)][::-1]
    return flipped if stop <= body else np.append(flipped, store.read(document, body, body + 1))


def _coin(*numbers: int) -> bool:
    """A fair coin that these numbers decide (splitmix64)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return bool(state >> 63)


def _to_device(rows: list[tuple[np.ndarray, np.ndarray]], device: torch.device) -> tuple[Tensor, Tensor]:
    tokens = torch.from_numpy(np.stack([row for row, _ in rows]))
    begins = torch.from_numpy(np.stack([row for _, row in rows]))
    if device.type == "cuda":  # pinned, the copy does not wait for the device
        tokens, begins = tokens.pin_memory(), begins.pin_memory()
    return tokens.to(device, non_blocking=True), begins.to(device, non_blocking=True)


def _require_enough(store: TokenStore, length: int, batch_size: int) -> None:
    rows = store.tokens // length
    if rows < batch_size:
        raise ValueError(
            f"the text has {store.tokens} tokens: {rows} rows of {length}, fewer than the batch of {batch_size}; give "
            "more "
            "text, or lower batch_size or sequence_length"
        )
