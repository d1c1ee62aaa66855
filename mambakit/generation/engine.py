"""Many texts at once: a scheduler over the loop of `mambakit.decoding.loop`.

The slots are a pool of states that decodes together, one token a slot and step. A slot is free for the next request as soon as its text
has ended. Prompts are read between steps, several in turn (`mambakit.generation.reading`), for so short a time that texts being
written are not held up.

Requests whose ``share`` differs take turns (`mambakit.generation.turns`): a text whose time slice is over makes room where another
share has fewer slots. It loses nothing: its state is copied out, and later back.

A text does not depend on the others: every request has its own random numbers, and each prompt is read on its own in chunks that start
at its own beginning. On a CPU, where a slot's step has the same bits in any batch, tokens are the same whatever else is there, and
free slots are left out of the step where few of many write. Elsewhere the step always runs on all ``slots``, so that its products
are cut the same way. Whatever goes wrong with one request, its grammar or its state, ends that request alone.
"""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.chunks import SNAPSHOT_CHUNK
from mambakit.decoding.logits import NO_CHOICE
from mambakit.decoding.loop import SlotLoop
from mambakit.decoding.parameters import CHUNK_SIZE, INT64, NEW_TOKENS, Number
from mambakit.decoding.sampler import Sampler
from mambakit.decoding.slots import SlotPool
from mambakit.errors import LogitsError
from mambakit.generation.prefix_cache import PrefixCache
from mambakit.generation.reading import PromptReading, ReadingShare
from mambakit.generation.request import Request, Text
from mambakit.generation.stream import _end_tokens
from mambakit.generation.token_ids import require_in_vocabulary
from mambakit.generation.turns import Path, Turns
from mambakit.modules import StateCache
from mambakit.ops.sampling.api import NO_TOKEN
from mambakit.quoting import cut

# A prompt's token costs about this share of one that is written.
_PROMPT_SHARE = 1 / 16
# Requests whose prompts are read before there is a slot for them: so many times the slots. Each holds a state.
_AHEAD = 4
_MOST_PER_LOOK = 64  # a graph keeps no more tokens
# Prompts whose state is held for the other texts of the same prompt and share.
_PROMPTS_HELD = 4
_STEPS_PER_LOOK = 16  # steps after which it is looked again whose prompts are next, though nobody came or went


