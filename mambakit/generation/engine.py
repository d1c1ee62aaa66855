"""Many texts at once: prompts of any lengths, rows that end on their own and are filled again, turns where there are too few.

The rows are those that `generate` writes with, `mambakit.decoding.slots.SlotPool`: a pool of states that decodes together, one token
a row and step, by the model's fastest step. Here a finished row is free at once for the next request. Prompts are read between
steps, several in turn (`mambakit.generation.reading`), for so short a time that those who write are not held up.

Requests whose ``share`` differs take turns (`mambakit.generation.turns`): a text whose time slice is over makes room where somebody
else has fewer rows. It loses nothing: its state is copied out, and later back.

A text does not depend on its neighbours: every request has its own random numbers, and each prompt is read on its own in chunks
that start at its own beginning; on a CPU, where a row's step has the same bits in any batch, tokens are the same whatever else
is there, and free rows are left out of the step where few of many write. Elsewhere the step always runs on all ``rows``, so that
its products are cut the same way. Whatever goes wrong with one request, its grammar or its state, ends that request alone.
"""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.choosing import NO_CHOICE
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
from mambakit.modules import StateCache as MambaCache
from mambakit.ops.sampling.api import NO_TOKEN
from mambakit.quoting import cut

# A prompt's token costs about this share of one that is written.
_PROMPT_SHARE = 1 / 16
# Requests whose prompts are read before there is a row for them: so many times the rows. Each holds a state.
_AHEAD = 4
# Prompts whose state is held for the other texts of the same prompt and share.
_PROMPTS_HELD = 4
_STEPS_PER_LOOK = 16  # steps after which it is looked again whose prompts are next, though nobody came or went


