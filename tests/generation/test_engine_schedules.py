"""The engine over random schedules of requests and errors: each text is that of an engine of its own."""

from __future__ import annotations

import copy
import random

import pytest
import torch

import mambakit
from mambakit.generation.drafters import DraftModel, PromptLookup
from mambakit.generation.engine import Engine, Request
from mambakit.generation.prefix_cache import PrefixCache
from mambakit.generation.stream import Sampling
from tests.decoding.choose_one import raising
from tests.decoding.eager_graph import WAYS, decode_by, read_in_buckets, speculate_on_device

pytestmark = pytest.mark.filterwarnings("ignore")

VOCAB = 29
MOST = 14  # tokens of a text
POISON = VOCAB - 1  # its embedding is NaN
ENDS = [3, 4]
SHARES = [(), ("a",), ("b", 1), ("b", 2), ("c", 1, 1)]


class FaultError(Exception):
    """What goes wrong in one request."""


FAULT = FaultError("of this request alone")


def tiny(falcon: bool = False):
    kind = (
        (mambakit.FalconMambaForCausalLM, mambakit.FalconMambaConfig)
        if falcon
        else (mambakit.MambaForCausalLM, mambakit.MambaConfig)
    )
    torch.manual_seed(0)
    config = kind[1](
        vocab_size=VOCAB, hidden_size=8, num_hidden_layers=2, state_size=4, expand=1, time_step_rank=2,
        initializer_range=0.4, tie_word_embeddings=False,
    )  # fmt: skip
    model = kind[0](config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model.backbone.embeddings.weight[POISON] = float("nan")
    model.generation_config.eos_token_id = ENDS
    return model


MODELS = {"native": tiny(), "falcon": tiny(falcon=True), "int8": tiny().quantize("int8")}
_ALONE: dict[tuple, tuple] = {}


def samplings(chance: random.Random) -> Sampling:
    seed = chance.randrange(2)
    return chance.choice(
        [
            Sampling(0), Sampling(0), Sampling(0, repetition_penalty=1.3), Sampling(0.9, seed=seed),
            Sampling(1.2, top_k=5, seed=seed), Sampling(0.8, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=seed),
            raising(FAULT, chance.randrange(4), "mask", temperature=0.9, seed=seed),
            raising(FAULT, 1, "accept", temperature=0), raising(FAULT, chance.randrange(3), "accept", seed=seed),
            raising(FAULT, when="begin"),
        ]
    )  # fmt: skip


def random_request(chance: random.Random, model, kept: float, drafts: bool = False) -> Request:
    length = chance.choice([1, 2, 3, 5, 17])
    generator = torch.Generator().manual_seed(chance.randrange(4))
    ids = torch.randint(5, POISON, (length,), generator=generator)
    if chance.random() < 0.08:
        ids[chance.randrange(length)] = chance.choice([POISON, POISON, VOCAB, -1])
    state = context = None
    if chance.random() < 0.15:
        read = torch.randint(5, POISON, (3,), generator=generator)
        state = model(read[None], use_cache=True).cache_params.detach()
        context = chance.choice([read, None])
    elif chance.random() < 0.03:
        state = mambakit.MambaForCausalLM(
            mambakit.MambaConfig(vocab_size=VOCAB, hidden_size=12, num_hidden_layers=1)
        ).backbone.new_cache(1)
    return Request(
        ids, samplings(chance), max_new_tokens=chance.choice([1, 1, 2, 3, 5, 9, MOST]), state=state, context=context,
        keep_state=chance.random() < kept, keep_states=chance.random() < kept, share=chance.choice(SHARES),
        cache_salt=chance.choice(["", "", "salt"]), draft_tokens=chance.choice([None, None, 0, 2]) if drafts else None,
        log_probs=chance.choice([None] * 9 + [1]) if drafts else None,
    )  # fmt: skip


def alone(model, way: str, rows: int, chunk: int, request: Request, drafter=None) -> tuple[list[int], str]:
    """What an engine of as many rows that has nothing else to do writes."""
    state = None if request.state is None else tuple(request.state.ssm_states.flatten().tolist())
    context = None if request.context is None else tuple(request.context.tolist())
    # With a draft model a sampled text follows from its guesses, too.
    options = {}
    if drafter is not None and request.draft_tokens != 0 and request.sampling.temperature:
        options = {"drafter": drafter, "draft_tokens": 3}
    key = (
        id(model), way, rows if way != "native" else 0, chunk, tuple(request.prompt_ids.tolist()),
        type(request.sampling), str(request.sampling), state, context,
        *((request.draft_tokens, request.max_new_tokens) if options else ()),
    )  # fmt: skip
    if key not in _ALONE:
        most = request.max_new_tokens if options else MOST
        mine = Request(request.prompt_ids, request.sampling, most, request.state, context=request.context)
        mine.draft_tokens = request.draft_tokens
        engine = Engine(model, rows, chunk, **options)
        engine.submit(mine)
        for _ in engine.run():
            pass
        _ALONE[key] = mine.tokens, mine.finish_reason
    tokens, reason = _ALONE[key]
    most = request.max_new_tokens
    return tokens[:most], reason if len(tokens) < most else "length"


def schedule(seed: int, model, way: str, drafter=None) -> None:
    chance = random.Random(seed)
    rows, chunk = chance.choice([1, 2, 3, 5, 8]), chance.choice([1, 2, 4, 64])
    now = 0.0

    def clock() -> float:  # every look at it costs time: readings are interrupted anywhere
        nonlocal now
        now += chance.choice([0.0, 0.001, 0.01])
        return now

    # A known prefix changes how the rest is cut into chunks, and so the last bits: tokens are equal, states are
    # compared with a tolerance.
    known = PrefixCache(model, chunk_size=chunk, memory_bytes=chance.choice([0, 1 << 12, 1 << 20]))
    engine = Engine(
        model, rows, chunk, prefix_cache=known if chance.random() < 0.3 else None,
        read_seconds=chance.choice([0, 0.005, 0.1]), slice_tokens=chance.choice([1, 1, 2, 7, 32]), clock=clock,
        tokens_per_look=chance.choice([None, 2, 5, 8]), drafter=drafter, draft_tokens=3,
    )  # fmt: skip
    kept = chance.choice([0, 0, 0.3])  # where no state is kept, looks of several tokens overlap
    requests: list[Request] = []
    seen: dict[Request, list[int]] = {}
    cancelled: set[Request] = set()
    left = chance.randrange(1, 14)
    while left or len(engine._schedule):
        for _ in range(chance.choice([0, 0, 1, 1, 2, 6]) if left else 0):
            left -= 1
            request = random_request(chance, model, kept, drafter is not None)
            if request.prompt_ids.min() < 0 or request.prompt_ids.max() >= VOCAB:
                with pytest.raises(ValueError, match="prompt_ids has token"):
                    engine.submit(request)
            else:
                requests.append(engine.submit(request))
                seen[request] = []
            if left == 0:
                break
        if requests and chance.random() < 0.06:
            gone = chance.choice(requests)
            if not gone.finish_reason:
                cancelled.add(gone)
            gone.cancel()
        for request, token in engine.step():
            seen[request].append(token)
        assert engine.busy <= rows
        assert len(engine._pool._began) == len(engine._pool.occupants) == engine._pool.size <= rows
    assert engine.busy == 0
    assert not engine._schedule.unread
    assert not engine._schedule.ready
    assert not any(engine._pool.occupants)
    assert not engine._states._copies, "no copy of a state is left"
    for request in requests:
        assert request.tokens == seen[request]
        tokens, reason = alone(model, way, rows, chunk, request, drafter)
        if request in cancelled:
            assert request.finish_reason == "cancelled"
            assert request.tokens == tokens[: len(request.tokens)]
        else:
            assert (request.tokens, request.finish_reason) == (tokens, reason)
        assert bool(request.error) == (request.finish_reason == "error")
        if request.final_state is not None and request.state is None and not request.exception:
            read = [*request.prompt_ids.tolist(), *request.tokens]
            if request.finish_reason != "stop":
                del read[-1]  # it was chosen and not read
            assert request.final_state.get_seq_length() == len(read)
            expected = model(torch.tensor([read]), use_cache=True).cache_params
            torch.testing.assert_close(request.final_state.ssm_states, expected.ssm_states, rtol=1e-3, atol=1e-4)
        for state in () if request.state is not None or request.exception or request.error else request.states:
            read = [*request.prompt_ids.tolist(), *request.tokens][: state.get_seq_length()]
            assert state.get_seq_length() == len(read) >= len(request.prompt_ids)
            expected = model(torch.tensor([read]), use_cache=True).cache_params
            torch.testing.assert_close(state.ssm_states, expected.ssm_states, rtol=1e-3, atol=1e-4)
        if request.keep_states and request.finish_reason in ("stop", "length"):
            assert request.states
        if request.keep_state and request.finish_reason in ("stop", "length"):
            assert request.final_state is not None


SCHEDULES = 25


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("way", [*WAYS, "falcon", "buckets", "int8"])
def test_random_schedules(way, part, monkeypatch):
    model = MODELS[way if way in MODELS else "native"]
    if way == "buckets":
        decode_by("graph", monkeypatch)
        read_in_buckets(monkeypatch)
    elif way not in ("falcon", "int8"):
        decode_by(way, monkeypatch)
    with torch.no_grad():
        for seed in range(part * SCHEDULES, (part + 1) * SCHEDULES):
            try:
                schedule(seed, model, way)
            except BaseException as error:
                error.add_note(f"schedule({seed}, way {way!r})")
                raise


@pytest.mark.parametrize("kind", ["near", "wrong", "lookup"])
def test_random_schedules_with_drafts(kind, monkeypatch):
    """Texts are those of an engine of their own: greedy ones without drafts, sampled ones with the same drafts."""
    speculate_on_device(monkeypatch)
    model, drafter = MODELS["native"], PromptLookup(2, 1)
    with torch.no_grad():
        if kind != "lookup":
            small = copy.deepcopy(model)
            if kind == "wrong":
                small.backbone.norm_f.weight.neg_()
            for parameter in small.backbone.layers.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
            small.backbone.embeddings.weight[POISON] = 0.1
            drafter = DraftModel(small)
        for seed in range(SCHEDULES):
            try:
                schedule(seed, model, kind, drafter)
            except BaseException as error:
                error.add_note(f"schedule({seed}, drafts {kind!r})")
                raise
