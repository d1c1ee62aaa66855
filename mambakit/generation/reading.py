"""Prefill between the steps of an engine: one prompt in parts that can be interrupted, and several prompts within a
time budget."""

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
    """The GPU time of one part of a prefill, by CUDA events, without a sync."""

    def __init__(self, device: torch.device, tokens: int):
        self.tokens = tokens
        self._stream = torch.cuda.current_stream(device)
        self._began, self._ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._began.record(self._stream)

    def end(self) -> None:
        """Call it after the part's kernels are launched."""
        self._ended.record(self._stream)

    def seconds(self) -> float | None:
        """The GPU time of the part; None while it is running."""
        return self._began.elapsed_time(self._ended) / 1000 if self._ended.query() else None


class PromptReading:
    """The prefill of one prompt, a part at a time. Chunks depend on the prompt and the chunk size alone, and so do the
    result's bits.

    Args:
        model: a causal language model in eval mode.
        ids: (l,) int64, l >= 1.
        chunk_size: tokens per forward.
        state: a cache of one row to start from, which is copied; None: zero states.
        prefix_cache: its states of known prefixes are used, and new ones are added to it; ignored with a ``state``.

    Attributes:
        begun, done: whether the first part has been read, and whether all of the prompt has.
        left: the number of tokens that are still to be read.
        cached: the number of tokens whose state was in the prefix cache.
        timing: of the last part, on a GPU.
        cache, logits: once ``done``, the state after the prompt, and the logits (1, v).
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
        """Read the smallest part: a layer of a chunk, or a whole chunk. Returns the chunk's number of tokens."""
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
        """Take the state and the logits of another request with the same prompt."""
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
            self._stops: Iterator[int] = iter([*known.stops(), length])  # the last token is a chunk, for its logits
            return
        self.cache = self._model.backbone.new_cache(1)
        if self._state is not None:
            self.cache.copy_(self._state, [0], [0])  # raises at once for a state of another model
            self.cache = self._state.clone()
        self._stops = iter([*range(self._chunk_size, length, self._chunk_size), length])


class ReadingShare(Generic[T]):
    """Which prompts an engine step reads: the one with the fewest tokens left first, within limits of time and tokens.

    A quarter of the time goes to the oldest prompt, so that it does not wait forever for shorter ones.

    Args:
        seconds: the maximum delay of texts that decode; at least one part is read, however long it takes.
        tokens: the maximum number of tokens per step; the part that exceeds it is read to its end.
        clock: returns the time in seconds.
    """

    def __init__(self, seconds: float, tokens: int, clock: Callable[[], float]):
        self.seconds, self.tokens, self._clock = seconds, tokens, clock
        self._owed = 0.0  # seconds owed to the oldest prompt: a third of those of others, minus its own
        self._first: object = None
        self._spent, self._read = 0.0, 0.0  # decaying sums over recent parts: seconds, and tokens
        self._launched: deque[PartTiming] = deque()  # parts that may still be running

    def step(
        self, candidates: Callable[[], Iterable[T]], reading: Callable[[T], PromptReading], part: Callable[[T], int]
    ) -> None:
        """Read prompts until the limits of a step are reached.

        Args:
            candidates: the prompts that may be read now, oldest first.
            reading: the `PromptReading` of one.
            part: reads a part of one, and returns its number of tokens.
        """
        began, budget, some = self._clock(), self.tokens, False
        queued = 0.0  # expected GPU seconds of the parts launched in this step
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
            else:  # the clock measures the launch, not the GPU's work
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
        return min(able, key=lambda one: reading(one).left)  # of equals the oldest

    def _look(self) -> None:
        """Collect the times of parts that a GPU has finished."""
        while self._launched and (seconds := self._launched[0].seconds()) is not None:
            self._note(seconds, self._launched.popleft().tokens)

    def _note(self, seconds: float, tokens: int) -> None:
        self._spent, self._read = 0.9 * self._spent + seconds, 0.9 * self._read + tokens

    def _expected(self, tokens: int) -> float:
        """The expected seconds of a part of that many tokens, by the rate of recent parts."""
        return self._spent / self._read * tokens if self._read else 0.0
