"""An engine's drafts: guesses for all of its slots, verified together."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from mambakit.decoding.draft_model import slot_drafter
from mambakit.decoding.drafting import NO_DRAFT, Draft, Drafter, read_draft_tokens
from mambakit.decoding.loop import SlotLoop
from mambakit.generation.engine_looks import Found
from mambakit.generation.request import Text
from mambakit.quoting import cut


class Drafts:
    """Proposes and verifies the next tokens of an engine's texts.

    Args:
        loop: the slots.
        model: of the texts.
        drafter: a draft model drafts all slots together; any other drafter is copied for each text.
        slots: the maximum number of slots.
        draft_tokens: the maximum number of guesses per draft, 1 to 15, of requests that do not say.

    Attributes:
        rounds: the number of verifications, each of which reads the weights once.
        proposed, accepted: the numbers of guesses that were verified, and that were accepted.
    """

    def __init__(self, loop: SlotLoop, model: Any, drafter: Drafter, slots: int, draft_tokens: int):
        self._loop, self._slots = loop, slots
        self.draft_tokens = read_draft_tokens(draft_tokens)
        self._drafter = slot_drafter(drafter, model, slots)
        self._vocab_size = model.config.vocab_size
        self._known: list[list[int]] = [[] for _ in range(slots)]  # all tokens of each slot's text
        self._most = [0] * slots  # guesses of each slot's drafts
        self._failed = False
        self.rounds = self.proposed = self.accepted = 0

    def begin(self, slot: int, text: Text) -> None:
        """A text has a slot now."""
        request, sampled = text.request, text.sampled
        assert sampled is not None
        own = request.draft_tokens
        self._most[slot] = self.draft_tokens if own is None else min(own, self.draft_tokens)
        if not self._most[slot] or self._failed:
            return
        parts = [ids.cpu() for ids in (request.context, request.prompt_ids) if ids is not None]
        read = torch.cat(parts).to(torch.int64)
        self._known[slot] = [*read.tolist(), *text.written]
        self._drafter.begin(slot, read, sampled.params)

    def release(self, slot: int) -> None:
        """The text has left its slot."""
        if self._most[slot]:
            self._drafter.release(slot)
        self._known[slot], self._most[slot] = [], 0

    def next(self) -> Found:
        """The next tokens of every slot: one, and the guesses before it that were accepted. The states are those after
        all of them but the last, or after a text's end."""
        texts: list[Text | None] = list(self._loop.pool.occupants)
        drafts = self._propose(texts)
        found = self._loop.verify(drafts)
        pairs = zip(texts, found, strict=True)
        self._loop.keep([0 if text is None else self._read(text, tokens) for text, tokens in pairs])
        self.rounds += 1
        for slot, (text, draft, tokens) in enumerate(zip(texts, drafts, found, strict=True)):
            if text is not None:
                self.proposed += len(draft.tokens)
                self.accepted += max(0, len(tokens) - 1)
                if self._most[slot]:
                    self._known[slot] += tokens
        return Found(texts, found, self._loop.log_probs)

    def _propose(self, texts: list[Text | None]) -> list[Draft]:
        most = [
            0 if text is None else max(0, min(self._most[slot], text.most - len(text.written) - 1))
            for slot, text in enumerate(texts)
        ]
        free = [None] * (self._slots - len(texts))
        if self._failed or not any(most):
            return [NO_DRAFT] * len(texts)
        known = [self._known[slot] if self._most[slot] else None for slot in range(len(texts))]
        try:
            return self._drafter.propose([*known, *free], [*most, *(0 for _ in free)])[: len(texts)]
        except torch.AcceleratorError:
            raise
        except Exception as error:  # guesses change the speed, never the texts
            warnings.warn(f"texts are written without drafts from now on: {cut(str(error), 500)}", stacklevel=2)
            self._failed = True
            return [NO_DRAFT] * len(texts)

    def _read(self, text: Text, tokens: list[int]) -> int:
        """How many of a slot's last token and of its guesses its state must read."""
        for i, token in enumerate(tokens):
            if not 0 <= token < self._vocab_size or token in text.ends:
                return i + 1
            if len(text.written) + i + 1 >= text.most:
                return i + 1
        return len(tokens)
