"""Many texts at once: a scheduler over the loop of `mambakit.decoding.loop`.

The slots are a pool of states that decodes together, one token a slot and step. A slot is free for the next request as
soon as its text has ended. Prompts are read between steps, several in turn (`mambakit.generation.engine_prompts`), for
so short a time that the texts being written are not held up.

Requests whose ``share`` differs take turns (`mambakit.generation.engine_schedule`): a text whose time slice is over
leaves its slot where another share has fewer slots. Its state is copied out and later back, so it goes on with the same
tokens.

A text does not depend on the others: every request has its own random numbers, and each prompt is read on its own in
chunks that start at its own beginning. On a CPU, where a slot's step has the same bits in any batch, tokens are the
same whatever else is there, and free slots are left out of the step where few of many write. Elsewhere a step always
runs on all ``slots``, so that its products are cut the same way. An error of one request, of its grammar or its state,
ends that request alone.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from mambakit.decoding.chunks import SNAPSHOT_CHUNK
from mambakit.decoding.drafting import Drafter, read_draft_tokens
from mambakit.decoding.logits import NO_CHOICE
from mambakit.decoding.loop import SlotLoop
from mambakit.decoding.parameters import CHUNK_SIZE, INT64, Number
from mambakit.decoding.slots import SlotPool
from mambakit.errors import LogitsError, MambakitError
from mambakit.generation.engine_drafts import Drafts
from mambakit.generation.engine_looks import Found, Looks
from mambakit.generation.engine_prompts import PromptReader
from mambakit.generation.engine_schedule import Schedule
from mambakit.generation.engine_states import TextStates
from mambakit.generation.prefix_cache import PrefixCache
from mambakit.generation.reading import ReadingShare
from mambakit.generation.request import Request, Text
from mambakit.generation.stream import _end_tokens
from mambakit.modules import StateCache
from mambakit.ops.sampling.api import NO_TOKEN
from mambakit.quoting import brief, cut

# On a CPU prompts are read for at most so many steps' time between two steps: a gap is then at most three times one in
# which nothing is read.
_MOST_STEPS = 2.0
# Tokens of a text before it makes room for one of another share. An exchange waits for the device, and copies states.
_SLICES = {"cpu": 32, "cuda": 128}


class Engine:
    """Writes the texts of any number of requests, ``slots`` at a time.

    Args:
        model: a causal language model in eval mode.
        slots: how many texts are written together.
        chunk_size: tokens of a prompt per forward, and at most about as many between two steps; memory does not grow
            with the prompt.
        prefix_cache: where beginnings of prompts are looked up, and prompts and texts are kept.
        read_seconds: the time for reading prompts between two steps, or that of the last step where it is more; on a
            CPU no more than that of two steps. The smallest part that can be read may exceed it: on a CPU a chunk in
            one layer, on a GPU a chunk. 0: one part; infinite: ``chunk_size`` alone is the limit.
        slice_tokens: how many tokens a text writes at least before it makes room for one of another share. None: 32 on
            a CPU; 128 elsewhere, where they take no longer.
        tokens_per_look: tokens that each slot writes between two device-to-host syncs, where no constraint needs one.
            More than 1 leaves the host behind the device: `step` launches the next tokens before it returns those that
            were launched before. The texts are the same, but `step` gives several tokens of a text at once. None: 1,
            and with a captured decoder as many as take 10 ms, up to 8.
        clock: gives the time in seconds.
        drafter: proposes tokens that are verified several at a time, for all slots together: `DraftModel(small)`,
            `PromptLookup()` or another `Drafter`, which is copied for each text. The texts are the same, of sampled
            ones the distribution; a step gives several tokens of a text at once. A draft model reads a text's whole
            prompt when the text gets its slot.
        draft_tokens: the maximum number of guesses per draft, 1 to 15; a `Request` may have fewer, or none.
        rows: the earlier name of ``slots``.

    Raises:
        ValueError: fewer than one slot, one token a chunk or one token a slice, a time below 0, or a draft model of
            another vocabulary or device.
    """

    def __init__(
        self,
        model: Any,
        slots: int | None = None,
        chunk_size: int = SNAPSHOT_CHUNK,
        *,
        prefix_cache: PrefixCache | None = None,
        read_seconds: float = 0.02,
        slice_tokens: int | None = None,
        tokens_per_look: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
        drafter: Drafter | None = None,
        draft_tokens: int = 4,
        rows: int | None = None,
    ):
        if rows is not None:
            if slots is not None:
                raise ValueError(f"slots is {brief(slots)} and rows, its earlier name, {brief(rows)}; give slots alone")
            warnings.warn("Engine(rows=...) is now Engine(slots=...)", DeprecationWarning, stacklevel=2)
            slots = rows
        slots = 8 if slots is None else slots
        slots = Number(8, 1, INT64[1], whole=True).read("slots" if rows is None else "rows", slots)
        chunk_size = replace(CHUNK_SIZE, default=SNAPSHOT_CHUNK).read("chunk_size", chunk_size)
        most = _SLICES.get(model.device.type, _SLICES["cuda"])
        slice_tokens = Number(most, 1, INT64[1], whole=True).read("slice_tokens", slice_tokens)
        read_seconds = Number(0.02, 0, math.inf).read("read_seconds", read_seconds)
        self.model, self.slots, self.chunk_size, self.slice_tokens = model, slots, chunk_size, slice_tokens
        self.prefix_cache = prefix_cache
        ends = frozenset(_end_tokens(model))
        self._vocab_size = model.config.vocab_size
        self._pool = SlotPool(model, slots)  # its slots hold their texts
        self._loop = SlotLoop(self._pool, 0 if drafter is None else read_draft_tokens(draft_tokens))
        self._states = TextStates(model)
        self._looks = Looks(self._loop, tokens_per_look, clock)
        self.drafts = None if drafter is None else Drafts(self._loop, model, drafter, slots, draft_tokens)
        self._schedule = Schedule(slots)
        steps = _MOST_STEPS if model.device.type == "cpu" else math.inf
        self._share, self._clock = ReadingShare[Text](read_seconds, chunk_size, clock, steps), clock
        self._prompts = PromptReader(model, self._share, self._schedule, ends, slots)
        self._cancelled: deque[Request] = deque()  # by whichever thread
        self._taken = 0  # of the slots
        self._freed = False  # whether slots have become free

    @property
    def rows(self) -> int:
        """The earlier name of ``slots``."""
        warnings.warn("Engine.rows is now Engine.slots", DeprecationWarning, stacklevel=2)
        return self.slots

    @property
    def waiting(self) -> list[Request]:
        """Requests of which nothing has been read yet."""
        return [text.request for text in self._schedule.unread if not text.reading.begun]

    @property
    def busy(self) -> int:
        """Slots that are taken: by texts being written, and by those that will be as soon as their prompt is read."""
        schedule = self._schedule
        begun = sum(text.reading.begun for text in schedule.unread)
        return min(self.slots, len(self._writing()) + len(schedule.ready) + len(schedule.starting) + begun)

    def submit(self, request: Request) -> Request:
        """Queue a request; it starts as soon as it is its turn.

        Raises:
            TypeError: no `Request`.
            ValueError: a token that the model does not have, or a request that runs already.
        """
        if not isinstance(request, Request):
            raise TypeError(f"a {type(request).__name__} cannot be written; give a Request")
        if request in self._schedule.texts:
            raise ValueError("this request runs already; make another Request of the same prompt")
        if request.finish_reason:
            return request
        self._schedule.add(self._prompts.text_of(request, self.chunk_size, self.prefix_cache))
        request.on_cancel = self._cancelled.append
        if request.finish_reason:  # cancelled meanwhile
            self._cancelled.append(request)
        return request

    def run(self) -> Iterator[tuple[Request, int]]:
        """(request, token) as they are chosen, until nothing is left; requests may be submitted meanwhile."""
        while len(self._schedule):
            yield from self.step()

    def write(self, requests: Iterable[Request]) -> list[Request]:
        """Submit all of them and wait until they are done. Raises RuntimeError then if one ended with an error.

        Where the engine has no other requests, nobody waits for single tokens: prompts are then read without regard to
        ``read_seconds``, so that texts start together and share their steps.
        """
        self._prompts.hurried = len(self._schedule) > 0
        try:
            requests = [self.submit(request) for request in requests]
            for _ in self.run():
                pass
        finally:
            self._prompts.hurried = True
        for request in requests:
            if request.error:
                kind = LogitsError if request.exception is None else RuntimeError
                raise kind(request.error) from request.exception
        return requests

    @torch.inference_mode(False)  # states and tables outlive the step, which may run in inference mode and out of it
    @torch.no_grad()
    def step(self) -> list[tuple[Request, int]]:
        """Read prompts for a while, then write the next tokens of every slot (``tokens_per_look``).

        Returns:
            (request, token) of each text that has a new token; none where those of the first look were only launched.
            A text whose prompt was read has its first.
        """
        self._schedule.begin_step()
        while self._cancelled:
            if (cancelled := self._schedule.texts.get(self._cancelled.popleft())) is not None:
                self._finish(cancelled, "cancelled")
        chosen: list[tuple[Request, int]] = []
        if self._schedule.unread:
            self._prompts.step(self._fail)
        # Where slots write, a device goes on with their next tokens while the host waits for first tokens.
        behind = self._taken > 0 and self._pool.captured
        if self._schedule.starting and not behind:
            self._collect(chosen)
        if self._schedule.ready:
            self._give_slots(chosen)
        if self._freed:
            self._leave_out_free_slots()
        if self._taken:
            self._note(self._next(), chosen)
        if self._schedule.starting:
            self._collect(chosen)
        if not self._taken:
            self._share.step_seconds = 0.0
            (self._looks if self.drafts is None else self.drafts).forget()
        if not len(self._schedule):
            self._prompts.drop_held()
        return chosen

    def _collect(self, chosen: list[tuple[Request, int]]) -> None:
        """Note the first tokens of the texts whose prompts are read."""
        self._prompts.collect(lambda text, token: self._take(text, token, chosen), self._fail)

    def _next(self) -> Found | None:
        """The next tokens of every slot."""
        began = self._clock()
        found = self._look()
        self._share.step_seconds = self._clock() - began
        return found

    def _look(self) -> Found | None:
        if self.drafts is None:
            self._states.before_look(self._pool, self._looks.several)
            return self._looks.next()
        if self.drafts.in_flight and self._states.are_due(self._pool, False):
            return self.drafts.wait()
        self._states.before_look(self._pool, False)  # a text's state is the one after its end
        return self.drafts.next()

    def _wait(self) -> Found | None:
        """The tokens that the device works on. Afterwards states are those after their texts."""
        return self._looks.wait() if self.drafts is None else self.drafts.wait()

    def _writing(self) -> list[Text]:
        return [text for text in self._pool.occupants if text is not None]

    def _give_slots(self, chosen: list[tuple[Request, int]]) -> None:
        leaving, entering = self._schedule.admission(self._writing(), self.slice_tokens)
        if leaving and (found := self._wait()) is not None:  # their states may be ahead of their tokens
            self._note(found, chosen)
            leaving, entering = self._schedule.admission(self._writing(), self.slice_tokens)
        for text in leaving:  # each continues later from a copy of its state
            slot = self._pool.occupants.index(text)
            text.state = self._pool.copy_of(slot)
            self._states.left(text)
            self._schedule.ready[text] = None
            self._release(slot)
        for text in entering:
            self._give_slot(text)

    def _give_slot(self, text: Text) -> None:
        assert text.state is not None
        try:
            slot = self._loop.admit(text, text.state, text.written[-1])
        except Exception as error:  # a state that was given may be of another model
            self._fail(text, error)
            return
        del self._schedule.ready[text]
        if self._is_wanted(text):
            self._states.seated(text, text.state)
        text.state, text.seated_at = None, len(text.written)
        self._taken += 1
        if self.drafts is not None:
            try:
                self.drafts.begin(slot, text)
            except Exception as error:  # a drafter may be a user's own
                self._fail(text, error)

    def _release(self, slot: int) -> None:
        self._loop.release(slot)
        if self.drafts is not None:
            self.drafts.release(slot)
        self._taken -= 1
        self._freed = True

    def _leave_out_free_slots(self) -> None:
        """Where few of many slots are taken and no text waits for one, let steps leave out the free slots."""
        if self.drafts is None and self._taken and self._taken == len(self._schedule):
            self._loop.shrink()
            self._freed = False

    def _note(self, found: Found | None, chosen: list[tuple[Request, int]]) -> None:
        """Note the tokens of a look."""
        if found is None:
            return
        vocab_size = self._vocab_size
        for slot, (text, tokens) in enumerate(zip(found.texts, found.tokens, strict=True)):
            if text is None or text.request not in self._schedule.texts:
                continue  # it has ended since
            request, written, ends = text.request, text.written, text.ends
            request.token_log_probs += found.log_probs.get(slot, [])
            for token in tokens:
                if 0 <= token < vocab_size and token not in ends:
                    written.append(token)
                    request.tokens.append(token)
                    chosen.append((request, token))
                    if len(written) < text.most:
                        continue
                    self._finish(text, "length")
                else:
                    self._take(text, token, chosen)
                break

    def _take(self, text: Text, token: int, chosen: list[tuple[Request, int]]) -> None:
        """Note a text's token, or end the text: with its end-of-text token, or where no token could be chosen."""
        if token == NO_TOKEN:
            assert text.sampled is not None
            self._fail(text, text.sampled.exception)
        elif not 0 <= token < self._vocab_size:
            self._fail(text, ValueError(f"token {token} was chosen; the model's are 0 to {self._vocab_size - 1}"))
        elif token in text.ends:
            self._finish(text, "stop")
        else:
            text.written.append(token)
            text.request.tokens.append(token)
            chosen.append((text.request, token))
            if len(text.written) >= text.most:
                self._finish(text, "length")

    def _fail(self, text: Text, error: Exception | None) -> None:
        """End a text with an error; None stands for logits that are not numbers. An error of the device is raised."""
        if isinstance(error, torch.AcceleratorError):
            raise error
        request = text.request
        request.exception = error
        name = "" if isinstance(error, MambakitError) else f"{type(error).__name__}: "  # ours says what it means
        request.error = NO_CHOICE if error is None else f"{name}{cut(str(error), 500)}"
        self._finish(text, "error")

    def _finish(self, text: Text, reason: str) -> None:
        request = text.request
        request.finish_reason = request.finish_reason or reason
        del request.token_log_probs[len(request.tokens) :]  # of what was chosen after the end
        slot = self._pool.occupants.index(text) if text in self._pool.occupants else None
        states = self._states.ended(text, self._pool, slot) if self._is_wanted(text) else []
        if states and not request.error:
            self._keep(text, states)
        if slot is not None:
            self._release(slot)
        self._schedule.remove(text)
        request.on_cancel = None

    def _is_wanted(self, text: Text) -> bool:
        """Whether somebody wants a text's state at its end."""
        request = text.request
        return request.keep_state or request.keep_states or (self.prefix_cache is not None and request.state is None)

    def _keep(self, text: Text, states: list[StateCache]) -> None:
        """Keep the latest of a text's states, or all."""
        request = text.request
        if request.keep_states:
            request.states = states
        if request.keep_state:
            request.final_state = self._states.read_on(text, states[0])
        if self.prefix_cache is not None and request.state is None:
            try:
                read = text.tokens()[: states[0].get_seq_length()]
                self.prefix_cache.store(read, states[0], salt=request.cache_salt, owner=request.owner)
            except Exception as error:  # the text itself is whole
                warnings.warn(f"a text's state could not be kept in the prefix cache: {error}", stacklevel=2)
