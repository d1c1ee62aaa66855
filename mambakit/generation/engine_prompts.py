"""The prompts of an engine's texts: read between its steps, up to each text's first token."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor

from mambakit.decoding.parameters import NEW_TOKENS
from mambakit.decoding.sampler import Sampler
from mambakit.generation.engine_schedule import Schedule
from mambakit.generation.prefix_cache import PrefixCache
from mambakit.generation.reading import PromptReading, ReadingShare
from mambakit.generation.request import Request, Text
from mambakit.generation.token_ids import require_in_vocabulary
from mambakit.generation.turns import Path
from mambakit.modules import StateCache

# Prompts whose state is held for the other texts of the same prompt and share.
_PROMPTS_HELD = 4


class PromptReader:
    """Reads prompts in turn, and chooses the first token of each text.

    Args:
        model: a causal language model in eval mode.
        share: how much is read in a step.
        schedule: which prompts may be read.
    """

    def __init__(self, model: Any, share: ReadingShare[Text], schedule: Schedule):
        self._model, self._vocab_size = model, model.config.vocab_size
        self._share, self._schedule = share, schedule
        self._held: OrderedDict[Path, tuple[StateCache, Tensor]] = OrderedDict()
        self._sampler = Sampler()

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
        reading = PromptReading(self._model, ids, chunk_size, request.state, prefix_cache)
        return Text(request, most, reading, prompt)

    def step(self, read: Callable[[Text, int], None], failed: Callable[[Text, Exception], None]) -> None:
        """Read for as long as a step may.

        Args:
            read: called with a text whose prompt is read, and its first token.
            failed: called with a text whose prompt cannot be read, and why.
        """
        self._share.step(
            self._schedule.may_be_read, lambda text: text.reading, lambda text: self._read_part(text, read, failed)
        )

    def drop_held(self) -> None:
        """Drop the states held for other texts."""
        self._held.clear()

    def _read_part(
        self, text: Text, read: Callable[[Text, int], None], failed: Callable[[Text, Exception], None]
    ) -> int:
        reading, tokens = text.reading, 0
        left = reading.left
        try:
            if text.prompt in self._held and not reading.begun:
                assert text.prompt is not None
                reading.finish(*self._held[text.prompt])
            else:
                tokens = reading.part()
            self._schedule.count_read(text, left - reading.left)
            if not reading.done:
                return tokens
            text.request.cached_tokens = reading.cached
            assert reading.logits is not None
            sampled = text.begin(self._vocab_size, self._model.device)
            (token,) = self._sampler.choose(reading.logits, [sampled])
        except Exception as error:
            failed(text, error)
            return tokens
        self._schedule.was_read(text)
        text.state = reading.cache
        if text.prompt is not None and reading.cache is not None:
            self._held[text.prompt] = reading.cache, reading.logits
            while len(self._held) > _PROMPTS_HELD:
                self._held.popitem(last=False)
        read(text, token)
        return tokens
