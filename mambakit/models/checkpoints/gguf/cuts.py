"""How a tokenizer cuts texts before it merges bytes: llama.cpp's names of it, and their regular expressions.

The expressions are those of llama.cpp's ``llama-vocab.cpp``, in the syntax of `tokenizers`.
"""

from __future__ import annotations

import json
from typing import Any

from mambakit.errors import CheckpointError
from mambakit.quoting import brief

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_ENGLISH = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORDS = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|%s]+"
# Name of a way to cut texts -> the regular expressions that are applied in turn, and names that mean the same.
CUTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "gpt-2": ((_GPT2,), ("mpt", "olmo", "phi-2", "jais", "trillion", "exaone4", "modern-bert", "mellum", "gigachat")),
    "starcoder": ((r"\p{N}", _GPT2), ("refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b")),
    "falcon": ((_PUNCTUATION % "`", _GPT2, "[0-9][0-9][0-9]"), ()),
    "default": ((_PUNCTUATION % "", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"), ("",)),
    "llama-bpe": ((_WORDS % "{1,3}",), ("llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe")),
    "qwen2": ((_WORDS % "",), ("stablelm2", "megrez", "deepseek-r1-qwen")),
}
WHOLE_WORDS_FIRST = {"llama-bpe"}  # a word that is a token is not merged anew
BY_NAME = {name: cut for cut, (_, others) in CUTS.items() for name in (cut, *others)}


def name_of_cut(state: Any, merges: bool) -> str:
    """llama.cpp's name of a tokenizer's way to cut texts.

    Raises:
        CheckpointError: it has none that is known here.
    """
    steps = _steps(state)
    for name in CUTS:
        if steps in _same_as(name):
            return name
    if steps == (("ByteLevel", False),) and not merges:
        return "gpt-2"  # bytes alone: where texts are cut makes no difference
    raise CheckpointError(
        f"llama.cpp has no name that mambakit knows for the way in which the tokenizer cuts texts: "
        f"{brief(steps, 200)}; write the model without it (--no-tokenizer, tokenizer=None)"
    )


def _same_as(name: str) -> list[tuple[Any, ...]]:
    """The steps of tokenizer.json that cut as ``name`` does: as `read_tokenizer` makes them, and as others do."""
    bytes_alone, with_regex = ("ByteLevel", False), ("ByteLevel", True)
    others: dict[str, list[tuple[Any, ...]]] = {
        "gpt-2": [(with_regex,)],
        "starcoder": [(("Digits", True), with_regex)],
        "falcon": [
            (("Punctuation", "Contiguous"), with_regex, ("Digits", False), ("Split", "[0-9][0-9][0-9]", "Isolated"))
        ],
        "llama-bpe": [(("Split", _insensitive("{1,3}"), "Isolated"), bytes_alone)],
        "qwen2": [(("Split", _insensitive(""), "Isolated"), bytes_alone)],
    }
    cuts = tuple(("Split", expression, "Isolated") for expression in CUTS[name][0])
    return [(*cuts, bytes_alone), *others.get(name, ())]


def _insensitive(digits: str) -> str:
    return (_WORDS % digits).replace(_ENGLISH, "(?i:'s|'t|'re|'ve|'m|'ll|'d)")


def _steps(state: Any) -> tuple[Any, ...]:
    """The parts of a pre-tokenizer's state that say how it cuts."""
    if state is None:
        return ()
    if state["type"] == "Sequence":
        parts: list[Any] = state["pretokenizers"]
        return tuple(step for part in parts for step in _steps(part))
    if state["type"] == "ByteLevel" and not state["add_prefix_space"]:
        return (("ByteLevel", state["use_regex"]),)
    if state["type"] == "Digits":
        return (("Digits", state["individual_digits"]),)
    if state["type"] == "Punctuation":
        return (("Punctuation", state["behavior"]),)
    if state["type"] == "Split" and not state["invert"]:
        pattern = state["pattern"]
        return (("Split", pattern.get("Regex", pattern.get("String")), state["behavior"]),)
    return ((state["type"], json.dumps(state)),)
