"""A checkpoint's configuration and generation settings, read through the table of formats, each field checked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambakit.errors import CheckpointError
from mambakit.models.checkpoints.fields import check_config, check_generation, shown
from mambakit.models.checkpoints.storage import read_config
from mambakit.models.checkpoints.table import format_of
from mambakit.models.families import FAMILIES
from mambakit.reading import read_json

if TYPE_CHECKING:
    from transformers import GenerationConfig

_REMEDY = "correct it there or fetch it again"


def read_fields(folder: Path) -> dict[str, Any]:
    """The fields of a checkpoint's config.json under transformers' names, of a family that mambakit has.

    Raises:
        CheckpointError: another architecture, or a value that the format does not allow.
    """
    config_json, path = read_config(folder)
    fields = format_of(folder, config_json).read_configuration(config_json, path)
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"{path}: model_type is {shown(model_type)}; mambakit loads {' and '.join(FAMILIES)}; load others with "
            "transformers"
        )
    return fields


def read_configuration(folder: Path, config_class: Any, **overrides: Any) -> tuple[Any, dict[str, Any]]:
    """The checked configuration of a checkpoint, as a ``config_class``.

    Args:
        overrides: fields that take other values than the file's.

    Returns:
        The configuration, and those of ``overrides`` that are not fields of it.

    Raises:
        CheckpointError: config.json or generation_config.json cannot be used as it is.
    """
    _, path = read_config(folder)
    fields = read_fields(folder)
    if fields["model_type"] != config_class.model_type:
        raise CheckpointError(
            f"{path}: model_type is {fields['model_type']!r}, this class loads {config_class.model_type!r}; use "
            "AutoModelForCausalLM, or the class of that architecture"
        )
    fields = check_config(fields, path, config_class)
    try:
        config, unused = config_class.from_dict(fields, return_unused_kwargs=True, **overrides)
    except Exception as error:  # a value that the configuration refuses: transformers raises any type
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}; {_REMEDY}") from error
    if not _is_activation(config.hidden_act):
        raise CheckpointError(
            f"{path}: hidden_act is {shown(config.hidden_act)}; it must be an activation of transformers' (silu, say); "
            f"{_REMEDY}"
        )
    read_generation_config(folder)
    return config, unused


def _is_activation(name: Any) -> bool:
    """Whether transformers has this activation; its table takes a second to import, which Mamba's own need not wait."""
    if name in ("silu", "swish"):
        return True
    from transformers.activations import ACT2FN

    return name in ACT2FN


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """The checked contents of a checkpoint's generation_config.json; None where there is none."""
    path = folder / "generation_config.json"
    if not path.exists():
        return None
    from transformers import GenerationConfig

    check_generation(read_json(path), path, GenerationConfig)
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}; {_REMEDY}") from error
