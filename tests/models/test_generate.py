"""generate(): transformers' arguments, made exact for a model whose cache is a state."""

from __future__ import annotations

import pytest
import torch
import transformers

import mambakit
from mambakit.models import generate as module
from tests.models.configurations import pair, tokens, worst

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def both():
    return pair("use_bias")


@pytest.fixture
def model(both):
    return both[0]


OPTIONS = {
    "greedy": {"do_sample": False},
    "temperature": {"do_sample": True, "temperature": 0.7},
    "top_k": {"do_sample": True, "top_k": 5},
    "top_p": {"do_sample": True, "top_p": 0.6, "top_k": 0},
    "min_p": {"do_sample": True, "min_p": 0.1},
    "repetition_penalty": {"do_sample": False, "repetition_penalty": 1.8},
    "beams": {"num_beams": 4, "do_sample": False, "length_penalty": 0.5},
    "beam_sample": {"num_beams": 3, "do_sample": True},
    "several_sequences": {"do_sample": True, "num_return_sequences": 3},
    "several_beams": {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
    "min_new_tokens": {"do_sample": False, "min_new_tokens": 6, "eos_token_id": list(range(1, 31))},
    "several_eos": {"do_sample": False, "eos_token_id": list(range(1, 31)), "pad_token_id": 0},
    "max_length": {"do_sample": False, "max_length": 13, "max_new_tokens": None},
    "no_cache": {"do_sample": False, "use_cache": False},
    "bad_words": {"do_sample": False, "bad_words_ids": [[3], [4], [5, 6]]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_tokens_of_transformers(both, name):
    """Same weights, same seed, same options: the same tokens as transformers' own class."""
    ours, theirs = both
    ids = tokens(2, 7)
    options = {"max_new_tokens": 10, "eos_token_id": None, **OPTIONS[name]}
    sequences = []
    for model in (ours, theirs):
        torch.manual_seed(1)
        sequences.append(model.generate(ids, **options))
    assert torch.equal(*sequences)


def test_a_batch_equals_its_rows(model):
    prompts = [tokens(1, n)[0] for n in (3, 8, 5)]
    alone = [
        model.generate(p[None], max_new_tokens=9, do_sample=False, eos_token_id=None)[0, len(p) :] for p in prompts
    ]
    for side in ("left", "right"):
        ids = torch.zeros(3, 8, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, p in enumerate(prompts):
            at = slice(8 - len(p), 8) if side == "left" else slice(0, len(p))
            ids[row, at], mask[row, at] = p, 1
        for options in ({}, {"prefill_chunk_size": 3}, {"num_beams": 1, "use_cache": False}):
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=None, **options
            )
            assert torch.equal(out[:, :8], ids), "the prompt comes back as it was given"
            for row in range(3):
                assert torch.equal(out[row, 8:], alone[row]), (side, row, options)


def test_rows_end_on_their_own(model):
    ids = tokens(4, 6)
    free = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)[:, 6:]
    eos = int(free[0, 3])
    out = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=eos, pad_token_id=0)[:, 6:]
    for row in range(4):
        hits = (free[row] == eos).nonzero()
        end = int(hits[0]) + 1 if len(hits) else out.shape[1]
        assert torch.equal(out[row, :end], free[row, :end])
        assert not out[row, end:].any()


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_prompts_read_in_chunks(model, chunk, options):
    ids = tokens(2, 23)
    common = {"max_new_tokens": 8, "eos_token_id": None, "seed": 3, **options}
    assert torch.equal(model.generate(ids, **common), model.generate(ids, prefill_chunk_size=chunk, **common))


@pytest.mark.parametrize("output_logits", [False, True], ids=["our loop", "transformers' loop"])
def test_the_last_chunk_gives_the_first_token(model, monkeypatch, output_logits):
    """No call of the model for the prompt's last token alone."""
    read, forward = [], type(model.backbone).forward

    def counted(self, input_ids=None, *args, **kwargs):
        read.append(input_ids.shape[1])
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(type(model.backbone), "forward", counted)
    model.generate(
        tokens(2, 23),
        max_new_tokens=1,
        prefill_chunk_size=10,
        output_logits=output_logits,
        return_dict_in_generate=True,
    )
    assert read == [10, 10, 3]


def test_padding_tokens_without_a_mask_are_padding_however_the_prompt_is_read(both):
    """transformers makes a mask of them, also where the prompt is read in chunks."""
    ours, _ = both
    ids = torch.tensor([[5, 7, 9, 7, 11]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 7, "eos_token_id": 60}
    expected = ours.generate(torch.tensor([[5, 9, 11]]), **options)[:, 3:]
    for chunk in (None, 2, 5):
        assert torch.equal(ours.generate(ids, prefill_chunk_size=chunk, **options)[:, 5:], expected)


WAYS = [{}, {"num_beams": 2}, {"use_cache": False}, {"output_logits": True}, {"prefill_chunk_size": 2}]


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_padding_tokens_on_the_right_without_a_mask(both, options):
    """Each row continues after its last token, as behind a mask, however the prompt is read; the prompt is kept."""
    ours, _ = both
    ids = torch.tensor([[5, 9, 7, 7], [7, 5, 9, 7], [5, 7, 9, 11]])
    common = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 7, "eos_token_id": None, **options}
    written = ours.generate(ids, **common)
    assert torch.equal(written[:, :4], ids)
    assert torch.equal(written, ours.generate(ids, attention_mask=(ids != 7).long(), **common))
    for row, given in zip(written, ids, strict=True):
        assert torch.equal(row[4:], ours.generate(given[given != 7][None], **common)[0, -6:])


def test_padding_tokens_after_a_state(both):
    ours, _ = both
    ids, common = torch.tensor([[5, 9, 13, 4], [3, 8, 7, 7]]), {"max_new_tokens": 6, "eos_token_id": None}
    with torch.no_grad():
        cache = ours(ids[:, :2], use_cache=True).cache_params
    more = torch.tensor([[11, 7], [7, 7]])
    expected = ours.generate(torch.cat([ids[:1, :2], more[:1, :1]], 1), **common)[0, 3:]
    written = ours.generate(more, cache_params=cache, pad_token_id=7, **common)[:, 2:]
    assert torch.equal(written[0], expected)
    assert torch.equal(written[1], ours.generate(torch.cat([ids[1:, :2], more[1:]], 1), **common)[0, 4:])


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_row_of_padding_tokens_alone_is_text(both, options):
    """A start token may be the padding token, too; transformers reads it as well."""
    ours, theirs = both
    start, common = torch.tensor([[7]]), {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = ours.generate(start, **common, **options)
    assert torch.equal(ours.generate(start, pad_token_id=7, **common, **options), expected)
    if "prefill_chunk_size" not in options:  # which is ours alone, and takes ids alone
        assert torch.equal(ours.generate(bos_token_id=7, pad_token_id=7, **common, **options)[:, -6:], expected[:, 1:])
        assert torch.equal(theirs.generate(start, pad_token_id=7, **common, **options), expected)
    batch = ours.generate(torch.tensor([[7, 7], [5, 9]]), pad_token_id=7, **common, **options)
    for row, given in zip(batch, ([7, 7], [5, 9]), strict=True):
        assert torch.equal(row, ours.generate(torch.tensor([given]), **common, **options)[0])


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_mask_that_leaves_a_row_without_a_token(model, options):
    ids, mask = tokens(2, 5), torch.ones(2, 5, dtype=torch.int64)
    mask[1] = 0
    with pytest.raises(ValueError, match="attention_mask leaves row 1 without a token"):
        model.generate(ids, attention_mask=mask, max_new_tokens=2, **options)
    cache = model.backbone.new_cache(2)
    model(tokens(2, 3), cache_params=cache)
    after = torch.cat([torch.ones(2, 3, dtype=torch.int64), mask], 1)
    with pytest.raises(ValueError, match="attention_mask leaves row 1 without a token"):
        model.generate(ids, attention_mask=after, cache_params=cache, max_new_tokens=2)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"seed": [1, 2]}, {"output_scores": True}], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_a_prompt_is_read_by_prefill(model, monkeypatch, options, padded):
    """generate -> prefill -> loop: whatever chooses the tokens, the forward does not read the prompt itself."""
    calls, ids = [], tokens(2, 7)
    read = module.prefill

    def counted(model, prompts, *arguments, **keywords):
        calls.append(tuple(prompts.shape))
        return read(model, prompts, *arguments, **keywords)

    monkeypatch.setattr(module, "prefill", counted)
    mask = torch.ones_like(ids)
    mask[0, 0] = 1 - padded
    options = {"return_dict_in_generate": True, **options}
    model.generate(ids, attention_mask=mask, max_new_tokens=3, eos_token_id=None, **options)
    assert calls == [(2, 7)]


