"""An engine's drafts: guesses for all of its slots, verified together."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakKeyDictionary

import torch

from mambakit.decoding.draft_model import draft_cost, slot_drafter
from mambakit.decoding.draft_rounds import WrittenText
from mambakit.decoding.drafting import Drafter, read_draft_tokens
from mambakit.decoding.loop import SlotLoop
from mambakit.decoding.speculation import Speculation
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
    """

    def __init__(self, loop: SlotLoop, model: Any, drafter: Drafter, slots: int, draft_tokens: int):
        self.draft_tokens, self._loop = read_draft_tokens(draft_tokens), loop
        self._texts: WeakKeyDictionary[Text, WrittenText] = WeakKeyDictionary()  # also of those that wait for a slot
        self.speculation = Speculation(
            loop, slot_drafter(drafter, model, slots), slots, self.draft_tokens, draft_cost(drafter, model), _failed
        )

    @property
    def rounds(self) -> int:
        """The number of verifications, each of which reads the weights once."""
        return self.speculation.rounds

    @property
    def proposed(self) -> int:
        """The number of guesses that were verified."""
        return self.speculation.proposed

    @property
    def accepted(self) -> int:
        """The number of guesses that were accepted."""
        return self.speculation.accepted

    def prepare(self) -> None:
        """Compile and capture what verifies drafts, before there are texts that would wait for it. Texts must have been
        written before: the first one makes the slots."""
        self._loop.prepare()

    def begin(self, slot: int, text: Text) -> None:
        """A text has a slot now."""
        request, sampled = text.request, text.sampled
        assert sampled is not None
        own = request.draft_tokens
        most = self.draft_tokens if own is None else min(own, self.draft_tokens)
        prompt = torch.cat([ids.cpu() for ids in (request.context, request.prompt_ids) if ids is not None])
        prompt = prompt.to(torch.int64)
        if (written := self._texts.get(text)) is None:
            known = [*prompt.tolist(), *text.written]
            written = self._texts[text] = WrittenText(sampled, known, len(text.written), text.most, text.ends)
        self.speculation.begin(slot, written, prompt, most)

    def release(self, slot: int) -> None:
        """The text has left its slot."""
        self.speculation.release(slot)

    @property
    def in_flight(self) -> bool:
        """Whether the device works on a round, so that states are ahead of the texts."""
        return self.speculation.in_flight

    def next(self) -> Found | None:
        """The next tokens of every slot; None where those of the first round were only launched."""
        return _found(self.speculation.next())

    def wait(self) -> Found | None:
        """The tokens of the round that was launched, if one was. Afterwards the states are those after its tokens."""
        return _found(self.speculation.wait())

    def forget(self) -> None:
        """Drop the round that was launched: all texts have ended."""
        self.speculation.forget()


def _found(written: Any) -> Found | None:
    return None if written is None else Found(written.texts, written.tokens, written.log_probs)


def _failed(error: Exception) -> None:
    warnings.warn(f"texts are written without drafts from now on: {cut(str(error), 500)}", stacklevel=2)
