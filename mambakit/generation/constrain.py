"""Constrained decoding: a JSON schema, a regular expression or a grammar, enforced by masking the logits of every step.

llguidance computes which tokens may come next; this file applies its masks: `ConstraintProcessor` for
``model.generate``, `ConstrainedSampling` for streams and engines, `mask_logits_` for any other batched loop.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from mambakit.decoding.sampling_params import SamplingParams
from mambakit.errors import ConstraintError
from mambakit.generation.grammars import MESSAGE, grammar_of, llguidance
from mambakit.ops._backends.memory import INT32, address
from mambakit.quoting import cut


class Constraint:
    """A grammar compiled for one tokenizer: a text that ends with an end-of-text token is a sentence of it.

    A text that reaches its limit of tokens first is cut off inside the sentence; its finish reason is "length".

    Args:
        model, tokenizer: a causal language model and its fast tokenizer. The model's end-of-text tokens end a sentence.
        json_schema: a JSON schema, as a dictionary or as text.
        regex: a regular expression (Rust's syntax: no look-around, no back-references) that the whole text matches.
        grammar: a context-free grammar in llguidance's variant of Lark's syntax; its rule ``start`` is the whole text.

    Raises:
        ValueError: not exactly one of the three, one that does not compile, or a model without an end-of-text token.
        ImportError: llguidance is not installed.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        json_schema: str | dict[str, Any] | None = None,
        regex: str | None = None,
        grammar: str | None = None,
    ):
        given = {"json_schema": json_schema, "regex": regex, "grammar": grammar}
        chosen = [name for name, value in given.items() if value is not None]
        if len(chosen) != 1:
            raise ValueError(
                f"give exactly one of json_schema, regex and grammar; got {' and '.join(chosen) or 'none'}"
            )
        guidance = llguidance()
        end = model.generation_config.eos_token_id
        ends: list[int] = [] if end is None else list(end) if isinstance(end, (list, tuple)) else [end]
        self.end_tokens = [token for token in ends if token < len(tokenizer)]
        if not self.end_tokens:
            raise ValueError(
                f"a constrained text ends with an end-of-text token, and the model has none that its tokenizer knows "
                f"({end}); set model.generation_config.eos_token_id"
            )
        self.vocab_size: int = model.config.vocab_size
        self._tokens = _token_table(tokenizer, self.vocab_size, tuple(self.end_tokens))
        (kind,) = chosen
        self._grammar = grammar_of(kind, given[kind], self._tokens)
        self._matcher = guidance.LLMatcher(self._tokens, self._grammar, log_level=0)

    def matcher(self) -> Matcher:
        """The position of a new text in the grammar, at the start."""
        return Matcher(self, self._matcher.deep_copy(), 0)

    def processor(self) -> ConstraintProcessor:
        """For ``model.generate(..., logits_processor=[constraint.processor()])``; beams and several texts work, too."""
        return ConstraintProcessor(self)

    def sampling(self, sampling: SamplingParams | None = None) -> ConstrainedSampling:
        """For ``Stream(..., sampling=constraint.sampling(SamplingParams(...)))``, and for requests of an engine."""
        given = sampling or SamplingParams()
        return ConstrainedSampling(**{f.name: getattr(given, f.name) for f in fields(SamplingParams)}, constraint=self)


class Matcher:
    """The position of one text in the grammar."""

    def __init__(self, constraint: Constraint, matcher: Any, length: int, ended: bool = False):
        self.constraint, self._matcher = constraint, matcher
        self.length = length
        """Tokens accepted, including the end-of-text token and without padding."""
        self.ended = ended
        """Whether the end-of-text token has been accepted."""

    def accept(self, token: int) -> None:
        """Advance by the text's next token; after the end-of-text token any token is padding.

        Raises:
            ValueError: the grammar does not allow it here.
        """
        if self.ended:
            return
        if not self.allows(token):
            raise ValueError(f"token {token} is not allowed by the constraint at position {self.length} of the text")
        if token in self.constraint.end_tokens:
            self.ended = True
        else:
            self._matcher.consume_token(token)
        self.length += 1

    def allows(self, token: int) -> bool:
        """Whether ``token`` may come next; after the end only end-of-text tokens may."""
        if token in self.constraint.end_tokens:
            return self.ended or self.complete
        return not self.ended and self._matcher.validate_tokens([token]) == 1

    def rollback(self, tokens: int) -> None:
        """Take back the last ``tokens`` accepted tokens."""
        if not 0 <= tokens <= self.length:
            raise ValueError(f"rollback of {tokens} tokens; {self.length} have been accepted")
        if tokens:
            self.length -= tokens
            tokens -= self.ended  # the grammar never saw the end-of-text token
            self.ended = False
            if tokens:
                assert self._matcher.rollback(tokens), self._matcher.get_error()

    def copy(self) -> Matcher:
        return Matcher(self.constraint, self._matcher.deep_copy(), self.length, self.ended)

    @property
    def complete(self) -> bool:
        """Whether the text so far is a sentence; a longer one may begin with it."""
        return self._matcher.is_accepting()


