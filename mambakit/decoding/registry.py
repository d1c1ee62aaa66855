"""The decoder registry: which decoder serves a model, in which order they are tried, and why one cannot serve.

A decoder reads one token for each row of a cache and returns the logits after it. `DECODERS` lists the decoders from
the fastest to the one that always serves, the model's forward. `choose` is the only place that picks one. `table_of`
shows, for a model and a number of rows, which decoder serves and why the others do not (`mambakit env --model M --rows
N` prints it). `VERIFIERS` is the same for draft verification.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from mambakit.decoding import graph_step, native_step, verify, verify_layers, verify_rows
from mambakit.decoding.cuda_graph import kept_with, why_not_captured
from mambakit.decoding.eligibility import skipped_modules
from mambakit.modules import StateCache
from mambakit.modules.interception import Watch
from mambakit.ops.linear.api import MOST_ROWS


class Decoder(Protocol):
    """One way to compute a decode step: one token for every row of a cache."""

    states: Any
    """The cache that it reads and writes in place; its tensors must not be replaced meanwhile."""
    logits: Tensor | None
    """(rows, v) of the last step, valid until the next one. None before the first."""
    capacity: int
    """The maximum number of greedy tokens that it chooses without the host (`GraphDecoder.likeliest`); 0: none."""

    def step(self, tokens: Tensor) -> Tensor:
        """Read ``tokens`` (rows,) int64. Returns the logits (rows, v) after them, valid until the next step."""


class WhyNot(Protocol):
    """A function: why a decoder cannot serve, or None where it can."""

    def __call__(self, model: Any, rows: int, /, *, states: Any = None, called: bool = False) -> str | None:
        """
        Args:
            states: the cache to decode; None: one made by `new_cache` of the model's backbone.
            called: whether this is asked inside the model's own forward, whose hooks have run already.
        """


@dataclass(frozen=True)
class DecoderKind:
    """An entry of `DECODERS`.

    Attributes:
        name: for printing.
        why_not: why it cannot serve, or None.
        make: makes the decoder over a cache, which it updates in place.
        elastic: whether a row's bits do not depend on the number of rows, so that rows may be added and dropped.
        captured: whether a CUDA graph holds on to its cache. It is then kept with the model, and states are copied in
            and out.
    """

    name: str
    why_not: WhyNot
    make: Callable[[Any, Any], Decoder]
    elastic: bool = False
    captured: bool = False


class ForwardDecoder:
    """The model's forward, with its hooks."""

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
    DecoderKind(
        "kernels for few rows (Triton)", graph_step.why_not_few_rows, graph_step.few_rows_decoder, captured=True
    ),
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
    """The model's captured decoder for ``rows`` rows, made at its first use and kept as long as the model's `Placement`
    holds.

    Callers copy states in and out, and set `GraphDecoder.holder` while they use it. None where no captured decoder
    serves.
    """
    if why_not_captured(model, called) is not None:  # cheap, checked at every use; the kernels' own reasons only once
        return None

    def make() -> Any:
        kind = choose(model, rows, called=called)
        return kind.make(model, model.backbone.new_cache(rows))

    return kept_with(model, ("decoder", rows), make)


def token_step(model: Any, cache: StateCache) -> Callable[[Tensor], Tensor]:
    """A function ``step(tokens (b,)) -> logits (b, v)`` that updates the cache in place at every call.

    It captures a new graph where a captured decoder serves. It is for benchmarks and for single steps; texts are
    decoded with a `SlotPool`, which reuses graphs. The cache must not be replaced meanwhile.
    """
    forward, watch = ForwardDecoder(model, cache), Watch(skipped_modules(model))
    kind, before = choose(model, cache.max_batch_size, states=cache), cache.clone()
    decoder = kind.make(model, cache)
    if kind.captured:
        cache.load_(before)  # the warm-up has read a token

    def step(tokens: Tensor) -> Tensor:
        if not watch.holds():  # a module got a hook or a replaced forward
            return forward.step(tokens)
        logits = decoder.step(tokens)
        if kind.captured:
            cache.advance(1)  # a replay does not count the token
        return logits.clone()

    return step


# -- verifying drafts --------------------------------------------------------------------------------------------------


class WhyNotVerify(Protocol):
    """A function: why a verifier cannot serve, or None where it can."""

    def __call__(self, model: Any, rows: int, tokens: int, /, *, states: Any = None) -> str | None: ...


@dataclass(frozen=True)
class VerifierKind:
    """An entry of `VERIFIERS`.

    Attributes:
        name: for printing.
        why_not: why it cannot verify drafts of so many rows and tokens, or None.
        make: makes the verifier over a cache, for drafts of at most that many tokens.
        on_device: whether it is a `verify.DeviceVerifier`.
    """

    name: str
    why_not: WhyNotVerify
    make: Callable[[Any, Any, int], verify.Verifier]
    on_device: bool = False


def _serves_any_draft(model: Any, rows: int, tokens: int, *, states: Any = None) -> str | None:
    return None


VERIFIERS: tuple[VerifierKind, ...] = (
    VerifierKind("native library (CPU)", verify.why_not_native, verify.NativeVerifier),
    VerifierKind("persistent kernel (CUDA)", graph_step.why_not_verification, verify.PersistentVerifier, True),
    VerifierKind("kernels for many rows (Triton)", verify_rows.why_not_verify_rows, verify_rows.ManyRowsVerifier, True),
    VerifierKind(
        "captured layers (CUDA graph)", verify_layers.why_not_captured_layers, verify_layers.CapturedVerifier, True
    ),
    VerifierKind("layers", verify_layers.why_not_layers, verify_layers.LayersVerifier),
    VerifierKind("forward", _serves_any_draft, verify.ForwardVerifier),
)


def choose_verifier(model: Any, cache: StateCache, tokens: int) -> VerifierKind:
    """The first of `VERIFIERS` that serves; drafts of more than 16 tokens are the forward's."""
    if tokens > MOST_ROWS:
        return VERIFIERS[-1]
    rows = cache.max_batch_size
    return next(kind for kind in VERIFIERS if kind.why_not(model, rows, tokens, states=cache) is None)


def verifier(model: Any, cache: StateCache, tokens: int) -> verify.Verifier:
    """A verifier of the kind that serves this cache (`choose_verifier`).

    Args:
        cache: of one or more rows; it must not be replaced while the verifier is in use.
        tokens: the maximum number of tokens of a row's draft.

    Raises:
        ValueError: fewer than 1 token or row.
    """
    rows = cache.max_batch_size
    if tokens < 1 or rows < 1:
        raise ValueError(f"a verification of {tokens} tokens of {rows} rows; give 1 or more of each")
    return choose_verifier(model, cache, tokens).make(model, cache, tokens)


# -- for people --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A row of the printed table."""

    decoder: str
    serves: bool
    """Whether this decoder is chosen."""
    reason: str
    """Why it cannot serve; "" for the chosen decoder, and for later ones that could serve, too."""


def table_of(model: Any, rows: int) -> list[Row]:
    """Which decoder serves ``rows`` rows of the model, and why each other one does not."""
    found: list[Row] = []
    for kind in DECODERS:
        reason = kind.why_not(model, rows)
        found.append(Row(kind.name, reason is None and not any(row.serves for row in found), reason or ""))
    return found


def describe(row: Row) -> str:
    """The text of a row of the table."""
    return "serves" if row.serves else row.reason or "could serve, comes after"


def as_markdown(models: dict[str, Any], rows: tuple[int, ...] = (1, 4, 16, 64, 256)) -> str:
    """A Markdown table for the documentation: the decoder that serves each model at each number of rows.

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