def test_continuing_from_a_state(model):
    ids, more = tokens(2, 9), tokens(2, 4)
    expected = model.generate(torch.cat([ids, more], 1), max_new_tokens=7, do_sample=False, eos_token_id=None)

    def state():
        with torch.no_grad():
            return model(ids, use_cache=True).cache_params

    common = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None}
    new_only = model.generate(more, cache_params=state(), **common)
    assert torch.equal(new_only, expected[:, 9:])
    other_name = model.generate(more, past_key_values=state(), attention_mask=torch.ones(2, 13), **common)
    assert torch.equal(other_name, expected[:, 9:])
    # more new tokens than the state has seen: only the mask can tell, and without it the call is refused
    many = tokens(2, 12)
    with pytest.raises(ValueError, match="seen 9 tokens and input_ids has 12"):
        model.generate(many, cache_params=state(), **common)
    out = model.generate(many, cache_params=state(), attention_mask=torch.ones(2, 21), **common)
    assert torch.equal(out, model.generate(torch.cat([ids, many], 1), **common)[:, 9:])


def test_a_second_turn_with_the_whole_conversation(model):
    ids, reply = tokens(2, 9), tokens(2, 4)
    common = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None}
    first = model.generate(ids, return_dict_in_generate=True, **common)
    assert isinstance(first.past_key_values, mambakit.MambaCache)
    conversation = torch.cat([first.sequences, reply], 1)
    second = model.generate(conversation, past_key_values=first.past_key_values, **common)
    assert torch.equal(second, model.generate(conversation, **common))