def mask_logits_(logits: Tensor, matchers: Sequence[Matcher]) -> Tensor:
    """Set forbidden tokens to -inf in place: row i of ``logits`` (b, v) by ``matchers[i]``; returns ``logits``.

    A text that has ended may only continue with end-of-text tokens. The masks of all rows are computed together on the
    CPU.

    Raises:
        ValueError: the numbers of rows or tokens differ.
        ConstraintError: a constraint cannot be followed any further.
    """
    if logits.dim() != 2 or logits.shape[0] != len(matchers):
        raise ValueError(
            f"logits have shape {tuple(logits.shape)}, but there are {len(matchers)} matchers; give (b, v)"
        )
    b, v = logits.shape
    if not b:
        return logits
    if any(v != m.constraint.vocab_size for m in matchers):
        sizes = sorted({m.constraint.vocab_size for m in matchers})
        raise ValueError(f"logits are of {v} tokens, but the constraint was compiled for {sizes}")
    words = -(-v // 32)
    bits = torch.zeros(b, words, dtype=torch.int32, pin_memory=logits.is_cuda, device="cpu")
    going = [(m._matcher, i) for i, m in enumerate(matchers) if not m.ended]
    if len(going) == 1:
        going[0][0].unsafe_compute_mask_ptr(address(bits[going[0][1]], INT32, words), words * 4)
    elif going:
        _executor().unsafe_compute_mask_ptr(going, address(bits, INT32, b * words), words * 4, b)
    for i, m in enumerate(matchers):
        for end in m.constraint.end_tokens if m.ended else ():
            bits[i, end // 32] |= -(1 << 31) if end % 32 == 31 else 1 << end % 32
    errors = [m._matcher.get_error() for m in matchers if m._matcher.is_error()]
    if errors:
        reason = errors[0].partition("<state>")[0]  # what follows is the matcher's state, with the text in it
        raise ConstraintError(
            f"the constraint became too complex to follow: {cut(' '.join(reason.split()), MESSAGE)}; give a simpler "
            "one, with less repetition inside of repetition and fewer alternatives"
        )
    bits = bits.to(logits.device, non_blocking=True)
    allowed = (bits[:, :, None] >> torch.arange(32, device=bits.device, dtype=torch.int32)) & 1  # (b, words, 32)
    return logits.masked_fill_(allowed.flatten(1)[:, :v] == 0, -float("inf"))


class ConstraintProcessor(LogitsProcessor):
    """The constraint as a logits processor, which masks before temperature and filters.

    It recognises rows by their tokens, so beams may be reordered and tokens rolled back; a new prompt starts again.
    """

    def __init__(self, constraint: Constraint):
        self.constraint = constraint
        self._prompts: Tensor | None = None
        self._rows: list[tuple[list[int], Matcher]] = []  # of each row, the tokens accepted and the matcher after them

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(b, l) all tokens so far, (b, v) scores of the next -> a copy of the scores, -inf for forbidden tokens."""
        known = self._prompts
        if known is None or input_ids.shape[0] != len(known) or not torch.equal(input_ids[:, : known.shape[1]], known):
            self._prompts = known = input_ids.clone()
            self._rows = [([], self.constraint.matcher()) for _ in range(len(input_ids))]
        texts = input_ids[:, known.shape[1] :].tolist()
        sources = [self._nearest(i, text) for i, text in enumerate(texts)]
        self._rows = [
            _follow(self._rows[source] if sources.count(source) == 1 else self._copy(source), text)
            for source, text in zip(sources, texts, strict=True)
        ]
        return mask_logits_(scores.clone(), [matcher for _, matcher in self._rows])

    def _nearest(self, row: int, text: list[int]) -> int:
        """The row that ``text`` continues: its own, unless beams were reordered."""
        if self._rows[row][0] == text[:-1]:
            return row
        return max(range(len(self._rows)), key=lambda i: (_shared(self._rows[i][0], text), i == row))

    def _copy(self, row: int) -> tuple[list[int], Matcher]:
        tokens, matcher = self._rows[row]
        return list(tokens), matcher.copy()


def _shared(a: list[int], b: list[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _follow(row: tuple[list[int], Matcher], text: list[int]) -> tuple[list[int], Matcher]:
    """The row moved to ``text``: tokens after the common prefix are rolled back, the text's are accepted."""
    tokens, matcher = row
    kept = len(tokens) if tokens == text[: len(tokens)] else _shared(tokens, text)
    matcher.rollback(max(0, matcher.length - kept))
    for token in text[kept:]:
        matcher.accept(token)
    return text, matcher


@dataclass
class ConstrainedSampling(SamplingParams):
    """`SamplingParams` with a constraint. One object serves many texts, each with its own matcher."""

    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.constraint is None:
            raise ValueError("ConstrainedSampling needs a constraint; make it with constraint.sampling(...)")

    def matcher(self) -> Matcher:
        assert self.constraint is not None
        return self.constraint.matcher()

    @staticmethod
    def mask(logits: Tensor, matchers: list[Any]) -> Tensor:
        return mask_logits_(logits, matchers)


@functools.cache
def _executor() -> Any:
    return llguidance().LLExecutor()


_tables: weakref.WeakKeyDictionary[Any, dict[tuple[int, tuple[int, ...]], Any]] = weakref.WeakKeyDictionary()


def _token_table(tokenizer: Any, vocab_size: int, ends: tuple[int, ...]) -> Any:
    """llguidance's table of a tokenizer, cached: it takes a second for a large vocabulary."""
    from llguidance.hf import from_tokenizer

    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer is a {type(tokenizer).__name__}; constraints need a fast one (a tokenizer.json)"
        )
    tables = _tables.setdefault(tokenizer, {})
    if (vocab_size, ends) not in tables:
        tables[vocab_size, ends] = from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=list(ends))
    return tables[vocab_size, ends]
