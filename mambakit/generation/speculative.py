"""Speculative decoding: guess several tokens cheaply, verify them at once, keep those that the model would have chosen.

Greedy text is the text of plain decoding. Sampled text has the distribution of plain sampling (arXiv 2211.17192, algorithm 1;
arXiv 2302.01318): a guess d drawn from q is kept with probability min(1, p(d) / q(d)); otherwise the token is drawn from
max(p - q, 0), normalised. So what a drafter guesses changes the speed and never the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.parameters import INT64, Number
from mambakit.decoding.registry import verifier
from mambakit.generation.constrain import ConstrainedSampling
from mambakit.generation.drafters import Draft, Drafter, DraftModel, PromptLookup
from mambakit.generation.stream import (
    SamplingParams,
    StoppingDecoder,
    Stream,
    _end_tokens,
    drawn,
    likeliest,
    token_number,
)
from mambakit.modules.interception import Watch, modules_of
from mambakit.ops.linear.api import MOST_ROWS


@dataclass
class SpeculativeStream(Stream):
    """A `Stream` whose tokens are guessed by a drafter and verified several at a time.

    Greedy tokens are those of `Stream`; sampled ones have the same distribution, though a seed gives other ones. A constraint's
    sampling, stop strings, continuing from a state and the state afterwards are as in `Stream`.

    Args:
        drafter: `PromptLookup()`, `DraftModel(model)`, or another `Drafter`.
        draft_tokens: the most guesses at a time, 1 to 15.
        context: what a drafter guesses from begins with these tokens, too.
    """

    drafter: Drafter = field(default_factory=PromptLookup)
    draft_tokens: int = 4

    proposed: int = 0
    """Guesses verified so far."""
    accepted: int = 0
    """Guesses kept."""
    rounds: int = 0
    """Verifications: times that the weights were read."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.draft_tokens = Number(4, *INT64, whole=True).read("draft_tokens", self.draft_tokens)
        if not 1 <= self.draft_tokens < MOST_ROWS:
            raise ValueError(f"draft_tokens is {self.draft_tokens}; it must be between 1 and {MOST_ROWS - 1}")
        if isinstance(self.drafter, DraftModel):
            draft = self.drafter.model
            ours, theirs = self.model.config.vocab_size, draft.config.vocab_size
            if ours != theirs:
                raise ValueError(
                    f"the draft model has a vocabulary of {theirs} tokens and the model one of {ours}; they must be the same"
                )
            if draft.device != self.model.device:
                raise ValueError(f"the draft model is on {draft.device} and the model on {self.model.device}; move one")

    @torch.inference_mode(False)  # as in `Stream`
    @torch.no_grad()
    def __iter__(self) -> Iterator[str]:
        model, device = self.model, self.model.device
        ids = self.prompt_ids.to(device)
        cache = self.cache = self.cache or model.backbone.new_cache(1)
        generator = torch.Generator(device)
        if self.sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.sampling.seed)
        rule = _Rule(self.sampling, generator)
        known = ids if self.context is None else torch.cat([self.context.to(device), ids])
        self.drafter.begin(known, self.sampling, rule.by_row, generator)
        text: list[int] = known.tolist()  # all tokens so far
        assembly = _Assembly(self.tokenizer, self.stop, _end_tokens(model))
        logits = self._read(ids[None])
        verify, watch = verifier(model, cache, 1 + self.draft_tokens), Watch(modules_of(model))
        draft = Draft([])
        reading = False  # whether the text's last token and the draft are on trial in the verifier
        while len(self.tokens) < self.max_new_tokens:
            chosen = rule.choose(text, draft, logits)
            self.proposed += len(draft.tokens)
            self.rounds += reading
            kept, piece, reason = assembly.take(chosen)
            # Of a text that goes on, the last token chosen is not read yet; nor is one that completes a stop string.
            accepted = min(len(kept), len(chosen) - 1)
            unread = 0 if reason == "end" else 1
            self.accepted += accepted
            if reading:
                verify.commit(1 + len(kept) - unread)
            text += kept
            self.tokens += kept
            if piece:
                self.text += piece
                yield piece
            if reason:
                self.finish_reason = "stop"
                break
            if left := self.max_new_tokens - len(self.tokens):
                draft = self.drafter.propose(text, min(self.draft_tokens, left - 1))
                if not watch.holds():  # somebody has put a hook or a forward on a module, or taken one away
                    verify, watch = verifier(model, cache, 1 + self.draft_tokens), Watch(modules_of(model))
                logits, reading = verify([text[-1], *draft.tokens]), True
        self.finish_reason = self.finish_reason or "length"
        if rest := assembly.rest():
            self.text += rest
            yield rest
        if assembly.stopped:
            self.finish_reason = "stop"


class _Rule:
    """How tokens are chosen from logits: a sampling's filters, then the likeliest, or a draw."""

    def __init__(self, sampling: SamplingParams, generator: torch.Generator):
        self.greedy, self.generator = sampling.temperature == 0, generator
        self._by_text, rows = sampling.filters()
        if isinstance(sampling, ConstrainedSampling):
            assert sampling.constraint is not None
            self._by_text.insert(0, sampling.constraint.processor())
        self._rows = rows

    def by_row(self, text: list[int], logits: Tensor) -> Tensor:
        """Scores (t, v) by the filters that need no tokens before; a draft model follows these."""
        return self._rows(None, logits) if self._rows else logits

    def choose(self, text: list[int], draft: Draft, logits: Tensor) -> list[int]:
        """The guesses that stay, and one token more: from logits (t + 1, v) after the text, and after each of t guesses."""
        if not self._by_text:
            scores = self.by_row(text, logits)
            if self.greedy:
                best = likeliest(scores).tolist()
                kept = next((i for i, guess in enumerate(draft.tokens) if guess != best[i]), len(draft.tokens))
                return [token_number(token) for token in best[: kept + 1]]
            return self._draw(draft, lambda i: scores[i])

        def score(i: int) -> Tensor:
            ids = torch.tensor([text + draft.tokens[:i]], dtype=torch.int64, device=logits.device)
            return self.by_row(text, self._by_text(ids, logits[i : i + 1]))[0]

        if not self.greedy:
            return self._draw(draft, score)
        chosen = []
        for i in range(len(draft.tokens) + 1):
            chosen.append(token_number(int(likeliest(score(i)[None]))))
            if draft.tokens[i : i + 1] != chosen[-1:]:
                break
        return chosen

    def _draw(self, draft: Draft, score: Callable[[int], Tensor]) -> list[int]:
        """Rejection sampling, position by position."""
        for i, guess in enumerate(draft.tokens):
            p = score(i).float().softmax(-1)
            if draft.probabilities is None:  # a certain guess: q is 1 there
                q = torch.zeros_like(p)
                q[guess] = 1
            else:
                q = draft.probabilities[i].to(p.device)
            chance = torch.rand((), dtype=torch.float32, device=p.device, generator=self.generator)
            if bool(chance * q[guess] >= p[guess]):
                return [*draft.tokens[:i], drawn((p - q).clamp(min=0), self.generator)]
        p = score(len(draft.tokens)).float().softmax(-1)
        return [*draft.tokens, drawn(p, self.generator)]


class _Assembly:
    """Tokens to text, in the pieces that may be shown, until an end token or a stop string."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], ends: set[int]):
        self._shown, self._ends = StoppingDecoder(tokenizer, stop), ends

    def take(self, chosen: list[int]) -> tuple[list[int], str, str]:
        """(the tokens that belong to the text, text to show, "end" or "stop" where it is over)."""
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
        """What was held back, once the text is over."""
        return self._shown.rest()

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._shown.stopped
