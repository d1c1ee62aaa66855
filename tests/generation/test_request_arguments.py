"""Arguments of requests and streams are checked at once, and copied, so that a caller may change and reuse them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from mambakit.generation.engine import Engine, Request
from mambakit.generation.prefix_cache import PrefixCache
from mambakit.generation.speculative import SpeculativeStream
from mambakit.generation.stream import Sampling, Stream
from tests.generation.test_inference_mode import PROMPT, Letters, untied

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def model():
    return untied()


def alone(model, prompt=PROMPT, sampling=None, count=6) -> list[int]:
    return Engine(model, 1).write([Request(prompt.clone(), sampling or Sampling(seed=1), count)])[0].tokens


@pytest.mark.parametrize("make", [torch.clone, lambda ids: np.array(ids), lambda ids: ids.to(torch.int32)])
def test_one_buffer_for_many_prompts(model, make):
    """In one share, where texts of the same prompt share a prefill; the buffer ends up with an unknown token."""
    engine, buffer, requests = Engine(model, 2), make(PROMPT), []
    prompts = [PROMPT, PROMPT.flip(0), PROMPT + 1]
    for prompt in prompts:
        buffer[:] = make(prompt)
        requests.append(engine.submit(Request(buffer, Sampling(seed=1), 6, share=("a",))))
    buffer[:] = 999
    for _ in engine.run():
        pass
    assert [(r.tokens, r.error) for r in requests] == [(alone(model, p), "") for p in prompts]


def test_a_prefix_cache_is_told_the_prompt_that_was_read(model):
    buffer, cache = PROMPT.clone(), PrefixCache(model, chunk_size=2)
    engine = Engine(model, prefix_cache=cache, read_seconds=60)
    request = engine.submit(Request(buffer, Sampling(seed=1), 6))
    engine.step()
    buffer += 1
    request.tokens.clear()
    for _ in engine.run():
        pass
    follower = torch.cat([PROMPT + 1, PROMPT])
    assert engine.write([Request(follower, Sampling(seed=1), 6)])[0].tokens == alone(model, follower)
    assert follower.shape[0] > cache.statistics.tokens_saved == 0


def test_a_context_is_copied(model):
    sampling, context = Sampling(seed=1, repetition_penalty=1.5), torch.tensor([7, 8])
    expected = Engine(model).write([Request(PROMPT, sampling, 6, context=context.clone())])[0].tokens
    request = Request(PROMPT, sampling, 6, context=context)
    stream = Stream(model, Letters(), PROMPT, sampling, 6, context=context)
    context[:] = 999
    assert Engine(model).write([request])[0].tokens == expected
    assert list(stream)
    assert stream.tokens == expected


@pytest.mark.parametrize("kind", [Request, Stream, SpeculativeStream])
@pytest.mark.parametrize(
    "context", [[], (), np.array([]), torch.tensor([]), [7, 8], np.array([7, 8]), torch.tensor([7, 8])]
)
def test_contexts(model, kind, context):
    sampling = Sampling(0, repetition_penalty=1.5)
    ids = torch.tensor([int(i) for i in context], dtype=torch.int64)
    expected = Engine(model).write([Request(PROMPT, sampling, 6, context=ids)])[0].tokens
    if kind is Request:
        found = Engine(model).write([Request(PROMPT, sampling, 6, context=context)])[0].tokens
    else:
        stream = kind(model, Letters(), PROMPT, sampling, 6, context=context)
        list(stream)
        found = stream.tokens
    assert found == expected


@pytest.mark.parametrize(
    ("context", "error", "message"),
    [
        ([-1], ValueError, "context has token -1"), ([999], ValueError, "context has token 999"),
        ([0.5], TypeError, "whole numbers"), ([[1]], ValueError, "expected .l,. with l >= 0"),
        ("ab", TypeError, "context is"), (7, TypeError, "context is"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "make",
    [
        lambda m, context: Engine(m).submit(Request(PROMPT, context=context)),
        lambda m, context: Stream(m, Letters(), PROMPT, context=context),
        lambda m, context: SpeculativeStream(m, Letters(), PROMPT, context=context),
    ],
)
def test_contexts_that_are_none(model, make, context, error, message):
    """On a GPU an index beyond a table would end the process."""
    with pytest.raises(error, match=message):
        make(model, context)


def test_one_object_for_many_samplings(model):
    sampling, engine = Sampling(seed=1, logit_bias={3: 2.0}), Engine(model, 3)
    requests = []
    for temperature in (0.5, 1.0, 2.0):
        sampling.temperature = temperature
        requests.append(engine.submit(Request(PROMPT, sampling, 6)))
    sampling.logit_bias[3] = "none"
    for _ in engine.run():
        pass
    expected = [alone(model, sampling=Sampling(t, seed=1, logit_bias={3: 2.0})) for t in (0.5, 1.0, 2.0)]
    assert [r.tokens for r in requests] == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.tokens.clear(), lambda r: setattr(r, "max_new_tokens", "many"),
        lambda r: setattr(r, "sampling", None), lambda r: setattr(r.sampling, "temperature", "hot"),
        lambda r: setattr(r.sampling, "repetition_penalty", None), lambda r: setattr(r, "share", [1]),
        lambda r: setattr(r, "context", "before"),
    ],
)  # fmt: skip
def test_a_request_that_is_changed_while_it_runs(model, change):
    """Taking tokens out of it as they come, say: neither it nor its neighbours are another text, or none, for that."""
    engine = Engine(model, 3, read_seconds=60)  # the first step reads both prompts
    changed, other = (engine.submit(Request(PROMPT, Sampling(seed=1), 6)) for _ in range(2))
    written = [token for request, token in engine.step() if request is changed]
    change(changed)
    newcomer = engine.submit(Request(PROMPT, Sampling(seed=1, top_k=3), 4))  # the batch is another one
    written += [token for request, token in engine.run() if request is changed]
    assert written == other.tokens == alone(model)
    assert newcomer.tokens == alone(model, sampling=Sampling(seed=1, top_k=3), count=4)


@pytest.mark.parametrize("change", [{"temperature": "hot"}, {"repetition_penalty": None}, {"top_k": -1}])
def test_a_sampling_that_is_changed_before_its_turn_ends_its_text_alone(model, change):
    engine = Engine(model, 1)
    wrong, right = (engine.submit(Request(PROMPT, Sampling(seed=1, repetition_penalty=1.0), 6)) for _ in range(2))
    for name, value in change.items():
        setattr(wrong.sampling, name, value)
    for _ in engine.run():
        pass
    if next(iter(change.values())) is None:  # the default
        assert wrong.tokens == alone(model)
    else:
        assert wrong.finish_reason == "error"
        assert next(iter(change)) in wrong.error
    assert right.tokens == alone(model)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: Request(PROMPT, share="abc"), TypeError, 'share is "abc"; give a tuple'),
        (lambda m: Request(PROMPT, share=None), TypeError, "share is null"),
        (lambda m: Request(PROMPT, share=("a", [])), TypeError, "unhashable"),
        (lambda m: Request(PROMPT, state="abc"), TypeError, "the state is a str; give a MambaCache"),
        (lambda m: Engine(m).submit(None), TypeError, "NoneType cannot be written; give a Request"),
        (lambda m: Engine(m).write([PROMPT]), TypeError, "Tensor cannot be written"),
        (lambda m: Stream(m, Letters(), PROMPT, sampling=0.7), TypeError, "sampling is 0.7; give a SamplingParams"),
    ],
)
def test_wrong_arguments(model, make, error, message):
    with pytest.raises(error, match=message):
        make(model)


@pytest.mark.parametrize("layers", [-1, 1])
def test_a_state_of_more_or_fewer_layers_writes_nothing(model, layers):
    config = copy.deepcopy(model.config)
    config.num_hidden_layers += layers
    other = type(model)(config).eval()
    wrong, right = (
        Request(PROMPT, Sampling(seed=1), 6, state=other.backbone.new_cache(1)),
        Request(PROMPT, Sampling(seed=1), 6),
    )
    engine = Engine(model)
    for request in (wrong, right):
        engine.submit(request)
    for _ in engine.run():
        pass
    assert (wrong.tokens, wrong.finish_reason) == ([], "error")
    assert "of another model" in wrong.error
    assert right.tokens == alone(model)
