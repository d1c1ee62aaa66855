"""The ways in which rows decode, each on a CPU: `graph` is a graph's control flow with its contents run again at each replay."""

from __future__ import annotations

import pytest
import torch

from mambakit.decoding import loop, step
from mambakit.decoding import slots as rows
from mambakit.decoding.graph_step import GraphStep
from mambakit.models import generate

WAYS = ["native", "forward", "graph"]


class EagerGraph(GraphStep):
    """`GraphStep` without a device."""

    def __init__(self, model, rows: int, capacity: int = 64):
        self.model, self.rows, self.capacity, self.holder = model, rows, capacity, None
        self.cache = model.backbone.new_cache(rows)
        self.tokens = torch.zeros(rows, dtype=torch.int64)
        self.history = torch.full((rows, capacity), -1)
        self.position = torch.zeros(1, dtype=torch.int64)
        self.logits = torch.zeros(rows, model.config.vocab_size)

    def __call__(self) -> torch.Tensor:
        hidden = self.model.backbone(self.tokens[:, None], cache_params=self.cache).last_hidden_state
        self.logits.copy_(self.model.lm_head(hidden)[:, -1])
        self.tokens.copy_(self.logits.argmax(-1))
        at = int(self.position.clamp(max=self.capacity - 1))
        self.history[:, at] = self.tokens
        self.position += 1
        return self.logits


def decode_by(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `SlotPool` take this way. By a graph it is looked as seldom as on a GPU whether texts have ended."""
    if way == "native":
        if step.native.describe()["isa"] is None:
            pytest.skip("no native library")
        return
    monkeypatch.setattr(rows, "native_serves", lambda *_: False)
    monkeypatch.setattr(step, "native_serves", lambda *_: False)
    if way == "graph":
        kept: dict[int, EagerGraph] = {}
        monkeypatch.setattr(rows, "graphs_serve", lambda *_: True)
        monkeypatch.setattr(generate, "graphs_serve", lambda *_: True)
        monkeypatch.setattr(rows, "GraphStep", EagerGraph)
        monkeypatch.setattr(rows, "graph_step", lambda model, n: kept.setdefault(n, EagerGraph(model, n)))
        monkeypatch.setitem(loop._TOKENS_PER_LOOK, "cpu", 16)
