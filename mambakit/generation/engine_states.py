"""The states of an engine's texts at their ends, though slots read several tokens between two looks.

A slot that has read beyond its text's end no longer holds the text's state. So a text whose state is wanted has it
copied every `_EVERY` tokens, which costs a percent of the steps. At its end there is a copy that is a few tokens short.
A prefix cache keeps that one as it is: the next prompt reads the few tokens with its own. `Request.final_state` is read
on to the end of the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mambakit.decoding.prefill import prefill_states
from mambakit.decoding.slots import SlotPool
from mambakit.decoding.transfers import integers
from mambakit.generation.request import Text
from mambakit.modules import StateCache

_EVERY = 32  # tokens between two copies
_HELD = 2  # copies of a text, besides the one after its prompt


class TextStates:
    """Copies of the states of the texts that have a slot.

    Args:
        model: a causal language model in eval mode.
    """

    def __init__(self, model: Any):
        self._model = model
        self._copies: dict[Text, list[StateCache]] = {}  # the oldest first; the first is that after the prompt

    def seated(self, text: Text, state: StateCache) -> None:
        """A text whose state is wanted has got a slot, with this state."""
        copies = self._copies.setdefault(text, [])
        if not copies or copies[-1] is not state:  # it is, where the text has had a slot before
            copies.append(state)
            self._drop_old(text)

    def before_look(self, pool: SlotPool, several: bool) -> None:
        """Copy the states that are due; ``several``: whether slots may read beyond their texts' ends."""
        for slot, text in self._due(pool, several):
            self._copies[text].append(pool.copy_of(slot))
            self._drop_old(text)

    def are_due(self, pool: SlotPool, several: bool) -> bool:
        """Whether `before_look` would copy a state."""
        return any(True for _ in self._due(pool, several))

    def _due(self, pool: SlotPool, several: bool) -> Iterator[tuple[int, Text]]:
        for slot, text in enumerate(pool.occupants):
            if text is None or (copies := self._copies.get(text)) is None:
                continue
            if (several or text.request.keep_states) and pool.seen(slot) - copies[-1].get_seq_length() >= _EVERY:
                yield slot, text

    def left(self, text: Text) -> None:
        """A text leaves its slot for another, and goes on later."""
        if text in self._copies and text.state is not None:
            self._copies[text].append(text.state)
            self._drop_old(text)

    def ended(self, text: Text, pool: SlotPool, slot: int | None) -> list[StateCache]:
        """States of a text that has ended, the latest first; none has read beyond its end.

        The first is its state at the end, where its slot has not read further.
        """
        end = _end_of(text)
        # The text may have ended in a look that was launched before the last copy.
        copies = [copy for copy in self._copies.pop(text, []) if copy.get_seq_length() <= end]
        if slot is None:
            current = text.state
        else:
            current = pool.copy_of(slot) if pool.seen(slot) <= end and slot not in pool.ahead else None
        if current is not None:
            if copies and copies[-1].get_seq_length() == current.get_seq_length():
                del copies[-1]
            copies.append(current.clone() if slot is None else current)
        return copies[::-1]

    def read_on(self, text: Text, state: StateCache) -> StateCache:
        """A state that has read on to the end of its text."""
        unread = text.tokens()[state.get_seq_length() - text.before : _end_of(text) - text.before]
        if unread:
            state = state.clone()
            ids = integers(self._model.device, [unread])
            prefill_states(self._model, ids, state)
        return state

    def _drop_old(self, text: Text) -> None:
        copies = self._copies[text]
        del copies[1 : len(copies) - _HELD]


def _end_of(text: Text) -> int:
    """The number of tokens that a text's state has read at its end.

    It has read all tokens but the last one, which nothing was chosen after. After an end-of-text token, which the text
    does not have, it has read all.
    """
    return text.length - (text.request.finish_reason != "stop")
