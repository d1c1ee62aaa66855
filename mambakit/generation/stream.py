"""Streaming generation: prefill a prompt, then yield text as its tokens are decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.loop import SlotLoop
from mambakit.decoding.parameters import CHUNK_SIZE, NEW_TOKENS
from mambakit.decoding.prefill import prefill
from mambakit.decoding.sampled_text import SampledText
from mambakit.decoding.sampling_params import SamplingParams
from mambakit.decoding.slots import SlotPool
from mambakit.errors import LogitsError
from mambakit.generation.stopping import StopSearch, read_stops
from mambakit.generation.token_ids import require_in_vocabulary, token_ids
from mambakit.modules import StateCache
from mambakit.ops.sampling.api import NO_TOKEN
from mambakit.quoting import quoted

Sampling = SamplingParams
"""The earlier name."""


@dataclass
class Stream:
    """Pieces of new text, to be read once. Afterwards it holds the whole text, its tokens and the final state.

    Args:
        model, tokenizer: a causal language model in eval mode, and its tokenizer.
        prompt_ids: (l,) int64 with l >= 1, the tokens to read first (only the new ones where a ``cache`` is given).
        sampling: how tokens are chosen.
        max_new_tokens: the maximum number of new tokens.
        stop: strings that end the text. They are not part of it, and no piece shows the beginning of one.
        cache: the state to start from; updated in place.
        chunk_size: tokens of the prompt per forward; memory does not grow with the prompt. Default: 512 on a CPU, where
            larger chunks are not faster, and 4,096 elsewhere.
        progress: called with the number of prompt tokens read.
        context: (p,) int64, the tokens that ``cache`` has read, if known: a repetition penalty counts them, too.
    """

    model: Any
    tokenizer: Any
    prompt_ids: Tensor
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    cache: StateCache | None = None
    chunk_size: int | None = None
    progress: Callable[[int], None] | None = None
    context: Tensor | None = None

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""
    """"stop" (end-of-text or a stop string) or "length"."""
    _begun: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        self.prompt_ids = token_ids("prompt_ids", self.prompt_ids)
        require_in_vocabulary("prompt_ids", self.prompt_ids, self.model.config.vocab_size)
        self.chunk_size = CHUNK_SIZE.read("chunk_size", self.chunk_size)
        self.max_new_tokens = replace(NEW_TOKENS, low=0).read("max_new_tokens", self.max_new_tokens)
        self.stop = read_stops(self.stop)
        if not isinstance(self.sampling, SamplingParams):
            raise TypeError(f"sampling is {quoted(self.sampling)}; give a SamplingParams")
        if self.context is not None:
            self.context = token_ids("context", self.context, least=0)
            require_in_vocabulary("context", self.context, self.model.config.vocab_size)

    @torch.inference_mode(False)  # its tensors are used again by later calls, which may be outside of inference mode
    @torch.no_grad()
    def __iter__(self) -> Iterator[str]:
        if self.finish_reason:
            return
        if self._begun:
            raise RuntimeError("this stream was begun and left before its end; make another one of the same prompt")
        self._begun = True
        model, device = self.model, self.model.device
        ids = self.prompt_ids.to(device)
        self.cache = self.cache or model.backbone.new_cache(1)
        known = ids if self.context is None else torch.cat([self.context.to(device), ids])
        sampled = SampledText(self.sampling, model.config.vocab_size, device, known)
        logits = prefill(model, ids[None], self.cache, chunk_size=self.chunk_size, progress=self.progress)
        with self._writer(sampled, self.cache, known) as writer:
            yield from self._pieces(writer, logits)

    def _writer(self, sampled: SampledText, cache: StateCache, known: Tensor) -> _Writer:
        """Writes the tokens after the prompt; ``known`` (l,) are all tokens so far."""
        return _Writer(sampled, SlotPool(self.model, 1, cache))

    def _pieces(self, writer: _Writer, logits: Tensor) -> Iterator[str]:
        assembly = _Assembly(self.tokenizer, self.stop, _end_tokens(self.model))
        chosen = writer.first(logits) if self.max_new_tokens else []
        while chosen:
            if chosen[-1] == NO_TOKEN:
                raise writer.sampled.exception or LogitsError(writer.sampled.error)
            kept, piece, reason = assembly.take(chosen)
            self.tokens += kept
            # The last token is not read yet, unless an end token follows it.
            writer.keep(chosen, kept, len(kept) + (reason == "end"))
            if piece:
                self.text += piece
                yield piece
            if reason:
                self.finish_reason = "stop"
                break
            left = self.max_new_tokens - len(self.tokens)
            chosen = writer.next(left) if left else []
        self.finish_reason = self.finish_reason or "length"
        if rest := assembly.rest():
            self.text += rest
            yield rest
        if assembly.stopped:  # a stop string may also be in the rest
            self.finish_reason = "stop"


class _Writer:
    """Writes one text's tokens in a pool of one slot, whose state has read the prompt."""

    def __init__(self, sampled: SampledText, pool: SlotPool, guesses: int = 0):
        self.sampled, self.loop = sampled, SlotLoop(pool, guesses)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.pool.close()

    def first(self, logits: Tensor) -> list[int]:
        """The first token, after the prompt's logits (1, v)."""
        (token,) = self.loop.first(self, logits)
        self.loop.seat(0, self, token)
        return [token]

    def next(self, most: int) -> list[int]:
        """1 to ``most`` next tokens; `NO_TOKEN` is the last where none can be chosen."""
        return self.loop.look()[0]

    def keep(self, chosen: list[int], kept: list[int], read: int) -> None:
        """Update the state after ``chosen``, the tokens of the last `first` or `next`.

        Args:
            kept: those of them that belong to the text.
            read: how many of the last token before them and of ``chosen`` the state must have read.
        """


