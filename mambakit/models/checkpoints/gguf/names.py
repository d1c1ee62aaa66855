"""llama.cpp's names and fields of a Mamba model, and this package's."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from mambakit.errors import CheckpointError
from mambakit.models.checkpoints.gguf.blocks import GROUP, PACKED
from mambakit.models.checkpoints.gguf.container import Header
from mambakit.models.checkpoints.gguf.types import BlockType
from mambakit.models.checkpoints.gguf.vocabulary import special_ids
from mambakit.models.quantization import LAYERS, METHOD
from mambakit.quoting import brief

ARCHITECTURE = "mamba"  # of FalconMamba, too: it has the norms of dt, B and C
FAMILIES = ("mamba", "falcon_mamba")
_WHOLE = {"token_embd.weight": "backbone.embeddings.weight", "output_norm.weight": "backbone.norm_f.weight",
          "output.weight": "lm_head.weight"}  # fmt: skip
_OF_LAYER = {
    "attn_norm.weight": "norm.weight", "ssm_in.weight": "mixer.in_proj.weight", "ssm_in.bias": "mixer.in_proj.bias",
    "ssm_conv1d.weight": "mixer.conv1d.weight", "ssm_conv1d.bias": "mixer.conv1d.bias",
    "ssm_x.weight": "mixer.x_proj.weight", "ssm_dt.weight": "mixer.dt_proj.weight",
    "ssm_dt.bias": "mixer.dt_proj.bias", "ssm_a": "mixer.A_log", "ssm_d": "mixer.D",
    "ssm_out.weight": "mixer.out_proj.weight", "ssm_out.bias": "mixer.out_proj.bias",
}  # fmt: skip
_IN_FILE = {ours: theirs for theirs, ours in _OF_LAYER.items()}
_SIZES = {
    "hidden_size": "embedding_length", "num_hidden_layers": "block_count", "state_size": "ssm.state_size",
    "conv_kernel": "ssm.conv_kernel", "time_step_rank": "ssm.time_step_rank",
}  # fmt: skip
_EPSILON = "mamba.attention.layer_norm_rms_epsilon"
MIXER_EPSILON = "mambakit.mixer_rms_eps"
"""A key of mambakit's own: llama.cpp has one epsilon for all norms, FalconMamba two."""


def name_in_model(stored: str) -> str:
    """The name in a causal language model; ``stored`` itself where llama.cpp's Mamba has no such tensor."""
    if stored in _WHOLE:
        return _WHOLE[stored]
    match = re.fullmatch(r"blk\.(\d{1,5})\.(.+)", stored)
    if match is None or match[2] not in _OF_LAYER:
        return stored
    return f"backbone.layers.{int(match[1])}.{_OF_LAYER[match[2]]}"


def name_in_file(name: str) -> str:
    for theirs, ours in _WHOLE.items():
        if name == ours:
            return theirs
    match = re.fullmatch(r"backbone\.layers\.(\d+)\.(.+)", name)
    if match is None or match[2] not in _IN_FILE:
        return name
    return f"blk.{match[1]}.{_IN_FILE[match[2]]}"


