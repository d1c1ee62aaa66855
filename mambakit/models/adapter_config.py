"""adapter_config.json: the base model that adapters are for, and what PEFT makes of the rest, each field checked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mambakit.errors import CheckpointError
from mambakit.models.checkpoints.fields import check_adapter
from mambakit.quoting import brief
from mambakit.reading import read_json

# Fields that PEFT's model wrapper implements, not its injected layers: without the wrapper they have no effect.
_OF_A_WRAPPER = ("alora_invocation_tokens", "arrow_config")


def base_of(folder: Path) -> str:
    """The name of the model that a folder's adapters are for.

    Raises:
        CheckpointError: the folder does not say.
    """
    path = folder / "adapter_config.json"
    fields = read_json(path)
    check_adapter({k: v for k, v in fields.items() if k == "base_model_name_or_path"}, path)
    name = fields.get("base_model_name_or_path")
    if not name:
        raise CheckpointError(
            f"{path} names no base model (base_model_name_or_path); write its folder or hub id there, or load it and "
            "then the adapters (mambakit.models.adapters.load_adapters)"
        )
    return str(name)


def read_adapter_config(folder: Path) -> Any:
    import peft

    path = folder / "adapter_config.json"
    if not path.exists():
        raise CheckpointError(f"there is no {path}; fetch the adapters again")
    fields = read_json(path)
    # Of other methods than LoRA a rank may be 0 or null.
    check_adapter({k: v for k, v in fields.items() if k != "r" or fields.get("peft_type") == "LORA"}, path)
    if fields.get("peft_type") not in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING:
        raise CheckpointError(
            f"{path}: peft_type is {brief(fields.get('peft_type'))}, which is no method of PEFT {peft.__version__}"
        )
    _require_followed(fields, path)
    try:
        return peft.PeftConfig.from_pretrained(str(folder))
    except Exception as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}; correct it there or fetch it again") from error


def _require_followed(fields: dict[str, Any], path: Path) -> None:
    """CheckpointError for a field that would be ignored: the adapters would then compute something else."""
    import peft

    for name in _OF_A_WRAPPER:
        if fields.get(name):
            raise CheckpointError(
                f"{path}: {name} is {brief(fields[name])}; only PEFT's wrapper of a model follows it: load the "
                "adapters with "
                "peft.PeftModel.from_pretrained"
            )
    known = {field.name for field in dataclasses.fields(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[fields["peft_type"]])}
    unknown = sorted(name for name, value in fields.items() if name not in known and value)
    if unknown:
        raise CheckpointError(
            f"{path}: {unknown[0]} is {brief(fields[unknown[0]])}, a field that PEFT {peft.__version__} does not know "
            "and would "
            f"ignore; install the PEFT that wrote it ({fields.get('peft_version') or 'a newer one'})"
        )
