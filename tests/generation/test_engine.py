"""The engine: each text as if it were alone, rows that end and are filled again."""

from __future__ import annotations

import math

import pytest
import torch

from mambakit.decoding.slots import SlotPool
from mambakit.generation.engine import Engine, Request
from mambakit.generation.stream import Sampling
from tests.decoding.eager_graph import WAYS, decode_by
from tests.models.configurations import pair, tokens, worst

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=WAYS)
def model(request, monkeypatch):
    model = pair("untied")[0]  # with tied embeddings these small models write one token for ever
    model.generation_config.eos_token_id = None
    decode_by(request.param, monkeypatch)
    return model


def model_is_native(model) -> bool:
    return SlotPool(model, 1).elastic


def prompts(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [tokens(1, 3 + 5 * i % 17)[0].random_(1, 61, generator=generator) for i in range(count)]


def alone(model, prompt, count, **options):
    out = model.generate(prompt[None], max_new_tokens=count, do_sample=False, eos_token_id=None, **options)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_greedy_texts_are_those_of_generate(model, rows):
    lengths = [7, 1, 12, 3, 9, 2, 5]
    requests = [Request(p, max_new_tokens=n) for p, n in zip(prompts(7), lengths, strict=True)]
    engine = Engine(model, rows, chunk_size=4)
    seen: dict[int, list[int]] = {id(r): [] for r in requests}
    for request in requests:
        engine.submit(request)
    for request, token in engine.run():
        seen[id(request)].append(token)
    for request, prompt, count in zip(requests, prompts(7), lengths, strict=True):
        assert request.tokens == seen[id(request)] == alone(model, prompt, count)
        assert request.finish_reason == "length"


def test_seeded_samples_do_not_depend_on_the_neighbours(model):
    def request(i, prompt):
        return Request(prompt, Sampling(temperature=0.9, top_k=20, repetition_penalty=1.2, seed=i), max_new_tokens=10)

    together = Engine(model, 5).write(request(i, p) for i, p in enumerate(prompts(9)))
    for i, prompt in enumerate(prompts(9)):
        (single,) = Engine(model, 1 if model_is_native(model) else 5).write([request(i, prompt)])
        assert single.tokens == together[i].tokens
    assert len({tuple(r.tokens) for r in together}) > 5


def test_an_end_frees_its_row(model):
    prompt = prompts(1)[0]
    written = alone(model, prompt, 12)
    end = written[5]
    model.generation_config.eos_token_id = end
    first, second = Engine(model, 1).write(
        [Request(prompt, max_new_tokens=12), Request(prompts(2)[1], max_new_tokens=4)]
    )
    assert first.finish_reason == "stop"
    assert first.tokens == written[: written.index(end)]
    assert second.finish_reason in ("length", "stop")


def test_states_go_in_and_come_out(model):
    prompt = tokens(1, 20)[0]
    (first,) = Engine(model, 2).write([Request(prompt[:12], max_new_tokens=5, keep_state=True)])
    read = torch.cat([prompt[:12], torch.tensor(first.tokens[:-1])])
    expected = model(read[None], use_cache=True).cache_params
    assert worst(first.final_state.ssm_states, expected.ssm_states) < 1e-5
    assert worst(first.final_state.conv_states, expected.conv_states) < 1e-5
    assert first.final_state.get_seq_length() == 16
    before = first.final_state.ssm_states.clone()
    more = Request(torch.tensor(first.tokens[-1:]), max_new_tokens=6, state=first.final_state)
    Engine(model, 2).write([more])
    assert first.tokens + more.tokens == alone(model, prompt[:12], 11)
    assert torch.equal(first.final_state.ssm_states, before), "a state that was given stays"


@pytest.mark.parametrize("per_look", [None, 1, 2, 3, 4, 5, 6, 7, 8])
def test_a_state_has_seen_its_own_tokens_alone(model, per_look):
    """However long the others are, whenever its row came, and however far its slot has read beyond its end."""
    lengths = [7, 1, 12, 3, 9, 2]
    requests = Engine(model, 3, chunk_size=4, tokens_per_look=per_look).write(
        Request(p, max_new_tokens=n, keep_state=True) for p, n in zip(prompts(6), lengths, strict=True)
    )
    for request in requests:
        read = torch.cat([request.prompt_ids, torch.tensor(request.tokens[:-1], dtype=torch.int64)])
        expected = model(read[None], use_cache=True).cache_params
        assert worst(request.final_state.ssm_states, expected.ssm_states) < 1e-5
        assert request.final_state.get_seq_length() == len(read)


def test_few_of_many_rows_are_stepped_alone(model, monkeypatch):
    """Where a row's bits are its own; a burst that is over costs nothing more, and the next one finds its rows."""
    sizes = []
    for name in ("step", "likeliest"):
        call = getattr(SlotPool, name)
        monkeypatch.setattr(SlotPool, name, lambda self, *a, f=call: sizes.append(self.size) or f(self, *a))
    engine = Engine(model, 8, read_seconds=math.inf)  # however slow this machine is
    long = engine.submit(Request(prompts(1)[0], max_new_tokens=30))
    burst = [engine.submit(Request(p, max_new_tokens=4 + i)) for i, p in enumerate(prompts(8)[1:])]
    late = Request(prompts(1)[0], Sampling(seed=1, top_k=20), max_new_tokens=6)
    for _ in range(20):
        engine.step()
    alone_by_now = sizes[-1]
    engine.submit(late)
    for _ in engine.run():
        pass
    if model_is_native(model):
        assert (max(sizes), alone_by_now, sizes[-1]) == (8, 1, 1)
    else:
        assert set(sizes) == {8}
    assert long.tokens == alone(model, prompts(1)[0], 30)
    for i, request in enumerate(burst):
        assert request.tokens == alone(model, prompts(8)[1 + i], 4 + i)
    (same,) = Engine(model, 8).write([Request(prompts(1)[0], Sampling(seed=1, top_k=20), max_new_tokens=6)])
    assert late.tokens == same.tokens


@pytest.mark.parametrize("temperature", [0.8, 0])
def test_a_text_without_numbers_ends_alone(model, temperature):
    """One prompt that the model answers with NaN costs its neighbours nothing."""
    with torch.no_grad():
        model.backbone.embeddings.weight[60] = float("nan")

    def request(prompt, seed=3):
        return Request(prompt, Sampling(temperature, seed=seed), max_new_tokens=8, keep_state=True)

    good = [p.clamp(max=59) for p in prompts(4)]
    engine = Engine(model, 3)
    by_themselves = [engine.write([request(p)])[0].tokens for p in good]
    poison = request(torch.tensor([5, 60, 7]))
    requests = [request(good[0]), poison, *map(request, good[1:])]
    for one in requests:
        engine.submit(one)
    assert poison not in [one for one, _ in engine.run()]
    assert (poison.finish_reason, poison.tokens, poison.final_state) == ("error", [], None)
    assert "NaN or infinite" in poison.error
    requests.remove(poison)
    assert [one.tokens for one in requests] == by_themselves
    assert all(one.finish_reason == "length" and not one.error for one in requests)
    with pytest.raises(RuntimeError, match="NaN or infinite, no token can be chosen"):
        engine.write([request(good[0]), request(torch.tensor([60]))])


def test_cancelled_and_submitted_meanwhile(model):
    engine = Engine(model, 2, tokens_per_look=1)
    long, waiting = (engine.submit(Request(p, max_new_tokens=50)) for p in prompts(2))
    waiting.cancel()
    late = None
    for count, (_request, _) in enumerate(engine.run()):
        if count == 3:
            long.cancel()
            late = engine.submit(Request(prompts(3)[2], max_new_tokens=3))
    assert long.finish_reason == waiting.finish_reason == "cancelled"
    assert len(long.tokens) == 4
    assert waiting.tokens == []
    assert late is not None
    assert late.tokens == alone(model, prompts(3)[2], 3)


def test_a_long_prompt_does_not_hold_up_those_who_write(model):
    long_prompt = tokens(1, 40)[0].random_(1, 61, generator=torch.Generator().manual_seed(6))
    engine = Engine(model, 3, chunk_size=4, read_seconds=math.inf, tokens_per_look=1)  # however slow this machine is
    writing = engine.submit(Request(prompts(1)[0], max_new_tokens=30))
    assert [request for request, _ in engine.step()] == [writing, writing]
    long, gone = (engine.submit(Request(long_prompt, max_new_tokens=5)) for _ in range(2))
    for _ in range(9):
        assert [request for request, _ in engine.step()] == [writing]
        assert engine.busy == 2
    assert {request for request, _ in engine.step()} == {writing, long}, "ten chunks of 4"
    engine.step()
    assert engine.busy == 3
    gone.cancel()
    engine.step()
    assert engine.busy == 2, "what is being read is dropped, too"
    for _ in engine.run():
        pass
    assert engine.busy == 0
    assert long.tokens == alone(model, long_prompt, 5)
    assert writing.tokens == alone(model, prompts(1)[0], 30)
    assert (gone.tokens, gone.finish_reason) == ([], "cancelled")


def test_a_penalty_counts_what_the_state_has_read(model):
    prompt = tokens(1, 12)[0]
    state = model(prompt[None, :-1], use_cache=True).cache_params
    sampling = Sampling(temperature=0, repetition_penalty=2.0)
    whole, continued = Engine(model, 2).write(
        [
            Request(prompt, sampling, max_new_tokens=6),
            Request(prompt[-1:], sampling, max_new_tokens=6, state=state, context=prompt[:-1]),
        ]
    )
    assert continued.tokens == whole.tokens


def test_what_makes_no_sense():
    model = pair("plain")[0]
    with pytest.raises(ValueError, match="slots is 0"):
        Engine(model, 0)
    with pytest.raises(ValueError, match=r"expected \(l,\)"):
        Request(torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        Request(torch.zeros(2, dtype=torch.int64), max_new_tokens=0)
    with pytest.raises(ValueError, match="select a row"):
        Request(torch.zeros(2, dtype=torch.int64), state=model.backbone.new_cache(2))


@pytest.mark.cuda
def test_on_a_gpu():
    model = pair("plain")[0].cuda()
    model.generation_config.eos_token_id = None
    requests = Engine(model, 3).write(Request(p, max_new_tokens=8) for p in prompts(7))
    model.cpu()
    for request, prompt in zip(requests, prompts(7), strict=True):
        assert request.tokens == alone(model, prompt, 8)


def test_a_pool_that_grows_and_shrinks_before_the_next_step(model):
    """A text that comes and ends at its first token leaves rows that never stepped."""
    engine, prompt = Engine(model), prompts(1)[0]
    first = engine.submit(Request(prompt, max_new_tokens=9))
    engine.step()
    second, _ = (engine.submit(Request(prompt, max_new_tokens=n)) for n in (9, 1))
    for _ in engine.run():
        pass
    assert first.tokens == second.tokens == alone(model, prompt, 9)


def test_a_request_runs_once(model):
    engine, request = Engine(model, 1), Request(prompts(1)[0], max_new_tokens=3)
    engine.submit(request)
    with pytest.raises(ValueError, match="runs already"):
        engine.submit(request)
    with pytest.raises(ValueError, match="prompt_ids has token 61; the model's are 0 to 60"):
        engine.submit(Request(torch.tensor([3, 61])))
    assert engine.waiting == [request]
    for _ in engine.run():
        pass
    assert len(request.tokens) == 3


def test_slots_under_their_earlier_name():
    model = pair("untied")[0]
    with pytest.warns(DeprecationWarning, match=r"Engine\(slots"):
        engine = Engine(model, rows=3)
    assert engine.slots == 3
    with pytest.raises(ValueError, match="slots is 2 and rows, its earlier name, 3; give slots alone"):
        Engine(model, slots=2, rows=3)
    assert Engine(model).slots == 8
