"""Draft verification: logits after several proposed tokens, then a commit of the prefixes that are kept.

A Mamba state has no entry per token, so it cannot be truncated as a KV cache can. A verifier therefore reads the drafts
without writing the states, and stores the inputs of every layer's recurrence. `commit` of m tokens then repeats only
the recurrences over m of those inputs, without the large projections. Where that is not possible (unknown layers), the
drafts run on a copy of the states, and the kept prefixes are read again.

The verifiers that call a model's own layers are in `mambakit.decoding.verify_layers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mambakit.decoding import native_step
from mambakit.decoding.eligibility import mixer_eps
from mambakit.decoding.graph_step import verification_step
from mambakit.decoding.prefill import prefill_states
from mambakit.decoding.transfers import integers
from mambakit.modules import MambaCache, StateCache
from mambakit.ops.decode.cpu_verify import VerifyStep
from mambakit.ops.linear.api import MOST_ROWS


class Verifier(Protocol):
    """Verifies drafts against the b rows of a cache, up to a number of tokens that it was made for."""

    holds_model: bool
    """Whether it refers to the model, so that it must not be kept with it."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """(b, t, v) logits after each of ``tokens`` (b, t) int64 on the model's device; the cache is unchanged. They
        are valid until the next call."""

    def commit(self, kept: Sequence[int]) -> None:
        """Advance row i of the cache by the first ``kept[i]`` tokens of its draft. The cache's length grows by their
        maximum.

        Raises:
            ValueError: a number is more than the tokens verified since the last commit.
        """

    def reload(self) -> None:
        """The cache was changed by something other than `commit`: read it again, and forget the drafts."""


class DeviceVerifier(Verifier, Protocol):
    """A verifier whose parts a CUDA graph can hold, with the numbers of kept tokens on the device."""

    tokens: Tensor
    """(b, t) int64: what `launch` verifies; t is the number of tokens that it was made for."""
    kept: Tensor
    """(b,) int64: what `advance` keeps of them, 0 to t."""

    def launch(self, model: Any) -> Tensor:
        """The kernels of a verification: (b, t, v) logits, valid until the next one. ``model`` is the one that the
        verifier was made for."""

    def advance(self) -> None:
        """The kernels of a commit of ``kept`` tokens. The cache's length stays; the caller counts."""

    def hold(self) -> None:
        """Before a graph with `launch` is replayed: have the verifier hold the cache's states."""


def require_read(kept: Sequence[int], read: int) -> None:
    """ValueError unless every number of ``kept`` is at most ``read``."""
    for m in kept:
        if not 0 <= m <= read:
            raise ValueError(f"commit of {m} tokens, but {read} were read since the last commit")


def why_not_native(model: Any, rows: int, tokens: int, *, states: Any = None) -> str | None:
    """Why `NativeVerifier` cannot verify drafts of ``rows`` rows, or None where it can."""
    if rows > MOST_ROWS:
        return f"{rows} rows; it serves 1 to {MOST_ROWS}"
    return native_step.why_not(model, rows, states=states)


class NativeVerifier:
    """One call into the native library, with the bits of token-by-token decoding."""

    holds_model = True  # its embeddings

    def __init__(self, model: Any, cache: MambaCache, tokens: int):
        layers, head = native_step.native_weights(model)
        self._embeddings, self._cache = model.backbone.embeddings, cache
        self._step = VerifyStep(
            layers, model.backbone.norm_f.weight, head, model.config.layer_norm_epsilon,
            cache.conv_states, cache.ssm_states, tokens, mixer_eps(model),
        )  # fmt: skip
        self._read = 0

    def __call__(self, tokens: Tensor) -> Tensor:
        self._read = tokens.shape[1]
        return self._step(self._embeddings(tokens.t())).transpose(0, 1).clone()

    def commit(self, kept: Sequence[int]) -> None:
        require_read(kept, self._read)
        self._read = 0
        self._step.commit(kept)
        self._cache.advance(max(kept))

    def reload(self) -> None:
        self._read = 0


class PersistentVerifier:
    """The persistent kernel for drafts of one row, with the bits of its decoding.

    All texts of a model share one `VerificationStep`. A verifier loads its own state if another's is in it.
    """

    holds_model = False

    def __init__(self, model: Any, cache: StateCache, tokens: int):
        self._step, self._cache, self._read = verification_step(model, tokens), cache, 0
        self.tokens, self.kept = self._step.tokens[None], self._step.kept

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        self._read = tokens.shape[1]
        self.hold()
        # Shorter drafts are padded: what an earlier draft has left behind them is a token, too.
        self.tokens[:, : self._read] = tokens
        return self._step()[None, : self._read]

    @torch.no_grad()
    def commit(self, kept: Sequence[int]) -> None:
        require_read(kept, self._read)
        if self._step.holder is not self:
            raise RuntimeError("another text was verified between these tokens and their commit")
        self._read = 0
        self.kept.copy_(integers(self.kept.device, kept))
        self.advance()
        self._cache.advance(max(kept))

    def launch(self, model: Any) -> Tensor:
        return self._step()[None]

    def advance(self) -> None:
        self._step.keep(self._cache)

    def hold(self) -> None:
        if self._step.holder is not self:
            self._step.load(self._cache, self)

    def reload(self) -> None:
        self._read = 0
        if self._step.holder is self:
            self._step.holder = None


class ForwardVerifier:
    """The model's forward on a copy of the states; `commit` reads the kept prefixes again, packed. It serves any
    number of tokens."""

    holds_model = True

    def __init__(self, model: Any, cache: StateCache, tokens: int):
        self.model, self.cache = model, cache
        self._tokens: Tensor | None = None

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        self._tokens, self._copy = tokens, self.cache.clone()
        return self.model(tokens, cache_params=self._copy).logits

    @torch.no_grad()
    def commit(self, kept: Sequence[int]) -> None:
        read = 0 if self._tokens is None else self._tokens.shape[1]
        require_read(kept, read)
        tokens, self._tokens = self._tokens, None
        if not any(kept):
            return
        assert tokens is not None
        seen = self.cache.get_seq_length()
        if whole := [i for i, m in enumerate(kept) if m == read]:
            self.cache.copy_(self._copy, whole, whole)
        if some := [i for i, m in enumerate(kept) if 0 < m < read]:
            states = self.cache.select(some)
            prefill_states(self.model, [tokens[i, : kept[i]] for i in some], states)
            self.cache.copy_(states, list(range(len(some))), some)
        self.cache.advance(seen + max(kept) - self.cache.get_seq_length())

    def reload(self) -> None:
        self._tokens = None
