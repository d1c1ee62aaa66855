"""A model that is left in train mode, with or without gradient checkpointing, writes and reads as in eval mode."""

from __future__ import annotations

import pytest
import torch

import mambakit
from mambakit.evaluation.likelihood import log_likelihoods
from mambakit.generation.drafters import DraftModel
from mambakit.generation.engine import Engine, Request
from mambakit.generation.logprobs import token_log_probs
from mambakit.generation.prefix_cache import PrefixCache
from mambakit.generation.score import score_continuations
from mambakit.generation.speculative import SpeculativeStream
from mambakit.generation.state import State
from mambakit.generation.stream import Sampling, Stream
from tests.models.configurations import BASE, pair, tokens, worst

pytestmark = pytest.mark.filterwarnings("ignore")

MODES = {
    "train": lambda m: m.train(),
    "reentrant": lambda m: (m.gradient_checkpointing_enable({"use_reentrant": True}), m.train()),
    "not reentrant": lambda m: (m.gradient_checkpointing_enable({"use_reentrant": False}), m.train()),
    "eval": lambda m: (m.gradient_checkpointing_enable(), m.eval()),
}
LEFT = torch.tensor([[0] * 3 + [1] * 9, [1] * 12])
RIGHT = torch.tensor([[1] * 12, [1] * 8 + [0] * 4])
OPTIONS = {
    "greedy": {},
    "sampled": {"do_sample": True, "seed": 3, "top_k": 20, "temperature": 0.8},
    "a processor that waits": {"do_sample": True, "seed": 4, "eta_cutoff": 1e-3},
    "repetition penalty": {"repetition_penalty": 1.3},
    "no repeated pairs": {"no_repeat_ngram_size": 2},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True, "seed": 1},
    "several sequences": {"do_sample": True, "num_return_sequences": 3, "seed": 2},
    "padded on the left": {"attention_mask": LEFT},
    "padded on the right": {"attention_mask": RIGHT},
    "padded beams": {"attention_mask": LEFT, "num_beams": 2},
    "chunks": {"prefill_chunk_size": 5},
    "padded chunks": {"prefill_chunk_size": 5, "attention_mask": LEFT},
    "chunks and beams": {"prefill_chunk_size": 5, "num_beams": 2},
    "no cache": {"use_cache": False},
    "no cache, beams": {"use_cache": False, "num_beams": 2},
    "scores": {"output_scores": True, "output_logits": True, "return_dict_in_generate": True},
    "hidden states": {"output_hidden_states": True, "return_dict_in_generate": True},
    "a dictionary": {"return_dict_in_generate": True},
}


class Streamer:
    def __init__(self):
        self.tokens: list[int] = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        pass


def model_of(name: str, mode: str | None):
    torch.manual_seed(0)
    model = pair(name)[0]
    model.generation_config.eos_token_id = None
    if mode is not None:
        MODES[mode](model)
    return model


def tensors_of(result) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    found = [result.sequences, *(result.get("scores") or ()), *(result.get("logits") or ())]
    found += [t for step in result.get("hidden_states") or () for t in step]
    cache = result.past_key_values
    return found if cache is None else [*found, cache.conv_states, cache.ssm_states]


