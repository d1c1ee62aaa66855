"""transformers' format: config.json with ``model_type``; safetensors or .bin, single or sharded.

Weights that another quantiser packed (bitsandbytes, torchao) have this format, too: transformers loads them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mambakit.errors import CheckpointError
from mambakit.models.checkpoints.fields import shown
from mambakit.models.checkpoints.format import Loading
from mambakit.models.checkpoints.plain import common_dtype, dtype_and_count, load_plain, write_by_transformers
from mambakit.models.checkpoints.storage import StoredTensor


class TransformersFormat:
    """transformers' own `CheckpointFormat`."""

    name = "transformers"
    packed = False
    holds_tokenizers = True

    def detect(self, folder: Path, config_json: dict[str, Any]) -> bool:
        return True

    def read_configuration(self, config_json: dict[str, Any], path: Path) -> dict[str, Any]:
        settings = config_json.get("quantization_config")
        if isinstance(settings, dict) and not isinstance(settings.get("quant_method"), str):
            raise CheckpointError(
                f"{path}: quantization_config.quant_method is {shown(settings.get('quant_method'))}; it must be the "
                "name of a method; correct it there or fetch it again"
            )
        return config_json

    def name_in_model(self, stored: str) -> str:
        """Early conversions of state-spaces' models kept its name of the embeddings."""
        return stored.replace("embedding.weight", "embeddings.weight")

    def name_in_file(self, name: str) -> str:
        return name

    def load(self, loading: Loading) -> Any:
        return load_plain(loading, self)

    def write(self, model: Any, folder: Path, *args: Any, **options: Any) -> None:
        write_by_transformers(model, folder, *args, **options)

    def count(self, stored: str, tensor: StoredTensor, config: Any) -> tuple[str, int]:
        return dtype_and_count(tensor)

    def dtype(self, found: dict[str, StoredTensor]) -> torch.dtype:
        return common_dtype(found)
