"""`from_pretrained`: find the checkpoint, read its configuration, and load it by its format."""

from __future__ import annotations

import os
from typing import Any

from mambakit.models.checkpoints.configuration import read_configuration, read_generation_config
from mambakit.models.checkpoints.format import Loading
from mambakit.models.checkpoints.storage import HUB_ARGUMENTS, is_gguf, read_config, resolve
from mambakit.models.checkpoints.table import format_of


def load_pretrained(cls: Any, name: str | os.PathLike, *args: Any, config: Any = None, **kwargs: Any) -> Any:
    """``cls.from_pretrained``; its arguments are transformers'."""
    folder = resolve(name, **{key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs})
    generation = kwargs.pop("generation_config", None)
    safe = kwargs.pop("use_safetensors", None)
    # Taken out first: a configuration would take the argument for its own field.
    dtype, older = kwargs.pop("dtype", None), kwargs.pop("torch_dtype", None)
    dtype = older if dtype is None else dtype
    config_json, _ = read_config(folder)
    if config is None:
        config, kwargs = read_configuration(folder, cls.config_class, **kwargs)
    else:
        if isinstance(config, (str, os.PathLike)):
            config, _ = read_configuration(resolve(config), cls.config_class)
        # The caller's configuration says how the weights are stored.
        config_json = {**config_json, "quantization_config": getattr(config, "quantization_config", None)}
    format = format_of(folder, config_json)
    result = format.load(Loading(cls, config, folder, str(name), dtype, safe, args, kwargs))
    model = result[0] if isinstance(result, tuple) else result
    generation = read_generation_config(folder) if generation is None else generation
    if model.can_generate() and generation is not None:
        model.generation_config = generation
    model.config.name_or_path = model.name_or_path = str(folder if is_gguf(folder) else name)
    return result
