"""The configuration of a checkpoint, in the two layouts that there are.

transformers': `config.json` with ``model_type``; safetensors or .bin, single or sharded. The original one of state-spaces:
`config.json` with ``d_model``; `pytorch_model.bin`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.activations import ACT2FN

from mambakit.errors import CheckpointError
from mambakit.models.checkpoints.fields import check_config, check_generation, check_original, shown
from mambakit.models.mamba.configuration import FalconMambaConfig, MambaConfig
from mambakit.models.quantization import METHOD, PACKED_FORMATS
from mambakit.reading import read_json

CONFIGS: dict[str, Any] = {"mamba": MambaConfig, "falcon_mamba": FalconMambaConfig}


def is_original(fields: dict[str, Any]) -> bool:
    return "model_type" not in fields and "d_model" in fields


def read_config(folder: Path, config_class: Any = None, **overrides: Any) -> tuple[Any, dict[str, Any]]:
    """(configuration, the keyword arguments that are not fields of it)."""
    path = folder / "config.json"
    fields = read_json(path)
    if is_original(fields):
        fields = from_original_fields(check_original(fields, path), path)
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIGS:
        raise CheckpointError(
            f"{path}: model_type is {shown(model_type)}; mambakit loads {' and '.join(CONFIGS)}; load others with "
            "transformers"
        )
    chosen = CONFIGS[model_type]
    fields = check_config(fields, path, chosen)
    _check_packing(fields, path)
    if config_class is not None and not issubclass(chosen, config_class):
        wanted = config_class.model_type
        raise CheckpointError(
            f"{path}: model_type is {model_type!r}, this class loads {wanted!r}; use AutoModelForCausalLM, or the class "
            f"of that architecture"
        )
    try:
        config, unused = chosen.from_dict(fields, return_unused_kwargs=True, **overrides)
    except Exception as error:  # a value that the configuration refuses: transformers raises any type
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}; correct it there or fetch it again") from error
    if config.hidden_act not in ACT2FN:
        raise CheckpointError(
            f"{path}: hidden_act is {shown(config.hidden_act)}; it must be an activation of transformers' (silu, say); "
            "correct it there or fetch it again"
        )
    read_generation_config(folder)
    return config, unused


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """The checked contents of a checkpoint's generation_config.json; None where there is none."""
    path = folder / "generation_config.json"
    if not path.exists():
        return None
    check_generation(read_json(path), path, GenerationConfig)
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}; correct it there or fetch it again") from error


def _check_packing(fields: dict[str, Any], path: Path) -> None:
    """What `mambakit.models.checkpoints.packed` relies on of a quantization_config."""
    settings = fields.get("quantization_config")
    if settings is None:
        return
    if not isinstance(settings.get("quant_method"), str):
        raise CheckpointError(
            f"{path}: quantization_config.quant_method is {shown(settings.get('quant_method'))}; it must be the name of a "
            "method; correct it there or fetch it again"
        )
    if settings["quant_method"] != METHOD:
        return
    for name, choices in (("format", PACKED_FORMATS), ("group", (32, 64, 128))):
        if not any(type(settings.get(name)) is type(c) and settings[name] == c for c in choices):
            raise CheckpointError(
                f"{path}: quantization_config.{name} is {shown(settings.get(name))}; it must be one of "
                f"{', '.join(map(str, choices))}; correct it there or quantise the original checkpoint again"
            )


# -- the original format's configuration -------------------------------------------------------------------------------

_SSM = {
    "d_state": "state_size", "d_conv": "conv_kernel", "expand": "expand", "dt_rank": "time_step_rank",
    "dt_min": "time_step_min", "dt_max": "time_step_max", "dt_scale": "time_step_scale", "dt_init": "time_step_init_scheme",
    "dt_init_floor": "time_step_floor", "conv_bias": "use_conv_bias", "bias": "use_bias",
}  # fmt: skip
_IGNORED = {"fused_add_norm", "use_fast_path"}  # ways to compute, not what is computed


def from_original_fields(fields: dict[str, Any], path: Path) -> dict[str, Any]:
    """transformers' configuration fields for a state-spaces config.json."""
    unsupported = {
        "d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True,
    }  # fmt: skip
    for key, value in unsupported.items():
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
    known = {*unsupported, *_IGNORED, "ssm_cfg", "d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple"}
    known |= {"residual_in_fp32", "tie_embeddings"}
    for key in fields.keys() - known:
        raise CheckpointError(
            f"{path}: {key} = {fields[key]!r} is not a field of Mamba-1; remove it if it has no effect"
        )
    return result


def to_original_fields(config: Any) -> dict[str, Any]:
    """state-spaces' config.json for a configuration; it has no field for what it cannot say."""
    if config.model_type != "mamba":
        raise CheckpointError(f"the original format holds Mamba models only, not {config.model_type!r}")
    if config.layer_norm_epsilon != 1e-5 or config.hidden_act not in ("silu", "swish"):
        raise CheckpointError(
            f"the original format has no field for layer_norm_epsilon {config.layer_norm_epsilon} (it is 1e-5) and "
            f"hidden_act {config.hidden_act!r} (it is silu); save in transformers' format"
        )
    ssm = {theirs: getattr(config, ours) for theirs, ours in _SSM.items()}
    return {
        "d_model": config.hidden_size, "d_intermediate": 0, "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size, "ssm_cfg": {"layer": "Mamba1", **ssm}, "attn_layer_idx": [], "attn_cfg": {},
        "rms_norm": True, "residual_in_fp32": config.residual_in_fp32, "fused_add_norm": True,
        "pad_vocab_size_multiple": 1, "tie_embeddings": config.tie_word_embeddings,
    }  # fmt: skip
