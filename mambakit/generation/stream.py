"""Text as it is made: prefill a prompt, then yield pieces of text, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mambakit.models.choosing import NO_CHOICE, are_numbers, draw
from mambakit.models.prompt import read_prompt
from mambakit.models.step import token_step
from mambakit.modules import MambaCache

NOTHING = -1  # what is chosen where no token can be chosen


def token_number(chosen: int) -> int:
    """The token that a chooser chose, on the host; RuntimeError where the logits were no numbers."""
    if chosen == NOTHING:
        raise RuntimeError(NO_CHOICE)
    return chosen


def likeliest(scores: Tensor) -> Tensor:
    """(b,) the most probable tokens by ``scores`` (b, v), `NOTHING` where they are no numbers."""
    token = scores.argmax(-1)
    return token.masked_fill(~are_numbers(scores, token), NOTHING)


def drawn(weights: Tensor, generator: torch.Generator) -> int:
    """A token drawn by ``weights`` (v,), which need not add up to 1: `torch.multinomial`'s; the device is waited for once."""
    token, sane = draw(weights[None], generator)
    return token_number(int(token.masked_fill(~sane, NOTHING)))


@dataclass
class Sampling:
    """How the next token is chosen. ``temperature`` 0 is greedy; a filter at its default is off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, float("inf")), ("top_k", 0, float("inf")), ("top_p", 0.0, 1.0), ("min_p", 0.0, 1.0),
        ):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be between {low} and {high}")
        if self.top_p == 0:
            raise ValueError("top_p is 0, which keeps no token; use temperature 0 for greedy text")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0 (1 is off)")

    def filters(self) -> tuple[Any, Any]:
        """transformers' processors in its order: those that look at the tokens before, and those of one row of logits alone."""
        from transformers import generation

        by_text, by_row = generation.LogitsProcessorList(), generation.LogitsProcessorList()
        if self.repetition_penalty != 1:
            by_text.append(generation.RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature not in (0, 1):
            by_row.append(generation.TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            by_row.append(generation.TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            by_row.append(generation.TopPLogitsWarper(self.top_p))
        if self.min_p:
            by_row.append(generation.MinPLogitsWarper(self.min_p))
        return by_text, by_row

    def chooser(self, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
        """(all tokens so far (1, l), logits (1, v)) -> the next token (1,), without waiting for the device; `token_number` reads it."""
        generator = torch.Generator(device)
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        by_text, by_row = self.filters()

        def choose(ids: Tensor, logits: Tensor) -> Tensor:
            scores = by_row(ids, by_text(ids, logits))
            if self.temperature == 0:
                return likeliest(scores)
            token, sane = draw(scores.softmax(-1), generator)
            return token.masked_fill(~sane, NOTHING)

        return choose


@dataclass
class Stream:
    """An iterator over pieces of new text; afterwards it holds what was made and the state it ended in.

    Args:
        model, tokenizer: a causal language model in eval mode, and its tokenizer.
        prompt_ids: (l,) int64 with l >= 1, the tokens to read first (only the new ones, where a ``cache`` continues).
        sampling: how tokens are chosen.
        max_new_tokens: when to stop at the latest.
        stop: strings that end the text; they are not part of it, and no piece ever shows the start of one.
        cache: the state to continue from; brought up to date in place.
        chunk_size: tokens of the prompt per forward; memory does not grow with the prompt. 512 on a CPU, where more makes
            nothing faster, and 2,048 elsewhere, unless given.
        progress: called with the number of prompt tokens read.
    """

    model: Any
    tokenizer: Any
    prompt_ids: Tensor
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    cache: MambaCache | None = None
    chunk_size: int | None = None
    progress: Callable[[int], None] | None = None

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""
    """"stop" (end-of-text or a stop string) or "length"."""

    def __post_init__(self) -> None:
        if self.prompt_ids.dim() != 1 or not len(self.prompt_ids):
            raise ValueError(f"prompt_ids has shape {tuple(self.prompt_ids.shape)}, expected (l,) with l >= 1")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size is {self.chunk_size}; it must be 1 or more")
        if self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be 0 or more")
        if any(not s for s in self.stop):
            raise ValueError("a stop string is empty; every text would end at once")

    @torch.no_grad()
    def __iter__(self) -> Iterator[str]:
        model, device = self.model, self.model.device
        ids = self.prompt_ids.to(device)[None]
        cache = self.cache = self.cache or model.backbone.new_cache(1)
        choose = self.sampling.chooser(device)
        ends = _end_tokens(model)
        logits = self._read(ids)
        step = token_step(model, cache)
        shown = StoppingDecoder(self.tokenizer, self.stop)
        while len(self.tokens) < self.max_new_tokens:
            token = choose(ids, logits)
            number = token_number(int(token))
            if number in ends:
                self.finish_reason = "stop"
                break
            self.tokens.append(number)
            piece = shown.push(number)
            self.text += piece
            if shown.stopped:
                self.finish_reason = "stop"
            if piece or shown.stopped:
                yield piece
            if shown.stopped:
                return
            if len(self.tokens) < self.max_new_tokens:
                ids = torch.cat([ids, token[None]], 1) if self.sampling.repetition_penalty != 1 else ids
                logits = step(token)
        else:
            self.finish_reason = "length"
        if rest := shown.rest():
            self.text += rest
            yield rest

    def _read(self, ids: Tensor) -> Tensor:
        """Read the prompt in chunks; the logits (1, v) after it."""
        done = 0
        chunk_size = self.chunk_size or (512 if ids.device.type == "cpu" else 2048)
        assert self.cache is not None
        for part in ids.split(chunk_size, 1):
            logits = read_prompt(self.model, part, self.cache)
            done += part.shape[1]
            if self.progress is not None:
                self.progress(done)
        return logits


class _TextDecoder:
    """Tokens to text, a piece at a time, never half a character.

    A token's text can depend on the token before it (a leading space, say), so each piece is what decoding gains over
    the tokens that were already shown.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.shown = 0  # tokens whose text has been given out
        self.context = 0  # where decoding starts: the tokens of the last piece

    def push(self, token: int) -> str:
        self.tokens.append(token)
        return self._take(final=False)

    def flush(self) -> str:
        return self._take(final=True)

    def _take(self, final: bool) -> str:
        before = self._decode(self.tokens[self.context : self.shown])
        after = self._decode(self.tokens[self.context :])
        if len(after) <= len(before) or (after.endswith("\ufffd") and not final):
            return ""  # nothing yet, or the bytes of a character that is not complete
        self.context, self.shown = self.shown, len(self.tokens)
        return after[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


class StoppingDecoder:
    """Tokens to text that may be shown: up to the first of the stop strings, and never the beginning of one."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]):
        self.stopped = False
        self._decoder, self._stop = _TextDecoder(tokenizer), stop
        self._held = ""  # text that may turn out to be the start of a stop string

    def push(self, token: int) -> str:
        self._held += self._decoder.push(token)
        cut = min((at for s in self._stop if (at := self._held.find(s)) >= 0), default=None)
        self.stopped = cut is not None
        ready = len(self._held) - _overlap(self._held, self._stop) if cut is None else cut
        piece, self._held = self._held[:ready], self._held[ready:]
        return piece

    def rest(self) -> str:
        """What was held back, when no more tokens come; nothing after a stop string."""
        return "" if self.stopped else self._held + self._decoder.flush()


def _overlap(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of ``text`` that begins one of ``stops``."""
    return max((n for s in stops for n in range(1, min(len(s), len(text)) + 1) if text.endswith(s[:n])), default=0)


def _end_tokens(model: Any) -> set[int]:
    end = model.generation_config.eos_token_id
    return set() if end is None else set(end) if isinstance(end, (list, tuple)) else {end}