class Engine:
    """Writes the texts of any number of requests, ``slots`` at a time.

    Args:
        model: a causal language model in eval mode.
        slots: how many texts are written together.
        chunk_size: tokens of a prompt per forward, and at most about as many between two steps; memory does not grow with the prompt.
        prefix_cache: where beginnings of prompts are looked up, and prompts and texts are kept.
        read_seconds: the time for reading prompts between two steps. What cannot be interrupted may exceed it: on a CPU a chunk
            in one layer, on a GPU a chunk.
        slice_tokens: how many tokens a text writes at least before it makes room for one of another share.
        tokens_per_look: tokens that each slot writes between two times that the host waits for the device, where no constraint needs it
            and no state is kept. More than 1 leaves the host behind the device; the texts are the same, but `step` gives several
            tokens of a text at once, and a text that is cancelled has had up to so many more.
        clock: gives the time in seconds.
        rows: the earlier name of ``slots``.

    Raises:
        ValueError: fewer than one slot, one token a chunk or one token a slice, or a time below 0.
    """

    def __init__(
        self,
        model: Any,
        slots: int = 8,
        chunk_size: int = SNAPSHOT_CHUNK,
        *,
        prefix_cache: PrefixCache | None = None,
        read_seconds: float = 0.02,
        slice_tokens: int = 32,
        tokens_per_look: int = 1,
        clock: Callable[[], float] = time.perf_counter,
        rows: int | None = None,
    ):
        if rows is not None:
            warnings.warn("Engine(rows=...) is now Engine(slots=...)", DeprecationWarning, stacklevel=2)
            slots = rows
        slots = Number(8, 1, INT64[1], whole=True).read("slots" if rows is None else "rows", slots)
        chunk_size = replace(CHUNK_SIZE, default=SNAPSHOT_CHUNK).read("chunk_size", chunk_size)
        slice_tokens = Number(32, 1, INT64[1], whole=True).read("slice_tokens", slice_tokens)
        read_seconds = Number(0.02, 0, math.inf).read("read_seconds", read_seconds)
        tokens_per_look = Number(1, 1, _MOST_PER_LOOK, whole=True).read("tokens_per_look", tokens_per_look)
        self.model, self.slots, self.chunk_size, self.slice_tokens = model, slots, chunk_size, slice_tokens
        self.tokens_per_look = tokens_per_look
        self.prefix_cache = prefix_cache
        self._ends = _end_tokens(model)
        self._vocab_size = model.config.vocab_size
        self._share = ReadingShare[Text](read_seconds, chunk_size, clock)
        self._pool = SlotPool(model, slots)  # its slots hold their texts
        self._loop = SlotLoop(self._pool)
        self._turns = Turns[Text]()  # all texts
        self._unread: dict[Text, None] = {}  # in the order in which they came
        self._ready: dict[Text, None] = {}  # read, and without a slot
        self._texts: dict[Request, Text] = {}
        self._cancelled: deque[Request] = deque()  # by whichever thread
        self._next: list[Text] | None = None  # those whose prompts may be read now; None where that is to be found out
        self._known: OrderedDict[Path, tuple[StateCache, Tensor]] = OrderedDict()
        self._steps = self._taken = 0  # of the slots
        self._freed = False  # whether slots have become free
        self._first = Sampler()  # of a prompt's first token

    @property
    def rows(self) -> int:
        """The earlier name of ``slots``."""
        warnings.warn("Engine.rows is now Engine.slots", DeprecationWarning, stacklevel=2)
        return self.slots

    @property
    def waiting(self) -> list[Request]:
        """Requests of which nothing has been read yet."""
        return [text.request for text in self._unread if not text.reading.begun]

    @property
    def busy(self) -> int:
        """Slots that are taken: by texts being written, and by those that will be as soon as their prompt is read."""
        begun = sum(text.reading.begun for text in self._unread)
        return min(self.slots, len(self._writing()) + len(self._ready) + begun)

    def submit(self, request: Request) -> Request:
        """Queue a request; it starts as soon as it is its turn.

        Raises:
            TypeError: no `Request`.
            ValueError: a token that the model does not have, or a request that runs already.
        """
        if not isinstance(request, Request):
            raise TypeError(f"a {type(request).__name__} cannot be written; give a Request")
        if request in self._texts:
            raise ValueError("this request runs already; make another Request of the same prompt")
        if request.finish_reason:
            return request
        ids = request.prompt_ids.detach().cpu()
        require_in_vocabulary("prompt_ids", ids, self._vocab_size)  # on a GPU another token would end the process
        if request.context is not None:
            require_in_vocabulary("context", request.context, self._vocab_size)
        alone = not request.share or request.state is not None or self.prefix_cache is not None
        prompt = None if alone else (request.share, hashlib.sha256(ids.numpy().tobytes()).digest())
        most = NEW_TOKENS.read("max_new_tokens", request.max_new_tokens)
        text = Text(
            request, most, PromptReading(self.model, ids, self.chunk_size, request.state, self.prefix_cache), prompt
        )
        self._turns.add(text, request.share)
        self._texts[request] = text
        self._unread[text] = self._next = None
        request.on_cancel = self._cancelled.append
        if request.finish_reason:  # cancelled meanwhile
            self._cancelled.append(request)
        return request

    def run(self) -> Iterator[tuple[Request, int]]:
        """(request, token) as they are chosen, until nothing is left; requests may be submitted meanwhile."""
        while len(self._turns):
            yield from self.step()

    def write(self, requests: Iterable[Request]) -> list[Request]:
        """Submit all of them and wait until they are done. Raises RuntimeError then if one ended with an error."""
        requests = [self.submit(request) for request in requests]
        for _ in self.run():
            pass
        for request in requests:
            if request.error:
                kind = LogitsError if request.exception is None else RuntimeError
                raise kind(request.error) from request.exception
        return requests

    @torch.inference_mode(
        False
    )  # states and tables outlive the step: it may be called in an inference mode and out of it
    @torch.no_grad()
    def step(self) -> list[tuple[Request, int]]:
        """Read prompts for a while, each of which then has its first token; then the next token of every slot (``tokens_per_look``)."""
        self._steps += 1
        while self._cancelled:
            if (cancelled := self._texts.get(self._cancelled.popleft())) is not None:
                self._finish(cancelled, "cancelled")
        chosen: list[tuple[Request, int]] = []
        if self._steps % _STEPS_PER_LOOK == 0:
            self._next = None
        if self._unread:
            self._share.step(self._may_be_read, lambda text: text.reading, lambda text: self._read_part(text, chosen))
        if self._ready:
            self._give_slots()
        if self._freed:
            self._leave_out_free_slots()
        if self._taken:
            self._write(chosen)
        if not len(self._turns):
            self._known.clear()
        return chosen

    # -- prompts ---------------------------------------------------------------------------------------------------

    def _may_be_read(self) -> list[Text]:
        """Prompts of the texts whose turn it is to have a slot, and the first of each share that has none yet."""
        if not self._unread:
            return []
        if self._next is None:
            self._count_served()
            due = {
                *self._turns.next(self.slots, _anybody),
                *self._turns.next(_AHEAD * self.slots, _anybody, per_request=1),
            }
            able = [text for text in self._unread if text in due]
            begun = {text.prompt for text in able if text.reading.begun}
            found: list[Text] = []
            for text in able:  # of several texts of one prompt, the others wait for the one that reads it
                if text.reading.begun or text.prompt is None or text.prompt not in begun:
                    begun.add(text.prompt)
                    found.append(text)
            self._next = found
        return self._next

    def _read_part(self, text: Text, chosen: list[tuple[Request, int]]) -> int:
        reading, request, tokens = text.reading, text.request, 0
        left = reading.left
        try:
            if text.prompt in self._known and not reading.begun:
                assert text.prompt is not None
                reading.finish(*self._known[text.prompt])
            else:
                tokens = reading.part()
            self._turns.serve(text, (left - reading.left) * _PROMPT_SHARE)
            if not reading.done:
                return tokens
            request.cached_tokens = reading.cached
            assert reading.logits is not None
            (token,) = self._first.choose(reading.logits, [text.begin(self._vocab_size, self.model.device)])
        except Exception as error:
            self._fail(text, error)
            return tokens
        del self._unread[text]
        self._next = None
        self._ready[text] = None
        text.state = reading.cache
        if text.prompt is not None and reading.cache is not None:
            self._known[text.prompt] = reading.cache, reading.logits
            while len(self._known) > _PROMPTS_HELD:
                self._known.popitem(last=False)
        if self._take(text, token):
            chosen.append((request, token))
        return tokens

    # -- slots -----------------------------------------------------------------------------------------------------

    def _writing(self) -> list[tuple[int, Text]]:
        return [(slot, text) for slot, text in enumerate(self._pool.occupants) if text is not None]

    def _give_slots(self) -> None:
        """To texts that are ready; where they are too many, to those whose turn it is."""
        due, writing = list(self._ready), self._writing()
        if len(writing) + len(due) > self.slots:
            staying = [text for _, text in writing if len(text.written) - text.seated_at < self.slice_tokens]
            if len(staying) == self.slots:
                return
            self._count_served()
            able = {*self._ready, *(text for _, text in writing)}
            due = self._turns.next(self.slots - len(staying), able.__contains__, staying)
            going = {*staying, *due}
            for slot, text in writing:
                if text not in going:  # its state is copied out, and it goes on from there later
                    text.state = self._pool.copy_of(slot)
                    self._ready[text] = None
                    self._release(slot)
        for text in due:
            if text in self._ready:
                self._give_slot(text)

    def _give_slot(self, text: Text) -> None:
        assert text.state is not None
        try:
            self._loop.admit(text, text.state, text.written[-1])
        except Exception as error:  # a state that was given may be of another model
            self._fail(text, error)
            return
        del self._ready[text]
        text.state, text.seated_at = None, len(text.written)
        self._taken += 1

    def _release(self, slot: int) -> None:
        self._loop.release(slot)
        self._taken -= 1
        self._freed = True

    def _leave_out_free_slots(self) -> None:
        """Where few of many still write and nobody waits, a step need not be one of all slots."""
        if self._taken and self._taken == len(self._turns):
            self._loop.shrink()
            self._freed = False

    # -- tokens ----------------------------------------------------------------------------------------------------

    def _write(self, chosen: list[tuple[Request, int]]) -> None:
        """The next tokens of every text that has a slot."""
        count = self.tokens_per_look
        held: list[Text | None] = list(self._pool.occupants)
        if count > 1:  # what is read beyond a text's end would be in its state
            texts = [text for text in held if text is not None]
            kept = self.prefix_cache is not None or any(text.request.keep_state for text in texts)
            count = 1 if kept else min(count, *(text.most - len(text.written) for text in texts))
        vocab_size, ends = self._vocab_size, self._ends
        for text, tokens in zip(held, self._loop.look(count), strict=True):
            if text is None:
                continue
            request, written = text.request, text.written
            for token in tokens:
                if 0 <= token < vocab_size and token not in ends:
                    written.append(token)
                    request.tokens.append(token)
                    chosen.append((request, token))
                    if len(written) < text.most:
                        continue
                    self._finish(text, "length")
                else:
                    self._take(text, token)
                break

    def _take(self, text: Text, token: int) -> bool:
        """Note a text's token; False where it is the end of the text, or none could be chosen."""
        if token == NO_TOKEN:
            assert text.sampled is not None
            self._fail(text, text.sampled.exception)
            return False
        if not 0 <= token < self._vocab_size:
            self._fail(text, ValueError(f"token {token} was chosen; the model's are 0 to {self._vocab_size - 1}"))
            return False
        if token in self._ends:
            self._finish(text, "stop")
            return False
        text.written.append(token)
        text.request.tokens.append(token)
        if len(text.written) >= text.most:
            self._finish(text, "length")
        return True

    def _count_served(self) -> None:
        """Tell the turns what texts have written since."""
        for text in self._texts.values():
            if len(text.written) > text.counted:
                self._turns.serve(text, len(text.written) - text.counted)
                text.counted = len(text.written)

    def _fail(self, text: Text, error: Exception | None) -> None:
        """End with an error the one request that raised it (None: its logits were no numbers); raise what no request survives."""
        if isinstance(error, torch.AcceleratorError):  # the device answers nobody any more
            raise error
        request = text.request
        request.exception = error
        request.error = NO_CHOICE if error is None else f"{type(error).__name__}: {cut(str(error), 500)}"
        self._finish(text, "error")

    def _finish(self, text: Text, reason: str) -> None:
        request = text.request
        request.finish_reason = request.finish_reason or reason
        if len(text.written) > text.counted:
            self._turns.serve(text, len(text.written) - text.counted)
        slot = self._pool.occupants.index(text) if text in self._pool.occupants else None
        wanted = request.keep_state or (self.prefix_cache is not None and request.state is None)
        if wanted and not request.error:
            state = text.state.clone() if slot is None and text.state is not None else None
            state = state if slot is None else self._pool.copy_of(slot)
            if state is not None:
                self._keep(text, state)
        if slot is not None:
            self._release(slot)
        self._unread.pop(text, None)
        self._ready.pop(text, None)
        self._turns.remove(text)
        del self._texts[request]
        request.on_cancel = None
        self._next = None

    def _keep(self, text: Text, state: StateCache) -> None:
        request = text.request
        if request.keep_state:
            request.final_state = state
        if self.prefix_cache is not None and request.state is None:
            read = [*request.prompt_ids.tolist(), *text.written][: state.get_seq_length()]
            try:
                self.prefix_cache.store(read, state)
            except Exception as error:  # the text itself is whole
                warnings.warn(f"a text's state could not be kept in the prefix cache: {error}", stacklevel=2)


def _anybody(_text: Text) -> bool:
    return True
