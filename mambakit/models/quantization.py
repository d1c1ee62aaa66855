"""Packing a whole model's weights, and unpacking them: int8, int4, fp8, or lossless (the same numbers in fewer bits).

in_proj, x_proj, out_proj and the head are packed: nearly all of the bytes that a decoding step reads. The convolution,
norms, A_log, D, dt_proj (its rows are short) and the states stay as they are, and so do embeddings that are not tied to
the head. Tied embeddings get the packed head's values, in a plain tensor of the model's dtype: a step reads one row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mambakit.modules.quantized_linear import QuantizedLinear
from mambakit.ops._backends.memory import PLAIN_TYPES
from mambakit.ops.linear import lossless
from mambakit.ops.linear.packed import GROUP
from mambakit.quoting import brief

METHOD = "mambakit"
FORMATS = ("int8", "int4", "fp8", "lossless")
GROUPED = ("int8", "int4")  # weights in groups that share a scale
PACKED_FORMATS = ("int8", "int4", "fp8", *lossless.DTYPES)  # as configurations name them
LAYERS = ("in_proj", "x_proj", "out_proj")


def quantize(model: Any, format: str, group: int | None = None) -> Any:
    """Replace ``model``'s large linear layers by quantised ones, in place; returns the model.

    Tied embeddings get the values of the packed head. A quantised model is dequantised first: what its format has
    rounded stays rounded.

    Args:
        format: "int8" or "int4"; "fp8" (e4m3, a scale for each output channel), for GPUs with 8-bit floats; or
            "lossless", which keeps every bit: bfloat16 in 12 bits, float32 in 28.
        group: of int8 and int4, weights of a row that share a scale: 32, 64 (when None) or 128.

    Raises:
        ValueError: an unknown format or group, layers that are not plain linear layers (adapters: merge them first),
            lossless packing of a model in neither float32 nor bfloat16, or fp8 on a GPU without 8-bit floats.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {brief(format)}; choose one of {', '.join(FORMATS)}")
    check_group(format, group)
    require_float8(format, model.device)
    group = GROUP if group is None else group
    if packed_format(model) is not None:
        dequantize(model)
    targets = targets_of(model)
    for parent, name in targets:
        layer = getattr(parent, name)
        if type(layer) is not nn.Linear:
            raise ValueError(f"{name} is a {type(layer).__name__}, not a plain linear layer; merge adapters first")
        if type(layer.weight) not in PLAIN_TYPES:
            raise ValueError(
                f"{name}.weight is a {type(layer.weight).__name__}, not a plain tensor; load the model without what "
                "another library has made of its weights (torchao, bitsandbytes, a sharding), and quantise that"
            )
    if format == "lossless":
        format = _lossless_format({getattr(parent, name).weight.dtype for parent, name in targets})
    tied = has_head(model) and model.lm_head.weight is model.get_input_embeddings().weight
    for parent, name in targets:
        setattr(parent, name, QuantizedLinear.from_linear(getattr(parent, name), format, group))
    if tied:
        with torch.no_grad():
            model.get_input_embeddings().weight.copy_(model.lm_head.packed.dequantized())
    model.config.quantization_config = {"quant_method": METHOD, "format": format, "group": group}
    return model.eval()


def check_group(format: str, group: int | None, given: str = "group is") -> None:
    """ValueError where a format has no groups and one is given; ``given`` is how the message begins."""
    if format in FORMATS and format not in GROUPED and group is not None:
        why = "lossless packing has no scales to share" if format == "lossless" else "fp8 has one scale for each row"
        raise ValueError(f"{given} {group}: {why}; drop it, or choose {' or '.join(GROUPED)}")


def require_float8(format: str, device: torch.device) -> None:
    """ValueError for fp8 on a GPU that has no 8-bit floats. A CPU widens them: slow, and the same weights."""
    if format != "fp8" or device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or capability < (8, 9):
        raise ValueError(
            f"fp8 needs an NVIDIA GPU of compute capability 8.9 or later (Ada, Hopper, Blackwell), and {device} has "
            f'{capability[0]}.{capability[1]}; choose "int8", which every GPU reads as fast'
        )


def dequantize(model: Any, dtype: torch.dtype | str | None = None) -> Any:
    """Replace ``model``'s quantised layers by plain linear ones of the same values, in place; returns the model.

    The head is tied to the embeddings again where these are its rows. Embeddings with other values (of checkpoints that
    were quantised before tied ones were rounded with the head) stay as they are: the head keeps its values, and
    ``config.tie_word_embeddings`` becomes false.

    Args:
        dtype: of the whole model; its own when None, in which lossless weights are restored bit for bit. int8 and int4
            weights have float32 values, which a half dtype rounds.

    Raises:
        ValueError: the model is not quantised.
    """
    if packed_format(model) is None:
        raise ValueError("the model is not quantised: its weights are plain already, there is nothing to dequantise")
    embeddings = model.get_input_embeddings()
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or embeddings.weight.dtype
    tied = shares_table(model)
    for parent, name in targets_of(model):
        if isinstance(layer := getattr(parent, name), QuantizedLinear):
            setattr(parent, name, layer.dequantized(dtype))
    if tied:
        embeddings.weight = model.lm_head.weight
    elif has_head(model) and model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}  # transformers read it from the configuration when the model was made
    if is_quantized(model.config):
        del model.config.quantization_config
    return model.to(dtype).train(model.training)  # the new layers too


