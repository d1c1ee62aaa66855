"""generate(seed=[...]): a text has random numbers of its own; nothing but an argument connects generate to forward."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import LogitsProcessorList

from mambakit.generation.engine import Engine, Request
from mambakit.generation.stream import SamplingParams
from tests.decoding.eager_graph import WAYS, decode_by
from tests.models.configurations import pair, tokens

pytestmark = pytest.mark.filterwarnings("ignore")
OPTIONS = {
    "sample": {"do_sample": True, "top_k": 0},
    "filters": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3},
    "greedy": {"do_sample": False},
}
PARAMS = {
    "sample": {},
    "filters": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3},
    "greedy": {"temperature": 0},
}


@pytest.fixture
def model():
    model = pair("untied")[0]
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", OPTIONS)
def test_a_row_is_the_text_alone(model, monkeypatch, way, how):
    """Beside others, by itself, after padding, and as the engine writes it."""
    decode_by(way, monkeypatch)
    ids, seeds = tokens(4, 6), [5, 6, 7, 2**40]
    options = {"max_new_tokens": 70, "eos_token_id": [3, 9, 11], "pad_token_id": 0, **OPTIONS[how]}
    torch.manual_seed(3)
    before = torch.get_rng_state()
    out = model.generate(ids, seed=seeds, **options)
    kept = model.generate(ids, seed=seeds, return_dict_in_generate=True, **options).sequences
    assert torch.equal(torch.get_rng_state(), before), "the global generator has no part in it"
    assert torch.equal(out, kept)
    model.generation_config.eos_token_id = [3, 9, 11]
    requests = [
        Request(row, SamplingParams(**PARAMS[how], seed=seed), max_new_tokens=70)
        for row, seed in zip(ids, seeds, strict=True)
    ]
    Engine(model, 3).write(requests)
    padded = torch.cat([torch.zeros(4, 2, dtype=torch.int64), ids], 1)
    mask = torch.cat([torch.zeros(4, 2), torch.ones(4, 6)], 1)
    shifted = model.generate(padded, attention_mask=mask, seed=seeds, **options)[:, 8:]
    for row, request in enumerate(requests):
        text = out[row, 6 : 6 + len(request.tokens)].tolist()
        assert text == request.tokens
        assert shifted[row, : len(text)].tolist() == text
        alone = model.generate(ids[row : row + 1], seed=[seeds[row]], **options)[0, 6:]
        assert alone[: len(text)].tolist() == text


def test_a_range_of_seeds(model):
    ids = tokens(2, 5)
    options = {"max_new_tokens": 5, "do_sample": True}
    assert torch.equal(model.generate(ids, seed=range(7, 9), **options), model.generate(ids, seed=[7, 8], **options))


def test_several_sequences_of_a_prompt(model):
    ids = tokens(1, 6)
    options = {"max_new_tokens": 8, "do_sample": True}
    out = model.generate(ids, seed=[1, 2, 1], num_return_sequences=3, **options)
    assert torch.equal(out[0], out[2])
    assert not torch.equal(out[0], out[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": [1]}, "seed has 1 seeds, but 2 texts"),
        ({"seed": [1, 2], "num_beams": 2}, "beams share"),
        ({"seed": [1, 2], "output_scores": True, "return_dict_in_generate": True}, "output_scores"),
        ({"seed": [1, 2], "eta_cutoff": 0.1}, "EtaLogitsWarper"),
        ({"seed": [1, 2], "use_cache": False}, "use_cache=False"),
    ],
)
def test_what_does_not_go_with_several_seeds(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(tokens(2, 5), max_new_tokens=3, do_sample=True, **options)


def test_logits_that_are_no_numbers(model):
    with torch.no_grad():
        model.backbone.norm_f.weight[0] = float("nan")
    for options in OPTIONS.values():
        with pytest.raises(RuntimeError, match="no token can be chosen"):
            model.generate(tokens(2, 5), max_new_tokens=6, seed=[1, 2], **options)


def test_two_threads_and_a_failure_in_between(model):
    """Each call has its own steps: nothing of one is seen in the other, and nothing is left of one that raised."""
    ids = [tokens(2, 30), tokens(2, 7)]
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    options["prefill_chunk_size"] = 5  # the logits after the prompt are known when transformers' loop begins
    expected = [model.generate(one, **options).sequences for one in ids]

    def fail(text, scores):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        model.generate(ids[0], logits_processor=LogitsProcessorList([fail]), **options)
    with torch.no_grad():
        assert model(ids[0]).logits.shape[1] == 30, "a forward of its own is whole"
    found: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def write(which: int) -> None:
        for _ in range(3):
            found[which].append(model.generate(ids[which], **options).sequences)

    threads = [threading.Thread(target=write, args=(which,)) for which in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which, results in found.items():
        assert len(results) == 3
        assert all(torch.equal(result, expected[which]) for result in results)
