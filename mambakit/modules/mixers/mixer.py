"""What a block asks of its sequence mixer, whatever the architecture."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from mambakit.modules.state_spec import StateTensor


class Mixer(nn.Module):
    """A layer's sequence mixer: ``mixer(x (b, l, h), cache, packing) -> (b, l, h)``. Abstract.

    ``forward`` takes a `StateCache`, or None while it trains, and a `Packing`, or None where the batch is not packed.
    It reads its state as it was before the first token and leaves it as it is after the last. Where gradients flow it
    uses `StateCache.layer` and `StateCache.update`, which work out of place; in inference it may write into
    `StateCache.memory`. A wrapped cache (`mambakit.modules.placement.opened`) is opened first. Nothing else of a model
    knows what the state tensors mean.

    A subclass is made as ``Class(config, layer_idx)``, and a configuration names it by its `mixer_class`.
    """

    # Fields of the configuration that must agree between the model that wrote a state and the one that reads it.
    STATE_FIELDS: tuple[str, ...] = ()
    # Fields that change what the mixer computes and that the shapes of its weights do not show.
    COMPUTATION_FIELDS: tuple[str, ...] = ()

    @staticmethod
    @abstractmethod
    def state_tensors(config: Any, dtype: torch.dtype) -> tuple[StateTensor, ...]:
        """One layer's state in a model of this dtype, in the order of `StateCache.layer` and `StateCache.update`."""

    @staticmethod
    def padded_window(config: Any) -> int | None:
        """How many past inputs the mixer's convolution reads, where ``forward`` takes a `LeftPadding` in place of a
        `Packing` in inference; None where it does not take one."""
        return None

    def initial_values(self) -> dict[str, Tensor]:
        """What the mixer's own parameters (not its children's) start from, by name; drawn anew at each call."""
        return {}

    def reset_parameters(self) -> None:
        """Draw every parameter anew, the children's first."""
        for child in self.children():
            if callable(reset := getattr(child, "reset_parameters", None)):
                reset()
        self.reset_own_parameters()

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        """Draw the mixer's own parameters anew.

        On meta there is nothing to draw, and torch would load sympy and torch._dynamo, a second's work, to say so.
        """
        if any(parameter.is_meta for parameter in self.parameters(recurse=False)):
            return
        for name, value in self.initial_values().items():
            getattr(self, name).copy_(value)