def shape_in_model(stored: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The convolution's weight has a dimension of one channel between, which llama.cpp leaves out."""
    return (shape[0], 1, shape[1]) if stored.endswith("ssm_conv1d.weight") and len(shape) == 2 else shape


def value_in_model(stored: str, value: Tensor, header: Header) -> Tensor:
    """The tensor as the model has it: A_log for A, and a convolution's weight (d, 1, k).

    Raises:
        CheckpointError: an A that is not negative.
    """
    if stored.endswith(".ssm_a"):
        if not (value < 0).all():
            raise CheckpointError(
                f"{header.path}: {stored} has {value.max().item():g}; Mamba's A is below 0; convert the file again"
            )
        return torch.log(-value.double()).float()
    return value.view(shape_in_model(stored, tuple(value.shape)))


def value_in_file(name: str, value: Tensor) -> Tensor:
    if name.endswith(".A_log"):
        return -torch.exp(value.double()).float()
    return value.squeeze(1) if name.endswith("conv1d.weight") else value


# -- configuration -----------------------------------------------------------------------------------------------------


def read_fields(header: Header) -> dict[str, Any]:
    """The configuration under transformers' names; ``quantization_config`` where weights run packed.

    Raises:
        CheckpointError: another architecture, or a field that is missing or of another type.
    """
    metadata = header.metadata
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise CheckpointError(
            f"{header.path}: general.architecture is {brief(architecture)}; mambakit loads {ARCHITECTURE!r} (Mamba and "
            "FalconMamba); load others with llama.cpp"
        )
    fields: dict[str, Any] = {ours: _number(header, f"mamba.{theirs}", int) for ours, theirs in _SIZES.items()}
    inner, epsilon = _number(header, "mamba.ssm.inner_size", int), _number(header, _EPSILON, float)
    hidden = fields["hidden_size"]
    if hidden < 1 or inner % hidden:
        raise CheckpointError(
            f"{header.path}: mamba.ssm.inner_size is {inner}, no multiple of mamba.embedding_length {hidden}; "
            "convert the file again"
        )
    embeddings = header.tensors.get("token_embd.weight")
    if embeddings is None or len(embeddings.shape) != 2:
        raise CheckpointError(f"{header.path} has no token_embd.weight of two dimensions; fetch it again")
    epsilon = _shortest(epsilon)
    fields |= {
        "expand": inner // hidden, "vocab_size": embeddings.shape[0], "layer_norm_epsilon": epsilon,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "use_bias": "blk.0.ssm_in.bias" in header.tensors,
        "use_conv_bias": "blk.0.ssm_conv1d.bias" in header.tensors or not fields["num_hidden_layers"],
        "residual_in_fp32": True, **special_ids(header),
    }  # fmt: skip
    if metadata.get("mamba.ssm.dt_b_c_rms", False):
        mixer = metadata.get(MIXER_EPSILON, epsilon)
        fields |= {"model_type": "falcon_mamba", "mixer_rms_eps": _shortest(mixer) if type(mixer) is float else mixer}
    else:
        fields["model_type"] = "mamba"
    settings = packing(header)
    return fields if settings is None else {**fields, "quantization_config": settings}


def _number(header: Header, key: str, kind: type) -> Any:
    value = header.metadata.get(key)
    if type(value) is not kind:
        what = "missing" if value is None else f"{brief(value)}, not a {'whole' if kind is int else 'real'} number"
        raise CheckpointError(f"{header.path}: {key} is {what}; convert the file again")
    return value


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: 1e-5 again."""
    if not math.isfinite(value):
        return value
    single = torch.tensor(value, dtype=torch.float32, device="cpu")
    for digits in range(1, 9):
        short = float(f"{value:.{digits}g}")
        if torch.equal(torch.tensor(short, dtype=torch.float32, device="cpu"), single):
            return short
    return value


def packing(header: Header) -> dict[str, Any] | None:
    """The ``quantization_config`` of a file whose large weights run as they are; None where none does.

    The head of tied embeddings is their tensor. ``layers`` names the weights of another format than most.
    """
    tied = "output.weight" not in header.tensors
    formats: dict[str, str] = {}
    for stored, place in header.tensors.items():
        name = name_in_model(stored)
        if tied and name == "backbone.embeddings.weight":
            name = "lm_head.weight"
        layer = name.removesuffix(".weight")
        if layer.rpartition(".")[2] in (*LAYERS, "lm_head") and layer != name:
            formats[layer] = PACKED.get(place.type, "plain")
    counts = {format: list(formats.values()).count(format) for format in PACKED.values() if format in formats.values()}
    if not counts:
        return None
    most = max(counts, key=lambda format: counts[format])
    others = {layer: format for layer, format in formats.items() if format != most}
    return {"quant_method": METHOD, "format": most, "group": GROUP, **({"layers": others} if others else {})}


def written_fields(config: Any) -> dict[str, Any]:
    """GGUF's metadata of a configuration.

    Raises:
        CheckpointError: llama.cpp's Mamba has no form for a field's value.
    """
    for field, value, needed in (
        ("use_bias", config.use_bias, False), ("expand", config.expand, 2),
        ("hidden_act", config.hidden_act in ("silu", "swish"), True),
    ):  # fmt: skip
        if value != needed:
            raise CheckpointError(
                f"GGUF: {field} is {getattr(config, field)!r}; llama.cpp's Mamba has "
                f"{'silu' if field == 'hidden_act' else repr(needed)} alone; save in transformers' format"
            )
    falcon = config.model_type == "falcon_mamba"
    fields = {
        "mamba.context_length": 1 << 20, "mamba.feed_forward_length": 0, "mamba.attention.head_count": 0,
        **{f"mamba.{theirs}": getattr(config, ours) for ours, theirs in _SIZES.items()},
        "mamba.ssm.inner_size": config.intermediate_size, _EPSILON: float(config.layer_norm_epsilon),
        "mamba.ssm.dt_b_c_rms": falcon,
    }  # fmt: skip
    if falcon and config.mixer_rms_eps != config.layer_norm_epsilon:
        fields[MIXER_EPSILON] = float(config.mixer_rms_eps)
    return fields


def kept_plain(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor stays float32 in every file: what llama.cpp's kernels read in no other type."""
    kind = name.rpartition(".")[0].rpartition(".")[2]
    return len(shape) < 2 or kind not in (*LAYERS, "dt_proj", "embeddings", "lm_head")


def dtype_of(type: BlockType) -> torch.dtype:
    return torch.float32 if type.dtype is None else type.dtype