def test_the_state_is_multiplied_for_several_sequences_and_left_alone(model):
    ids, more = tokens(2, 9), tokens(2, 3)
    with torch.no_grad():
        cache = model(ids, use_cache=True).cache_params
    before = cache.clone()
    common = {"max_new_tokens": 6, "eos_token_id": None, "seed": 1, "do_sample": True, "num_return_sequences": 3}
    out = model.generate(more, cache_params=cache, **common)
    assert torch.equal(out, model.generate(torch.cat([ids, more], 1), **common)[:, 9:])
    assert torch.equal(cache.ssm_states, before.ssm_states)


def test_return_dict_scores_and_hidden_states(both):
    ids = tokens(2, 5)
    common = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    a, b = (m.generate(ids, output_scores=True, output_logits=True, output_hidden_states=True, **common) for m in both)
    assert len(a.scores) == len(a.logits) == len(a.hidden_states) == 4
    for x, y in zip(a.scores + a.logits, b.scores + b.logits, strict=True):
        assert worst(x, y) < 1e-5
    assert worst(a.hidden_states[0][1], b.hidden_states[0][1]) < 1e-5


def test_a_seed_is_the_calls_own(model):
    ids = tokens(1, 5)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    a = model.generate(ids, max_new_tokens=10, do_sample=True, eos_token_id=None, seed=5)
    assert torch.equal(torch.rand(3), expected), "the global generator is left as it was"
    assert torch.equal(a, model.generate(ids, max_new_tokens=10, do_sample=True, eos_token_id=None, seed=5))
    assert not torch.equal(a, model.generate(ids, max_new_tokens=10, do_sample=True, eos_token_id=None, seed=6))


