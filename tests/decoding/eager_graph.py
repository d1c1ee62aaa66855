"""The decoders on a CPU. `graph` has the control flow of a CUDA graph, but each replay runs the captured function
again."""

from __future__ import annotations

import pytest
import torch

from mambakit.decoding import batch, native_step, registry
from mambakit.decoding.graph_step import GraphDecoder
from mambakit.decoding.registry import DECODERS, FORWARD, DecoderKind
from mambakit.models import generate
from mambakit.ops._backends import native

WAYS = ["native", "forward", "graph"]


class EagerGraph(GraphDecoder):
    """`GraphDecoder` without a device."""

    def __init__(self, model, states, run=None, capacity: int = 64):
        self.model, self.states, self.capacity, self.holder = model, states, capacity, None
        self.rows = rows = states.max_batch_size
        self.tokens = torch.zeros(rows, dtype=torch.int64)
        self.history = torch.full((rows, capacity), -1)
        self.position = torch.zeros(1, dtype=torch.int64)
        self.logits = torch.zeros(rows, model.config.vocab_size)

    def __call__(self) -> None:
        hidden = self.model.backbone(self.tokens[:, None], cache_params=self.states).last_hidden_state
        self.logits.copy_(self.model.lm_head(hidden)[:, -1])
        self.tokens.copy_(self.logits.argmax(-1))
        at = int(self.position.clamp(max=self.capacity - 1))
        self.history[:, at] = self.tokens
        self.position += 1


def native_serves(model, cache) -> bool:
    """Whether a token of this model, from this state, is one call into the native library."""
    return native_step.why_not(model, cache.max_batch_size, states=cache) is None


def decode_by(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the registry hold this decoder alone. With `graph`, ended texts are checked for as rarely as on a GPU."""
    if way == "native":
        if native.describe()["isa"] is None:
            pytest.skip("no native library")
        return
    monkeypatch.setattr(registry, "DECODERS", tuple(kind for kind in DECODERS if not kind.elastic))
    if way == "graph":
        monkeypatch.setattr(registry, "why_not_captured", lambda *_, **__: None)
        eager = DecoderKind("eager", lambda *_, **__: None, EagerGraph, captured=True)
        monkeypatch.setattr(registry, "DECODERS", (eager, FORWARD))
        monkeypatch.setattr(generate, "graphs_serve", lambda *_: True)
        monkeypatch.setitem(batch._TOKENS_PER_LOOK, "cpu", 16)
