"""causal_conv1d's compiled extension, ``causal_conv1d_cuda``: every release's signatures, told apart by their length.

An extension knows no autograd: each call returns tensors, or fills those that it is given. A backward call computes the
forward again, from its inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambakit.compat.convolution import causal_conv1d_fn, causal_conv1d_update

_CONV = "causal_conv1d_cuda"


def _arguments(name: str, forms: dict[int, str], given: tuple[Any, ...]) -> dict[str, Any]:
    """The arguments by name, from the release whose call has so many."""
    if len(given) not in forms:
        known = "; ".join(f"{count}: {names}" for count, names in forms.items())
        raise TypeError(f"{_CONV}.{name} takes one of these lists of arguments ({known}), and got {len(given)}")
    return dict(zip(forms[len(given)].split(", "), given, strict=True))


_FORWARD = {
    4: "x, weight, bias, silu",  # 1.0
    5: "x, weight, bias, seq_idx, silu",  # 1.1
    7: "x, weight, bias, seq_idx, initial_states, final_states, silu",  # 1.2 to 1.5
    8: "x, weight, bias, seq_idx, initial_states, out, final_states, silu",  # 1.6
}
_BACKWARD = {
    6: "x, weight, bias, dout, dx, silu",
    7: "x, weight, bias, dout, seq_idx, dx, silu",
    10: "x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, return_dinitial_states, silu",
    12: "x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, dweight, dbias, dinitial_states, silu",
}
_UPDATE = {
    5: "x, state, weight, bias, silu",
    6: "x, state, weight, bias, silu, cache_seqlens",
    7: "x, state, weight, bias, silu, cache_seqlens, indices",
    8: "x, state, weight, bias, out, silu, cache_seqlens, indices",
}


def _activation(found: dict[str, Any]) -> str | None:
    return "silu" if found["silu"] else None


@torch.no_grad()
def conv_fwd(*arguments: Any) -> Tensor | None:
    """``causal_conv1d_cuda.causal_conv1d_fwd``: 4, 5 or 7 arguments return the output, 8 (release 1.6) fill ``out``."""
    found = _arguments("causal_conv1d_fwd", _FORWARD, arguments)
    final = found.get("final_states")
    y = causal_conv1d_fn(
        found["x"], found["weight"], found["bias"], found.get("seq_idx"), found.get("initial_states"),
        final_states_out=final, activation=_activation(found),
    )  # fmt: skip
    if "out" not in found:
        return y
    found["out"].copy_(y)
    return None


def conv_bwd(*arguments: Any) -> tuple[Tensor | None, ...] | None:
    """``causal_conv1d_cuda.causal_conv1d_bwd``: 6 and 7 arguments return (dx, dweight, dbias), 10 also the initial
    states' gradient; 12 (release 1.6) fill the tensors that they are given."""
    found = _arguments("causal_conv1d_bwd", _BACKWARD, arguments)
    inputs = [found["x"], found["weight"], found["bias"], found.get("initial_states")]
    leaves: list[Any] = [None if t is None else t.detach().requires_grad_() for t in inputs]
    dfinal = found.get("dfinal_states")
    with torch.enable_grad():
        x, weight, bias, initial_states = leaves
        outputs = causal_conv1d_fn(
            x, weight, bias, found.get("seq_idx"), initial_states, return_final_states=dfinal is not None,
            activation=_activation(found),
        )  # fmt: skip
        outputs, gradients = ((outputs,), (found["dout"],)) if dfinal is None else (outputs, (found["dout"], dfinal))
        gradients = tuple(g.to(o.dtype) for g, o in zip(gradients, outputs, strict=True))
        values = torch.autograd.grad(outputs, [t for t in leaves if t is not None], gradients, allow_unused=True)
    by_leaf = iter(values)
    dx, dweight, dbias, dstates = (None if t is None else next(by_leaf) for t in leaves)
    if len(arguments) == 12:
        targets = (found["dx"], found["dweight"], found["dbias"], found["dinitial_states"])
        for target, value in zip(targets, (dx, dweight, dbias, dstates), strict=True):
            if target is not None and value is not None:
                target.copy_(value)
        return None
    if found["dx"] is not None:
        dx = found["dx"].copy_(dx)
    if len(arguments) < 10:
        return dx, dweight, dbias
    return dx, dweight, dbias, dstates if found["return_dinitial_states"] else None


@torch.no_grad()
def conv_update(*arguments: Any) -> Tensor | None:
    """``causal_conv1d_cuda.causal_conv1d_update``: 5, 6 or 7 arguments return the output, 8 (release 1.6) fill
    ``out``."""
    found = _arguments("causal_conv1d_update", _UPDATE, arguments)
    y = causal_conv1d_update(
        found["x"], found["state"], found["weight"], found["bias"], _activation(found), found.get("cache_seqlens"),
        found.get("indices"),
    )  # fmt: skip
    if "out" not in found:
        return y
    found["out"].copy_(y)
    return None


def conv_fwd_function(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, initial_states: Tensor | None,
    final_states_out: Tensor | None, silu_activation: bool,
) -> Tensor:  # fmt: skip
    """``causal_conv1d_fwd_function`` of release 1.6: the output, without a gradient."""
    y = conv_fwd(x, weight, bias, seq_idx, initial_states, final_states_out, silu_activation)
    assert y is not None
    return y


def conv_bwd_function(
    x: Tensor, weight: Tensor, bias: Tensor | None, dout: Tensor, seq_idx: Tensor | None,
    initial_states: Tensor | None, dfinal_states: Tensor | None, dx: Tensor | None, return_dinitial_states: bool,
    silu_activation: bool,
) -> tuple[Tensor | None, ...] | None:  # fmt: skip
    """``causal_conv1d_bwd_function`` of release 1.6: (dx, dweight, dbias, the initial states' gradient)."""
    return conv_bwd(
        x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, return_dinitial_states, silu_activation
    )


def conv_update_function(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu_activation: bool,
    cache_seqlens: Tensor | None, conv_state_indices: Tensor | None,
) -> Tensor:  # fmt: skip
    """``causal_conv1d_update_function`` of release 1.6."""
    y = conv_update(x, conv_state, weight, bias, silu_activation, cache_seqlens, conv_state_indices)
    assert y is not None
    return y
