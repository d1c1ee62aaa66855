"""The command line's tokenizer has the tokens and the text of transformers', of the same files."""

from __future__ import annotations

import json

import pytest

import mambakit
from mambakit.assets import default_model_path
from mambakit.models.inference_tokenizer import InferenceTokenizer
from tests.models.tiny import save_tiny

TEXTS = (
    "", " ", "It was a dark and stormy night;", "  two  spaces\n\tand\r\nlines ", "1234567890",
    "<|endoftext|>a<|endoftext|>", "caf\u00e9 \u65e5\u672c\u8a9e \U0001f600\u200d\U0001f680", "\x00\x7f\ufffd",
)  # fmt: skip


def both(folder):
    ours = InferenceTokenizer.of(folder)
    assert ours is not None
    return ours, mambakit.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(params=["embedded", "tiny"])
def folder(request, tmp_path):
    if request.param == "embedded":
        return default_model_path()
    save_tiny(tmp_path)
    return tmp_path


def test_tokens_and_text(folder):
    ours, theirs = both(folder)
    for text in TEXTS:
        ids = ours(text, add_special_tokens=False, verbose=False).input_ids
        assert ids == theirs(text, add_special_tokens=False, verbose=False).input_ids
        tensor = ours(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids
        expected = theirs(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids
        assert tensor.tolist() == expected.tolist()
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
        for token in ids:
            assert ours.decode([token]) == theirs.decode([token])
    for name in ("bos_token", "bos_token_id", "eos_token", "eos_token_id", "chat_template", "is_fast"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours._whole is None  # nothing of that needed transformers


def test_all_else_is_transformers(folder):
    ours, theirs = both(folder)
    assert ours("a b")["input_ids"] == theirs("a b")["input_ids"]
    assert (
        ours(["a", "b"], add_special_tokens=False).input_ids == theirs(["a", "b"], add_special_tokens=False).input_ids
    )
    assert ours.convert_ids_to_tokens(5) == theirs.convert_ids_to_tokens(5)
    assert ours.decode(5) == theirs.decode(5)
    assert ours.vocab_size == theirs.vocab_size
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = ours.nothing_of_this_name


@pytest.mark.parametrize("changed", [
    {"tokenizer_class": "GPTNeoXTokenizer"}, {"clean_up_tokenization_spaces": True}, {"add_bos_token": True},
    {"chat_template": "{{ messages }}"}, {"bos_token": "<not in the file>"}, {"eos_token": {"content": "a"}},
    {"split_special_tokens": True}, {"a_field_of_nobody": 1},
])  # fmt: skip
def test_what_is_left_to_transformers(tmp_path, changed):
    save_tiny(tmp_path)
    assert InferenceTokenizer.of(tmp_path) is not None
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    assert InferenceTokenizer.of(tmp_path) is None


@pytest.mark.parametrize("file", ["special_tokens_map.json", "added_tokens.json", "chat_template.jinja"])
def test_other_files_are_left_to_transformers(tmp_path, file):
    save_tiny(tmp_path)
    (tmp_path / file).write_text("{}")
    assert InferenceTokenizer.of(tmp_path) is None


def test_a_damaged_file_is_left_to_transformers(tmp_path):
    save_tiny(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    assert InferenceTokenizer.of(tmp_path) is None


def test_names_without_files():
    assert InferenceTokenizer.of("raw-bytes") is None


def test_what_is_set_or_added_holds(folder):
    """Also where transformers' tokenizer has not been made yet, and whatever was read before."""
    ours, theirs = both(folder)
    for one in (ours, theirs):
        one.chat_template = "{{ messages[0].content }}"
        one.eos_token = "<new end>"
        one.add_tokens(["dark and"])
    assert (ours.eos_token, ours.eos_token_id) == (theirs.eos_token, theirs.eos_token_id)
    said = [{"role": "user", "content": "x"}]
    assert ours.apply_chat_template(said, tokenize=False) == "x"
    text = "a dark and stormy night<new end>"
    ids = ours(text, add_special_tokens=False, verbose=False).input_ids
    assert ids == theirs(text, add_special_tokens=False, verbose=False).input_ids
    assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
