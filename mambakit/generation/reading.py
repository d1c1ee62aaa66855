"""Prefill between the steps of an engine: one prompt in parts that can be interrupted, buckets of several prompts
together, and all of it within a time budget."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from mambakit.decoding.bucket_graphs import LARGEST_GROUPED, read_together, rows_together
from mambakit.decoding.chunks import LARGEST_BUCKET, bucket_of, parts
from mambakit.decoding.prefill import prefill_parts
from mambakit.decoding.transfers import to_device
from mambakit.generation.prefix_cache import PrefixCache
from mambakit.generation.prefix_reading import PrefixReading
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


@dataclass(frozen=True)
class Part:
    """What was read without an interruption.

    Attributes:
        read: how many tokens further a prompt is. 0 within a chunk.
        work: the tokens of the forward: of the whole chunk, or of several prompts with their padding.
        timing: on a GPU.
    """

    read: int
    work: int
    timing: PartTiming | None = None


class PromptReading:
    """The prefill of one prompt, a part at a time. Chunks depend on the prompt and the chunk size alone, and so do the
    result's bits.

    Args:
        model: a causal language model in eval mode.
        ids: (l,) int64, l >= 1.
        chunk_size: tokens per forward.
        state: a cache of one row to start from, which is copied; None: zero states.
        prefix_cache: its states of known prefixes are used, and new ones are added to it; ignored with a ``state``.
        salt, owner: of the prefix cache.
        empty: a cache of the model, to make others of: a new one takes longer than to read a few tokens.

    Attributes:
        begun, done: whether the first part has been read, and whether all of the prompt has: both at once where the
            prefix cache has the state and the logits after it.
        left: the number of tokens that are still to be read.
        cached: the number of tokens whose state was in the prefix cache.
        cache, logits: once ``done``, the state after the prompt, and the logits (1, v).
    """

    def __init__(
        self,
        model: Any,
        ids: Tensor,
        chunk_size: int,
        state: StateCache | None,
        prefix_cache: PrefixCache | None,
        salt: str = "",
        owner: str = "",
        empty: StateCache | None = None,
    ):
        self._empty: StateCache = model.backbone.new_cache(0) if empty is None else empty
        self._salt, self._owner = salt, owner
        self._model, self._ids, self._chunk_size = model, ids, chunk_size
        self._state, self._prefix_cache = state, prefix_cache if state is None else None
        self._parts: Generator[None, None, Tensor | None] | None = None
        self._known: PrefixReading | None = None
        self._stops: Iterator[int] | None = None  # ends of the chunks that are not begun; None: nothing is known yet
        self._position = self._stop = 0
        self.begun = self.done = False
        self.cached = 0
        self.cache: StateCache | None = None
        self.logits: Tensor | None = None

    @property
    def left(self) -> int:
        return self._ids.shape[0] - self._position

    @property
    def is_short(self) -> bool:
        """Whether a group may read it. A long prompt looks for its prefix only when it is read, when others may have
        read that."""
        return self.begun or len(self._ids) <= LARGEST_GROUPED

    @property
    def next_bucket(self) -> int:
        """The bucket of `next_tokens` of a prompt that is not `done`; where its prefix was not looked up yet, that
        without one."""
        if self._stops is not None:
            return bucket_of(len(self.next_tokens()))
        return bucket_of(min(self.left, self._chunk_size, LARGEST_BUCKET))

    def look_up(self) -> None:
        """Find what is known of the prompt, unless that has been done; it may be `done` then."""
        if self._stops is None and not self.done:
            self._stops = self._begin()

    def part(self) -> Part:
        """Read the smallest part: a layer of a chunk, or a whole chunk; nothing where all is known."""
        self.look_up()
        if self.done:
            return Part(0, 0)
        self._to_stop()
        self.begun = True
        if self.cache is None:
            self.cache = self._empty.empty_like(1)
        if self._parts is None:
            part = to_device(self._model.device, self._ids[None, self._position : self._stop])
            self._parts = prefill_parts(self._model, part, self.cache)
        tokens, read = self._stop - self._position, 0
        timing = PartTiming(self._model.device, tokens) if self._model.device.type == "cuda" else None
        try:
            next(self._parts)
        except StopIteration as end:
            self._parts, read = None, tokens
            self._reached(self._stop, end.value)
        if timing is not None:
            timing.end()
        return Part(read, tokens, timing)

    def next_tokens(self) -> Tensor:
        """(l,) int64, what `read_group` reads next of a prompt that is not `done`. Nothing is read."""
        self._to_stop()
        count = parts(self._stop - self._position, LARGEST_BUCKET)[0]
        return self._ids[self._position : self._position + count]

    @staticmethod
    def read_group(readings: Sequence[PromptReading], slots: int) -> Part:
        """Read the next tokens of several prompts, which are of the same bucket, in an engine of so many slots."""
        model = readings[0]._model
        tokens = [reading.next_tokens() for reading in readings]
        bucket = bucket_of(len(tokens[0]))
        rows = rows_together(bucket, slots)
        work = bucket * rows
        timing = PartTiming(model.device, work)
        ends = [reading.left == len(own) for reading, own in zip(readings, tokens, strict=True)]
        before = [reading.cache for reading in readings]
        caches, logits = read_together(model, tokens, before, rows, want_logits=any(ends))
        for row, (reading, cache) in enumerate(zip(readings, caches, strict=True)):
            reading.begun, reading.cache = True, cache
            reading._reached(reading._position + len(tokens[row]), None if logits is None else logits[row : row + 1])
        timing.end()
        return Part(max(map(len, tokens)), work, timing)

    def _reached(self, position: int, logits: Tensor | None) -> None:
        """The prompt is read up to ``position``, with these logits after it."""
        self._position, whole = position, position == self._ids.shape[0]
        if position == self._stop and self._known is not None:
            self._known.reached(position, logits if whole else None)
        if whole:
            self.done, self.logits = True, logits

    def finish(self, cache: StateCache, logits: Tensor) -> None:
        """Take the state and the logits of another request with the same prompt."""
        self.cache, self.logits = cache.clone(), logits
        self._position = self._ids.shape[0]
        self.begun = self.done = True

    def _to_stop(self) -> None:
        """Find the end of the chunk that is read next; at first, what is known of the prompt."""
        self.look_up()
        assert self._stops is not None
        if self._position == self._stop:
            self._stop = next(self._stops)

    def _begin(self) -> Iterator[int]:
        length = self._ids.shape[0]
        if self._prefix_cache is not None:
            self._known = self._prefix_cache.begin(self._ids, self._salt, self._owner)
            self.cache = self._known.cache
            self._position = self._stop = self.cached = self._known.position
            if self._known.logits is not None:
                self.begun = self.done = True
                self.logits = self._known.logits
            return self._known.stops()
        if self._state is not None:
            cache = self._empty.empty_like(1)
            cache.copy_(self._state, [0], [0])  # raises at once for a state of another model
            self.cache = self._state.clone()
        return iter([*range(self._chunk_size, length, self._chunk_size), length])


class ReadingShare(Generic[T]):
    """Which prompts an engine step reads: the one with the fewest tokens left first, within limits of time and tokens.

    A quarter of the time goes to the oldest prompt, so that it does not wait forever for shorter ones. Where a step of
    many slots takes long, prompts may take as long: else slots became free faster than prompts are read.

    Args:
        seconds: the maximum delay of texts that decode, or `step_seconds` where that is more; at least one part is
            read, however long it takes. Infinite: no limit but ``tokens``.
        tokens: the maximum number of tokens per step; the part that exceeds it is read to its end.
        clock: returns the time in seconds.
        steps: where texts decode, the maximum delay in steps of theirs. It needs steps whose time the host sees.

    Attributes:
        step_seconds: how long the last step of the texts that decode took; 0: none decodes.
        hurried: whether the time limit holds: not where nobody waits for the texts that decode.
    """

    def __init__(self, seconds: float, tokens: int, clock: Callable[[], float], steps: float = math.inf):
        self.seconds, self.tokens, self._clock, self._steps = seconds, tokens, clock, steps
        self.step_seconds = 0.0
        self.hurried = True
        self._owed = 0.0  # seconds owed to the oldest prompt: a third of those of others, minus its own
        self._first: object = None
        self._spent, self._read = 0.0, 0.0  # decaying sums over recent parts: seconds, and tokens
        self._launched: deque[PartTiming] = deque()  # parts that may still be running

    def step(
        self, candidates: Callable[[], Iterable[T]], reading: Callable[[T], PromptReading], part: Callable[[T], Part]
    ) -> None:
        """Read prompts until the limits of a step are reached.

        Args:
            candidates: the prompts that may be read now, oldest first.
            reading: the `PromptReading` of one.
            part: reads a part of one, or of other short prompts that are read before it.
        """
        began, budget, some = self._clock(), self.tokens, False
        most = max(self.seconds, self.step_seconds) if self.seconds else 0.0
        if self.step_seconds and math.isfinite(self.seconds):
            most = min(most, self._steps * self.step_seconds)
        queued = 0.0  # expected GPU seconds of the parts launched in this step
        self._look()
        able: list[T] = []
        while budget > 0 and (able := able or list(candidates())):
            now = self._clock()
            chosen = self._choose(able, reading)
            left = reading(chosen).left
            late = max(now - began, queued) + self._expected(min(left, self.tokens)) > most
            if some and late and self.hurried:
                return
            done, some = part(chosen), True
            if done.timing is None:
                spent = self._clock() - now
                if done.work:  # else nothing was read: the time says nothing about others
                    self._note(spent, done.work)
            else:  # the clock measures the launch, not the GPU's work
                self._launched.append(done.timing)
                spent = self._expected(done.work)
                queued += spent
            self._owed += spent / 3 if chosen is not able[0] else -spent
            self._owed = max(self._owed, -self.seconds)
            budget -= done.read
            if done.read or not done.work:  # else it was a layer of a chunk: there are the same prompts as before
                able = []

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
