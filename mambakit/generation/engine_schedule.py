"""The schedule of an engine: whose prompt is read next, and who has a slot.

Requests whose ``share`` differs take turns (`mambakit.generation.turns`). A text whose time slice is over leaves its
slot where another share has fewer slots.

With more texts than slots, prompts of the texts next in turn are read ahead (`texts_ahead`), so that a slot is refilled
as soon as it is free.
"""

from __future__ import annotations

from collections.abc import Hashable

from mambakit.generation.request import Request, Text
from mambakit.generation.turns import Turns, texts_ahead

# A prompt's token costs about this share of one that is written.
_PROMPT_SHARE = 1 / 16
# Requests whose prompts are read before there is a slot for them: so many times the slots. Each holds a state.
_EARLY = 4
_STEPS_PER_LOOK = 16  # steps after which the order of prompts is found again, though no text came or ended
# A prompt that is due waits at most so many steps for others to fill its forward. Where slots are idle meanwhile, it
# waits only while that is at most a sixteenth of a step of the slots that write: an H200 reads 1 to 4 prompts of 128
# tokens in 5 ms, and a step of the engine takes 9 ms (1.4b, 64 slots).
_PATIENCE, _IDLE_SHARE = 2, 16


class Schedule:
    """All texts of an engine. Each is unread, then starting, then ready; once it has a slot it is none of these, until
    it leaves the slot.

    Args:
        slots: how many texts are written together.

    Attributes:
        texts: all of them.
        unread: texts whose prompt is still to be read, in the order in which they came. The value is the step in which
            the prompt was first found due; None before.
        starting: texts whose prompt is read, and whose first token is not on the host yet.
        ready: texts which have their first token and no slot.
    """

    def __init__(self, slots: int):
        self._slots, self._lead = slots, texts_ahead(slots)
        self.texts: dict[Request, Text] = {}
        self.unread: dict[Text, int | None] = {}
        self.starting: dict[Text, None] = {}
        self.ready: dict[Text, None] = {}
        self._turns = Turns[Text]()
        self._due: list[Text] = []  # as `may_be_read` last found them; some may be read meanwhile
        self._ahead: list[Text] = []
        self._changed = True  # texts came or ended since
        self._found_in = -1  # the step
        self._steps = 0
        self._may_have_written = False  # since `add` counted

    def __len__(self) -> int:
        return len(self.texts)

    def add(self, text: Text) -> None:
        """Add a text whose prompt is unread. Call it between steps."""
        if self._may_have_written:  # it starts level with others; those of a burst come with one count
            self._count_all_written()
            self._may_have_written = False
        self._turns.add(text, text.request.share)
        self.texts[text.request] = text
        self.unread[text] = None
        self._changed = True

    def remove(self, text: Text) -> None:
        """Remove a text that has ended, in whatever state it is."""
        self._count_written(text)
        for texts in (self.unread, self.starting, self.ready):
            texts.pop(text, None)
        self._turns.remove(text)
        del self.texts[text.request]
        self._changed = True

    def begin_step(self) -> None:
        """Count a step of the engine."""
        self._steps += 1
        self._may_have_written = True
        if self._steps % _STEPS_PER_LOOK == 0:
            self._changed = True

    def may_be_read(self) -> tuple[list[Text], list[Text]]:
        """(texts whose prompts are due, texts whose prompts may be read ahead), each the oldest first.

        Due are those whose turn it is to have a slot, and the first of each share that has none yet. Ahead are those
        next in turn. Of several texts of one prompt, the others wait for the one that reads it.
        """
        if not self.unread:
            self._due, self._ahead = [], []
            return [], []
        if self._changed and self._found_in != self._steps:  # once a step: it takes a look at every text
            self._find()
        due, ahead = self._untouched()
        if self._changed and not due and not ahead:  # the texts that were found have ended within this step
            self._find()
            due, ahead = self._untouched()
        return due, ahead

    def _find(self) -> None:
        due, ahead = list(self.unread), list[Text]()
        if len(self.texts) > self._slots:
            self._count_all_written()
            following = self._turns.next(self._slots + self._lead)
            firsts = self._turns.next(_EARLY * self._slots, per_request=1)
            now, later = {*following[: self._slots], *firsts}, set(following[self._slots :])
            ahead = [text for text in due if text in later and text not in now]
            due = [text for text in due if text in now]
        for text in due:
            if self.unread[text] is None:
                self.unread[text] = self._steps
        self._due, self._ahead = due, ahead
        self._changed, self._found_in = False, self._steps

    def _untouched(self) -> tuple[list[Text], list[Text]]:
        """Those of the texts that were found which are still to be read, one of each prompt."""
        self._due = [text for text in self._due if text in self.unread]
        self._ahead = [text for text in self._ahead if text in self.unread]
        begun = {text.prompt for text in (*self._due, *self._ahead) if text.reading.begun}

        def one_of_each(texts: list[Text]) -> list[Text]:
            found = []
            for text in texts:
                if text.reading.begun or text.prompt is None or text.prompt not in begun:
                    begun.add(text.prompt)
                    found.append(text)
            return found

        return one_of_each(self._due), one_of_each(self._ahead)

    def overdue(self) -> set[Text]:
        """The texts that are due and wait no longer for others that share their forward."""
        coming = len(self.ready) + len(self.starting)
        writing = len(self.texts) - len(self.unread) - coming
        idle = min(self._slots - writing - coming, len(self._due))
        steps = _PATIENCE if idle <= 0 else min(_PATIENCE, writing // (_IDLE_SHARE * idle))
        return {text for text in self._due if (since := self.unread[text]) is None or self._steps - since >= steps}

    @property
    def lacks_ready(self) -> bool:
        """Whether so few texts are ready that prompts should be read ahead without waiting for others."""
        return len(self.ready) + len(self.starting) < self._lead // 2

    def count_read(self, text: Text, tokens: int) -> None:
        """So many more tokens of a text's prompt are read."""
        self._turns.serve(text, tokens * _PROMPT_SHARE)

    def was_read(self, text: Text) -> None:
        """All of a text's prompt is read: it is starting."""
        del self.unread[text]
        self.starting[text] = None

    def started(self, text: Text) -> None:
        """A text's first token is on the host: it is ready."""
        del self.starting[text]
        self.ready[text] = None

    def admission(self, writing: list[Text], slice_tokens: int) -> tuple[list[Text], list[Text]]:
        """The texts that leave their slots, and the ready texts that get one.

        Where all have room, all ready texts get a slot; otherwise those whose turn it is. No text leaves its slot for
        one of the same share.

        Args:
            writing: the texts that have a slot.
            slice_tokens: how many tokens a text writes at least before it leaves its slot for a text of another share.
        """
        if len(writing) + len(self.ready) <= self._slots:
            return [], list(self.ready)
        staying = [text for text in writing if len(text.written) - text.seated_at < slice_tokens]
        if len(staying) == self._slots:
            return [], []
        able = [*self.ready, *writing]
        if len(writing) == self._slots and len({self._turns.path_of(text) for text in able}) == 1:
            return [], []
        for text in writing:
            self._count_written(text)
        due = self._turns.next(self._slots - len(staying), able, staying)
        going = {*staying, *due}
        return self._without_exchanges(
            [text for text in writing if text not in going], [text for text in due if text in self.ready]
        )

    def _without_exchanges(self, leaving: list[Text], entering: list[Text]) -> tuple[list[Text], list[Text]]:
        """Leave out texts that would leave their slots for others of the same share: those that came earlier, and whose
        prompts took longer to read."""
        kept: dict[Hashable, list[Text]] = {}
        for text in leaving:
            kept.setdefault(self._turns.path_of(text), []).append(text)
        found = []
        for text in reversed(entering):
            if same := kept.get(self._turns.path_of(text)):
                same.pop()
            else:
                found.append(text)
        return [text for texts in kept.values() for text in texts], found[::-1]

    def _count_all_written(self) -> None:
        for text in self.texts.values():
            self._count_written(text)

    def _count_written(self, text: Text) -> None:
        """Tell the turns what a text has written since."""
        if len(text.written) > text.counted:
            self._turns.serve(text, len(text.written) - text.counted)
            text.counted = len(text.written)
