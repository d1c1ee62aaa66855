"""A request to the engine, its result, and the engine's own record of it while it is served."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mambakit.decoding.drafting import read_draft_tokens
from mambakit.decoding.log_probs import TokenLogProb
from mambakit.decoding.parameters import INT64, NEW_TOKENS, Number
from mambakit.decoding.sampled_text import SampledText
from mambakit.decoding.sampling_params import SamplingParams
from mambakit.decoding.transfers import to_device
from mambakit.generation.reading import PromptReading
from mambakit.generation.token_ids import token_ids
from mambakit.generation.turns import Path
from mambakit.modules import StateCache
from mambakit.quoting import quoted


@dataclass(eq=False)
class Request:
    """One text to write, and the result. Arguments are copied: the caller may change and reuse them.

    Args:
        prompt_ids: (l,) int64, l >= 1: the tokens to read first (only the new ones where a ``state`` is given).
        sampling: how tokens are chosen; a seed makes the text repeatable.
        max_new_tokens: the maximum number of new tokens.
        state: a `StateCache` (`MambaCache`) of one row to start from; it is copied, never changed.
        keep_state: whether to return the final state.
        cache_salt: of the engine's prefix cache: prompts of another salt are never found, nor is this one by them.
        keep_states: whether to return the latest states of the text that are at hand, without reading anything again:
            for a caller that cuts the text, or reads its last tokens later.
        context: (p,) int64, the tokens that ``state`` has read: a repetition penalty counts them, too.
        draft_tokens: the maximum number of guesses per draft, where the engine has a drafter; 0: none. None: the
            engine's.
        log_probs: how many of the likeliest tokens to record at every token, with the log-probability of each and of
            the text's own; None: nothing is recorded.
        min_new_tokens: no end-of-text token is chosen before so many new tokens.
        ignore_ends: whether end-of-text tokens are tokens like any other, and only ``max_new_tokens`` ends the text.
        share: the path of the request's owners, outermost first, such as (key, request). At every level slots are
            divided evenly among the owners with waiting requests. Requests of the same share (by default all) are in
            order of submission. A prompt that several requests of a share have in common is read once, unless the share
            is ().

    Attributes:
        tokens: the new tokens, without the end-of-text token.
        finish_reason: "" while it runs; then "stop", "length", "cancelled", or "error".
        error: after "error", the reason, such as logits that are NaN. Other texts of the batch continue.
        exception: after "error", the exception of this request, if there was one.
        cached_tokens: the number of prompt tokens whose state was in the engine's prefix cache.
        token_log_probs: with ``log_probs``, one for each of ``tokens``: the model's own, before temperature, filters,
            biases, penalties and constraints.
        final_state: with ``keep_state``, a `StateCache` (`MambaCache`) of one row that has read the prompt and all of
            ``tokens`` but the last; after "stop" all of them.
        states: with ``keep_states``, such states, the latest first. Each has read the prompt, and the first of
            ``tokens``, as many as its `get_seq_length` says; the last of them is the state after the prompt, where the
            text has had a slot.
    """

    prompt_ids: Tensor
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0))
    max_new_tokens: int = 256
    state: StateCache | None = None
    keep_state: bool = False
    context: Tensor | None = None
    log_probs: int | None = None
    min_new_tokens: int = 0
    ignore_ends: bool = False
    share: Path = ()
    draft_tokens: int | None = None
    keep_states: bool = False
    cache_salt: str = ""

    tokens: list[int] = field(default_factory=list, init=False)
    token_log_probs: list[TokenLogProb] = field(default_factory=list, init=False)
    finish_reason: str = field(default="", init=False)
    error: str = field(default="", init=False)
    exception: Exception | None = field(default=None, init=False, repr=False)
    cached_tokens: int = field(default=0, init=False)
    final_state: StateCache | None = field(default=None, init=False)
    states: list[StateCache] = field(default_factory=list, init=False, repr=False)
    on_cancel: Callable[[Request], None] | None = field(default=None, init=False, repr=False)
    """Called by `cancel`; for the engine's own use."""

    def __post_init__(self) -> None:
        self.prompt_ids = token_ids("prompt_ids", self.prompt_ids)
        self.max_new_tokens = NEW_TOKENS.read("max_new_tokens", self.max_new_tokens)
        if self.draft_tokens is not None:
            self.draft_tokens = read_draft_tokens(self.draft_tokens, least=0)
        self.log_probs = Number(None, 0, INT64[1], whole=True).read("log_probs", self.log_probs)
        least = Number(0, 0, self.max_new_tokens, whole=True, remedy="at most max_new_tokens")
        self.min_new_tokens = least.read("min_new_tokens", self.min_new_tokens)
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

    @property
    def owner(self) -> str:
        """The outermost of its owners, to whose share of a prefix cache its states count."""
        return str(self.share[0]) if self.share else ""

    def cancel(self) -> None:
        """Stop before the next token."""
        self.finish_reason = self.finish_reason or "cancelled"
        if (told := self.on_cancel) is not None:
            told(self)


@dataclass(eq=False)
class Text:
    """A request being served: its prompt is read, or it has a slot, or it has a ``state`` and waits for a slot.

    The engine relies on these fields only, so the caller may change those of the request.
    """

    request: Request
    most: int
    """The maximum number of new tokens."""
    reading: PromptReading
    ends: frozenset[int]
    """Tokens that end it."""
    prompt: Path | None
    """Equal for texts that share one prefill; None: it is shared with no other text."""
    before: int = 0
    """The number of tokens that the given state has read."""
    state: StateCache | None = None
    seated_at: int = 0
    """The number of tokens written when it got its slot."""
    written: list[int] = field(default_factory=list)
    counted: int = 0
    """The number of written tokens that `Turns` has counted."""
    sampled: SampledText | None = None
    """None until its prompt has been read."""

    @property
    def length(self) -> int:
        """The number of tokens of the prompt and the text, and of what the given state has read."""
        return self.before + self.request.prompt_ids.shape[0] + len(self.written)

    def tokens(self) -> list[int]:
        """The tokens of the prompt and the text."""
        return [*self.request.prompt_ids.tolist(), *self.written]

    def begin(self, vocab_size: int, device: torch.device) -> SampledText:
        """Call it once its prompt has been read."""
        request = self.request
        read = request.prompt_ids
        if request.context is not None:
            read = torch.cat([to_device(device, ids.to(torch.int64)) for ids in (request.context, read)])
        self.sampled = SampledText(
            request.sampling, vocab_size, device, read,
            log_probs=request.log_probs, least=request.min_new_tokens, ends=self.ends,
        )  # fmt: skip
        return self.sampled
