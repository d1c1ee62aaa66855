"""Tokenizers in GGUF files: every way to cut texts comes back, with special tokens and the chat template."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import mambakit
from mambakit import CheckpointError
from mambakit.models.checkpoints.gguf.container import Typed, read_header, write_file
from mambakit.models.checkpoints.gguf.cuts import BY_NAME, CUTS
from mambakit.models.checkpoints.gguf.vocabulary import read_tokenizer, written
from mambakit.training.tokenizer import make_vocabulary, train_tokenizer
from tests.models.tiny import TEXT

TEXTS = (
    TEXT, "", " ", "\n\n  a\tb \r\n", "It's 12345 o'clock, I'LL pay $3.50!!", "x = y<=z ^ ~q | `r`", "naïve 日本語 🙂",
    "<|endoftext|>a<|endoftext|>", "  leading", "12 123 1234 ١٢٣٤",
)  # fmt: skip
PAT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The forms in which these are found in tokenizer.json.
USUAL = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "starcoder": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PAT % "{1,3}"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    ),
    "qwen2": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PAT % ""), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    ),
}


def fast(tokenizer: Tokenizer, **special) -> PreTrainedTokenizerFast:
    special = special or {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def trained(cut) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = cut, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT, *TEXTS], trainer)
    return tokenizer


def through(tokenizer, path: Path, vocab_size: int = 400, **changes):
    write_file(path, {"general.architecture": "mamba", **written(tokenizer, vocab_size), **changes}, {})
    return read_tokenizer(read_header(path))


@pytest.mark.parametrize("cut", USUAL)
def test_usual_tokenizers_come_back(cut, tmp_path):
    before = fast(trained(USUAL[cut]))
    after = through(before, tmp_path / "m.gguf")
    assert read_header(tmp_path / "m.gguf").metadata["tokenizer.ggml.pre"] == cut
    for text in TEXTS:
        ids = before(text).input_ids
        assert after(text).input_ids == ids
        assert after.decode(ids) == before.decode(ids) == text
    assert (after.bos_token, after.eos_token, after.pad_token) == ("<|endoftext|>", "<|endoftext|>", None)
    again = through(after, tmp_path / "again.gguf")
    assert [again(text).input_ids for text in TEXTS] == [after(text).input_ids for text in TEXTS]


@pytest.mark.parametrize("cut", CUTS)
def test_what_is_read_is_written_under_its_name(cut, tmp_path):
    tokenizer = fast(trained(USUAL["gpt-2"]))
    read = through(tokenizer, tmp_path / "m.gguf", **{"tokenizer.ggml.pre": cut})
    assert written(read, 400)["tokenizer.ggml.pre"] == cut


def test_names_of_cuts_are_told_apart():
    assert len(BY_NAME) == sum(1 + len(others) for _, others in CUTS.values())


def test_mambakits_own_tokenizers(tmp_path):
    text = fast(train_tokenizer([TEXT], 300))
    assert [through(text, tmp_path / "a.gguf")(t).input_ids for t in TEXTS] == [text(t).input_ids for t in TEXTS]
    raw = fast(make_vocabulary("bytes").tokenizer)
    assert [through(raw, tmp_path / "b.gguf")(t).input_ids for t in TEXTS] == [raw(t).input_ids for t in TEXTS]
    with pytest.raises(CheckpointError, match="byte-level BPE tokenizers, this one is 'WordLevel'"):
        written(fast(make_vocabulary("nucleotides").tokenizer), 8)


def test_special_tokens_and_the_chat_template(tmp_path):
    tokenizer = trained(USUAL["gpt-2"])
    tokenizer.add_special_tokens(["<|user|>", "<|pad|>"])
    tokenizer.add_tokens(["    "])
    before = fast(tokenizer, bos_token="<|user|>", eos_token="<|endoftext|>", pad_token="<|pad|>")
    before.chat_template = "{% for m in messages %}<|user|>{{ m.content }}<|endoftext|>{% endfor %}"
    after = through(before, tmp_path / "m.gguf")
    chat = [{"role": "user", "content": "The cat    sat"}]
    assert after.apply_chat_template(chat, tokenize=False) == "<|user|>The cat    sat<|endoftext|>"
    assert after.apply_chat_template(chat)["input_ids"] == before.apply_chat_template(chat)["input_ids"]
    assert after.pad_token_id == before.pad_token_id
    assert after.decode(after("<|user|>a").input_ids, skip_special_tokens=True) == "a"
    assert after("The cat").input_ids[:1] != [after.bos_token_id]
    adding = through(before, tmp_path / "b.gguf", **{"tokenizer.ggml.add_bos_token": True})
    assert adding("The cat").input_ids == [adding.bos_token_id, *after("The cat").input_ids]
    assert written(adding, 400)["tokenizer.ggml.add_bos_token"] is True


def test_sentencepiece(tmp_path):
    """The pair whose token has the highest score is merged first; what is no token is read as bytes."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * 6]
    scores = [0.0] * 259 + [-9.0, -8.0, -7.0, -2.0, -1.0, -3.0]
    ids = {token: id for id, token in enumerate(tokens)}
    write_file(
        tmp_path / "m.gguf",
        {"general.architecture": "mamba", "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens,
         "tokenizer.ggml.scores": scores, "tokenizer.ggml.token_type": [Typed("i", kind) for kind in kinds],
         "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0},
        {},
    )  # fmt: skip
    tokenizer = read_tokenizer(read_header(tmp_path / "m.gguf"))
    assert tokenizer("aab é").input_ids == [
        1, ids["▁a"], ids["ab"], ids["▁"], ids["<0xC3>"], ids["<0xA9>"],
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer("aab é").input_ids, skip_special_tokens=True) == "aab é"


BROKEN = {
    "another kind": ({"tokenizer.ggml.model": "t5"}, "kind 't5'; mambakit reads gpt2 and llama"),
    "none": ({"tokenizer.ggml.model": "none"}, "holds no tokenizer"),
    "an unknown cut": ({"tokenizer.ggml.pre": "deepseek-v3"}, "cuts texts as 'deepseek-v3' does"),
    "an end beyond": ({"tokenizer.ggml.eos_token_id": 400}, "eos_token_id is 400 of 400 tokens"),
    "too few types": ({"tokenizer.ggml.token_type": [Typed("i", 1)]}, "400 tokens have 1 types"),
    "numbers for tokens": ({"tokenizer.ggml.tokens": [1, 2]}, "tokens is no list of str"),
    "a token twice": ({"tokenizer.ggml.tokens": ["a"] * 400}, "tokens 0 and 1 are both 'a'"),
    "a strange merge": ({"tokenizer.ggml.merges": ["qq zz"]}, "the merge 'qq zz' is not one of tokens"),
    "a merge of one": ({"tokenizer.ggml.merges": ["qq"]}, "the merge 'qq' is not one of tokens"),
    "a template of numbers": ({"tokenizer.chat_template": 3}, "chat_template is 3, no text"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_tokenizers_are_refused(case, tmp_path):
    changes, message = BROKEN[case]
    with pytest.raises(CheckpointError, match=message):
        through(fast(trained(USUAL["gpt-2"])), tmp_path / "m.gguf", **changes)


def test_what_cannot_be_written():
    tokenizer = trained(USUAL["gpt-2"])
    with pytest.raises(CheckpointError, match="embeddings 40 rows"):
        written(fast(tokenizer), 40)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), USUAL["gpt-2"]])
    with pytest.raises(CheckpointError, match="no name that mambakit knows"):
        written(fast(tokenizer), 400)


def test_a_file_without_a_tokenizer(tmp_path):
    model = mambakit.MambaForCausalLM(mambakit.MambaConfig(vocab_size=16, hidden_size=32, num_hidden_layers=1))
    model.save_gguf(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="holds no tokenizer; give one of its own"):
        mambakit.AutoTokenizer.from_pretrained(tmp_path / "m.gguf")
