"""State tuning: the initial state of each layer is learned, and nothing else.

A recurrent layer's state before the first token is zero by default. Here it is a parameter, through which the loss of
every row flows back. What is learned is a state like any that a text leaves: it costs nothing per token, and is kept in
the same files. (For transformers the counterpart is prefix tuning, arXiv 2101.00190, whose prefix is read at each
token.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mambakit.generation.fingerprint import fingerprint
from mambakit.modules import StateCache, StateSpec
from mambakit.training.optimizer import INITIAL_STATE


class InitialState(nn.Module):
    """The state before the first token, as float32 parameters (layers, 1, *shape), zeros at first.

    Args:
        spec: the model's state.
        mark: the `fingerprint` of the model that it is learned for.

    Raises:
        ValueError: a state of whole numbers, which cannot be learned.
    """

    def __init__(self, spec: StateSpec, mark: str):
        super().__init__()
        self.spec, self.mark = spec, mark
        for stack in spec.stacks:
            if not stack.tensor.dtype.is_floating_point:
                raise ValueError(f"{stack.key} holds {stack.tensor.dtype}, which has no gradient: it cannot be learned")
        self.tensors = nn.ParameterDict({stack.key.replace(".", "/"): _zeros(stack) for stack in spec.stacks})

    def cache(self, rows: int) -> StateCache:
        """A cache whose ``rows`` slots all hold the learned state; gradients of all of them flow into it."""
        tensors = {
            stack.key: self._of(stack.key).to(stack.tensor.dtype).repeat(1, rows, *[1] * len(stack.tensor.shape))
            for stack in self.spec.stacks
        }
        return StateCache.over(self.spec, tensors)

    def _of(self, key: str) -> Tensor:
        return self.tensors[key.replace(".", "/")]  # a parameter's name has no dots


def _zeros(stack: Any) -> nn.Parameter:
    shape = (len(stack.layers), 1, *stack.tensor.shape)
    return nn.Parameter(torch.zeros(shape, dtype=torch.float32, device="cpu"))


def add_initial_state(model: Any) -> None:
    """Give ``model`` an initial state that learns; call it before packed weights are unpacked, for the fingerprint."""
    model.add_module(INITIAL_STATE, InitialState(model.backbone.new_cache(0).spec, fingerprint(model)))


def freeze_weights(model: Any) -> None:
    """Let nothing but the initial state learn; call it after packed weights are unpacked, which makes new ones."""
    model.requires_grad_(False)
    model.get_submodule(INITIAL_STATE).requires_grad_(True)


def initial_state_of(model: Any) -> InitialState | None:
    """What `add_initial_state` put there; None for any other model."""
    return model._modules.get(INITIAL_STATE)


def take_initial_state(model: Any) -> tuple[StateCache, str]:
    """Take the learned state off: (a cache of one row, the mark of the model that it is for)."""
    found = initial_state_of(model)
    assert found is not None
    delattr(model, INITIAL_STATE)
    with torch.no_grad():
        return found.cache(1), found.mark
