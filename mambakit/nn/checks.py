"""Arguments of a stack, checked once for each call: errors name value, limit and remedy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from mambakit.ops._autocast import autocast_dtype
from mambakit.quoting import brief


def check_sizes(dropout: float, **sizes: int) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {brief(value)}; it must be a whole number, 1 or more")
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
        raise ValueError(f"dropout is {brief(dropout)}; it must be a probability, 0 to 1")


def require_input(stack: Any, x: Any, one: tuple[int, ...] | None = None) -> None:
    """ValueError for an x that the stack does not take; ``one`` is the shape that a caller of `step` gave."""
    data = x.data if isinstance(x, PackedSequence) else x
    if not isinstance(data, Tensor):
        raise TypeError(f"x is a {type(x).__name__}; give a tensor or a PackedSequence")
    letters = "(b, l, f)" if stack.batch_first else "(l, b, f)"
    kinds = (2,) if isinstance(x, PackedSequence) else (2, 3)
    if data.dim() not in kinds or data.shape[-1] != stack.input_size:
        shape, wanted = (one, "(b, f) or (f,)") if one is not None else (tuple(data.shape), f"{letters} or (l, f)")
        raise ValueError(f"x has shape {shape}; it must be {wanted} with f = input_size = {stack.input_size}")
    if any(size == 0 for size in data.shape):
        raise ValueError(f"x has shape {one or tuple(data.shape)}: there is nothing to read; give a token or more")
    if data.is_floating_point() is False:
        raise ValueError(f"x is of {data.dtype}; it must be floating: embed tokens first")
    weight = stack.in_proj.weight
    if data.dtype != weight.dtype and autocast_dtype(data.device) is None:
        raise ValueError(f"x is of {data.dtype}, the stack of {weight.dtype}; cast one of them, or use torch.autocast")


def require_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} is {brief(value)}; it must be a whole number, 0 or more")


def checked_state(stack: Any, state: Any, b: int) -> tuple[Tensor, Tensor]:
    """The state before the first token, in the dtypes that the layers read: zeros where it is None."""
    settings, weight = stack.settings, stack.in_proj.weight
    if state is None:
        return stack.zero_state(b)
    if not (isinstance(state, (tuple, list)) and len(state) == 2 and all(isinstance(t, Tensor) for t in state)):
        raise ValueError(f"state is a {type(state).__name__}; give the pair (conv, ssm) that a call returned, or None")
    lead = (settings.num_hidden_layers, b, settings.intermediate_size)
    found = []
    for name, t, last in (("conv", state[0], settings.conv_kernel - 1), ("ssm", state[1], settings.state_size)):
        if tuple(t.shape) != (*lead, last):
            raise ValueError(
                f"state: {name} has shape {tuple(t.shape)}; of this stack and {b} sequences it is {(*lead, last)}"
            )
        if t.device != weight.device:
            raise ValueError(f"state: {name} is on {t.device}, and the stack on {weight.device}; move it there")
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        found.append(t.to(weight.dtype if name == "conv" else wide))
    return found[0], found[1]


def checked_starts(starts: Any, shape: torch.Size, device: torch.device) -> Tensor | None:
    if starts is None:
        return None
    if not isinstance(starts, Tensor) or starts.shape != shape:
        given = tuple(starts.shape) if isinstance(starts, Tensor) else type(starts).__name__
        raise ValueError(f"starts has shape {given}; it must be {tuple(shape)}, x without its features")
    if starts.dtype != torch.bool:
        raise ValueError(f"starts is of {starts.dtype}; it must be bool, True where an episode begins")
    if starts.device != device:
        raise ValueError(f"starts is on {starts.device}, and x on {device}; move it there")
    return starts
