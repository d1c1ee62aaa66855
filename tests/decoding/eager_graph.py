"""The decoders on a CPU. `graph` has the control flow of a CUDA graph, but each replay runs the captured function
again."""

from __future__ import annotations

import contextlib
import weakref

import pytest
import torch

from mambakit.decoding import batch, bucket_graphs, native_step, prefill, registry, round_graphs, verify_layers
from mambakit.decoding.graph_step import GraphDecoder
from mambakit.decoding.registry import DECODERS, FORWARD, DecoderKind, VerifierKind
from mambakit.generation import engine_prompts, reading
from mambakit.models import generate
from mambakit.ops._backends import native

WAYS = ["native", "forward", "graph"]


class EagerGraph(GraphDecoder):
    """`GraphDecoder` without a device."""

    def __init__(self, model, states, run=None, capacity: int = 64):
        self.model, self.states, self.capacity, self.holder = model, states, capacity, None
        self.verifiers: dict = {}
        self.rounds = weakref.WeakKeyDictionary()
        self.rows = rows = states.max_batch_size
        self.tokens = torch.zeros(rows, dtype=torch.int64)
        self.history = torch.full((rows, capacity), -1)
        self.position = torch.zeros(1, dtype=torch.int64)
        self.logits = torch.zeros(rows, model.config.vocab_size)

    def __call__(self) -> None:
        self.launch(self.model)

    def launch(self, model) -> None:
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


class EagerCapture:
    """A captured graph whose replays run the function again; it is run when it is captured, too."""

    def __init__(self, run, device, **_):
        self._run = run
        self.result = run()

    def replay(self):
        again = self._run()
        if again is not None:
            self.result.copy_(again)


def speculate_on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have rounds of speculation run as on a GPU, by graphs."""
    decode_by("graph", monkeypatch)
    for module in (verify_layers, round_graphs):
        monkeypatch.setattr(module, "CapturedGraph", EagerCapture)
    kind = VerifierKind("eager", lambda *_, **__: None, verify_layers.CapturedVerifier, True)
    monkeypatch.setattr(registry, "VERIFIERS", (kind, registry.VERIFIERS[-1]))


class _NoTiming:
    """A part's time on a GPU, where there is none."""

    def __init__(self, device, tokens):
        self.tokens = tokens

    def end(self):
        pass

    def seconds(self):
        return 0.0


class _EagerReplay:
    """A captured graph's control flow: each replay runs the function again."""

    def __init__(self, run, device, shared=None):
        self._run = run

    def replay(self):
        self.result = self._run()


def read_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have single prompts, and those of engines, be read as by captured graphs."""
    for module in (prefill, generate, engine_prompts):
        monkeypatch.setattr(module, "reads_in_buckets", lambda model, rows: rows == 1 and model.is_its_layers())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(reading, "PartTiming", _NoTiming)
    monkeypatch.setattr(bucket_graphs, "CapturedGraph", _EagerReplay)
