"""The tokens of one `generate` call: the steps that transformers' loop takes, and a loop of our own where the device need not be waited for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.choosing import NO_CHOICE, Choosing, are_numbers
from mambakit.decoding.slots import SlotPool
from mambakit.errors import LogitsError
from mambakit.modules import StateCache as MambaCache


class GeneratingSteps:
    """The steps of one `generate` call: forward asks it for each token's logits.

    A step is made for a cache's own tensors. They stay in place while rows go on side by side, so the second token against
    the same tensors makes the step and later ones use it; a beam search, which moves rows at every token, never does.
    On a GPU the state moves into the graph's own memory meanwhile, and comes back in `close`.
    """

    def __init__(self, model: Any):
        self.model = model
        self.longest_piece = 0  # where the prompt is read by `read_prompt`: tokens of a piece
        self.after_prompt: Tensor | None = None  # (b, v), once it is read: what forward says first
        self.own_cache: MambaCache | None = None  # made for this call: nobody else sees it
        self._seen: tuple[Any, ...] | None = None
        self._rows: SlotPool | None = None

    def logits(self, tokens: Tensor, cache: MambaCache) -> Tensor | None:
        """(b, v) logits of (b,) tokens, the cache brought up to date; None: the model's forward must do it."""
        if self.after_prompt is not None:
            logits, self.after_prompt = self.after_prompt, None
            return logits
        place = cache.addresses()
        if place != self._seen:
            self.close()
            self._seen = place
            return None
        if self._rows is None:
            self._rows = SlotPool(self.model, cache.max_batch_size, cache, called=True)
        if self._rows.by_forward:
            self.close()  # a graph may have read some tokens before somebody put a hook on a module
            return None
        logits = self._rows.step(tokens)
        return logits.clone() if logits.is_cuda else logits  # a graph's are gone with the next step

    def close(self) -> None:
        """Bring the cache up to date."""
        if self._rows is not None:
            self._rows.close()
        self._rows = None


# Tokens between two looks at whether the texts have ended: a look waits for the device.
_TOKENS_PER_LOOK = {"cuda": 16, "cpu": 1}
_MOST_UNSEEN = 64  # where nothing ends a text; a graph keeps no more


def write_tokens(
    model: Any, cache: MambaCache, text: Tensor, logits: Tensor, most: int, choose: Choosing, cache_is_kept: bool
) -> Tensor:
    """(b, m) the tokens after ``text`` (b, l), m <= ``most``, until every text has had an end; what follows an end is padding.

    Tokens, padding and the global generator's state afterwards are those of transformers' loop.

    Args:
        cache: what has read ``text``.
        logits: (b, v) after it.
        cache_is_kept: leave in ``cache`` what transformers' loop leaves: every row has read all m tokens but the last, padding
            included. Otherwise ``cache`` is used up: texts that have ended are read on no more where that changes nobody's bits
            and at most half go on, and a GPU need not take back what it has read too much.

    Raises:
        RuntimeError: logits that are no numbers.
    """
    rows = SlotPool(model, text.shape[0], cache)
    first = choose(text, logits)
    loop = _Loop(rows, text, first, choose, cache_is_kept)
    per_look = _MOST_UNSEEN if choose.ends is None else _TOKENS_PER_LOOK[model.device.type]
    while len(loop.written) < most and loop.going:
        loop.write(min(most - len(loop.written), per_look))
    rows.close()
    if not choose.sample:  # what is sampled has been looked at
        last = loop.token if loop.of is None else loop.token[loop.of]
        if not bool(are_numbers(logits, first).all() & rows.are_numbers(last).all()):
            raise LogitsError(NO_CHOICE)
    return torch.stack(loop.written, 1)


class _Loop:
    """b texts, of which the first token is chosen, on their way in `SlotPool`."""

    def __init__(self, rows: SlotPool, text: Tensor, first: Tensor, choose: Choosing, cache_is_kept: bool):
        self.rows, self.text, self.choose, self.cache_is_kept = rows, text, choose, cache_is_kept
        self.written: list[Tensor] = []  # (b,) each
        self.of: Tensor | None = None  # the texts whose rows these are, once rows were left out
        self._logits: Tensor | None = None  # (b, v) then; of the other texts anything that a token can be drawn from
        self._reads_text = choose.reads_text
        # Rows that choose for themselves read on after an end, where padding should be read.
        self._rows_choose = choose.plain and (choose.ends is None or text.shape[0] == 1 or not cache_is_kept)
        ended = choose.is_end(first)
        self._take([first], ended, first.shape[0] - int(ended.sum()))

    def write(self, count: int) -> None:
        """``count`` tokens more of each text; fewer where all have ended before."""
        ends = self.choose.ends
        back = None
        if ends is not None and count > 1 and (self.cache_is_kept or self.choose.sample):
            back = self.rows.snapshot(), _generator(self.text.device).get_state()
        new, ended = self._next(count)
        if ends is None:
            self._take(new, self.ended, self.going)
            return
        over = [sum(texts) for texts in torch.stack(ended).tolist()]  # the look: how many have ended by each token
        used = over.index(len(self.ended)) + 1 if over[-1] == len(self.ended) else count
        if used < count and back is not None:  # too far: from before, and no further
            self.rows.go_back(back[0])
            _generator(self.text.device).set_state(back[1])
            self._next(used)
        self._take(new[:used], ended[used - 1], len(self.ended) - over[used - 1])

    def _next(self, count: int) -> tuple[list[Tensor], list[Tensor]]:
        """``count`` times the (b,) next tokens, and which texts have ended by then."""
        is_end, padding = self.choose.is_end, self.choose.padding
        if self._rows_choose and count > 1:
            assert self.of is None  # rows are left out on a CPU alone, where each token is looked at
            new = self.rows.likeliest(self.token, count)
            ended = is_end(new).cummax(1).values | self.ended[:, None]
            before = torch.cat([self.ended[:, None], ended[:, :-1]], 1)
            return list(new.masked_fill(before, padding).unbind(1)), list(ended.unbind(1))
        text, token, over = self.text, self.token, self.ended
        tokens, overs = [], []
        for i in range(count):
            if i and self._reads_text:
                text = torch.cat([text, token[:, None]], 1)
            token = self.choose(text, self._step(token))
            if self.choose.ends is not None:
                token = token.masked_fill(over, padding)
                over = over | is_end(token)
            tokens.append(token)
            overs.append(over)
        return tokens, overs

    def _take(self, new: list[Tensor], ended: Tensor, going: int) -> None:
        self.written += new
        self.token, self.ended, self.going = new[-1], ended, going
        if self._reads_text:
            self.text = torch.cat([self.text, torch.stack(new, 1)], 1)
        self.choose.check()
        if self.rows.elastic and not self.cache_is_kept and 0 < 2 * going <= self.rows.size:
            of = torch.arange(len(ended), dtype=torch.int64, device=ended.device) if self.of is None else self.of
            kept = (~ended[of]).nonzero()[:, 0]
            if self.rows.shrink(kept.tolist()):
                self.of = of[kept]

    def _step(self, tokens: Tensor) -> Tensor:
        """(b, v), so that scores and random numbers are those of all texts whatever rows there are."""
        if self.of is None:
            return self.rows.step(tokens)
        logits = self.rows.step(tokens[self.of])
        if self._logits is None:
            self._logits = logits.new_zeros(len(tokens), logits.shape[1])
        return self._logits.index_copy_(0, self.of, logits)


def _generator(device: torch.device) -> torch.Generator:
    """The global one of ``device``; reading and setting its state does not wait for the device."""
    return torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index]