def same(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        # Sums of products differ in their last bit with where their memory begins.
        assert worst(a, b) < 1e-6 if b.is_floating_point() else torch.equal(a, b)


def generate(name: str, mode: str | None, ids: torch.Tensor | None, **options):
    model = model_of(name, mode)
    torch.manual_seed(1)
    return tensors_of(model.generate(ids, max_new_tokens=5, **options))


@pytest.mark.parametrize("option", OPTIONS)
def test_generate(option, way):
    ids = tokens(2, 12)
    expected = generate("untied", None, ids, **OPTIONS[option])
    for mode in MODES:
        same(generate("untied", mode, ids, **OPTIONS[option]), expected)


@pytest.mark.parametrize("option", ["greedy", "sampled", "beams", "padded chunks", "hidden states"])
def test_generate_of_another_architecture(option):
    ids = tokens(2, 12)
    expected = generate("falcon_odd", None, ids, **OPTIONS[option])
    for mode in MODES:
        same(generate("falcon_odd", mode, ids, **OPTIONS[option]), expected)


@pytest.mark.parametrize("mode", MODES)
def test_generate_from_other_prompts(mode):
    """Embeddings, nothing but a bos token, a prompt that is read in chunks unasked, a given cache, a streamer."""
    ids = tokens(2, 12)
    embeds = model_of("untied", None).get_input_embeddings()(ids).detach()
    for options in ({"inputs_embeds": embeds}, {"inputs_embeds": embeds, "num_beams": 2}, {"bos_token_id": 3}):
        same(generate("untied", mode, None, **options), generate("untied", None, None, **options))
    long = tokens(2, 700)
    same(generate("untied", mode, long), generate("untied", None, long))
    found = []
    for each in (None, mode):
        model = model_of("untied", each)
        cache = State.read(model, ids).cache
        streamer = Streamer()
        sequences = model.generate(ids[:, -1:], cache_params=cache, max_new_tokens=4)
        model.generate(ids[:1], streamer=streamer, max_new_tokens=4)
        found.append([sequences, cache.conv_states, cache.ssm_states, torch.tensor(streamer.tokens)])
    same(found[1], found[0])


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_configuration_says_nothing_about_generate(use_cache):
    ids = tokens(2, 12)
    expected = generate("untied", None, ids)
    for mode in MODES:
        model = model_of("untied", mode)
        model.config.use_cache = use_cache
        same([model.generate(ids, max_new_tokens=5)], expected)


class Numbers:
    """A tokenizer of which only decoding is asked."""

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


def readers(model) -> list[torch.Tensor]:
    """What everything else that reads and writes tokens makes of one prompt."""
    torch.manual_seed(2)
    prompt = tokens(1, 40)[0]
    found = []
    for sampling in (Sampling(temperature=0), Sampling(temperature=0.9, seed=1)):
        request = Request(prompt, sampling, max_new_tokens=6)
        Engine(model, 3, chunk_size=7).write([request, Request(prompt[:9], sampling, max_new_tokens=9)])
        found.append(torch.tensor(request.tokens))
        for kind, options in (
            (Stream, {}),
            (SpeculativeStream, {}),
            (SpeculativeStream, {"drafter": DraftModel(model)}),
        ):
            stream = kind(model, Numbers(), prompt, sampling, max_new_tokens=6, chunk_size=7, **options)
            list(stream)
            found.append(torch.tensor(stream.tokens))
    state = State.read(model, [prompt, prompt[:11]], chunk_size=9)
    found += [state.cache.conv_states, state.cache.ssm_states]
    kept = PrefixCache(model, chunk_size=8)
    kept.read(prompt[:30])
    found.append(kept.read(prompt).cache.ssm_states)
    found += [s.log_probs for s in score_continuations(model, prompt, [prompt[:3], prompt[:7]])]
    found.append(token_log_probs(model, prompt, before=1, chunk_size=9).log_probs)
    pairs = [(prompt[:9].tolist(), prompt[9:13].tolist()), (prompt[:30].tolist(), prompt[30:].tolist())]
    found.append(torch.tensor([score.log_prob for score in log_likelihoods(model, pairs, batch_tokens=16)]))
    return found


def test_everything_else_that_reads_and_writes(way):
    expected = readers(model_of("untied", None))
    for mode in MODES:
        same(readers(model_of("untied", mode)), expected)


def test_forward_without_gradients_keeps_a_state():
    ids = tokens(2, 9)
    config = mambakit.MambaConfig(**BASE, num_labels=3)
    for model in (model_of("untied", None), mambakit.MambaForSequenceClassification(config).eval()):
        with torch.no_grad():
            expected = model(ids, use_cache=True)
            model.gradient_checkpointing_enable()
            model.train()
            found = model(ids, use_cache=True)
            cache = model.backbone.new_cache(2)
            given = model(ids, cache_params=cache)
        for out in (found, given):
            same([out.logits, out.cache_params.ssm_states], [expected.logits, expected.cache_params.ssm_states])
        assert given.cache_params is cache


def test_with_gradients_checkpointing_says_that_it_keeps_no_state():
    model = model_of("untied", "not reentrant")
    ids = tokens(2, 9)
    with pytest.raises(ValueError, match=r"gradient_checkpointing_disable\(\)"):
        model(ids, cache_params=model.backbone.new_cache(2))
    with pytest.warns(UserWarning, match="cache_params is None"):
        assert model(ids, use_cache=True).cache_params is None
    assert model(ids).cache_params is None
