"""AutoConfig, AutoModel*, AutoTokenizer: transformers' interface, for the families and formats that mambakit has."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mambakit.errors import CheckpointError
from mambakit.models.adapter_config import base_of
from mambakit.models.checkpoints.configuration import read_configuration, read_fields
from mambakit.models.checkpoints.storage import (
    HUB_ARGUMENTS,
    holds_adapters,
    is_gguf,
    locate,
    resolve,
    small_files,
)
from mambakit.models.checkpoints.table import format_of
from mambakit.models.families import (
    CAUSAL_LM,
    CLASSIFIER,
    CONFIG,
    FAMILIES,
    MASKED_LM,
    MODEL,
    TOKEN_CLASSIFIER,
    classifier_of,
)
from mambakit.models.options import check_loading
from mambakit.models.vocabularies import MADE, made, stand_in
from mambakit.quoting import brief
from mambakit.reading import read_json, require_whole

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt",
)  # fmt: skip


def read_any_configuration(folder: Path, **overrides: Any) -> tuple[Any, dict[str, Any]]:
    """`read_configuration` as the class that the checkpoint's model_type asks for."""
    family = FAMILIES[read_fields(folder)["model_type"]]
    return read_configuration(folder, family.load(CONFIG), **overrides)


def model_place(name: str | os.PathLike, **hub: Any) -> Path:
    """The folder or file of a model; of adapters their base model's."""
    place = locate(name, **hub)
    if not holds_adapters(place):
        return resolve(name, **hub)
    return resolve(base_of(place), **{k: v for k, v in hub.items() if k not in ("revision", "subfolder")})


def require_text(name: str | os.PathLike, config: Any) -> None:
    """CheckpointError where a checkpoint's head gives classes: a language model made of it would write nonsense."""
    if (found := classifier_of(config.architectures)) is not None:
        ending = next(ending for ending in (CLASSIFIER, TOKEN_CLASSIFIER) if found.endswith(ending))
        raise CheckpointError(
            f"{name} holds a {found}, whose head gives classes, not text; load it with AutoModel{ending}, or take the "
            "language model that it was made from"
        )


class AutoConfig:
    """The configuration of a checkpoint."""

    @staticmethod
    def from_pretrained(name: str | os.PathLike, **kwargs: Any) -> Any:
        hub = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
        config, unused = read_any_configuration(model_place(name, **hub), **check_loading(kwargs))
        if unused:
            raise TypeError(f"AutoConfig.from_pretrained: {sorted(unused)} are not fields of {type(config).__name__}")
        config.name_or_path = str(name)
        return config


class _AutoModel:
    """Takes the class from the family of the configuration's model_type. Abstract."""

    _ending: str

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        if config is None:
            hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
            model_type = read_any_configuration(model_place(name, **hub))[0].model_type
        elif isinstance(config, (str, os.PathLike)):
            config = AutoConfig.from_pretrained(config)
            model_type = config.model_type
        else:
            model_type = config.model_type
        return cls._class_of(model_type).from_pretrained(name, *args, config=config, **kwargs)

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> Any:
        return cls._class_of(config.model_type)._from_config(config, **kwargs)

    @classmethod
    def _class_of(cls, model_type: str) -> Any:
        if model_type not in FAMILIES:
            raise ValueError(f"model_type is {brief(model_type)}; mambakit has {' and '.join(FAMILIES)}")
        return FAMILIES[model_type].load(cls._ending)


class AutoModel(_AutoModel):
    """`MambaModel` or `FalconMambaModel`."""

    _ending = MODEL


class AutoModelForCausalLM(_AutoModel):
    """`MambaForCausalLM` or `FalconMambaForCausalLM`."""

    _ending = CAUSAL_LM


class AutoModelForSequenceClassification(_AutoModel):
    """`MambaForSequenceClassification` or `FalconMambaForSequenceClassification`."""

    _ending = CLASSIFIER


class AutoModelForMaskedLM(_AutoModel):
    """`BiMambaForMaskedLM`."""

    _ending = MASKED_LM


class AutoModelForTokenClassification(_AutoModel):
    """`MambaForTokenClassification`, or its like of another family."""

    _ending = TOKEN_CLASSIFIER


def _stand_in(name: str, config: Any, fields: dict[str, Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """The tokenizer of a checkpoint without one."""
    chosen = stand_in(name, fields.get("vocab_size", config.vocab_size))
    try:
        return AutoTokenizer.from_pretrained(chosen, *args, **{k: v for k, v in kwargs.items() if k != "config"})
    except CheckpointError as error:
        raise CheckpointError(
            f"{name} holds no tokenizer, and the one that it takes cannot be had: {error}; or give the folder of one: "
            "--tokenizer FOLDER"
        ) from error


class AutoTokenizer:
    """transformers' AutoTokenizer; for checkpoints in state-spaces' format, which hold none, also the one that their
    number of tokens asks for (`mambakit.models.vocabularies`)."""

    @staticmethod
    def from_pretrained(name: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        import transformers

        if not Path(name).exists() and str(name) in MADE:
            return made(str(name))
        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
        folder = small_files(name, **hub)
        if is_gguf(folder):
            from mambakit.models.checkpoints.gguf.container import read_header
            from mambakit.models.checkpoints.gguf.vocabulary import read_tokenizer

            read_any_configuration(folder)
            return read_tokenizer(read_header(folder), **{k: v for k, v in kwargs.items() if k not in hub})
        if holds_adapters(folder) and not any((folder / file).exists() for file in _TOKENIZER_FILES):
            return AutoTokenizer.from_pretrained(base_of(folder), *args, **kwargs)
        fields = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
        found = [folder / file for file in _TOKENIZER_FILES if (folder / file).exists()]
        if fields:
            format = format_of(folder, fields)
            # A tokenizer may come from a model of another architecture; what has a Mamba model's configuration must be
            # one.
            model_type = format.read_configuration(fields, folder / "config.json").get("model_type")
            if not found or model_type in tuple(FAMILIES):
                config, _ = read_any_configuration(folder)
                # transformers' own reading takes no whole number for a real one, and would blame the tokenizer.
                kwargs.setdefault("config", config)
            if not found and not format.holds_tokenizers:
                return _stand_in(str(name), config, fields, args, {k: v for k, v in kwargs.items() if k not in hub})
        if not found:
            raise CheckpointError(f"{name} holds no tokenizer (tokenizer.json); give the folder or id that does")
        for path in (
            *found,
            *(p for p in (folder / "special_tokens_map.json", folder / "added_tokens.json") if p.exists()),
        ):
            if path.suffix == ".json":
                read_json(path)
            elif path.suffix == ".model":
                require_whole(path)
        try:
            return transformers.AutoTokenizer.from_pretrained(name, *args, **kwargs)
        except Exception as error:  # tokenizers raises plain Exceptions
            raise CheckpointError(
                f"the tokenizer in {folder} ({', '.join(path.name for path in found)}) cannot be used: "
                f"{' '.join(str(error).split()) or type(error).__name__}; fetch it again"
            ) from error
