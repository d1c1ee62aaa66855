"""Which values each field of a checkpoint's JSON files may have: a table for each file, checked before its use."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambakit.errors import CheckpointError
from mambakit.quoting import brief

_REMEDY = "correct it there or fetch it again"


@dataclass(frozen=True)
class Kind:
    """The values that a field may have.

    Attributes:
        accepts: whether a value is one of them.
        expected: what an error says they are.
        real: they are floats, and an int is converted to one.
        low: the least, where there is one.
    """

    accepts: Callable[[Any], bool]
    expected: str
    real: bool = False
    low: int | None = None

    def or_null(self) -> Kind:
        return Kind(lambda v: v is None or self.accepts(v), f"{self.expected}, or null", self.real, self.low)

    def wanted(self, value: Any) -> str:
        """What an error says in place of ``value`` is expected."""
        below = self.low is not None and type(value) is int and value < self.low
        return f"{self.low} or more" if below else self.expected


def _whole(low: int, high: int) -> Kind:
    return Kind(
        lambda v: type(v) is int and low <= v <= high,
        f"a whole number from {low} to {high:,}".replace(",", ""),
        low=low,
    )


def _real(low: float, high: float, above: bool = False) -> Kind:
    limits = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
    return Kind(
        lambda v: type(v) in (int, float) and low <= v <= high and not (above and v == low),
        f"a number {limits}",
        real=True,
    )


def _one_of(*choices: Any) -> Kind:
    return Kind(
        lambda v: any(type(v) is type(c) and v == c for c in choices), f"one of {', '.join(map(repr, choices))}"
    )


def _object(keys: Callable[[str], bool], values: Callable[[Any], bool], expected: str) -> Kind:
    return Kind(
        lambda v: isinstance(v, dict) and all(keys(k) for k in v) and all(values(x) for x in v.values()), expected
    )


def _list(items: Callable[[Any], bool], expected: str, least: int = 0) -> Kind:
    return Kind(lambda v: isinstance(v, list) and len(v) >= least and all(items(x) for x in v), expected)


def _any_of(expected: str, *kinds: Kind) -> Kind:
    return Kind(lambda v: any(kind.accepts(v) for kind in kinds), expected)


def _is_string(value: Any) -> bool:
    return isinstance(value, str)


_BOOLEAN = Kind(lambda v: type(v) is bool, "true or false")
_STRING = Kind(_is_string, "a string")
_TOKEN = _whole(-1, 2**31 - 1)
_TOKENS = _any_of(
    "the number of a token, a list of them, or null",
    _TOKEN.or_null(), _list(_TOKEN.accepts, "", least=1),
)  # fmt: skip
_ABSENT = Kind(lambda v: v is None, "left out: Mamba models have none")
_DTYPE = _one_of("float32", "bfloat16", "float16", "float64").or_null()
_POSITIVE = _real(0, 1e6, above=True)
_RANK = _any_of('"auto", or a whole number from 1 to 1048576', _one_of("auto"), _whole(1, 2**20))

_SIZES = {
    "vocab_size": _whole(1, 2**31 - 1), "hidden_size": _whole(1, 2**20), "state_size": _whole(1, 2**16),
    "num_hidden_layers": _whole(0, 2**12), "expand": _whole(1, 2**10), "conv_kernel": _whole(1, 2**10),
    "time_step_rank": Kind(_RANK.accepts, _RANK.expected, low=1), "intermediate_size": _whole(1, 2**30),
}  # fmt: skip
# config.json of transformers' format, in both architectures.
_CONFIG = {
    **_SIZES,
    "layer_norm_epsilon": _real(0, 1, above=True), "mixer_rms_eps": _real(0, 1, above=True),
    "initializer_range": _real(0, 1e3),
    "time_step_scale": _POSITIVE, "time_step_min": _POSITIVE, "time_step_max": _POSITIVE,
    "time_step_floor": _real(0, 1e6),
    "time_step_init_scheme": _one_of("random", "constant"), "hidden_act": _STRING,
    **dict.fromkeys(
        ("use_bias", "use_conv_bias", "residual_in_fp32", "rescale_prenorm_residual", "use_cache", "use_mambapy",
         "use_falcon_mambapy", "use_associative_scan", "tie_word_embeddings"),
        _BOOLEAN,
    ),
    **dict.fromkeys(("output_hidden_states", "return_dict"), _BOOLEAN.or_null()),
    "bos_token_id": _TOKEN.or_null(), "pad_token_id": _TOKEN.or_null(), "eos_token_id": _TOKENS,
    "dtype": _DTYPE, "torch_dtype": _DTYPE,
    "architectures": Kind(
        lambda v: v is None or (isinstance(v, list) and bool(v) and all(isinstance(x, str) and x.strip() for x in v)),
        "a list of class names that is not empty, or null",
    ),
    "transformers_version": _STRING.or_null(), "_name_or_path": _STRING.or_null(), "name_or_path": _STRING.or_null(),
    "id2label": _object(str.isdecimal, _is_string, "an object of names under whole numbers").or_null(),
    "label2id": _object(_is_string, lambda v: type(v) is int, "an object of whole numbers under names").or_null(),
    "num_labels": _whole(1, 2**20),
    "problem_type": _one_of("regression", "single_label_classification", "multi_label_classification").or_null(),
    "is_encoder_decoder": _one_of(False), "chunk_size_feed_forward": _one_of(0),
    "output_attentions": _one_of(False).or_null(),
    "quantization_config": Kind(lambda v: isinstance(v, dict), "an object").or_null(),
    "attn_implementation": _one_of("eager").or_null(), "_attn_implementation": _one_of("eager").or_null(),
    **dict.fromkeys(
        ("experts_implementation", "per_layer_config", "text_config", "vision_config", "audio_config", "decoder",
         "encoder", "generator", "text_encoder", "rope_parameters", "rope_scaling", "rope_theta", "head_dim",
         "embed_dim", "num_heads"),
        _ABSENT,
    ),
    "model_type": _STRING,
}  # fmt: skip
# config.json of state-spaces' format. `mambakit.models.checkpoints.original` refuses fields that it cannot follow.
_ORIGINAL = {
    "d_model": _SIZES["hidden_size"], "n_layer": _SIZES["num_hidden_layers"], "vocab_size": _SIZES["vocab_size"],
    "pad_vocab_size_multiple": _whole(1, 2**20), "residual_in_fp32": _BOOLEAN, "tie_embeddings": _BOOLEAN,
    "fused_add_norm": _BOOLEAN, "ssm_cfg": Kind(lambda v: isinstance(v, dict), "an object").or_null(),
}  # fmt: skip
_ORIGINAL_SSM = {
    "d_state": _SIZES["state_size"], "d_conv": _SIZES["conv_kernel"], "expand": _SIZES["expand"],
    "dt_rank": _SIZES["time_step_rank"], "dt_min": _POSITIVE, "dt_max": _POSITIVE, "dt_scale": _POSITIVE,
    "dt_init": _one_of("random", "constant"), "dt_init_floor": _real(0, 1e6), "conv_bias": _BOOLEAN, "bias": _BOOLEAN,
    "use_fast_path": _BOOLEAN,
}  # fmt: skip
_COUNT = _whole(0, 2**31 - 1).or_null()
_FRACTION = _real(0, 1).or_null()
_GENERATION = {
    "bos_token_id": _TOKENS, "pad_token_id": _TOKEN.or_null(), "eos_token_id": _TOKENS,
    "decoder_start_token_id": _TOKENS, "forced_bos_token_id": _TOKENS, "forced_eos_token_id": _TOKENS,
    **dict.fromkeys(
        ("max_length", "max_new_tokens", "min_length", "min_new_tokens", "top_k", "no_repeat_ngram_size"), _COUNT
    ),
    **dict.fromkeys(("num_beams", "num_return_sequences", "num_beam_groups"), _whole(1, 2**20).or_null()),
    **dict.fromkeys(("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"), _FRACTION),
    "temperature": _real(0, 1e6).or_null(), "repetition_penalty": _POSITIVE.or_null(),
    "length_penalty": _real(-1e6, 1e6).or_null(), "diversity_penalty": _real(-1e6, 1e6).or_null(),
    **dict.fromkeys(
        ("do_sample", "use_cache", "remove_invalid_values", "renormalize_logits", "output_scores", "output_logits",
         "output_hidden_states", "output_attentions", "return_dict_in_generate"),
        _BOOLEAN.or_null(),
    ),
    "transformers_version": _STRING.or_null(),
    "suppress_tokens": _TOKENS, "begin_suppress_tokens": _TOKENS,
    "stop_strings": _any_of("a string, a list of them, or null", _STRING.or_null(), _list(_is_string, "")),
}  # fmt: skip
# adapter_config.json, PEFT's of LoRA.
_ADAPTER = {
    "peft_type": _STRING, "r": _whole(1, 2**16), "lora_alpha": _real(0, 1e6, above=True), "lora_dropout": _real(0, 1),
    "target_modules": _any_of(
        "a name of layers, or a list of them",
        _STRING, _list(lambda v: isinstance(v, str) and bool(v.strip()), "", least=1),
    ).or_null(),
    "base_model_name_or_path": _STRING.or_null(), "bias": _STRING.or_null(),
    **dict.fromkeys(("fan_in_fan_out", "use_rslora", "use_dora", "inference_mode"), _BOOLEAN.or_null()),
    "rank_pattern": _object(_is_string, lambda v: type(v) is int and v > 0, "an object of ranks under names").or_null(),
    "alpha_pattern": _object(
        _is_string, lambda v: type(v) in (int, float) and v > 0, "an object of numbers under names"
    ).or_null(),
    "modules_to_save": _list(_is_string, "a list of names, or null").or_null(),
}  # fmt: skip


def check_config(fields: dict[str, Any], path: Path, config_class: Any) -> dict[str, Any]:
    """The checked fields of a transformers config.json.

    Raises:
        CheckpointError: a field has a value that it must not have; the error names file, field, value and what it may
        be.
    """
    return _checked(fields, _CONFIG, path, owner=config_class)


def check_original(fields: dict[str, Any], path: Path) -> dict[str, Any]:
    """The checked fields of a state-spaces config.json."""
    fields = _checked(fields, _ORIGINAL, path)
    if fields.get("ssm_cfg"):
        fields["ssm_cfg"] = _checked(fields["ssm_cfg"], _ORIGINAL_SSM, path, prefix="ssm_cfg.")
    return fields


def check_generation(fields: dict[str, Any], path: Path, config_class: Any) -> dict[str, Any]:
    """The checked fields of a generation_config.json."""
    return _checked(fields, _GENERATION, path, owner=config_class)


def check_adapter(fields: dict[str, Any], path: Path) -> dict[str, Any]:
    """The checked fields of an adapter_config.json."""
    return _checked(fields, _ADAPTER, path)


def shown(value: Any) -> str:
    """A value as an error shows it."""
    return brief(value, 60)


def _checked(
    fields: dict[str, Any], table: dict[str, Kind], path: Path, prefix: str = "", owner: Any = None
) -> dict[str, Any]:
    result = {}
    for name, value in fields.items():
        kind = table.get(name)
        if kind is None:
            if owner is not None:
                _require_free(name, path, owner)
            _require_numbers(prefix + name, value, path)
        elif not kind.accepts(value):
            raise CheckpointError(
                f"{path}: {prefix}{name} is {shown(value)}; it must be {kind.wanted(value)}; {_REMEDY}"
            )
        elif kind.real and type(value) is int:
            value = float(value)
        result[name] = value
    return result


def _require_free(name: str, path: Path, owner: Any) -> None:
    """CheckpointError where a field that no table has would replace an attribute of the class ``owner``."""
    fields = getattr(owner, "__dataclass_fields__", {})
    if not name or name.startswith("__") or (hasattr(owner, name) and name not in fields):
        raise CheckpointError(f"{path}: {brief(name, 60)} is not a field of a {owner.__name__}; remove it there")


def _require_numbers(name: str, value: Any, path: Path) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise CheckpointError(f"{path}: {name} is {value}; it must be a finite number; {_REMEDY}")
