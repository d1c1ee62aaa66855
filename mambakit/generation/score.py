"""Log-likelihoods: of a text of any length, or of many continuations of one prefix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.chunks import SCORING_CHUNK
from mambakit.decoding.prefill import hidden_states, prefill
from mambakit.generation.start_token import start_token
from mambakit.generation.state import State
from mambakit.generation.token_ids import require_in_vocabulary, text_ids, texts
from mambakit.generation.token_scores import score_after, score_tokens
from mambakit.modules import StateCache
from mambakit.quoting import brief

# Continuations are read this many tokens, and this many bytes of copies of the state, at a time.
_PACKED_TOKENS, _PACKED_BYTES = 4096, 1 << 30
# Text is tokenised in parts of about this many characters, cut at line ends, where tokens of common vocabularies end.
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
        state: of one row, before the first token; it is copied. None: zeros.
    """

    def __init__(self, model: Any, first_token: int, state: StateCache | None = None):
        self.model = model
        self.cache: StateCache = model.backbone.new_cache(1) if state is None else state.clone()
        self.last = torch.tensor([first_token], dtype=torch.int64, device=model.device)

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """ln p of each of ``ids`` (l,), float32 on the CPU, given everything before it."""
        ids = ids.to(self.model.device)
        inputs = torch.cat([self.last, ids[:-1]])[None]
        ((hidden,),) = hidden_states(self.model, inputs, self.cache, chunk_size=len(ids))
        self.last = ids[-1:]
        return score_tokens(self.model, hidden, ids).log_probs


def score_text(
    model: Any,
    tokenizer: Any,
    text: str | Iterable[str],
    *,
    chunk_size: int = SCORING_CHUNK,
    per_token: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Score:
    """Score one document.

    Args:
        model: a causal language model, in eval mode.
        tokenizer: its tokenizer; its `start_token` stands before the text.
        text: the document, or its parts in order (such as an open text file), which are read as needed.
        chunk_size: tokens per forward; memory is proportional to it and does not grow with the text.
        per_token: keep every token's log-probability.
        progress: called with the number of characters done.

    Raises:
        ValueError: chunk_size below 1, or a tokenizer without a token to start from.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {brief(chunk_size)}; it must be 1 or more")
    scorer, score = TokenScorer(model, start_token(tokenizer)), Score()
    pending = torch.empty(0, dtype=torch.long, device="cpu")

    def take(ids: Tensor) -> None:
        log_probs = scorer(ids)
        score.nats -= float(log_probs.double().sum())
        score.tokens += len(ids)
        if per_token:
            score.log_probs += log_probs.tolist()

    for piece in _pieces([text] if isinstance(text, str) else text):
        ids = tokenizer(piece, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0].long()
        require_in_vocabulary("the text", ids, model.config.vocab_size)
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
    """The same text in parts that end at a line end, or at `_PIECE_CHARACTERS` where there is none."""
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


# -- many continuations of one prefix ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ContinuationScore:
    """ln p of each token of a continuation, given the prefix and the tokens before it."""

    log_probs: Tensor
    """(l,) float32, on the CPU."""
    greedy: bool
    """Whether every token is the likeliest: greedy decoding would write exactly this."""

    @property
    def log_prob(self) -> float:
        """ln p of the whole continuation."""
        return float(self.log_probs.double().sum())

    @property
    def log_prob_per_token(self) -> float:
        return self.log_prob / max(1, len(self.log_probs))


@torch.no_grad()
def score_continuations(
    model: Any,
    prefix: Tensor | Sequence[int] | State,
    continuations: Sequence[Tensor | Sequence[int]],
    *,
    chunk_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[ContinuationScore]:
    """Score many continuations of one prefix, which is read once.

    The state after the prefix is copied for every continuation, and continuations of any lengths are packed, without
    padding. A continuation's last token is not read, because nothing follows it.

    Args:
        model: a causal language model in eval mode.
        prefix: (l,) int64 with l >= 1, or the `State` of one row after it.
        continuations: (l_i,) int64 each, any lengths; an empty one is certain (ln p = 0).
        chunk_size: tokens of the prefix per forward.
        progress: called with the number of continuations scored.

    Raises:
        ValueError: an empty prefix; a state of several rows, or without an unread token; a continuation that is not
            (l,), or has a token outside of the vocabulary.
        TypeError: tokens that are no whole numbers.
    """
    vocabulary = model.config.vocab_size
    rows = [text_ids(f"continuation {i}", t, vocabulary, least=0) for i, t in enumerate(continuations)]
    if isinstance(prefix, State):
        after = prefix.prompt()
        ids, cache = after["prompt_ids"], after["cache"]
    else:
        ids = text_ids("the prefix", prefix, vocabulary).to(model.device)
        cache = model.backbone.new_cache(1)
    (logits,) = prefill(model, ids[None], cache, chunk_size=chunk_size)
    results: list[ContinuationScore] = []
    most = max(1, _PACKED_BYTES // cache.nbytes)
    for group in score_after(model, cache, logits, rows, most_tokens=_PACKED_TOKENS, most_rows=most):
        results += [ContinuationScore(scores.log_probs, bool(scores.likeliest.all())) for scores in group]
        if progress is not None:
            progress(len(results))
    return results


def score_choices(model: Any, tokenizer: Any, prefix: str, choices: Sequence[str]) -> list[ContinuationScore]:
    """`score_continuations` of texts: multiple choice, variants of a sequence, rankings.

    Prefix and choice are tokenised together, and the choice's tokens are those after the prefix's own. Where a
    tokenizer would merge the two, white space at the end of the prefix counts as the start of the choice. An empty
    prefix is the tokenizer's `start_token`.

    Raises:
        ValueError: a choice that adds no token to the prefix, or an empty prefix and a tokenizer without eos and bos.
        TypeError: a prefix that is no text, or choices that are no list of texts.
    """
    if not isinstance(prefix, str):
        raise TypeError(f"the prefix is {brief(prefix)}; it must be text")
    texts("choices", choices)
    requests: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}  # prefix tokens -> (index of the choice, its tokens)
    for number, choice in enumerate(choices):
        whole = _encode(tokenizer, prefix + choice)
        split = len(_encode(tokenizer, prefix.rstrip()))
        if len(whole) <= split:
            raise ValueError(f"choice {number} ({brief(choice)}) adds no token to the prefix; give a longer one")
        before = whole[:split] if split else [start_token(tokenizer)]
        requests.setdefault(tuple(before), []).append(
            (number, torch.tensor(whole[split:], dtype=torch.int64, device="cpu"))
        )
    scores: dict[int, ContinuationScore] = {}
    # One group, unless the tokenizer splits the prefix differently before some of the choices.
    for read, members in requests.items():
        results = score_continuations(
            model, torch.tensor(read, dtype=torch.int64, device="cpu"), [tokens for _, tokens in members]
        )
        scores.update(zip((number for number, _ in members), results, strict=True))
    return [scores[number] for number in range(len(choices))]


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids
