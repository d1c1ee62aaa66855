"""Draft verification by a model's own layers: its projections and norms, and the ops that leave states unchanged.

`LayersVerifier` serves every model of Mamba-1 layers on any device; `CapturedVerifier` is the same as two CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.cuda_graph import CapturedGraph, why_not_captured
from mambakit.decoding.eligibility import why_not_by_layers
from mambakit.decoding.transfers import integers
from mambakit.decoding.verify import require_read
from mambakit.modules import StateCache
from mambakit.ops import causal_conv1d, selective_scan, selective_scan_

# softplus of this step size is exactly 0, so the recurrence leaves its state unchanged, bit for bit.
_NO_STEP = -1e4


def why_not_captured_layers(model: Any, rows: int, tokens: int, *, states: Any = None) -> str | None:
    """Why `CapturedVerifier` cannot serve, or None where it can."""
    return why_not_captured(model) or why_not_by_layers(model)


def why_not_layers(model: Any, rows: int, tokens: int, *, states: Any = None) -> str | None:
    """Why `LayersVerifier` cannot serve, or None where it can."""
    return why_not_by_layers(model)


class LayersVerifier:
    """Calls the model's own projections and norms, and the ops that leave the state unchanged."""

    holds_model = True

    def __init__(self, model: Any, cache: StateCache, tokens: int):
        self.model, self.cache = model, cache
        self.inputs: list[tuple[Tensor, tuple]] = []  # per layer: those of the convolution and of the scan
        self._read = 0

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        self._read = tokens.shape[1]
        return self.logits(tokens)

    @torch.no_grad()
    def commit(self, kept: Sequence[int]) -> None:
        require_read(kept, self._read)
        self._read = 0
        self.replay(integers(self.model.device, kept))
        self.cache.advance(max(kept))

    def reload(self) -> None:
        self._read = 0

    def logits(self, ids: Tensor) -> Tensor:
        """(b, t) ids -> (b, t, v) logits."""
        backbone = self.model.backbone
        x = backbone.embeddings(ids)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        residual, self.inputs = None, []
        for i, block in enumerate(backbone.layers):
            stream = wide if block.residual_in_fp32 else block.norm.weight.dtype
            y, residual = block.norm(x, residual, stream)
            m = block.mixer
            conv_input, z = m.in_proj(y).chunk(2, -1)  # (b, t, d) each
            conv = (m.conv1d.weight.squeeze(1), m.conv1d.bias, m.conv_activation)
            conv_state, ssm_state = self.cache.memory(i)
            u, _ = causal_conv1d(conv_input, *conv, initial_state=conv_state)
            scan_inputs = m._scan_inputs(u, z)
            y, _ = selective_scan(*scan_inputs, initial_state=ssm_state)
            x = m.out_proj(y)
            self.inputs.append((conv_input, scan_inputs))
        x, _ = backbone.norm_f(x, residual, wide if self.model.config.residual_in_fp32 else None)
        logits = self.model.lm_head(x)
        return logits if logits.dtype == torch.float64 else logits.float()

    def replay(self, m: Tensor) -> None:
        """`_replay` of the last drafts."""
        _replay(self.cache, self.inputs, m)


def _replay(cache: StateCache, inputs: list[tuple[Tensor, tuple]], m: Tensor) -> None:
    """Run the recurrences over each row's first m (b,) tokens. Shapes do not depend on m, as a CUDA graph requires."""
    for i, (conv_input, (u, delta, A, B, *rest)) in enumerate(inputs):
        conv_state, ssm_state = cache.memory(i)
        d, width = conv_state.shape[1:]
        windows = torch.cat([conv_state, conv_input.transpose(1, 2).to(conv_state.dtype)], 2)  # (b, d, k - 1 + t)
        at = m[:, None] + torch.arange(width, dtype=torch.int64, device=m.device)
        conv_state.copy_(windows.gather(2, at[:, None].expand(-1, d, -1)))
        kept = (torch.arange(delta.shape[1], dtype=torch.int64, device=m.device) < m[:, None])[:, :, None]
        # What follows the kept tokens may not be a number.
        u, delta, B = torch.where(kept, u, 0), torch.where(kept, delta, _NO_STEP), torch.where(kept, B, 0)
        selective_scan_(u, delta, A, B, *rest, state=ssm_state)


class CapturedVerifier:
    """`LayersVerifier` as two CUDA graphs for a fixed number of tokens; shorter drafts are padded, and only they are
    kept."""

    holds_model = False

    def __init__(self, model: Any, cache: StateCache, tokens: int):
        rows, device, self._cache, self._read = cache.max_batch_size, model.device, cache, 0
        self.tokens = torch.zeros(rows, tokens, dtype=torch.long, device=device)
        self.kept = torch.zeros(rows, dtype=torch.long, device=device)
        layers = LayersVerifier(model, cache, tokens)
        with torch.no_grad():
            self._verifying = CapturedGraph(lambda: layers.logits(self.tokens), device, warm_ups=2)
            # The warm-up replays 0 tokens, so the state is unchanged.
            self._replaying = CapturedGraph(lambda: layers.replay(self.kept), device, warm_ups=2)
        self._inputs = layers.inputs  # the graphs write and read them
        self._launched: list[tuple[Tensor, tuple]] = []  # the inputs of the last `launch`

    def __call__(self, tokens: Tensor) -> Tensor:
        self._read = tokens.shape[1]
        self.tokens[:, : self._read] = tokens
        self._verifying.replay()
        return self._verifying.result[:, : self._read]

    def commit(self, kept: Sequence[int]) -> None:
        require_read(kept, self._read)
        self._read = 0
        self.kept.copy_(integers(self.kept.device, kept))
        self._replaying.replay()
        self._cache.advance(max(kept))

    def launch(self, model: Any) -> Tensor:
        layers = LayersVerifier(model, self._cache, self.tokens.shape[1])
        logits = layers.logits(self.tokens)
        self._launched = layers.inputs
        return logits

    def advance(self) -> None:
        _replay(self._cache, self._launched, self.kept)

    def hold(self) -> None:
        """The layers read the cache's own memory."""

    def reload(self) -> None:
        self._read = 0