# A character has at most 4 bytes, and so at most 4 tokens. More pending tokens are not valid UTF-8.
_LONGEST_CHARACTER = 4


class _TextDecoder:
    """Tokens to text, piece by piece, never half a character.

    A token's text can depend on the token before it (a leading space, for example). So each piece is the difference
    between the decoded text with and without the new tokens.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._window: list[int] = []  # the tokens of the last piece, and those since
        self._known = 0  # tokens of the window that have been shown
        self._shown = 0  # characters of the window's text that have been shown

    def push(self, token: int) -> str:
        self._window.append(token)
        text = self._text(self._window)
        incomplete = text.endswith("\ufffd")  # the bytes of an incomplete or invalid character
        if len(text) > self._shown and not incomplete:
            piece = text[self._shown :]
            self._window = self._window[self._known :]
            self._known, self._shown = len(self._window), len(self._text(self._window))
            return piece
        # Nothing to show. The window must stay short, because all of it is decoded again for every token.
        if len(self._window) - self._known <= 2 * _LONGEST_CHARACTER:
            return ""
        if not incomplete or not self._text([token]):
            self._window.pop()  # a token without text, such as a special one
            return ""
        piece = text[self._shown : -1]
        self._window = [t for t in self._window if self._text([t])][-_LONGEST_CHARACTER:]
        self._known, self._shown = 0, max(0, len(self._text(self._window)) - 1)
        return piece

    def push_all(self, tokens: list[int]) -> str:
        """The pieces of several tokens together, decoded twice instead of twice each where all is plain text."""
        text, last = self._text(self._window + tokens), self._text(tokens[-1:])
        piece = text[self._shown :]
        if not last or not piece or "\ufffd" in piece or "\ufffd" in last:
            return "".join(map(self.push, tokens))
        self._window, self._known, self._shown = tokens[-1:], 1, len(last)
        return piece

    def flush(self) -> str:
        """The rest of the text, after the last token."""
        return self._text(self._window)[self._shown :]

    def _text(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


class _Assembly:
    """Tokens to the text that may be shown, until an end token or a stop string."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], ends: set[int]):
        self._shown, self._ends = StoppingDecoder(tokenizer, stop), ends

    def take(self, chosen: list[int]) -> tuple[list[int], str, str]:
        """(the tokens that belong to the text, the text to show, "end" or "stop" where the text has ended, else "")."""
        kept: list[int] = []
        piece = ""
        for token in chosen:
            if token in self._ends:
                return kept, piece, "end"
            kept.append(token)
            piece += self._shown.push(token)
            if self._shown.stopped:
                return kept, piece, "stop"
        return kept, piece, ""

    def rest(self) -> str:
        """The text that was held back, after the end."""
        return self._shown.rest()

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._shown.stopped


class StoppingDecoder:
    """Tokens to text that may be shown: up to the first stop string, and never the beginning of one.

    Attributes:
        decoded: characters of the tokens' text so far, whether shown or not.
        shown: characters that `push` has given.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]):
        self._decoder, self._search = _TextDecoder(tokenizer), StopSearch(stop)
        self.decoded = self.shown = 0

    @property
    def stopped(self) -> bool:
        return self._search.stopped

    def push(self, token: int) -> str:
        return self._show(self._decoder.push(token))

    def push_all(self, tokens: list[int]) -> str:
        """As `push` of each, in less time. Which of them ended the text is not known afterwards."""
        return self._show(self._decoder.push_all(tokens))

    def _show(self, piece: str) -> str:
        self.decoded += len(piece)
        shown = self._search.push(piece)
        self.shown += len(shown)
        return shown

    def rest(self) -> str:
        """The text that was held back, after the last token; empty after a stop string."""
        if self.stopped:
            return ""
        last = self._search.push(self._decoder.flush())
        return last + self._search.rest()


def _end_tokens(model: Any) -> set[int]:
    end = model.generation_config.eos_token_id
    return set() if end is None else set(end) if isinstance(end, (list, tuple)) else {end}