def test_from_embeddings(model):
    ids = tokens(2, 6)
    embeds = model.get_input_embeddings()(ids)
    common = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(inputs_embeds=embeds, **common), model.generate(ids, **common)[:, 6:])
    with pytest.raises(ValueError, match="pad them on the left"):
        model.generate(inputs_embeds=embeds, attention_mask=torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]]), **common)


def test_streamers_see_every_token(model):
    class Collector(transformers.generation.streamers.BaseStreamer):
        def __init__(self):
            self.pieces, self.ended = [], False

        def put(self, value):
            self.pieces.append(value.reshape(-1))

        def end(self):
            self.ended = True

    ids, collector = tokens(1, 6), Collector()
    out = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, streamer=collector)
    assert torch.equal(torch.cat(collector.pieces), out[0])
    assert collector.ended


def test_what_cannot_be_done_is_refused(model):
    ids = tokens(1, 5)
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        model.generate(ids, cache_implementation="static")
    with pytest.raises(ValueError, match="drop use_cache=False"):
        model.generate(ids, prefill_chunk_size=2, use_cache=False)
    with pytest.raises(ValueError, match="prefill_chunk_size is -3"):
        model.generate(ids, prefill_chunk_size=-3)
    with pytest.raises(ValueError, match="temprature"):
        model.generate(ids, temprature=0.5)
    with pytest.raises(ValueError, match="drafts are of one text each, and num_beams"):
        model.generate(ids, prompt_lookup_num_tokens=3, num_beams=2)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([1, 2]), r"shape \(2,\), expected \(b, l\); one sequence is input_ids\[None\]"),
        (torch.zeros(1, 0, dtype=torch.int64), r"shape \(1, 0\), expected \(b, l\) with l >= 1$"),
        ([[1, 2]], "input_ids is a list; give a tensor"),
    ],
)
def test_prompts_that_are_none(model, ids, message):
    with pytest.raises((TypeError, ValueError), match=message):
        model.generate(ids, max_new_tokens=2)


@pytest.mark.parametrize("shape", [(2, 3), (2, 9), (1, 5), (5,)])
def test_masks_of_another_shape(model, shape):
    ids, mask = tokens(2, 5), torch.ones(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"attention_mask has shape .*, expected \(2, 5\)$"):
        model.generate(ids, attention_mask=mask, max_new_tokens=2)
    cache = model(ids[:, :2], use_cache=True).cache_params
    with pytest.raises(ValueError, match=r"expected \(2, 5\), or \(2, 7\) with the 2 tokens before them$"):
        model.generate(ids, cache_params=cache, attention_mask=mask, max_new_tokens=2)


def test_memory_of_a_chunked_prompt_does_not_grow(model):
    """The peak of tensors made by torch while reading 16 times the prompt stays the same."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor) and t.is_floating_point():
                    self.size = max(self.size, t.nbytes)
            return out

    sizes = []
    for length in (128, 2048):
        with Largest() as mode:
            model.generate(
                tokens(1, length), max_new_tokens=2, prefill_chunk_size=64, do_sample=False, eos_token_id=None
            )
        sizes.append(mode.size)
    assert sizes[0] == sizes[1]


def test_a_long_prompt_is_read_in_chunks_unasked(monkeypatch):
    from mambakit.decoding import chunks

    model = pair("plain")[0]
    ids = tokens(2, 150)
    options = {"max_new_tokens": 6, "do_sample": False}
    whole = model.generate(ids, **options)
    lengths = []
    forward = model.backbone.forward
    monkeypatch.setattr(model.backbone, "forward", lambda ids, **k: lengths.append(ids.shape[1]) or forward(ids, **k))
    monkeypatch.setitem(chunks.CHUNK_SIZES, "cpu", chunks.ChunkSizes(64, 128, 64))
    assert torch.equal(model.generate(ids, **options), whole)
    assert max(lengths) == 64, "no less than 64 tokens of a row at a time"
    lengths.clear()
    out = model.generate(ids, **options, return_dict_in_generate=True, output_hidden_states=True)
    assert max(lengths) == 150
    assert out.hidden_states[0][0].shape[1] == 150, "hidden states are asked for: those of the whole prompt"
