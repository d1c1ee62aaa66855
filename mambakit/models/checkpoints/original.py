"""state-spaces' original format, which mamba_ssm reads and writes: config.json with ``d_model``; pytorch_model.bin."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambakit.errors import CheckpointError
from mambakit.models.checkpoints.fields import check_original
from mambakit.models.checkpoints.format import Loading, require_whole_expand
from mambakit.models.checkpoints.plain import common_dtype, dtype_and_count, load_plain
from mambakit.models.checkpoints.storage import StoredTensor
from mambakit.models.quantization import packed_format
from mambakit.modules.placement import stored_value

# Fields of ssm_cfg -> transformers' names.
_SSM = {
    "d_state": "state_size", "d_conv": "conv_kernel", "expand": "expand", "dt_rank": "time_step_rank",
    "dt_min": "time_step_min", "dt_max": "time_step_max", "dt_scale": "time_step_scale",
    "dt_init": "time_step_init_scheme", "dt_init_floor": "time_step_floor", "conv_bias": "use_conv_bias",
    "bias": "use_bias",
}  # fmt: skip
_IGNORED = {"fused_add_norm", "use_fast_path"}  # ways to compute, not what is computed
# Fields of other architectures, with the value that a pure Mamba-1 model has.
_FIXED: dict[str, Any] = {"d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True}
_KNOWN = {
    *_FIXED, *_IGNORED, "ssm_cfg", "d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple", "residual_in_fp32",
    "tie_embeddings",
}  # fmt: skip


class OriginalFormat:
    """state-spaces' own `CheckpointFormat`. It holds causal language models of the mamba family."""

    name = "original"
    packed = False
    holds_tokenizers = False

    def detect(self, folder: Path, config_json: dict[str, Any]) -> bool:
        return "model_type" not in config_json and "d_model" in config_json

    def read_configuration(self, config_json: dict[str, Any], path: Path) -> dict[str, Any]:
        fields = check_original(config_json, path)
        for key, value in _FIXED.items():
            if fields.get(key, value) not in (value, None):
                raise CheckpointError(
                    f"{path}: {key} is {fields[key]!r}; mambakit loads pure Mamba-1 models ({key} = {value!r})"
                )
        ssm = dict(fields.get("ssm_cfg") or {})
        layer = ssm.pop("layer", "Mamba1")
        if layer != "Mamba1":
            raise CheckpointError(f"{path}: ssm_cfg.layer is {layer!r}; mambakit loads Mamba1")
        for key in ("d_model", "n_layer"):
            if key not in fields:
                raise CheckpointError(f"{path} has no {key}; add it: the weights' names and shapes show its value")
        multiple = fields.get("pad_vocab_size_multiple", 8)
        result = {
            "model_type": "mamba",
            "hidden_size": fields["d_model"],
            "num_hidden_layers": fields["n_layer"],
            "vocab_size": -(-fields.get("vocab_size", 50277) // multiple) * multiple,
            "residual_in_fp32": fields.get("residual_in_fp32", True),
            "tie_word_embeddings": fields.get("tie_embeddings", True),
        }
        for key, value in ssm.items():
            if key in _SSM:
                result[_SSM[key]] = value
            elif key not in _IGNORED:
                raise CheckpointError(
                    f"{path}: ssm_cfg.{key} = {value!r} is not a field of Mamba-1; remove it if it has no effect"
                )
        for key in fields.keys() - _KNOWN:
            raise CheckpointError(
                f"{path}: {key} = {fields[key]!r} is not a field of Mamba-1; remove it if it has no effect"
            )
        return result

    def name_in_model(self, stored: str) -> str:
        return stored.replace("embedding.weight", "embeddings.weight")

    def name_in_file(self, name: str) -> str:
        return name.replace("embeddings.weight", "embedding.weight")

    def load(self, loading: Loading) -> Any:
        return load_plain(loading, self)

    def write(self, model: Any, folder: Path, *args: Any, **options: Any) -> None:
        """config.json and pytorch_model.bin.

        The format has no field for the ids of special tokens (they are 0). Where the model's differ,
        generation_config.json is written beside them: `from_pretrained` reads it, state-spaces' own loader does not.
        """
        if given := [*map(repr, args), *options]:
            raise TypeError(f"the original format has no options; drop {', '.join(given)}")
        if packed_format(model) is not None:
            raise CheckpointError(
                "the original format holds plain weights, the model's are packed; dequantize() it first"
            )
        fields = _config_json(model.config)
        state: dict[str, Tensor] = {}
        for name, tensor in model.state_dict().items():
            values = stored_value(model, name, tensor)
            state[self.name_in_file(name)] = values.detach().cpu().contiguous()
        if "lm_head.weight" not in state:
            raise CheckpointError(f"the original format holds causal language models, not a {type(model).__name__}")
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "config.json", lambda path: path.write_text(json.dumps(fields, indent=2), encoding="utf-8"))
        _write(folder / "pytorch_model.bin", lambda path: torch.save(state, path))
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            special = (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id)
            if special != (0, 0, 0):
                generation.save_pretrained(folder)

    def count(self, stored: str, tensor: StoredTensor, config: Any) -> tuple[str, int]:
        return dtype_and_count(tensor)

    def dtype(self, found: dict[str, StoredTensor]) -> torch.dtype:
        return common_dtype(found)


def _config_json(config: Any) -> dict[str, Any]:
    """state-spaces' config.json for a configuration.

    Raises:
        CheckpointError: the configuration has a value for which the format has no field.
    """
    if config.model_type != "mamba":
        raise CheckpointError(f"the original format holds Mamba models only, not {config.model_type!r}")
    if config.layer_norm_epsilon != 1e-5 or config.hidden_act not in ("silu", "swish"):
        raise CheckpointError(
            f"the original format has no field for layer_norm_epsilon {config.layer_norm_epsilon} (it is 1e-5) and "
            f"hidden_act {config.hidden_act!r} (it is silu); save in transformers' format"
        )
    require_whole_expand(config, "the original format")
    ssm = {theirs: getattr(config, ours) for theirs, ours in _SSM.items()}
    return {
        "d_model": config.hidden_size, "d_intermediate": 0, "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size, "ssm_cfg": {"layer": "Mamba1", **ssm}, "attn_layer_idx": [], "attn_cfg": {},
        "rms_norm": True, "residual_in_fp32": config.residual_in_fp32, "fused_add_norm": True,
        "pad_vocab_size_multiple": 1, "tie_embeddings": config.tie_word_embeddings,
    }  # fmt: skip


def _write(path: Path, write: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)
