"""The schedule of an engine: whose prompt is read next, and who has a slot.

Requests whose ``share`` differs take turns (`mambakit.generation.turns`). A text whose time slice is over leaves its
slot where another share has fewer slots.
"""

from __future__ import annotations

from mambakit.generation.request import Request, Text
from mambakit.generation.turns import Turns

# A prompt's token costs about this share of one that is written.
_PROMPT_SHARE = 1 / 16
# Requests whose prompts are read before there is a slot for them: so many times the slots. Each holds a state.
_AHEAD = 4
_STEPS_PER_LOOK = 16  # steps after which the order of prompts is found again, though no text came or ended


class Schedule:
    """All texts of an engine. Each is unread, then ready; once it has a slot it is neither, until it leaves the slot.

    Args:
        slots: how many texts are written together.

    Attributes:
        texts: all of them.
        unread: texts whose prompt is still to be read, in the order in which they came.
        ready: texts whose prompt is read, and which have no slot.
    """

    def __init__(self, slots: int):
        self._slots = slots
        self.texts: dict[Request, Text] = {}
        self.unread: dict[Text, None] = {}
        self.ready: dict[Text, None] = {}
        self._turns = Turns[Text]()
        self._next: list[Text] | None = None  # the result of `may_be_read`; None where it must be found again
        self._steps = 0

    def __len__(self) -> int:
        return len(self.texts)

    def add(self, text: Text) -> None:
        """Add a text whose prompt is unread."""
        self._count_all_written()  # it starts level with others
        self._turns.add(text, text.request.share)
        self.texts[text.request] = text
        self.unread[text] = self._next = None

    def remove(self, text: Text) -> None:
        """Remove a text that has ended, in whatever state it is."""
        self._count_written(text)
        self.unread.pop(text, None)
        self.ready.pop(text, None)
        self._turns.remove(text)
        del self.texts[text.request]
        self._next = None

    def begin_step(self) -> None:
        """Count a step of the engine."""
        self._steps += 1
        if self._steps % _STEPS_PER_LOOK == 0:
            self._next = None

    def may_be_read(self) -> list[Text]:
        """Texts whose prompts may be read now, the oldest first.

        Those whose turn it is to have a slot, and the first of each share that has none yet.
        """
        if not self.unread:
            return []
        if self._next is None:
            able = list(self.unread)
            if len(self.texts) > self._slots:
                self._count_all_written()
                due = {
                    *self._turns.next(self._slots, _any_text),
                    *self._turns.next(_AHEAD * self._slots, _any_text, per_request=1),
                }
                able = [text for text in able if text in due]
            begun = {text.prompt for text in able if text.reading.begun}
            found: list[Text] = []
            for text in able:  # of several texts of one prompt, the others wait for the one that reads it
                if text.reading.begun or text.prompt is None or text.prompt not in begun:
                    begun.add(text.prompt)
                    found.append(text)
            self._next = found
        return self._next

    def count_read(self, text: Text, tokens: int) -> None:
        """So many more tokens of a text's prompt are read."""
        self._turns.serve(text, tokens * _PROMPT_SHARE)

    def was_read(self, text: Text) -> None:
        """All of a text's prompt is read: it is ready."""
        del self.unread[text]
        self._next = None
        self.ready[text] = None

    def admission(self, writing: list[Text], slice_tokens: int) -> tuple[list[Text], list[Text]]:
        """The texts that leave their slots, and the ready texts that get one.

        Where all have room, all ready texts get a slot; otherwise those whose turn it is.

        Args:
            writing: the texts that have a slot.
            slice_tokens: how many tokens a text writes at least before it leaves its slot for a text of another share.
        """
        if len(writing) + len(self.ready) <= self._slots:
            return [], list(self.ready)
        staying = [text for text in writing if len(text.written) - text.seated_at < slice_tokens]
        if len(staying) == self._slots:
            return [], []
        self._count_all_written()
        able = {*self.ready, *writing}
        due = self._turns.next(self._slots - len(staying), able.__contains__, staying)
        going = {*staying, *due}
        return [text for text in writing if text not in going], [text for text in due if text in self.ready]

    def _count_all_written(self) -> None:
        for text in self.texts.values():
            self._count_written(text)

    def _count_written(self, text: Text) -> None:
        """Tell the turns what a text has written since."""
        if len(text.written) > text.counted:
            self._turns.serve(text, len(text.written) - text.counted)
            text.counted = len(text.written)


def _any_text(_text: Text) -> bool:
    return True
