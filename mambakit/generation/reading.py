"""Prompts being read into states: one in chunks that can be interrupted, and several in turn within a step's time for reading."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from mambakit.decoding.prefill import prefill_parts
from mambakit.generation.prefix_cache import PrefixCache, PrefixReading
from mambakit.modules import StateCache

T = TypeVar("T")


class PartTiming:
    """How long a part takes a GPU, known once it is done: nobody waits for that."""

    def __init__(self, device: torch.device, tokens: int):
        self.tokens = tokens
        self._stream = torch.cuda.current_stream(device)
        self._began, self._ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._began.record(self._stream)

    def end(self) -> None:
        """The part is launched."""
        self._ended.record(self._stream)

    def seconds(self) -> float | None:
        """What it took; None while it is not done."""
        return self._began.elapsed_time(self._ended) / 1000 if self._ended.query() else None


class PromptReading:
    """One prompt, a part at a time. Where its chunks are cut depends on the prompt and the chunk size alone, and so do its bits.

    Args:
        model: a causal language model in eval mode.
        ids: (l,) int64, l >= 1.
        chunk_size: tokens per forward.
        state: a cache of one row to go on from, which is copied; None for none.
        prefix_cache: where the beginning may be known, and what is read is kept; only without a ``state``.

    Attributes:
        begun, done: whether any of it, all of it, has been read.
        left: tokens that are still to be read.
        cached: tokens of it whose state was known.
        cache, logits: once ``done``, the state after all of it, and the logits (1, v).
    """

    def __init__(
        self, model: Any, ids: Tensor, chunk_size: int, state: StateCache | None, prefix_cache: PrefixCache | None
    ):
        self._model, self._ids, self._chunk_size = model, ids, chunk_size
        self._state, self._prefix_cache = state, prefix_cache if state is None else None
        self._parts: Generator[None, None, Tensor | None] | None = None
        self._position = self._stop = 0
        self.begun = self.done = False
        self.timing: PartTiming | None = None  # of the last part, on a GPU
        self.cached = 0
        self.cache: StateCache | None = None
        self.logits: Tensor | None = None

    @property
    def left(self) -> int:
        return self._ids.shape[0] - self._position

    def part(self) -> int:
        """Read on for as little as can be read at once. Returns how many tokens it went over (in one of the layers, perhaps)."""
        if self.cache is None:
            self._begin()
        assert self.cache is not None
        if self._parts is None:
            self._stop = next(self._stops)
            part = self._ids[None, self._position : self._stop].to(self._model.device)
            self._parts = prefill_parts(self._model, part, self.cache)
        tokens = self._stop - self._position
        self.timing, on_gpu = None, self._model.device.type == "cuda"
        timing = PartTiming(self._model.device, tokens) if on_gpu else None
        try:
            next(self._parts)
        except StopIteration as end:
            self._parts, self._position = None, self._stop
            if self._known is not None:
                self._known.reached(self._position)
            if self._position == self._ids.shape[0]:
                self.done, self.logits = True, end.value
        if timing is not None:
            timing.end()
            self.timing = timing
        return tokens

    def finish(self, cache: StateCache, logits: Tensor) -> None:
        """Somebody else has read the same."""
        self.begun = self.done = True
        self._position = self._ids.shape[0]
        self.cache, self.logits = cache.clone(), logits

    def _begin(self) -> None:
        self.begun = True
        length, self._known = self._ids.shape[0], None
        if self._prefix_cache is not None:
            known: PrefixReading = self._prefix_cache.begin(self._ids)
            self._known, self.cache = known, known.cache
            self._position = self.cached = known.position
            self._stops: Iterator[int] = iter(
                [*known.stops(), length]
            )  # the last token by itself: its logits are asked for
            return
        self.cache = self._model.backbone.new_cache(1)
        if self._state is not None:
            self.cache.copy_(
                self._state, [0], [0]
            )  # raises for another model's, of which the layers may do for a while
            self.cache = self._state.clone()
        self._stops = iter([*range(self._chunk_size, length, self._chunk_size), length])


class ReadingShare(Generic[T]):
    """What a step reads of several prompts: the shortest rest first, within a time and a number of tokens.

    So that none waits for ever for shorter ones, a quarter of the time goes to the one that came first.

    Args:
        seconds: how long those who write may be held up; one part is read whatever it takes.
        tokens: how many tokens are read in a step at most (the part that exceeds it is read to its end).
        clock: gives the time in seconds.
    """

    def __init__(self, seconds: float, tokens: int, clock: Callable[[], float]):
        self.seconds, self.tokens, self._clock = seconds, tokens, clock
        self._owed = 0.0  # seconds that the first has let others go before, less those in which it had the turn
        self._first: object = None
        self._spent, self._read = 0.0, 0.0  # lately: seconds, and the tokens of parts that took them
        self._launched: deque[PartTiming] = deque()  # parts whose time is not known yet

    def step(
        self, candidates: Callable[[], Iterable[T]], reading: Callable[[T], PromptReading], part: Callable[[T], int]
    ) -> None:
        """Read for as long as a step may.

        Args:
            candidates: those that may be read now, the oldest first.
            reading: how far one has come.
            part: reads a part of one, and says how many tokens it went over.
        """
        began, budget, some = self._clock(), self.tokens, False
        queued = 0.0  # seconds of work that a GPU was given in this step, as parts took lately
        self._look()
        while budget > 0 and (able := list(candidates())):
            now = self._clock()
            chosen = self._choose(able, reading)
            left = reading(chosen).left
            if some and max(now - began, queued) + self._expected(min(left, self.tokens)) > self.seconds:
                return
            tokens, some = part(chosen), True
            if (timing := reading(chosen).timing) is None:
                spent = self._clock() - now
                self._note(spent, tokens)
            else:  # the clock has seen the launch and not the work
                self._launched.append(timing)
                spent = self._expected(tokens)
                queued += spent
            self._owed += spent / 3 if chosen is not able[0] else -spent
            self._owed = max(self._owed, -self.seconds)
            budget -= max(0, left - reading(chosen).left)

    def _choose(self, able: list[T], reading: Callable[[T], PromptReading]) -> T:
        if able[0] is not self._first:
            self._first, self._owed = able[0], 0.0
        if self._owed > self.seconds:
            return able[0]
        return min(able, key=lambda one: reading(one).left)  # the first of equals: the oldest

    def _look(self) -> None:
        """Note what a GPU has done by now."""
        while self._launched and (seconds := self._launched[0].seconds()) is not None:
            self._note(seconds, self._launched.popleft().tokens)

    def _note(self, seconds: float, tokens: int) -> None:
        self._spent, self._read = 0.9 * self._spent + seconds, 0.9 * self._read + tokens

    def _expected(self, tokens: int) -> float:
        """Seconds of a part over so many tokens, as parts took lately."""
        return self._spent / self._read * tokens if self._read else 0.0
