"""A tokenizer in GGUF's metadata, both ways: byte-level BPE, which llama.cpp calls "gpt2", and sentencepiece's "llama".

GGUF holds tokens, their kinds and merges. How text is cut before it is merged, it only names (``tokenizer.ggml.pre``;
`cuts` has llama.cpp's expressions). It holds no normaliser, so a text is read as llama.cpp reads it: GPT-NeoX's NFC,
say, is not applied.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mambakit.errors import CheckpointError
from mambakit.models.checkpoints.gguf.container import Header, Typed
from mambakit.models.checkpoints.gguf.cuts import BY_NAME, CUTS, WHOLE_WORDS_FIRST, name_of_cut
from mambakit.quoting import brief

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
_SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_SPACE = "▁"


# -- reading -----------------------------------------------------------------------------------------------------------


def read_tokenizer(header: Header, **options: Any) -> Any:
    """transformers' fast tokenizer of a GGUF file, its chat template included.

    Args:
        options: of `PreTrainedTokenizerFast`.

    Raises:
        CheckpointError: the file holds none, or one of a kind that is not read.
    """
    from transformers import PreTrainedTokenizerFast

    tokens = _Tokens(header)
    if tokens.kind == "gpt2":
        tokenizer = _byte_level(tokens)
    elif tokens.kind == "llama":
        tokenizer = _sentencepiece(tokens)
    else:
        raise CheckpointError(
            f"{header.path} holds a tokenizer of llama.cpp's kind {brief(tokens.kind)}; mambakit reads gpt2 and llama "
            "there: give a tokenizer of its own (a folder or a hub id)"
        )
    ids = {ours: tokens.special(theirs) for theirs, ours in _SPECIAL.items()}
    special = {name: tokens.texts[id] for name, id in ids.items() if id is not None}
    if tokens.flag("add_bos_token", tokens.kind == "llama") and ids["bos_token"] is not None:
        text = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[text, "$A"], pair=[text, "$A", text, "$B:1"], special_tokens=[(text, ids["bos_token"])]
        )
    template = header.metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{header.path}: tokenizer.chat_template is {brief(template)}, no text; convert it again")
    settings = {"model_max_length": 10**9, "clean_up_tokenization_spaces": False, "chat_template": template}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**settings, **special, **options})
    fast.name_or_path = str(header.path)
    return fast


def special_ids(header: Header) -> dict[str, int]:
    """The configuration's ids of special tokens, those that the file has."""
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    found = {ours: header.metadata.get(f"tokenizer.ggml.{theirs}_token_id") for theirs, ours in names.items()}
    return {name: id for name, id in found.items() if id is not None}


