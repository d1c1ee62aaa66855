"""Objects that keep tensors, with `torch.inference_mode` on and off between calls: same texts, no errors."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch

from mambakit.generation.drafters import DraftModel
from mambakit.generation.engine import Engine, Request
from mambakit.generation.prefix_cache import PrefixCache
from mambakit.generation.speculative import SpeculativeStream
from mambakit.generation.stream import Sampling, Stream
from tests.decoding.eager_graph import WAYS, decode_by
from tests.models.configurations import pair

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPT = torch.tensor([3, 14, 15, 9, 26])
SAMPLINGS = [
    Sampling(0), Sampling(seed=1), Sampling(seed=2, top_k=5, repetition_penalty=1.3),
    Sampling(0, frequency_penalty=0.5),
]  # fmt: skip


class Letters:
    """A tokenizer as far as streams need it."""

    @staticmethod
    def decode(ids, **_) -> str:
        return "".join(chr(65 + i) for i in ids)


def untied(device: str = "cpu"):
    model = pair("untied")[0].to(device)
    model.generation_config.eos_token_id = None
    return model


def turns(pattern: str):
    """A context for each call: in an inference mode for every "i"."""
    while True:
        for letter in pattern:
            yield torch.inference_mode() if letter == "i" else contextlib.nullcontext()


def requests() -> list[Request]:
    return [Request(PROMPT, s, 10, share=(i,)) for i, s in enumerate(SAMPLINGS)]


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("pattern", ["in", "ni", "iiinnn", "inn"])
@pytest.mark.parametrize("way", WAYS)
def test_an_engine(way, pattern, caching, monkeypatch):
    decode_by(way, monkeypatch)
    model = untied()
    expected = [request.tokens for request in Engine(model, 2).write(requests())]
    cache = PrefixCache(model, chunk_size=2) if caching else None
    engine, found, contexts = Engine(model, 2, 4, prefix_cache=cache, slice_tokens=2), requests(), turns(pattern)
    for request in found:
        with next(contexts):
            engine.submit(request)
            engine.step()
    while any(not request.finish_reason for request in found):
        with next(contexts):
            engine.step()
    assert [(r.tokens, r.error) for r in found] == [(t, "") for t in expected]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("way", WAYS)
def test_a_stream(way, sampling, monkeypatch):
    decode_by(way, monkeypatch)
    model, prompt = untied(), PROMPT
    whole = "".join(Stream(model, Letters(), prompt, sampling, 10))
    pieces, text = iter(Stream(model, Letters(), prompt, sampling, 10)), ""
    for context in turns("iin"):
        with context:
            piece = next(pieces, None)
        if piece is None:
            break
        text += piece
    assert text == whole


def test_a_speculative_stream():
    model, prompt = untied(), PROMPT
    whole = "".join(Stream(model, Letters(), prompt, Sampling(0), 10))
    for drafter in (DraftModel(model), DraftModel(untied())):
        pieces, text = iter(SpeculativeStream(model, Letters(), prompt, Sampling(0), 10, drafter=drafter)), ""
        for context in turns("in"):
            with context:
                piece = next(pieces, None)
            if piece is None:
                break
            text += piece
        assert text == whole


@pytest.mark.cuda
def test_what_a_model_keeps_on_a_gpu():
    """Its graphs are captured at their first and second use, whatever the mode is then."""
    model = untied("cuda")
    ids = torch.stack([PROMPT, PROMPT.flip(0)]).cuda()
    drafter, engine = DraftModel(model), Engine(model, 4)

    def text(kind, **options) -> str:
        return "".join(kind(model, Letters(), ids[0], Sampling(seed=3), 8, **options))

    for write in (
        lambda: model.generate(ids, max_new_tokens=8).tolist(),
        lambda: model.generate(ids[:1], max_new_tokens=8, do_sample=True, seed=1).tolist(),
        lambda: model.generate(ids[:1], max_new_tokens=8, num_beams=3).tolist(),
        lambda: text(Stream),
        lambda: text(SpeculativeStream),
        lambda: text(SpeculativeStream, drafter=drafter),
        lambda: [request.tokens for request in engine.write(requests())],
    ):
        found = []
        for context in itertools.islice(turns("iiinnnii"), 8):
            with context:
                found.append(write())
        assert found == found[:1] * len(found)
