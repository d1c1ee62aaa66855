"""Many texts at once: prompts of any lengths, rows that end on their own and are filled again.

The rows are those that `generate` writes with, `mambakit.models.rows.DecodingRows`: a pool of states that decodes together, one token
a row and step, by the model's fastest step. Here a finished row is free at once for the next request. Prompts are read a chunk
between steps, so that a long one does not hold up those who write.

A text does not depend on its neighbours: every request has its own random numbers, and each prompt is read on its own in chunks
that start at its own beginning; on a CPU, where a row's step has the same bits in any batch, tokens are the same whatever else
is there, and free rows are left out of the step where few of many write. Elsewhere the step always runs on all ``rows``, so that
its products are cut the same way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mambakit.generation.parameters import CHUNK_SIZE, INT64, NEW_TOKENS, Number
from mambakit.generation.stream import NOTHING, Sampling, _end_tokens
from mambakit.generation.token_ids import require_in_vocabulary, token_ids
from mambakit.models.choosing import NO_CHOICE
from mambakit.models.prompt import read_prompt
from mambakit.models.rows import DecodingRows
from mambakit.modules import MambaCache
from mambakit.quoting import cut, quoted


@dataclass(eq=False)
class Request:
    """One text to write, and what became of it.

    Args:
        prompt_ids: (l,) int64, l >= 1: the tokens to read first (only the new ones, where a ``state`` continues).
        sampling: how tokens are chosen; its seed makes the text repeatable.
        max_new_tokens: when to stop at the latest.
        state: a `MambaCache` of one row to continue from; it is copied, never changed.
        keep_state: whether the request is to hold its state at the end.
        context: (p,) int64, what the ``state`` has read: a repetition penalty counts its tokens, too.

    Attributes:
        tokens: what was written, without the end-of-text token.
        finish_reason: "" while it runs; then "stop", "length", "cancelled", or "error".
        error: after "error", what went wrong: the model's logits were no numbers, say. The texts beside it go on.
        exception: after "error", what was raised for this request, if anything was.
        final_state: a `MambaCache` of one row that has read the prompt and all of ``tokens`` but the last; all of them
            after "stop". Only where ``keep_state`` is set.
    """

    prompt_ids: Tensor
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0))
    max_new_tokens: int = 256
    state: MambaCache | None = None
    keep_state: bool = False
    context: Tensor | None = None

    tokens: list[int] = field(default_factory=list, init=False)
    finish_reason: str = field(default="", init=False)
    error: str = field(default="", init=False)
    exception: Exception | None = field(default=None, init=False, repr=False)
    final_state: MambaCache | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.prompt_ids = token_ids("prompt_ids", self.prompt_ids)
        self.max_new_tokens = NEW_TOKENS.read("max_new_tokens", self.max_new_tokens)
        if self.context is not None and len(self.context):
            self.context = token_ids("context", self.context)
        if not isinstance(self.sampling, Sampling):
            raise TypeError(f"sampling is {quoted(self.sampling)}; give a Sampling")
        if self.state is not None and self.state.max_batch_size != 1:
            raise ValueError(f"the state has {self.state.max_batch_size} rows; a request continues one: select a row")

    def cancel(self) -> None:
        """Stop before the next token."""
        self.finish_reason = self.finish_reason or "cancelled"


@dataclass
class _Row:
    request: Request
    choose: Callable[[Tensor, Tensor], Tensor]
    read: Tensor  # (1, l) the prompt and, for the filter that looks at them, all tokens so far


@dataclass
class _Reading:
    """A prompt on its way into a state."""

    request: Request
    cache: MambaCache
    ids: Tensor  # (1, l)
    done: int = 0


class Engine:
    """Writes the texts of any number of requests, ``rows`` at a time.

    Args:
        model: a causal language model in eval mode.
        rows: how many texts are written together.
        chunk_size: tokens of a prompt per forward, and about as many between two steps; memory does not grow with the prompt.

    Raises:
        ValueError: fewer than one row or one token a chunk.
    """

    def __init__(self, model: Any, rows: int = 8, chunk_size: int = 512):
        rows = Number(8, 1, INT64[1], whole=True).read("rows", rows)
        chunk_size = replace(CHUNK_SIZE, default=512).read("chunk_size", chunk_size)
        self.model, self.rows, self.chunk_size = model, rows, chunk_size
        self.waiting: deque[Request] = deque()
        self._ends = _end_tokens(model)
        self._active: list[_Row | None] = []
        self._reading: _Reading | None = None
        self._pool = DecodingRows(model, rows)

    @property
    def busy(self) -> int:
        """Rows that are taken: those that write, and the one whose prompt is being read."""
        return sum(row is not None for row in self._active) + (self._reading is not None)

    def submit(self, request: Request) -> Request:
        """Queue a request; it starts as soon as a row is free.

        Raises:
            ValueError: a token that the model does not have.
        """
        require_in_vocabulary("prompt_ids", request.prompt_ids, self.model.config.vocab_size)
        if request.context is not None:
            require_in_vocabulary("context", request.context, self.model.config.vocab_size)
        self.waiting.append(request)
        return request

    def run(self) -> Iterator[tuple[Request, int]]:
        """(request, token) as they are chosen, until nothing is left; requests may be submitted meanwhile."""
        while self.waiting or self.busy:
            yield from self.step()

    def write(self, requests: Iterable[Request]) -> list[Request]:
        """Submit all of them and wait until they are done. Raises RuntimeError then if one ended with an error."""
        requests = [self.submit(request) for request in requests]
        for _ in self.run():
            pass
        for request in requests:
            if request.error:
                raise RuntimeError(request.error) from request.exception
        return requests

    @torch.no_grad()
    def step(self) -> list[tuple[Request, int]]:
        """Read a chunk of prompts into free rows, each of which then has its first token; then one token more for every row."""
        self._drop_cancelled()
        chosen = self._admit()
        self._leave_out_free_rows()
        going = [(i, row) for i, row in enumerate(self._active) if row is not None]
        if going:
            chosen += [(row.request, token) for i, row, token in self._write(going) if self._take(i, row, token)]
        return chosen

    def _admit(self) -> list[tuple[Request, int]]:
        chosen, budget = [], self.chunk_size
        while budget > 0 and (self._reading or (self.waiting and self.busy < self.rows)):
            request = self._reading.request if self._reading else self.waiting.popleft()
            try:
                reading = self._reading = self._reading or self._begin(request)
                if reading is None:
                    continue
                part = reading.ids[:, reading.done : reading.done + self.chunk_size]
                budget -= part.shape[1]
                logits = read_prompt(self.model, part, reading.cache)
                reading.done += part.shape[1]
                if reading.done < reading.ids.shape[1]:
                    continue
                self._reading = None
                row, token = self._first(request, reading, logits)
            except Exception as error:
                self._reading = None
                self._fail(request, error)
                continue
            index = self._free_row()
            self._pool.put(index, reading.cache)
            self._active[index] = row
            if self._take(index, row, token):
                chosen.append((request, token))
        return chosen

    def _first(self, request: Request, reading: _Reading, logits: Tensor) -> tuple[_Row, int]:
        """The row of a prompt that has been read, and its first token."""
        context = () if request.context is None else (request.context.to(reading.ids.device)[None],)
        read = torch.cat([*context, reading.ids], 1)
        row = _Row(request, request.sampling.chooser(read.device), read)
        return row, int(row.choose(read, logits))

    def _fail(self, request: Request, error: Exception) -> None:
        """End with an error the one request that raised it; raise what no request survives."""
        if isinstance(error, torch.AcceleratorError):  # the device answers nobody any more
            raise error
        request.exception, request.error = error, f"{type(error).__name__}: {cut(str(error), 500)}"
        request.finish_reason = request.finish_reason or "error"

    def _begin(self, request: Request) -> _Reading | None:
        if request.finish_reason:
            return None
        cache = self.model.backbone.new_cache(1) if request.state is None else request.state.clone()
        return _Reading(request, cache, request.prompt_ids.to(self.model.device)[None])

    def _write(self, going: list[tuple[int, _Row]]) -> list[tuple[int, _Row, int]]:
        """Each row's next token; where all want the likeliest, the step chooses. The device is waited for once."""
        last = torch.zeros(len(self._active), dtype=torch.int64, device="cpu")
        for i, row in going:
            last[i] = row.request.tokens[-1]
        last = last.to(self.model.device)
        plain = Sampling(temperature=0)
        if all(row.request.sampling == plain for _, row in going):
            best = self._pool.likeliest(last, 1)[:, 0]
            tokens = best.masked_fill(~self._pool.are_numbers(best), NOTHING).tolist()
            return [(i, row, tokens[i]) for i, row in going]
        logits = self._pool.step(last)
        chosen: list[Tensor] = []
        able: list[tuple[int, _Row]] = []
        for i, row in going:
            try:  # a constraint, say, raises for its own text
                chosen.append(row.choose(row.read, logits[i : i + 1]))
                able.append((i, row))
            except Exception as error:
                self._fail(row.request, error)
                self._active[i] = None
        tokens = torch.cat(chosen).tolist() if chosen else []
        return [(i, row, token) for (i, row), token in zip(able, tokens, strict=True)]

    def _take(self, index: int, row: _Row, token: int) -> bool:
        """Note a row's token; False where it is the end of the text, or none could be chosen."""
        request = row.request
        if token == NOTHING:
            request.error = NO_CHOICE
            self._finish(index, "error")
            return False
        if token in self._ends:
            self._finish(index, "stop")
            return False
        request.tokens.append(token)
        if request.sampling.repetition_penalty != 1:
            row.read = torch.cat([row.read, torch.tensor([[token]], dtype=torch.int64, device=row.read.device)], 1)
        if len(request.tokens) == request.max_new_tokens:
            self._finish(index, "length")
        return True

    def _finish(self, index: int, reason: str) -> None:
        row = self._active[index]
        assert row is not None
        row.request.finish_reason = row.request.finish_reason or reason
        if row.request.keep_state and not row.request.error:
            row.request.final_state = self._pool.copy_of(index)
        self._active[index] = None

    def _drop_cancelled(self) -> None:
        if self._reading is not None and self._reading.request.finish_reason:
            self._reading = None
        for i, row in enumerate(self._active):
            if row is not None and row.request.finish_reason:
                self._finish(i, "cancelled")

    def _free_row(self) -> int:
        if None not in self._active:
            self._active += [None] * self._pool.grow()
        return self._active.index(None)

    def _leave_out_free_rows(self) -> None:
        """Where few of many still write and nobody waits, a step need not be one of all rows."""
        kept = [i for i, row in enumerate(self._active) if row is not None]
        if kept and not self.waiting and self._reading is None and self._pool.shrink(kept):
            self._active = [self._active[i] for i in kept]
