"""The reading of a prompt through a prefix cache: where it stops, and which of its states are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from mambakit.modules import StateCache

# Snapshots of one prompt are the denser the nearer its end: so many in each doubling of the distance. A prompt of a
# million tokens does not push out everything else, and one that is edited near its end is mostly known.
_SNAPSHOTS = 4


@dataclass(frozen=True)
class Found:
    """What is known of a prompt: ``cache`` has read the first ``position`` of its tokens.

    Attributes:
        logits: (1, v) after the whole prompt, where ``position`` is its end.
    """

    position: int
    cache: StateCache
    logits: Tensor | None = None


class PrefixReading:
    """The reading of a prompt that may be known in part, or whole.

    Args:
        tokens: the prompt's.
        end: how many of them are read.
        chunk_size: tokens per forward.
        found: what is known.
        keep: called with a position, the cache that has read so many tokens, and the logits after them where they are
            known.

    Attributes:
        cache: has read the first ``position`` of ``tokens``.
        logits: (1, v) after the whole prompt, where they were found: nothing is to be read then.
    """

    def __init__(
        self,
        tokens: list[int],
        end: int,
        chunk_size: int,
        found: Found,
        keep: Callable[[int, StateCache, Tensor | None], None],
    ):
        self.tokens, self.position, self.cache, self.logits = tokens, found.position, found.cache, found.logits
        self._end, self._chunk_size, self._keep = end, chunk_size, keep

    def stops(self) -> Iterator[int]:
        """Where each forward ends: at multiples of the chunk size, and at the end."""
        position, size = self.position, self._chunk_size
        while position < self._end:
            position = min(self._end, (position // size + 1) * size)
            yield position

    def reached(self, position: int, logits: Tensor | None = None) -> None:
        """``cache`` has read so many tokens; ``logits`` (1, v) are those after the whole prompt, once it is read."""
        self.position, left = position, self._end - position
        if not left or position % self._stride(left) == 0:
            self._keep(position, self.cache, logits)

    def _stride(self, distance: int) -> int:
        """The distance of snapshots so far from the end."""
        stride = self._chunk_size
        while distance > 2 * _SNAPSHOTS * stride:
            stride *= 2
        return stride
