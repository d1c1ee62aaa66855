"""Draft verification: logits after several proposed tokens, then a commit of the prefix that is kept.

A Mamba state has no entry per token, so it cannot be truncated as a KV cache can. A verifier therefore reads the draft
without writing the state, and stores the inputs of every layer's recurrence. `commit` of m tokens then repeats only the
recurrences over m of those inputs, without the large projections. Where that is not possible (several rows, unknown
layers), the draft runs on a copy of the states, and the kept prefix is read again.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from mambakit.decoding import native_step
from mambakit.decoding.cuda_graph import CapturedGraph, why_not_captured
from mambakit.decoding.eligibility import mixer_eps, why_not_by_layers
from mambakit.decoding.graph_step import verification_step
from mambakit.decoding.prefill import prefill_states
from mambakit.modules import MambaCache, StateCache
from mambakit.ops import causal_conv1d, selective_scan, selective_scan_
from mambakit.ops.decode.cpu_verify import VerifyStep

# softplus of this step size is exactly 0, so the recurrence leaves its state unchanged, bit for bit.
_NO_STEP = -1e4


class Verifier(Protocol):
    """Verifies drafts against a cache of one row."""

    def __call__(self, tokens: list[int]) -> Tensor:
        """(t, v) logits after each of t tokens; the cache is unchanged."""

    def commit(self, m: int) -> None:
        """Advance the cache by the first m tokens of the draft.

        Raises:
            ValueError: m is more than the tokens verified since the last commit.
        """

    def reload(self) -> None:
        """The cache was changed by something other than `commit`: read it again, and forget the draft."""


# -- one row, fastest first --------------------------------------------------------------------------------------------


def why_not_native(model: Any, tokens: int, *, states: Any = None) -> str | None:
    """Why `NativeVerifier` cannot verify drafts of ``tokens`` tokens, or None where it can."""
    return native_step.why_not(model, 1, states=states)


def why_not_captured_layers(model: Any, tokens: int, *, states: Any = None) -> str | None:
    """Why `CapturedVerifier` cannot serve, or None where it can."""
    return why_not_captured(model) or why_not_by_layers(model)


def why_not_layers(model: Any, tokens: int, *, states: Any = None) -> str | None:
    """Why `LayersVerifier` cannot serve, or None where it can."""
    return why_not_by_layers(model)


def _require_read(m: int, read: int) -> None:
    if not 0 <= m <= read:
        raise ValueError(f"commit of {m} tokens, but {read} were read since the last commit")


class NativeVerifier:
    """One call into the native library, with the bits of token-by-token decoding."""

    def __init__(self, model: Any, cache: MambaCache, tokens: int):
        layers, head = native_step.native_weights(model)
        self._embeddings, self._cache = model.backbone.embeddings, cache
        self._step = VerifyStep(
            layers, model.backbone.norm_f.weight, head, model.config.layer_norm_epsilon,
            cache.conv_states, cache.ssm_states, tokens, mixer_eps(model),
        )  # fmt: skip
        self._read = 0

    def __call__(self, tokens: list[int]) -> Tensor:
        self._read = len(tokens)
        return self._step(self._embeddings(torch.tensor(tokens, dtype=torch.int64, device="cpu"))).clone()

    def commit(self, m: int) -> None:
        _require_read(m, self._read)
        self._read = 0
        self._step.commit(m)
        self._cache.advance(m)

    def reload(self) -> None:
        self._read = 0


class PersistentVerifier:
    """The persistent kernel, with the bits of its decoding.

    All texts of a model share one `VerificationStep`. A verifier loads its own state if another's is in it.
    """

    def __init__(self, model: Any, cache: StateCache, tokens: int):
        self._step, self._cache, self._read = verification_step(model, tokens), cache, 0

    @torch.no_grad()
    def __call__(self, tokens: list[int]) -> Tensor:
        self._read = len(tokens)
        if self._step.holder is not self:
            self._step.load(self._cache, self)
        return self._step(tokens).clone()

    @torch.no_grad()
    def commit(self, m: int) -> None:
        _require_read(m, self._read)
        if self._step.holder is not self:
            raise RuntimeError("another text was verified between these tokens and their commit")
        self._read = 0
        self._step.keep(m, self._cache)

    def reload(self) -> None:
        self._read = 0
        if self._step.holder is self:
            self._step.holder = None


class PackedVerifier:
    """Verifies drafts of any number of rows by the model's forward on a copy of the states; `commit` reads the kept
    prefixes again, packed.

    Args:
        cache: of b rows; `commit` updates it in place.
    """

    def __init__(self, model: Any, cache: StateCache):
        self.model, self.cache = model, cache
        self._tokens: Tensor | None = None

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """(b, t, v) logits after each of ``tokens`` (b, t); the cache is unchanged."""
        self._tokens, self._copy = tokens, self.cache.clone()
        return self.model(tokens, cache_params=self._copy).logits

    @torch.no_grad()
    def commit(self, kept: list[int]) -> None:
        """Advance row i of the cache by its first ``kept[i]`` tokens. The cache's length grows by their maximum."""
        read = 0 if self._tokens is None else self._tokens.shape[1]
        for m in kept:
            _require_read(m, read)
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


class ForwardVerifier:
    """`PackedVerifier` with one row."""

    def __init__(self, model: Any, cache: StateCache, tokens: int):
        self._model, self._packed = model, PackedVerifier(model, cache)

    def __call__(self, tokens: list[int]) -> Tensor:
        return self._packed(torch.tensor([tokens], dtype=torch.int64, device=self._model.device))[0]

    def commit(self, m: int) -> None:
        self._packed.commit([m])

    def reload(self) -> None:
        self._packed.reload()


class LayersVerifier:
    """Calls the model's own projections and norms, and the ops that leave the state unchanged."""

    def __init__(self, model: Any, cache: StateCache, tokens: int):
        self.model, self.cache = model, cache
        self._inputs: list[tuple[Tensor, tuple]] = []  # per layer: those of the convolution and of the scan
        self._read = 0

    @torch.no_grad()
    def __call__(self, tokens: list[int]) -> Tensor:
        self._read = len(tokens)
        return self._verify(torch.tensor([tokens], dtype=torch.int64, device=self.model.device))

    @torch.no_grad()
    def commit(self, m: int) -> None:
        _require_read(m, self._read)
        self._read = 0
        self._replay(torch.tensor([m], dtype=torch.int64, device=self.model.device))
        self.cache.advance(m)

    def reload(self) -> None:
        self._read = 0

    def _verify(self, ids: Tensor) -> Tensor:
        """(1, t) ids -> (t, v) logits."""
        backbone = self.model.backbone
        x = backbone.embeddings(ids)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        residual, self._inputs = None, []
        for i, block in enumerate(backbone.layers):
            stream = wide if block.residual_in_fp32 else block.norm.weight.dtype
            y, residual = block.norm(x, residual, stream)
            m = block.mixer
            conv_input, z = m.in_proj(y).chunk(2, -1)  # (1, t, d) each
            conv = (m.conv1d.weight.squeeze(1), m.conv1d.bias, m.conv_activation)
            conv_state, ssm_state = self.cache.memory(i)
            u, _ = causal_conv1d(conv_input, *conv, initial_state=conv_state)
            scan_inputs = m._scan_inputs(u, z)
            y, _ = selective_scan(*scan_inputs, initial_state=ssm_state)
            x = m.out_proj(y)
            self._inputs.append((conv_input, scan_inputs))
        x, _ = backbone.norm_f(x, residual, wide if self.model.config.residual_in_fp32 else None)
        logits = self.model.lm_head(x)[0]
        return logits if logits.dtype == torch.float64 else logits.float()

    def _replay(self, m: Tensor) -> None:
        """Run the recurrences over the first m (1,) tokens. Shapes do not depend on m, as a CUDA graph requires."""
        for i, (conv_input, (u, delta, *rest)) in enumerate(self._inputs):
            conv_state, ssm_state = self.cache.memory(i)
            windows = torch.cat([conv_state, conv_input.transpose(1, 2).to(conv_state.dtype)], 2)  # (1, d, k - 1 + t)
            conv_state.copy_(
                windows.index_select(2, m + torch.arange(conv_state.shape[2], dtype=torch.int64, device=m.device))
            )
            kept = torch.arange(delta.shape[1], dtype=torch.int64, device=m.device) < m
            selective_scan_(u, torch.where(kept[:, None], delta, _NO_STEP), *rest, state=ssm_state)


class CapturedVerifier(LayersVerifier):
    """`LayersVerifier` as two CUDA graphs for a fixed number of tokens; shorter drafts are padded, and only they are
    kept."""

    def __init__(self, model: Any, cache: MambaCache, tokens: int):
        super().__init__(model, cache, tokens)
        self._ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
        self._kept = torch.zeros(1, dtype=torch.long, device=model.device)
        with torch.no_grad():
            self._verifying = CapturedGraph(lambda: self._verify(self._ids), model.device, warm_ups=2)
            # The warm-up replays 0 tokens, so the state is unchanged.
            self._replaying = CapturedGraph(lambda: self._replay(self._kept), model.device, warm_ups=2)

    def __call__(self, tokens: list[int]) -> Tensor:
        self._read = len(tokens)
        filled = tokens + tokens[-1:] * (self._ids.shape[1] - len(tokens))
        self._ids.copy_(torch.tensor([filled], dtype=torch.int64, device="cpu"), non_blocking=True)
        self._verifying.replay()
        return self._verifying.result[: len(tokens)].clone()

    def commit(self, m: int) -> None:
        _require_read(m, self._read)
        self._read = 0
        self._kept.fill_(m)
        self._replaying.replay()
        self.cache.advance(m)