class _Tokens:
    """The checked fields of ``tokenizer.ggml``."""

    def __init__(self, header: Header):
        self._metadata, self._path = header.metadata, header.path
        self.kind = self._get("model", str, "")
        if not self.kind or self.kind in ("none", "no_vocab"):
            raise CheckpointError(f"{self._path} holds no tokenizer; give one of its own (a folder or a hub id)")
        self.texts: list[str] = self._list("tokens", str)
        count = len(self.texts)
        self.kinds: list[int] = self._list("token_type", int) or [_NORMAL] * count
        self.scores: list[float] = self._list("scores", float)
        self.merges: list[str] = self._list("merges", str)
        if len(self.kinds) != count or (self.scores and len(self.scores) != count):
            raise self._wrong(f"{count} tokens have {len(self.kinds)} types and {len(self.scores)} scores")
        if not count:
            raise self._wrong("there are no tokens")

    def _wrong(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: its tokenizer is damaged ({what}); convert it again")

    def _get(self, name: str, kind: type, default: Any) -> Any:
        value = self._metadata.get(f"tokenizer.ggml.{name}", default)
        if type(value) is not type(default) and type(value) is not kind:
            raise self._wrong(f"tokenizer.ggml.{name} is {brief(value)}")
        return value

    def _list(self, name: str, kind: type) -> list[Any]:
        values = self._get(name, list, [])
        if not all(type(value) is kind for value in values):
            raise self._wrong(f"tokenizer.ggml.{name} is no list of {kind.__name__}")
        return values

    @property
    def cut(self) -> str:
        name = self._get("pre", str, "")
        if name not in BY_NAME:
            raise CheckpointError(
                f"{self._path}: its tokenizer cuts texts as {brief(name)} does (tokenizer.ggml.pre); mambakit knows "
                f"{', '.join(filter(None, BY_NAME))}: give a tokenizer of its own (a folder or a hub id)"
            )
        return BY_NAME[name]

    def flag(self, name: str, default: bool) -> bool:
        return self._get(name, bool, default)

    def special(self, name: str) -> int | None:
        id = self._get(f"{name}_token_id", int, None)
        if id is not None and not 0 <= id < len(self.texts):
            raise self._wrong(f"tokenizer.ggml.{name}_token_id is {id} of {len(self.texts)} tokens")
        return id

    def vocabulary(self) -> dict[str, int]:
        ids: dict[str, int] = {}
        for id, (text, kind) in enumerate(zip(self.texts, self.kinds, strict=True)):
            if text in ids and kind != _UNUSED:
                raise self._wrong(f"tokens {ids[text]} and {id} are both {brief(text)}")
            ids.setdefault(text, id)
        return ids

    def pairs(self, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
        pairs = []
        for merge in self.merges:
            left, space, right = merge[1:].partition(" ")  # a token may begin with a space, none begins with two
            left = merge[:1] + left
            if not space or left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
                raise self._wrong(f"the merge {brief(merge)} is not one of tokens")
            pairs.append((left, right))
        return pairs

    def add_special(self, tokenizer: Tokenizer) -> None:
        """Tokens that are found in a text before it is cut."""
        kinds = zip(self.texts, self.kinds, strict=True)
        tokenizer.add_tokens(
            [AddedToken(text, special=kind == _CONTROL, normalized=False)
             for text, kind in kinds if kind in (_CONTROL, _USER) and text]
        )  # fmt: skip


def _byte_level(tokens: _Tokens) -> Tokenizer:
    vocabulary = tokens.vocabulary()
    whole = tokens.cut in WHOLE_WORDS_FIRST
    tokenizer = Tokenizer(models.BPE(vocabulary, tokens.pairs(vocabulary), ignore_merges=whole))
    cuts = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in CUTS[tokens.cut][0]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokens.add_special(tokenizer)
    return tokenizer


def _sentencepiece(tokens: _Tokens) -> Tokenizer:
    """Pairs are merged in the order of the scores of what they make; what is no token is read as bytes."""
    vocabulary = tokens.vocabulary()
    if not tokens.scores:
        raise tokens._wrong("tokens have no scores")
    normal = [id for id, kind in enumerate(tokens.kinds) if kind == _NORMAL and len(tokens.texts[id]) > 1]
    merges = []
    for id in sorted(normal, key=lambda id: -tokens.scores[id]):
        text = tokens.texts[id]
        pairs = [(text[:i], text[i:]) for i in range(1, len(text))]
        merges += [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
    unknown = tokens.special("unknown")
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary, merges, byte_fallback=True, fuse_unk=True,
            unk_token=None if unknown is None else tokens.texts[unknown],
        )
    )  # fmt: skip
    prefix = tokens.flag("add_space_prefix", True)
    first = [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", _SPACE)])
    last = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    tokens.add_special(tokenizer)
    return tokenizer


# -- writing -----------------------------------------------------------------------------------------------------------


def written(tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """GGUF's metadata of a transformers tokenizer; of none where it is None.

    Args:
        vocab_size: rows of the embeddings; rows beyond the tokenizer's get unused tokens.

    Raises:
        CheckpointError: GGUF has no form for the tokenizer.
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none", "mamba.vocab_size": vocab_size}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(
            f"the tokenizer is a {type(tokenizer).__name__}; give a fast one of transformers "
            "(AutoTokenizer.from_pretrained), or None"
        )
    state = json.loads(backend.to_str())
    model = state["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise CheckpointError(
            f"GGUF is written with byte-level BPE tokenizers, this one is {brief(model['type'])}; "
            "write the model without it (--no-tokenizer, tokenizer=None)"
        )
    cut = name_of_cut(state["pre_tokenizer"], bool(model["merges"]))
    ids: dict[str, int] = dict(model["vocab"])
    kinds = dict.fromkeys(ids.values(), _NORMAL)
    for added in state["added_tokens"]:
        ids[added["content"]] = added["id"]
        kinds[added["id"]] = _CONTROL if added["special"] else _USER
    texts = {id: text for text, id in ids.items()}
    if max(texts, default=-1) >= vocab_size:
        raise CheckpointError(f"the tokenizer has token {max(texts)}, the model's embeddings {vocab_size} rows")
    special = {theirs: getattr(tokenizer, f"{ours}_id") for theirs, ours in _SPECIAL.items()}
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": cut,
        "tokenizer.ggml.tokens": [texts.get(id, f"[PAD{id}]") for id in range(vocab_size)],
        "tokenizer.ggml.token_type": [Typed("i", kinds.get(id, _UNUSED)) for id in range(vocab_size)],
        "tokenizer.ggml.merges": merges,
        **{f"tokenizer.ggml.{name}_token_id": id for name, id in special.items() if id is not None},
        "tokenizer.ggml.add_bos_token": _adds_bos(tokenizer),
    }  # fmt: skip
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        metadata["tokenizer.chat_template"] = template
    return metadata


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
