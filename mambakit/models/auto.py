"""AutoConfig, AutoModel*, AutoTokenizer: transformers' interface, for Mamba models only and in either checkpoint format."""

from __future__ import annotations

import os
from typing import Any

from mambakit.errors import CheckpointError
from mambakit.models.checkpoints.formats import CONFIGS, is_original, read_config
from mambakit.models.checkpoints.storage import HUB_ARGUMENTS, resolve, small_files
from mambakit.models.falcon_mamba import modeling as falcon_mamba
from mambakit.models.mamba import classification
from mambakit.models.mamba import modeling as mamba
from mambakit.models.options import check_loading
from mambakit.quoting import brief
from mambakit.reading import read_json, require_whole

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt",
)  # fmt: skip


class AutoConfig:
    """The configuration of a checkpoint."""

    @staticmethod
    def from_pretrained(name: str | os.PathLike, **kwargs: Any) -> Any:
        hub = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
        config, unused = read_config(resolve(name, **hub), **check_loading(kwargs))
        if unused:
            raise TypeError(f"AutoConfig.from_pretrained: {sorted(unused)} are not fields of {type(config).__name__}")
        config.name_or_path = str(name)
        return config


class _AutoModel:
    """Picks the class by the configuration's model_type."""

    _classes: dict[str, Any] = {}

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        if config is None:
            hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
            model_type = read_config(resolve(name, **hub))[0].model_type
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
        if model_type not in cls._classes:
            raise ValueError(f"model_type is {brief(model_type)}; mambakit has {' and '.join(cls._classes)}")
        return cls._classes[model_type]


class AutoModel(_AutoModel):
    """`MambaModel` or `FalconMambaModel`."""

    _classes = {"mamba": mamba.MambaModel, "falcon_mamba": falcon_mamba.FalconMambaModel}


class AutoModelForCausalLM(_AutoModel):
    """`MambaForCausalLM` or `FalconMambaForCausalLM`."""

    _classes = {"mamba": mamba.MambaForCausalLM, "falcon_mamba": falcon_mamba.FalconMambaForCausalLM}


class AutoModelForSequenceClassification(_AutoModel):
    """`MambaForSequenceClassification` or `FalconMambaForSequenceClassification`."""

    _classes = {
        "mamba": classification.MambaForSequenceClassification,
        "falcon_mamba": falcon_mamba.FalconMambaForSequenceClassification,
    }


class AutoTokenizer:
    """transformers' AutoTokenizer; an original-format checkpoint without one is told where its tokenizer is."""

    @staticmethod
    def from_pretrained(name: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        import transformers

        folder = small_files(name, **{key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs})
        # A tokenizer may come from a model of another architecture; what has a Mamba model's configuration must be one.
        fields = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
        found = [folder / file for file in _TOKENIZER_FILES if (folder / file).exists()]
        ours = not is_original(fields) and fields.get("model_type") in tuple(CONFIGS)
        if fields and (not found or is_original(fields) or ours):
            config, _ = read_config(folder)
            if ours:  # transformers' own reading takes no whole number for a real one, and would blame the tokenizer
                kwargs.setdefault("config", config)
        if not found:
            if is_original(fields):
                raise CheckpointError(
                    f"{name} holds no tokenizer: models in state-spaces' original format use GPT-NeoX's; load it from "
                    '"EleutherAI/gpt-neox-20b", or save its files into the folder'
                )
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
