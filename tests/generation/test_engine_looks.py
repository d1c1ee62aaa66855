"""An engine that looks at several tokens at once, and texts that it writes together as streams: the same texts."""

from __future__ import annotations

import pytest
import torch

from mambakit.decoding.loop import HostCopy, SlotLoop
from mambakit.generation import engine_states
from mambakit.generation.engine import Engine, Request
from mambakit.generation.engine_stream import stream_together
from mambakit.generation.prefix_cache import PrefixCache
from mambakit.generation.stream import SamplingParams, Stream
from tests.decoding.eager_graph import WAYS, decode_by
from tests.models.configurations import pair

pytestmark = pytest.mark.filterwarnings("ignore")
PARAMS = [
    SamplingParams(0), SamplingParams(seed=1), SamplingParams(0.8, top_p=0.9, seed=2), SamplingParams(0, top_k=3),
    SamplingParams(seed=3, repetition_penalty=1.3, frequency_penalty=0.5),
]  # fmt: skip
PROMPTS = (torch.arange(30, dtype=torch.int64) * 7 % 53 + 1).reshape(5, 6)


class Letters:
    """Each token is a letter."""

    def decode(self, tokens: list[int], **_) -> str:
        return "".join(chr(65 + t) for t in tokens)


@pytest.fixture
def model():
    model = pair("untied")[0]
    model.generation_config.eos_token_id = [3, 9]
    return model


def requests(**options) -> list[Request]:
    return [
        Request(row, params, max_new_tokens=11 + 3 * i, **options)
        for i, (row, params) in enumerate(zip(PROMPTS, PARAMS, strict=True))
    ]


@pytest.mark.parametrize("way", WAYS)
def test_several_tokens_between_two_looks(model, monkeypatch, way):
    decode_by(way, monkeypatch)
    expected = Engine(model, 3).write(requests())
    counts, launch = [], SlotLoop.launch
    monkeypatch.setattr(SlotLoop, "launch", lambda self, count: counts.append(count) or launch(self, count))
    found = Engine(model, 3, tokens_per_look=6).write(requests())
    assert [(r.tokens, r.finish_reason) for r in found] == [(r.tokens, r.finish_reason) for r in expected]
    assert max(counts) == 6


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("every", [1, 4, 32])
def test_states_at_the_end_of_texts(model, monkeypatch, way, every):
    """A slot reads beyond the end of its text; what is kept of it has not. Also where texts take turns for slots."""
    decode_by(way, monkeypatch)
    monkeypatch.setattr(engine_states, "_EVERY", every)
    counts, launch = [], SlotLoop.launch
    monkeypatch.setattr(SlotLoop, "launch", lambda self, count: counts.append(count) or launch(self, count))
    cache = PrefixCache(model, chunk_size=4)
    engine = Engine(model, 2, tokens_per_look=6, slice_tokens=3, prefix_cache=cache)
    written = requests(keep_state=True, keep_states=True)
    for number, request in enumerate(written):
        request.share = (number % 3,)
    for request in engine.write(written):
        text = torch.cat([request.prompt_ids, torch.tensor(request.tokens)])
        read = len(text) - (request.finish_reason == "length")
        lengths = [state.get_seq_length() for state in request.states]
        assert lengths == sorted(set(lengths), reverse=True)
        assert len(request.prompt_ids) == lengths[-1], "the state after the prompt is among them"
        assert lengths[0] > read - 2 * every - 12, "it is a few tokens short at most"
        assert request.final_state.get_seq_length() == read
        for state in (request.final_state, *request.states):
            expected = model(text[None, : state.get_seq_length()], use_cache=True).cache_params
            assert torch.allclose(state.ssm_states, expected.ssm_states, atol=1e-5)
            assert torch.allclose(state.conv_states, expected.conv_states, atol=1e-5)
        known, found = cache.lookup(torch.cat([text, text[:1]]))
        assert known >= lengths[0]
        expected = model(text[None, :known], use_cache=True).cache_params
        assert torch.allclose(found.ssm_states, expected.ssm_states, atol=1e-5)
    assert max(counts) > 1


def test_the_next_look_is_launched_before_the_tokens_of_the_last_are_handled(model, monkeypatch):
    events, launch, wait = [], SlotLoop.launch, HostCopy.wait
    monkeypatch.setattr(SlotLoop, "launch", lambda self, count: events.append(count) or launch(self, count))
    monkeypatch.setattr(HostCopy, "wait", lambda self: events.append("wait") or wait(self))
    model.generation_config.eos_token_id = None
    engine = Engine(model, 1, read_seconds=60, tokens_per_look=4)  # the first step reads the prompt
    (text,) = [engine.submit(request) for request in requests()[:1]]
    steps = [len(engine.step()) for _ in range(4)]
    assert steps == [1, 4, 4, 2], "the first look is launched, then each look returns the one before"
    first = ["wait"]
    assert events == [*first, 4, 4, "wait", 2, "wait", "wait"], "and no token is read beyond the last"
    assert len(text.tokens) == text.max_new_tokens


@pytest.mark.parametrize("stop", [(), ("G", "never this")])
def test_streams_together(model, stop):
    """As each text alone, pieces, stop strings and states; however late a stream is read."""
    alone = [Stream(model, Letters(), r.prompt_ids, r.sampling, r.max_new_tokens, stop) for r in requests()]
    texts = ["".join(stream) for stream in alone]
    streams = stream_together(Engine(model, 5), Letters(), requests(keep_state=True), stop)
    for stream, text, one in zip(streams, texts, alone, strict=True):
        assert "".join(stream) == text == stream.text
        assert (stream.tokens, stream.finish_reason) == (one.tokens, one.finish_reason)
        assert stream.cache.get_seq_length() == one.cache.get_seq_length()
        assert torch.allclose(stream.cache.ssm_states, one.cache.ssm_states, atol=1e-5)


def test_an_error_of_one_is_raised_by_its_stream(model):
    with torch.no_grad():
        model.backbone.embeddings.weight[60] = float("nan")
    prompts = [Request(torch.tensor([1, 2]), max_new_tokens=4), Request(torch.tensor([1, 60]), max_new_tokens=4)]
    good, bad = stream_together(Engine(model, 2), Letters(), prompts)
    assert "".join(good)
    with pytest.raises(RuntimeError, match="no token can be chosen"):
        "".join(bad)
