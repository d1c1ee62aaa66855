"""The tokenizer of a checkpoint for inference alone: the library tokenizers without transformers around it.

transformers takes as long to import as torch does. It is imported for a tokenizer that is more than its tokenizer.json,
and at the first use of what is not here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mambakit.models.checkpoints.storage import is_gguf, small_files
from mambakit.models.vocabularies import MADE
from mambakit.reading import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Classes of transformers whose tokens are those of tokenizer.json.
_PLAIN = ("TokenizersBackend", "PreTrainedTokenizerFast")
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
# What else tokenizer_config.json may say without changing a token: the length is for warnings, which are off.
_HARMLESS = {"backend", "model_max_length", "tokenizer_class"}
# Beside these files tokenizer.json is not all.
_OTHERS = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "additional_chat_templates")
# From this many tokens on transformers looks whether the file has a known fault.
_LARGEST = 100_000


@dataclass
class Encoding:
    """The result of a call: ``input_ids``, a list, or (1, l) int64 where tensors were asked for."""

    input_ids: Any


class InferenceTokenizer:
    """Tokens and text as transformers' tokenizer of the same files has them; all else is that tokenizer's.

    Args:
        name: of the checkpoint.
        backend: its tokenizer.json.
        special: the tokens that tokenizer_config.json names.
    """

    def __init__(self, name: str | os.PathLike, backend: Tokenizer, special: dict[str, str | None]):
        ids = {f"{key}_id": None if token is None else backend.token_to_id(token) for key, token in special.items()}
        own = {"name_or_path": str(name), "backend_tokenizer": backend, "is_fast": True, "chat_template": None}
        self.__dict__.update(_whole=None, _own={**own, **special, **ids})

    @classmethod
    def of(cls, name: str | os.PathLike) -> InferenceTokenizer | None:
        """The tokenizer of a checkpoint; None where transformers must read it, or say what is wrong."""
        if str(name) in MADE and not Path(name).exists():
            return None
        folder = small_files(name)
        path, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
        if is_gguf(folder) or not path.is_file() or not settings.is_file():
            return None
        if any((folder / other).exists() for other in _OTHERS):
            return None
        given = read_json(settings)
        special = {key: given.pop(key, None) for key in _SPECIAL}
        if given.pop("clean_up_tokenization_spaces", False) or given.get("tokenizer_class") not in _PLAIN:
            return None
        if given.keys() - _HARMLESS or not all(token is None or isinstance(token, str) for token in special.values()):
            return None
        backend = _backend(path)
        if backend is None or not _has(backend, {token for token in special.values() if token is not None}):
            return None
        return cls(name, backend, special)

    def __call__(self, text: Any, **options: Any) -> Any:
        plain = {"add_special_tokens": False, "verbose": False, **options}
        tensors = plain.pop("return_tensors", None)
        simple = plain == {"add_special_tokens": False, "verbose": False} and "add_special_tokens" in options
        if self._whole is not None or not isinstance(text, str) or not simple or tensors not in (None, "pt"):
            return self.of_transformers()(text, **options)
        ids = self.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return Encoding(ids if tensors is None else torch.tensor([ids], dtype=torch.int64, device="cpu"))

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **options: Any) -> Any:
        ints = isinstance(token_ids, list) and all(isinstance(token, int) for token in token_ids)
        if self._whole is not None or options or not ints:
            return self.of_transformers().decode(token_ids, skip_special_tokens=skip_special_tokens, **options)
        return self.backend_tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def of_transformers(self) -> Any:
        """transformers' tokenizer of the same files. From then on it does everything: tokens may be added to it."""
        if self._whole is None:
            from mambakit.models.auto import AutoTokenizer

            self.__dict__["_whole"] = AutoTokenizer.from_pretrained(self._own["name_or_path"])
        return self._whole

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_whole", "_own"):
            raise AttributeError(name)
        if name in self._own:
            return self._own[name] if self._whole is None else getattr(self._whole, name, self._own[name])
        return getattr(self.of_transformers(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.of_transformers(), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.of_transformers(), name)


def _backend(path: Path) -> Tokenizer | None:
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_file(str(path))
    except Exception:  # tokenizers raises plain Exceptions; transformers' reader says what is wrong
        return None
    cut = backend.truncation is not None or backend.padding is not None
    return None if cut or backend.get_vocab_size() > _LARGEST else backend


def _has(backend: Tokenizer, tokens: set[str]) -> bool:
    """Whether ``tokens`` are special in the file already; transformers would add those that are not."""
    added = backend.get_added_tokens_decoder().values()
    return tokens <= {token.content for token in added if token.special and not token.normalized}