class Engine:
    """Writes the texts of any number of requests, ``rows`` at a time.

    Args:
        model: a causal language model in eval mode.
        rows: how many texts are written together.
        chunk_size: tokens of a prompt per forward, and at most about as many between two steps; memory does not grow with the prompt.
        prefix_cache: where beginnings of prompts are looked up, and prompts and texts are kept.
        read_seconds: the time for reading prompts between two steps. What cannot be interrupted may exceed it: on a CPU a chunk
            in one layer, on a GPU a chunk.
        slice_tokens: how many tokens a text writes at least before it makes room for one of another share.
        clock: gives the time in seconds.

    Raises:
        ValueError: fewer than one row, one token a chunk or one token a slice, or a time below 0.
    """

    def __init__(
        self,
        model: Any,
        rows: int = 8,
        chunk_size: int = 512,
        *,
        prefix_cache: PrefixCache | None = None,
        read_seconds: float = 0.02,
        slice_tokens: int = 32,
        clock: Callable[[], float] = time.perf_counter,
    ):
        rows = Number(8, 1, INT64[1], whole=True).read("rows", rows)
        chunk_size = replace(CHUNK_SIZE, default=512).read("chunk_size", chunk_size)
        slice_tokens = Number(32, 1, INT64[1], whole=True).read("slice_tokens", slice_tokens)
        read_seconds = Number(0.02, 0, math.inf).read("read_seconds", read_seconds)
        self.model, self.rows, self.chunk_size, self.slice_tokens = model, rows, chunk_size, slice_tokens
        self.prefix_cache = prefix_cache
        self._ends = _end_tokens(model)
        self._vocab_size = model.config.vocab_size
        self._share = ReadingShare[Text](read_seconds, chunk_size, clock)
        self._pool = SlotPool(model, rows)  # its rows hold their texts
        self._turns = Turns[Text]()  # all texts
        self._unread: dict[Text, None] = {}  # in the order in which they came
        self._ready: dict[Text, None] = {}  # read, and without a row
        self._next: list[Text] | None = None  # those whose prompts may be read now; None where that is to be found out
        self._known: OrderedDict[Path, tuple[MambaCache, Tensor]] = OrderedDict()
        self._steps = 0
        self._sampler, self._first = Sampler(), Sampler()  # of those who write, and of a prompt's first token

    @property
    def waiting(self) -> list[Request]:
        """Those of whom nothing has been read yet."""
        return [text.request for text in self._unread if not text.reading.begun]

    @property
    def busy(self) -> int:
        """Rows that are taken: by those who write, and by those who will as soon as their prompt is read."""
        begun = sum(text.reading.begun for text in self._unread)
        return min(self.rows, len(self._writing()) + len(self._ready) + begun)

    def submit(self, request: Request) -> Request:
        """Queue a request; it starts as soon as it is its turn.

        Raises:
            TypeError: no `Request`.
            ValueError: a token that the model does not have, or a request that runs already.
        """
        if not isinstance(request, Request):
            raise TypeError(f"a {type(request).__name__} cannot be written; give a Request")
        if any(text.request is request for text in self._turns):
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
        self._unread[text] = self._next = None
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
        """Read prompts for a while, each of which then has its first token; then one token more for every row."""
        self._steps += 1
        for text in [text for text in self._turns if text.request.finish_reason]:
            self._finish(text, "cancelled")
        chosen: list[tuple[Request, int]] = []
        if self._steps % _STEPS_PER_LOOK == 0:
            self._next = None
        self._share.step(self._may_be_read, lambda text: text.reading, lambda text: self._read_part(text, chosen))
        self._give_rows()
        self._leave_out_free_rows()
        if writing := self._writing():
            for text, token in self._write(writing):
                if self._take(text, token):
                    chosen.append((text.request, token))
        if not len(self._turns):
            self._known.clear()
        return chosen

    # -- prompts ---------------------------------------------------------------------------------------------------

    def _may_be_read(self) -> list[Text]:
        """Prompts of those whose turn it is to have a row, and the first of everybody who has none yet."""
        if not self._unread:
            return []
        if self._next is None:
            due = {
                *self._turns.next(self.rows, _anybody),
                *self._turns.next(_AHEAD * self.rows, _anybody, per_request=1),
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

    # -- rows ------------------------------------------------------------------------------------------------------

    def _writing(self) -> list[tuple[int, Text]]:
        return [(row, text) for row, text in enumerate(self._pool.held) if text is not None]

    def _give_rows(self) -> None:
        """To those who are ready; where they are too many, to those whose turn it is."""
        if not self._ready:
            return
        due, writing = list(self._ready), self._writing()
        if len(writing) + len(due) > self.rows:
            staying = [text for _, text in writing if text.since < self.slice_tokens]
            if len(staying) == self.rows:
                return
            able = {*self._ready, *(text for _, text in writing)}
            due = self._turns.next(self.rows - len(staying), able.__contains__, staying)
            going = {*staying, *due}
            for row, text in writing:
                if text not in going:  # its state is copied out, and it goes on from there later
                    text.state = self._pool.copy_of(row)
                    self._ready[text] = self._pool.held[row] = None
        for text in due:
            if text in self._ready:
                self._give_row(text)

    def _give_row(self, text: Text) -> None:
        assert text.state is not None
        if None not in self._pool.held:
            self._pool.grow()
        row = self._pool.held.index(None)
        try:
            self._pool.put(row, text.state)
        except Exception as error:  # a state that was given may be of another model
            self._fail(text, error)
            return
        del self._ready[text]
        text.state, text.since, self._pool.held[row] = None, 0, text

    def _leave_out_free_rows(self) -> None:
        """Where few of many still write and nobody waits, a step need not be one of all rows."""
        kept = [row for row, _ in self._writing()]
        if kept and len(kept) == len(self._turns):
            self._pool.shrink(kept)

    # -- tokens ----------------------------------------------------------------------------------------------------

    def _write(self, writing: list[tuple[int, Text]]) -> list[tuple[Text, int]]:
        """Each text's next token; where all want the likeliest, the step chooses. The device is waited for once."""
        last = torch.zeros(self._pool.size, dtype=torch.int64, device="cpu")
        last[[row for row, _ in writing]] = torch.tensor(
            [text.written[-1] for _, text in writing], dtype=torch.int64, device="cpu"
        )
        last = last.to(self.model.device)
        texts = [text.sampled for _, text in writing if text.sampled is not None]
        if all(text.plain for text in texts):
            best = self._pool.likeliest(last, 1)[:, 0]
            numbers = best.masked_fill(~self._pool.are_numbers(best), NO_TOKEN).tolist()
            tokens = [text.accept(numbers[row]) for text, (row, _) in zip(texts, writing, strict=True)]
        else:
            logits = self._pool.step(last)
            if len(writing) < len(logits):
                rows = torch.tensor([row for row, _ in writing], dtype=torch.int64, device=logits.device)
                logits = logits[rows]
            tokens = self._sampler.choose(logits, texts)
        return [(text, token) for (_, text), token in zip(writing, tokens, strict=True)]

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
        text.take(token)
        self._turns.serve(text, 1)
        if len(text.written) >= text.most:
            self._finish(text, "length")
        return True

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
        row = self._pool.held.index(text) if text in self._pool.held else None
        wanted = request.keep_state or (self.prefix_cache is not None and request.state is None)
        if wanted and not request.error:
            state = text.state.clone() if row is None and text.state is not None else None
            state = state if row is None else self._pool.copy_of(row)
            if state is not None:
                self._keep(text, state)
        if row is not None:
            self._pool.held[row] = None
        self._unread.pop(text, None)
        self._ready.pop(text, None)
        self._turns.remove(text)
        self._next = None

    def _keep(self, text: Text, state: MambaCache) -> None:
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