def require_plain(model: Any, what: str) -> None:
    """ValueError where ``model`` is quantised, or a layer of it, and ``what`` needs plain weights."""
    if (format := packed_format(model)) is not None:
        raise ValueError(f"{what}: the model's weights are packed ({format}); call model.dequantize() first")


def require_described(model: Any) -> None:
    """ValueError where a layer is packed otherwise than the configuration says, from which a checkpoint is read."""
    if packed_format(model) is None:
        return
    config = model.config
    settings: Any = getattr(config, "quantization_config", None)
    for name, parent, child in named_targets(model):
        layer = getattr(parent, child)
        found = layer.format if isinstance(layer, QuantizedLinear) else "plain"
        said = format_of_layer(config, name) if is_quantized(config) else "plain"
        if found == said and (found not in GROUPED or layer.group == settings["group"]):
            continue
        kinds = [f"{found}, groups of {layer.group}" if found in GROUPED else found, said]
        if said in GROUPED:
            kinds[1] += f", groups of {settings['group']}"
        raise ValueError(
            f"{name} is {kinds[0]}, and config.quantization_config says {kinds[1]}: a checkpoint would be read as "
            "that; pack the whole model alike by model.quantize(), or call model.dequantize() first"
        )


def require_learning(model: Any) -> None:
    """ValueError where training a quantised ``model`` would change only the few parameters that are not packed.

    Adapters may be trained, and the modules that PEFT trains beside them.
    """
    if is_quantized(model.config) and (name := _learning(model)) is not None:
        format = model.config.quantization_config["format"]
        raise ValueError(
            f"training: the model's weights are packed ({format}) and do not learn, only {name} and the like would; "
            "call model.dequantize() first, or freeze the model (requires_grad_(False)) and train adapters"
        )


def _learning(module: nn.Module, prefix: str = "") -> str | None:
    """The name of a parameter that requires a gradient, outside PEFT's layers."""
    if type(module).__module__.startswith("peft."):
        return None
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.requires_grad:
            return prefix + name
    for name, child in module.named_children():
        if (found := _learning(child, f"{prefix}{name}.")) is not None:
            return found
    return None


def packed_numbers(model: Any) -> int:
    """The number of weights in packed layers, without a head whose rows are the embeddings."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    if shares_table(model) and isinstance(model.lm_head, QuantizedLinear):
        layers.remove(model.lm_head)
    return sum(layer.in_features * layer.out_features for layer in layers)


def shares_table(model: Any) -> bool:
    """Whether the embeddings equal the head's rows, so that a checkpoint needs one of them alone."""
    if not model.config.tie_word_embeddings or not has_head(model):
        return False
    weight = model.get_input_embeddings().weight
    if not isinstance(model.lm_head, QuantizedLinear):
        return model.lm_head.weight is weight
    return torch.equal(weight, model.lm_head.packed.dequantized().to(weight.dtype))


def _lossless_format(dtypes: set[torch.dtype]) -> str:
    for format, dtype in lossless.DTYPES.items():
        if dtypes == {dtype}:
            return format
    names = ", ".join(sorted(str(d) for d in dtypes))
    raise ValueError(
        f"lossless packing takes a model in float32 or in bfloat16; these weights are {names}: cast the model"
    )


def format_of_layer(config: Any, name: str) -> str:
    """The packed format of a layer, or "plain".

    Args:
        name: in a causal language model ("backbone.layers.0.mixer.in_proj", "lm_head").
    """
    settings = config.quantization_config
    return settings.get("layers", {}).get(name, settings["format"])


def targets_of(model: Any) -> list[tuple[Any, str]]:
    backbone = getattr(model, "backbone", model)
    targets = [(block.mixer, name) for block in backbone.layers for name in LAYERS]
    return [*targets, (model, "lm_head")] if has_head(model) else targets


def named_targets(model: Any) -> list[tuple[str, Any, str]]:
    """(name in a causal language model, parent, name in it) of every layer that may be packed."""
    backbone = getattr(model, "backbone", model)
    layers = {id(block.mixer): f"backbone.layers.{index}.mixer." for index, block in enumerate(backbone.layers)}
    return [(layers.get(id(parent), "") + name, parent, name) for parent, name in targets_of(model)]


def has_head(model: Any) -> bool:
    return isinstance(getattr(model, "lm_head", None), nn.Module)


def packed_format(model: Any) -> str | None:
    """The format of the model's packed weights, as its configuration has it; where that says nothing, of a layer that
    was packed by hand. None: every weight is plain."""
    if is_quantized(model.config):
        format: str = model.config.quantization_config["format"]
        return format
    return next((m.format for m in model.modules() if isinstance(m, QuantizedLinear)), None)


def is_quantized(config: Any) -> bool:
    settings = getattr(config, "quantization_config", None)
    return isinstance(settings, dict) and settings.get("quant_method") == METHOD
