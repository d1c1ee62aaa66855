"""Streaming: the pieces make up the text, nothing half is shown, and the tokens are generate()'s."""

from __future__ import annotations

import copy

import pytest
import torch

import mambakit
from mambakit.generation.engine import Engine, Request
from mambakit.generation.stream import Sampling, Stream, _TextDecoder
from tests.models.tiny import TEXT, save_tiny

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder)
    model = mambakit.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    model.generation_config.eos_token_id = None  # a random model meets it by chance
    return model, mambakit.AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def ids(both):
    return both[1]("The cat sat on", return_tensors="pt").input_ids[0]


def test_greedy_equals_generate(both, ids):
    model, tokenizer = both
    stream = Stream(model, tokenizer, ids, Sampling(temperature=0), max_new_tokens=20)
    pieces = list(stream)
    expected = model.generate(ids[None], max_new_tokens=20, do_sample=False)[0, len(ids) :].tolist()
    assert stream.tokens == expected
    assert "".join(pieces) == stream.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert stream.finish_reason == "length"


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_of_the_prompt(both, ids, chunk):
    model, tokenizer = both
    seen = []
    whole = Stream(model, tokenizer, ids, Sampling(temperature=0), 8)
    parts = Stream(model, tokenizer, ids, Sampling(temperature=0), 8, chunk_size=chunk, progress=seen.append)
    assert "".join(whole) == "".join(parts)
    assert seen[-1] == len(ids)


def test_a_stream_is_read_once(both, ids):
    stream = Stream(*both, ids, Sampling(temperature=0), max_new_tokens=4)
    list(stream)
    tokens, seen = list(stream.tokens), stream.cache.get_seq_length()
    assert list(stream) == []  # nothing is written beyond max_new_tokens, and the prompt is not read again
    assert (stream.tokens, stream.cache.get_seq_length()) == (tokens, seen)
    left = Stream(*both, ids, Sampling(temperature=0), max_new_tokens=4)
    next(iter(left))
    with pytest.raises(RuntimeError, match="begun and left before its end; make another one"):
        list(left)


def test_seeds(both, ids):
    model, tokenizer = both
    sample = lambda seed, **kw: "".join(Stream(model, tokenizer, ids, Sampling(seed=seed, **kw), 20))  # noqa: E731
    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert sample(1, top_k=1) == "".join(Stream(model, tokenizer, ids, Sampling(temperature=0), 20))


def test_nothing_to_draw_from(both, ids):
    model, tokenizer = both
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.backbone.norm_f.weight[0] = float("nan")
    for sampling in (Sampling(seed=1), Sampling(temperature=0)):
        with pytest.raises(RuntimeError, match="NaN or infinite, no token can be chosen"):
            list(Stream(broken, tokenizer, ids, sampling))
        with pytest.raises(RuntimeError, match="NaN or infinite, no token can be chosen"):
            Engine(broken).write([Request(ids, sampling)])


def test_filters_are_transformers(both, ids):
    """top-k, top-p, min-p and the penalty leave the tokens that transformers' generate leaves."""
    model, tokenizer = both
    options = {"top_k": 7, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.3, "temperature": 0.9}
    stream = Stream(model, tokenizer, ids, Sampling(seed=0, **options), 12)
    list(stream)
    row = torch.cat([ids, torch.tensor(stream.tokens)])[None]
    out = model.generate(
        ids[None],
        max_new_tokens=12,
        do_sample=True,
        return_dict_in_generate=True,
        output_scores=True,
        seed=0,
        **options,
    )
    assert torch.isfinite(out.scores[0][0, stream.tokens[0]])
    for step in range(12):  # every token is one that the filters keep, given the tokens before it
        prefix = row[:, : len(ids) + step]
        kept = model.generate(
            prefix,
            max_new_tokens=1,
            do_sample=True,
            return_dict_in_generate=True,
            output_scores=True,
            seed=0,
            **options,
        ).scores[0]
        assert torch.isfinite(kept[0, stream.tokens[step]])


def test_stop_strings_are_held_back(both, ids):
    model, tokenizer = both
    free = "".join(Stream(model, tokenizer, ids, Sampling(temperature=0), 30))
    stop = free[10:14]
    stream = Stream(model, tokenizer, ids, Sampling(temperature=0), 30, stop=("never this", stop))
    pieces = list(stream)
    assert "".join(pieces) == free[: free.index(stop)]
    assert stream.finish_reason == "stop"


def test_the_end_token_stops(both, ids):
    model, tokenizer = both
    free = Stream(model, tokenizer, ids, Sampling(temperature=0), 12)
    list(free)
    model.generation_config.eos_token_id = [free.tokens[5]]
    try:
        stream = Stream(model, tokenizer, ids, Sampling(temperature=0), 12)
        list(stream)
    finally:
        model.generation_config.eos_token_id = None
    first = free.tokens.index(free.tokens[5])
    assert stream.tokens == free.tokens[:first]
    assert stream.finish_reason == "stop"


def test_characters_are_never_split(both):
    tokenizer = both[1]
    text = "naïve 日本語 🙂🙂 end"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    decoder = _TextDecoder(tokenizer)
    pieces = [decoder.push(token) for token in ids]
    assert "".join(pieces) + decoder.flush() == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces, "some characters take several tokens, or this tests nothing"
    assert "日本語" in TEXT


def test_a_state_continues(both):
    model, tokenizer = both
    a, b = (tokenizer(t, return_tensors="pt").input_ids[0] for t in ("The cat sat", " on the mat"))
    with torch.no_grad():
        cache = model(a[None], use_cache=True).cache_params
    continued = Stream(model, tokenizer, b, Sampling(temperature=0), 8, cache=cache)
    whole = Stream(model, tokenizer, torch.cat([a, b]), Sampling(temperature=0), 8)
    assert "".join(continued) == "".join(whole)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m, t, i: Stream(m, t, i[:0]), "l >= 1"),
        (lambda m, t, i: Stream(m, t, i, chunk_size=0), "chunk_size is 0"),
        (lambda m, t, i: Stream(m, t, i, stop=("",)), "stop string is empty"),
        (lambda m, t, i: Sampling(temperature=-1), "temperature is -1"),
        (lambda m, t, i: Sampling(top_p=1.5), "top_p is 1.5"),
        (lambda m, t, i: Sampling(repetition_penalty=0), "repetition_penalty is 0"),
    ],
)
def test_bad_values(both, ids, make, message):
    with pytest.raises(ValueError, match=message):
        make(*both, ids)
