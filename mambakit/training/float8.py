"""Training with in_proj and out_proj in float8, by torchao: the optimiser sees float32 weights as ever.

Each product of these layers, forward and backward, rounds its factors to 8 bits with a scale of the whole tensor, found
anew at every step. The other layers, norms, scan and head compute as without it.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from mambakit.errors import RequirementError
from mambakit.modules import MambaMixer

LAYERS = ("in_proj", "out_proj")
MULTIPLE = 16  # of the sizes of a float8 product
_CAPABILITY = (8, 9)


def require_float8(device: torch.device) -> None:
    """RequirementError without torchao; ValueError where ``device`` has no 8-bit floats."""
    if importlib.util.find_spec("torchao") is None:
        raise RequirementError("float8=true trains through torchao, which is not installed: pip install torchao")
    if device.type != "cuda":
        raise ValueError(
            f"float8=true needs an NVIDIA GPU of compute capability {_dotted(_CAPABILITY)} or later, and the run is on "
            f"the {device.type}; drop it"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        raise ValueError(
            f"float8=true needs a GPU of compute capability {_dotted(_CAPABILITY)} or later (Ada, Hopper, Blackwell), "
            f"and {device} has {_dotted(capability)}; drop it, bfloat16 is as fast there"
        )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def use_float8(model: Any, rows: int, *, emulate: bool = False, compile_layers: bool = True) -> None:
    """Put torchao's layers in the place of in_proj and out_proj, in place, with the same parameters.

    Args:
        rows: tokens of a micro-batch on this device, which a gradient's product sums over.
        emulate: round to float8 and multiply in the usual dtype, on any device.
        compile_layers: compile each layer's casts with its products; alone they take longer than float8 saves.

    Raises:
        ValueError: sizes that float8 products do not take, or projections that are no plain linear layers.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    if rows % MULTIPLE:
        raise ValueError(
            f"float8=true: a micro-batch has {rows} tokens on each device, and float8 products sum over multiples of "
            f"{MULTIPLE}; change sequence_length or batch_size"
        )
    chosen = {id(getattr(m, name)) for m in model.modules() if isinstance(m, MambaMixer) for name in LAYERS}
    for layer in (m for m in model.modules() if id(m) in chosen):
        if type(layer) is not nn.Linear:
            raise ValueError(f"float8=true: in_proj or out_proj is a {type(layer).__name__}, not a plain linear layer")
        if layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
            raise ValueError(
                f"float8=true: a projection of {layer.in_features} to {layer.out_features}; both must be multiples of "
                f"{MULTIPLE}: choose another hidden_size"
            )
    convert_to_float8_training(
        model, config=Float8LinearConfig(emulate=emulate), module_filter_fn=lambda module, name: id(module) in chosen
    )
    if compile_layers:
        for layer in _float8_layers(model).values():
            layer.compile()


def plain_layers(model: Any) -> Any:
    """Plain linear layers in the place of torchao's, in place, with the same parameters; returns the model."""
    for name, layer in _float8_layers(model).items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        model.set_submodule(name, plain.train(layer.training))
    return model


def _float8_layers(model: Any) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module).__module__.startswith("torchao.")
    }
