"""The prompts of an engine's texts: read between its steps, up to each text's first token."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.bucket_graphs import reads_in_buckets, rows_together
from mambakit.decoding.chunks import bucket_of
from mambakit.decoding.loop import HostCopy
from mambakit.decoding.parameters import NEW_TOKENS
from mambakit.decoding.sampled_text import SampledText
from mambakit.decoding.sampler import Sampler
from mambakit.generation.engine_schedule import Schedule
from mambakit.generation.prefix_cache import PrefixCache
from mambakit.generation.reading import Part, PromptReading, ReadingShare
from mambakit.generation.request import Request, Text
from mambakit.generation.token_ids import require_in_vocabulary
from mambakit.generation.turns import Path
from mambakit.modules import StateCache

# Prompts whose state is held for the other texts of the same prompt and share.
_PROMPTS_HELD = 4


@dataclass(frozen=True)
class _Starting:
    """First tokens that the device may still be choosing."""

    texts: list[Text]
    sampler: Sampler
    tokens: HostCopy


class PromptReader:
    """Reads prompts in turn, and chooses the first token of each text.

    Args:
        model: a causal language model in eval mode.
        share: how much is read in a step.
        schedule: which prompts may be read.
        ends: tokens that end a text.
        slots: of the engine.
    """

    def __init__(self, model: Any, share: ReadingShare[Text], schedule: Schedule, ends: frozenset[int], slots: int):
        self._model, self._vocab_size, self._slots = model, model.config.vocab_size, slots
        self._share, self._schedule, self._ends = share, schedule, ends
        self._empty: StateCache = model.backbone.new_cache(0)
        self._held: OrderedDict[Path, tuple[StateCache, Tensor]] = OrderedDict()
        self._done: list[Text] = []  # whose prompts were read in this step
        self._starting: list[_Starting] = []

    def text_of(self, request: Request, chunk_size: int, prefix_cache: PrefixCache | None) -> Text:
        """A text for the request, its prompt unread, to be read in chunks of ``chunk_size`` tokens.

        Raises:
            ValueError: a token that the model does not have.
        """
        ids = request.prompt_ids.detach().cpu()
        require_in_vocabulary("prompt_ids", ids, self._vocab_size)  # on a GPU another token would end the process
        if request.context is not None:
            require_in_vocabulary("context", request.context, self._vocab_size)
        alone = not request.share or request.state is not None or prefix_cache is not None
        prompt = None if alone else (request.share, hashlib.sha256(ids.numpy().tobytes()).digest())
        most = NEW_TOKENS.read("max_new_tokens", request.max_new_tokens)
        reading = PromptReading(
            self._model, ids, chunk_size, request.state, prefix_cache, request.cache_salt, request.owner, self._empty
        )
        before = 0 if request.state is None else request.state.get_seq_length()
        ends = frozenset[int]() if request.ignore_ends else self._ends
        return Text(request, most, reading, ends, prompt, before)

    def step(self, failed: Callable[[Text, Exception], None]) -> None:
        """Read for as long as a step may, and choose the first tokens of the texts whose prompts are read then, without
        a device-to-host sync: `collect` brings them.

        Args:
            failed: called with a text whose prompt cannot be read, and why.
        """
        self._share.step(self._to_read, lambda text: text.reading, lambda text: self._read_part(text, failed))
        done, self._done = self._done, []
        self._start([text for text in done if text in self._schedule.starting], failed)

    def collect(self, read: Callable[[Text, int], None], failed: Callable[[Text, Exception], None]) -> None:
        """Wait for the first tokens of the last `step`. Their texts are ready then.

        Args:
            read: called with a text and its first token.
            failed: called with a text that has none, and why.
        """
        starting, self._starting = self._starting, []
        for one in starting:
            try:
                found, log_probs = one.tokens.wait()
                tokens = one.sampler.finish([token for (token,) in found])
            except Exception as error:
                for text in one.texts:
                    if text in self._schedule.starting:
                        failed(text, error)
                continue
            for row, (text, token) in enumerate(zip(one.texts, tokens, strict=True)):
                if text not in self._schedule.starting:  # cancelled meanwhile
                    continue
                self._schedule.started(text)
                text.request.token_log_probs += log_probs.get(row, [])
                text.state = text.reading.cache
                read(text, token)

    def _to_read(self) -> list[Text]:
        """The texts whose prompts are read now, the oldest first: those that are due, else those to be read ahead.

        Where a forward reads several prompts, a short one waits for the others for a while, as long as nobody needs it.
        """
        due, ahead = self._schedule.may_be_read()
        if not reads_in_buckets(self._model, 1):
            return due or ahead
        now = self._schedule.overdue() if self._share.hurried else {*due}  # else nobody writes, and all texts are here
        grouped = {text for text in (*due, *ahead) if self._is_short(text) and not text.reading.done}
        counts = Counter(text.reading.next_bucket for text in grouped)

        def is_full(text: Text) -> bool:
            """Whether its forward has no room for prompts that may still come, or it needs none."""
            bucket = text.reading.next_bucket
            return text not in grouped or counts[bucket] >= rows_together(bucket, self._slots)

        if found := [text for text in due if text in now or is_full(text)]:
            return found
        return [text for text in ahead if is_full(text)] or (ahead if self._schedule.lacks_ready else [])

    @property
    def hurried(self) -> bool:
        """Whether reading keeps to its time between two steps."""
        return self._share.hurried

    @hurried.setter
    def hurried(self, hurried: bool) -> None:
        self._share.hurried = hurried

    def drop_held(self) -> None:
        """Drop the states held for other texts."""
        self._held.clear()

    def _read_part(self, text: Text, failed: Callable[[Text, Exception], None]) -> Part:
        """Read the smallest part of a text's prompt, or of a group of short prompts."""
        group, part, reading = [text], Part(0, 0), text.reading
        try:
            if text.prompt in self._held and not reading.begun:
                assert text.prompt is not None
                left = {text: reading.left}
                reading.finish(*self._held[text.prompt])
                part = Part(left[text], 0)
            else:
                reading.look_up()
                in_buckets = not reading.done and reads_in_buckets(self._model, 1)
                if in_buckets:
                    group = self._group(text, failed)
                left = {one: one.reading.left for one in group}  # what is known is not read
                if in_buckets:
                    part = PromptReading.read_group([one.reading for one in group if not one.reading.done], self._slots)
                elif not reading.done:
                    part = reading.part()
        except Exception as error:
            for one in group:
                if not one.reading.done:  # else its turn is next
                    failed(one, error)
            return part
        for one in group:
            self._schedule.count_read(one, left[one] - one.reading.left)
        for one in group:
            if one.reading.done:
                self._was_read(one)
        return part

    def _was_read(self, text: Text) -> None:
        reading = text.reading
        self._schedule.was_read(text)
        self._done.append(text)
        if text.prompt is not None and reading.cache is not None and reading.logits is not None:
            self._held[text.prompt] = reading.cache, reading.logits
            while len(self._held) > _PROMPTS_HELD:
                self._held.popitem(last=False)

    def _group(self, text: Text, failed: Callable[[Text, Exception], None]) -> list[Text]:
        """The texts whose next tokens are read by one forward: ``text``, and others of the same bucket. Among these may
        be some whose whole prompt the prefix cache has: they are `done`."""
        bucket = bucket_of(len(text.reading.next_tokens()))
        group, most = [text], rows_together(bucket, self._slots)
        due, ahead = self._schedule.may_be_read() if most > 1 else ([], [])
        for other in (*due, *ahead):
            if len(group) == most:
                break
            if other is text or not self._is_short(other):
                continue
            try:
                other.reading.look_up()
                if other.reading.done or bucket_of(len(other.reading.next_tokens())) == bucket:
                    group.append(other)
            except Exception as error:  # a state that was given may be of another model
                failed(other, error)
        return group

    def _is_short(self, text: Text) -> bool:
        return text.reading.is_short and (text.reading.begun or text.prompt not in self._held)

    def _start(self, texts: list[Text], failed: Callable[[Text, Exception], None]) -> None:
        """Choose the first tokens of texts whose prompts are read."""
        begun: list[Text] = []
        sampled: list[SampledText] = []
        for text in texts:
            text.request.cached_tokens = text.reading.cached
            try:
                sampled.append(text.begin(self._vocab_size, self._model.device))
            except Exception as error:
                failed(text, error)
            else:
                begun.append(text)
        if not begun:
            return
        try:
            sampler = Sampler()
            tokens = sampler.start(
                torch.cat([logits for text in begun if (logits := text.reading.logits) is not None]), sampled
            )
            self._starting.append(_Starting(begun, sampler, HostCopy(tokens[:, None], sampler.take_log_probs())))
        except Exception as error:
            for text in begun:
                failed(text, error)
