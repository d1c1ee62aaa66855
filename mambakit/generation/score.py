"""The likelihood of text of any length, read as a stream: memory does not grow with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.modules import MambaCache

# Logits are formed for this many tokens at a time: with a vocabulary of 50,280 that is 51 MB of float32.
_LOGIT_ROWS = 256
# Text is tokenised in pieces of about this many characters, cut at a line end, where tokens of common vocabularies end.
_PIECE_CHARACTERS = 20_000


@dataclass
class Score:
    """Log-likelihood of a text, in nats, with the counts that its averages need."""

    nats: float = 0.0
    """Sum of -ln p(token | everything before it in the document)."""
    tokens: int = 0
    characters: int = 0
    bytes: int = 0
    log_probs: list[float] = field(default_factory=list)
    """ln p of every token, where they were asked for."""

    def __add__(self, other: Score) -> Score:
        return Score(
            self.nats + other.nats, self.tokens + other.tokens, self.characters + other.characters,
            self.bytes + other.bytes, self.log_probs + other.log_probs,
        )  # fmt: skip

    @property
    def nats_per_token(self) -> float:
        return self.nats / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        return math.exp(min(700.0, self.nats_per_token))

    @property
    def bits_per_character(self) -> float:
        return self.nats / math.log(2) / max(1, self.characters)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / max(1, self.bytes)


class TokenScorer:
    """Scores one document's tokens as they arrive, with the model's state carried from call to call.

    Args:
        model: a causal language model.
        first_token: what stands before the document's first token, so that it is scored too (end-of-text).
    """

    def __init__(self, model: Any, first_token: int):
        self.model = model
        self.cache: MambaCache = model.backbone.new_cache(1)
        self.last = torch.tensor([first_token], device=model.device)

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """ln p of each of ``ids`` (l,), float32 on the CPU, given everything before it."""
        ids = ids.to(self.model.device)
        inputs = torch.cat([self.last, ids[:-1]])[None]
        hidden = self.model.backbone(inputs, cache_params=self.cache).last_hidden_state[0]
        self.last = ids[-1:]
        parts = []
        for rows, targets in zip(hidden.split(_LOGIT_ROWS), ids.split(_LOGIT_ROWS), strict=True):
            logits = self.model.lm_head(rows).float()
            parts.append(-F.cross_entropy(logits, targets, reduction="none"))
        return torch.cat(parts).cpu()


def score_text(
    model: Any,
    tokenizer: Any,
    text: str | Iterable[str],
    *,
    chunk_size: int = 1024,
    per_token: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Score:
    """Score one document.

    Args:
        model: a causal language model, in eval mode.
        tokenizer: its tokenizer; its eos (or bos) token stands before the text.
        text: the document, or pieces of it in order (an open text file, say): read as they are needed.
        chunk_size: tokens per forward; memory is proportional to it and to nothing else.
        per_token: keep every token's log-probability.
        progress: called with the number of characters done.

    Raises:
        ValueError: chunk_size below 1, or a tokenizer without a token to start from.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be 1 or more")
    first = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    if first is None:
        raise ValueError("the tokenizer has neither an eos nor a bos token to start a document with; set one")
    scorer, score = TokenScorer(model, first), Score()
    pending = torch.empty(0, dtype=torch.long)

    def take(ids: Tensor) -> None:
        log_probs = scorer(ids)
        score.nats -= float(log_probs.double().sum())
        score.tokens += len(ids)
        if per_token:
            score.log_probs += log_probs.tolist()

    for piece in _pieces([text] if isinstance(text, str) else text):
        ids = tokenizer(piece, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0].long()
        pending = torch.cat([pending, ids])
        while len(pending) >= chunk_size:
            take(pending[:chunk_size])
            pending = pending[chunk_size:]
        score.characters += len(piece)
        score.bytes += len(piece.encode())
        if progress is not None:
            progress(score.characters)
    if len(pending):
        take(pending)
    return score


def _pieces(parts: Iterable[str]) -> Iterator[str]:
    """The same text in pieces that end at a line end (or, in a text without any, wherever they are long enough)."""
    buffer = ""
    for part in parts:
        buffer += part
        while len(buffer) >= _PIECE_CHARACTERS:
            line_end = buffer.rfind("\n", 1, _PIECE_CHARACTERS)
            cut = line_end if line_end > 0 else _PIECE_CHARACTERS
            yield buffer[:cut]
            buffer = buffer[cut:]
    if buffer:
        yield buffer
