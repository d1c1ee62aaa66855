"""The decoders: which of them serves a model, in what order they are asked, and why one does not. Nothing else chooses.

A decoder takes one token for each row of a cache and gives the logits after it. `DECODERS` lists them from the fastest to the one
that always serves, the model's forward; `table` says for a model and a number of rows which serves and what keeps the others from it
(`mambakit env --model M --rows N` prints it).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from mambakit.decoding import graph_step, native_step, verify
from mambakit.decoding.cuda_graph import kept_with, why_not_captured
from mambakit.decoding.eligibility import skipped_modules
from mambakit.modules import StateCache
from mambakit.modules.interception import Watch
from mambakit.ops.linear.api import MOST_ROWS


class Decoder(Protocol):
    """One token after another for every row of a cache, by one way of computing it."""

    states: Any
    """The cache that it reads and writes, in place: its tensors must not be replaced meanwhile."""
    logits: Tensor | None
    """(rows, v) after the last step; valid until the next one. None before the first."""
    capacity: int
    """How many tokens in a row it chooses by itself, without the host (`GraphDecoder.likeliest`); 0: none."""

    def step(self, tokens: Tensor) -> Tensor:
        """Read ``tokens`` (rows,) int64; the logits (rows, v) after them, valid until the next step."""


class WhyNot(Protocol):
    """Why a decoder cannot serve, or None where it can."""

    def __call__(self, model: Any, rows: int, /, *, states: Any = None, called: bool = False) -> str | None:
        """
        Args:
            states: the cache that it would decode; without it one as the model makes it.
            called: the model is in its own forward: its hooks have been called.
        """


@dataclass(frozen=True)
class DecoderKind:
    """An entry of the table.

    Attributes:
        name: as it is printed.
        why_not: why it cannot serve, or None.
        make: over a cache, which it decodes in place.
        elastic: a row's bits do not depend on how many rows there are, so rows may be added and left out.
        captured: a CUDA graph holds on to the cache: it is kept with the model, and states are moved in and out.
    """

    name: str
    why_not: WhyNot
    make: Callable[[Any, Any], Decoder]
    elastic: bool = False
    captured: bool = False


class ForwardDecoder:
    """The model's forward, with whatever hooks it has."""

    capacity = 0

    def __init__(self, model: Any, states: Any):
        self._model, self.states = model, states
        self.logits: Tensor | None = None

    def step(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self._model(tokens[:, None], cache_params=self.states).logits[:, -1]
        self.logits = logits
        return logits


def _always(model: Any, rows: int, *, states: Any = None, called: bool = False) -> str | None:
    return None


FORWARD = DecoderKind("forward", _always, ForwardDecoder)
DECODERS: tuple[DecoderKind, ...] = (
    DecoderKind("native library (CPU)", native_step.why_not, native_step.NativeDecoder, elastic=True),
    DecoderKind(
        "persistent kernel (CUDA)", graph_step.why_not_persistent, graph_step.persistent_decoder, captured=True
    ),
    DecoderKind("kernels for few rows (Triton)", graph_step.why_not_few_rows, graph_step.few_rows_decoder, captured=True),
    DecoderKind(
        "kernels for many rows (Triton)", graph_step.why_not_many_rows, graph_step.many_rows_decoder, captured=True
    ),
    DecoderKind("captured forward (CUDA graph)", graph_step.why_not_graph, graph_step.GraphDecoder, captured=True),
    FORWARD,
)  # fmt: skip


def choose(model: Any, rows: int, *, states: Any = None, called: bool = False) -> DecoderKind:
    """The first of `DECODERS` that serves."""
    return next(kind for kind in DECODERS if kind.why_not(model, rows, states=states, called=called) is None)


def kept_decoder(model: Any, rows: int, *, called: bool = False) -> Any:
    """The model's captured decoder of so many rows, made at its first use and kept for as long as it holds; None where none serves.

    Its states are whose it says (`GraphDecoder.holder`): they are moved in and out.
    """
    if why_not_captured(model, called) is not None:  # cheap, and asked at every use; the kernels' own reasons once
        return None

    def make() -> Any:
        kind = choose(model, rows, called=called)
        return kind.make(model, model.backbone.new_cache(rows))

    return kept_with(model, ("decoder", rows), make)


def token_step(model: Any, cache: StateCache) -> Callable[[Tensor], Tensor]:
    """``step(tokens (b,)) -> logits (b, v)``; the cache is brought up to date in place at every token, and must not be replaced
    meanwhile. `SlotPool` is what texts are written with: there a graph's states need not move in and out at every token."""
    rows = cache.max_batch_size
    forward, watch = ForwardDecoder(model, cache), Watch(skipped_modules(model))
    graph = kept_decoder(model, rows)
    decoder = choose(model, rows, states=cache).make(model, cache) if graph is None else graph

    def step(tokens: Tensor) -> Tensor:
        if not watch.holds():  # somebody has put a hook or a forward on a module
            return forward.step(tokens)
        if graph is None:
            return decoder.step(tokens)
        graph.load(cache)
        logits = graph.step(tokens).clone()
        graph.store(cache, 1)
        return logits

    return step


# -- verifying drafts ---------------------------------------------------------------------------------------------------


class WhyNotVerify(Protocol):
    """Why a verifier cannot serve, or None where it can."""

    def __call__(self, model: Any, tokens: int, /, *, states: Any = None) -> str | None: ...


@dataclass(frozen=True)
class VerifierKind:
    """An entry of `VERIFIERS`.

    Attributes:
        name: as it is printed.
        why_not: why it cannot verify drafts of so many tokens, or None.
        make: over a cache of one row, for at most so many tokens.
    """

    name: str
    why_not: WhyNotVerify
    make: Callable[[Any, Any, int], verify.Verifier]


VERIFIERS: tuple[VerifierKind, ...] = (
    VerifierKind("native library (CPU)", verify.why_not_native, verify.NativeVerifier),
    VerifierKind("persistent kernel (CUDA)", graph_step.why_not_verification, verify.PersistentVerifier),
    VerifierKind("captured layers (CUDA graph)", verify.why_not_captured_layers, verify.CapturedVerifier),
    VerifierKind("layers", verify.why_not_layers, verify.LayersVerifier),
    VerifierKind("forward", _always, verify.ForwardVerifier),
)


def verifier(model: Any, cache: StateCache, tokens: int) -> verify.Verifier:
    """The first of `VERIFIERS` that serves this cache of one row.

    Args:
        cache: it must not be replaced while the verifier is in use.
        tokens: the most tokens of one draft, 1 to 16.

    Raises:
        ValueError: other numbers of tokens or rows.
    """
    if not 1 <= tokens <= MOST_ROWS:
        raise ValueError(f"tokens is {tokens}; a verification is of 1 to {MOST_ROWS} tokens")
    if cache.max_batch_size != 1:
        raise ValueError(f"the cache has {cache.max_batch_size} rows; a verification is of one text: select one row")
    kind = next(kind for kind in VERIFIERS if kind.why_not(model, tokens, states=cache) is None)
    return kind.make(model, cache, tokens)


# -- for people ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Of the printed table."""

    decoder: str
    serves: bool
    """Whether it is the one that decodes."""
    reason: str
    """Why it does not; "" for the one that serves, and for those after it that could."""


def table_of(model: Any, rows: int) -> list[Row]:
    """Which decoder serves so many rows of the model, and why each other one does not."""
    found: list[Row] = []
    for kind in DECODERS:
        reason = kind.why_not(model, rows)
        found.append(Row(kind.name, reason is None and not any(row.serves for row in found), reason or ""))
    return found


def describe(row: Row) -> str:
    """What a row of the table says of its decoder."""
    return "serves" if row.serves else row.reason or "could serve, comes after"


def as_markdown(models: dict[str, Any], rows: tuple[int, ...] = (1, 4, 16, 64, 256)) -> str:
    """A Markdown table of which decoder serves each model at each number of rows, for the documentation.

    Args:
        models: by the name that is printed.
    """
    lines = [
        "| model | " + " | ".join(f"{n} row{'s' * (n > 1)}" for n in rows) + " |",
        "| --- " * (len(rows) + 1) + "|",
    ]
    for name, model in models.items():
        lines.append(f"| {name} | " + " | ".join(choose(model, n).name for n in rows) + " |")
    return "\n".join(lines) + "\n"
