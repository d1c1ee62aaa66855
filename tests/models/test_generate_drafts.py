"""generate(assistant_model=...) and generate(prompt_lookup_num_tokens=...): batches, padding, ends, states, samples."""

from __future__ import annotations

import itertools

import pytest
import torch

import mambakit
from tests.models.configurations import pair, tokens

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def other():
    torch.manual_seed(1)
    shape = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "initializer_range": 0.3}
    return mambakit.MambaForCausalLM(mambakit.MambaConfig(**shape)).eval()


def ways(model, other):
    return (
        {"assistant_model": other},
        {"assistant_model": model, "num_assistant_tokens": 2},
        {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
    )


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", ["plain", "falcon"])
def test_greedy_tokens_and_the_state_are_those_without_drafts(other, name, rows):
    model, ids = pair(name)[0].eval(), tokens(rows, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    free = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=None)
    end = int(free[0, 9 + 7])
    for ends in (None, end):
        options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "eos_token_id": ends,
                   "pad_token_id": 3, "return_dict_in_generate": True}  # fmt: skip
        plain = model.generate(ids, **options)
        for way in ways(model, other):
            drafted = model.generate(ids, **options, **way)
            assert torch.equal(drafted.sequences, plain.sequences)
            mine, own = drafted.cache_params, plain.cache_params
            assert mine.get_seq_length() == own.get_seq_length()
            assert (mine.ssm_states - own.ssm_states).abs().max() < 1e-5
            assert (mine.conv_states - own.conv_states).abs().max() < 1e-5


def test_going_on_from_a_cache_and_penalties(other):
    model, ids = pair("plain")[0].eval(), tokens(2, 9)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "repetition_penalty": 1.4}
    plain = model.generate(ids, **options)
    for way in ways(model, other):
        assert torch.equal(model.generate(ids, **options, **way), plain)
        cache = model(ids[:, :5], use_cache=True).cache_params
        unpunished = options | {"repetition_penalty": 1.0}
        drafted = model.generate(ids[:, 5:], cache_params=cache.clone(), **unpunished, **way)
        assert torch.equal(drafted, model.generate(ids[:, 5:], cache_params=cache, **unpunished))


def test_samples_are_repeatable_and_have_the_models_distribution():
    torch.manual_seed(3)
    config = mambakit.MambaConfig(
        vocab_size=5, hidden_size=8, num_hidden_layers=1, initializer_range=0.8, eos_token_id=None
    )
    model, small = (mambakit.MambaForCausalLM(config).eval() for _ in range(2))
    prompt, draws = torch.tensor([[1, 2, 1, 3, 1]]), 800
    with torch.no_grad():
        first = model(prompt).logits[0, -1].softmax(-1)
        exact = {}
        for a in range(5):
            second = model(torch.cat([prompt, torch.tensor([[a]])], 1)).logits[0, -1].softmax(-1)
            exact |= {(a, b): float(first[a] * second[b]) for b in range(5)}
    options = {"max_new_tokens": 2, "do_sample": True, "top_k": 0, "assistant_model": small, "eos_token_id": None,
               "num_assistant_tokens": 2}  # fmt: skip
    written = model.generate(prompt.expand(draws, -1), seed=5, **options)[:, 5:]
    assert torch.equal(model.generate(prompt.expand(draws, -1), seed=5, **options)[:, 5:], written)
    counts = dict.fromkeys(itertools.product(range(5), repeat=2), 0)
    for row in written.tolist():
        counts[tuple(row)] += 1
    statistic = sum((counts[k] - p * draws) ** 2 / (p * draws) for k, p in exact.items())
    assert statistic < 24 + 3.3 * 48**0.5  # about 0.1 %
    seeds = list(range(4))
    many = model.generate(prompt.expand(4, -1), seed=seeds, **options)
    assert torch.equal(many[2:3], model.generate(prompt, seed=[2], **options))


def test_what_does_not_go_together(other):
    model, ids = pair("plain")[0].eval(), tokens(1, 5)
    for options, message in (
        ({"assistant_model": other, "prompt_lookup_num_tokens": 3}, "two drafters"),
        ({"prompt_lookup_num_tokens": 16}, "prompt_lookup_num_tokens is 16; it must be between 1 and 15"),
        ({"assistant_model": other, "num_beams": 2}, "use num_beams=1"),
        ({"assistant_model": other, "output_scores": True, "return_dict_in_generate": True}, "with output_scores"),
        ({"assistant_model": mambakit.MambaForCausalLM(mambakit.MambaConfig(vocab_size=7, hidden_size=8,
          num_hidden_layers=1))}, "vocabulary of 7 tokens"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            model.generate(ids, max_new_tokens=4, **options)
