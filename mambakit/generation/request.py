"""One text for the engine to write: what is asked, what became of it, and what is needed to choose its tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mambakit.decoding.parameters import NEW_TOKENS
from mambakit.decoding.sampled_text import SampledText
from mambakit.decoding.sampling_params import SamplingParams
from mambakit.generation.reading import PromptReading
from mambakit.generation.token_ids import token_ids
from mambakit.generation.turns import Path
from mambakit.modules import StateCache
from mambakit.quoting import quoted


@dataclass(eq=False)
class Request:
    """One text to write, and what became of it. What is given is copied: it may be changed and used again for the next one.

    Args:
        prompt_ids: (l,) int64, l >= 1: the tokens to read first (only the new ones, where a ``state`` continues).
        sampling: how tokens are chosen; its seed makes the text repeatable.
        max_new_tokens: when to stop at the latest.
        state: a `StateCache` (`MambaCache`) of one row to continue from; it is copied, never changed.
        keep_state: whether the request is to hold its state at the end.
        context: (p,) int64, what the ``state`` has read: a repetition penalty counts its tokens, too.
        share: a tuple: whose it is, from the outside in, such as (key, request): at every level slots are divided evenly among those who
            want them. Requests of the same share, by default all, are in the order in which they were submitted. A prompt that
            several requests of a share have is read once, unless the share is ().

    Attributes:
        tokens: what was written, without the end-of-text token.
        finish_reason: "" while it runs; then "stop", "length", "cancelled", or "error".
        error: after "error", what went wrong: the model's logits were no numbers, say. The texts beside it go on.
        exception: after "error", what was raised for this request, if anything was.
        cached_tokens: of the prompt, those whose state the engine's prefix cache knew.
        final_state: a `StateCache` (`MambaCache`) of one row that has read the prompt and all of ``tokens`` but the last; all of them
            after "stop". Only where ``keep_state`` is set.
    """

    prompt_ids: Tensor
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0))
    max_new_tokens: int = 256
    state: StateCache | None = None
    keep_state: bool = False
    context: Tensor | None = None
    share: Path = ()

    tokens: list[int] = field(default_factory=list, init=False)
    finish_reason: str = field(default="", init=False)
    error: str = field(default="", init=False)
    exception: Exception | None = field(default=None, init=False, repr=False)
    cached_tokens: int = field(default=0, init=False)
    final_state: StateCache | None = field(default=None, init=False)
    on_cancel: Callable[[Request], None] | None = field(default=None, init=False, repr=False)
    """What an engine that writes it wants to be told; its own."""

    def __post_init__(self) -> None:
        self.prompt_ids = token_ids("prompt_ids", self.prompt_ids)
        self.max_new_tokens = NEW_TOKENS.read("max_new_tokens", self.max_new_tokens)
        if self.context is not None:
            self.context = token_ids("context", self.context, least=0)
        if not isinstance(self.sampling, SamplingParams):
            raise TypeError(f"sampling is {quoted(self.sampling)}; give a SamplingParams")
        self.sampling = self.sampling.snapshot()
        if not isinstance(self.share, tuple):
            raise TypeError(f"share is {quoted(self.share)}; give a tuple, such as (key, request)")
        try:
            hash(self.share)
        except TypeError as error:
            raise TypeError(f"share is {quoted(self.share)}; {error}: give names or numbers") from error
        if self.state is None:
            return
        if not isinstance(self.state, StateCache):
            raise TypeError(f"the state is a {type(self.state).__name__}; give a MambaCache of one row")
        if self.state.max_batch_size != 1:
            raise ValueError(f"the state has {self.state.max_batch_size} rows; a request continues one: select a row")

    def cancel(self) -> None:
        """Stop before the next token."""
        self.finish_reason = self.finish_reason or "cancelled"
        if (told := self.on_cancel) is not None:
            told(self)


@dataclass(eq=False)
class Text:
    """A request being served: its prompt is read; or it has a slot; or it has a ``state``, and waits for a slot.

    The caller may take tokens out of the request or change its fields: the engine goes by what is here.
    """

    request: Request
    most: int
    """Tokens to write."""
    reading: PromptReading
    prompt: Path | None
    """The same for texts whose prompt need be read once only; None where it is this one's alone."""
    state: StateCache | None = None
    seated_at: int = 0
    """Tokens it had when it got its slot."""
    written: list[int] = field(default_factory=list)
    counted: int = 0
    """Of these, what the turns know of."""
    sampled: SampledText | None = None
    """Once its prompt has been read."""

    def begin(self, vocab_size: int, device: torch.device) -> SampledText:
        """Its prompt has been read."""
        request = self.request
        parts = [ids for ids in (request.context, request.prompt_ids) if ids is not None]
        read = torch.cat([ids.to(device, torch.int64) for ids in parts])
        self.sampled = SampledText(request.sampling, vocab_size, device, read)
        return self.sampled
