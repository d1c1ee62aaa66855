"""What a model's state is made of: for each layer the names, shapes and dtypes of its tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class StateTensor:
    """One tensor of one layer's state.

    Attributes:
        name: unique within its layer, an identifier.
        shape: of one slot; a cache of b slots holds (b, *shape).
        dtype: floating or integer. A new slot is all zeros.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.name} {self.shape}"


@dataclass(frozen=True)
class Stack:
    """The tensors of several layers that share a name, a shape and a dtype: one memory (layers, b, *shape).

    Attributes:
        key: the stack's name in `StateCache.tensors` and in files: ``<name>_states``. Where a name has more than one
            shape or dtype, the second and later stacks add their first layer: ``<name>_states.<layer>``.
        tensor: what each of the layers has.
        layers: their indices, rising.
    """

    key: str
    tensor: StateTensor
    layers: tuple[int, ...]


class StateSpec:
    """The specification of a model's state, which `StateCache` makes memory of. Layers may differ (hybrid models).

    Args:
        layers: for each layer its tensors, in the order in which its mixer takes them; () for a layer without a state.
        dtype: the model's; what a cache made of this calls its own.
        model: facts of the model, as JSON has them, that must agree between the writer and the reader of a saved state.

    Attributes:
        stacks: the layers' tensors, grouped.
        places: for each layer, (key of the stack, position in it) of each of its tensors.

    Raises:
        ValueError: a name that is no identifier, or comes twice in a layer.
    """

    def __init__(
        self,
        layers: tuple[tuple[StateTensor, ...], ...],
        dtype: torch.dtype,
        model: Mapping[str, Any] | None = None,
    ):
        self.layers, self.dtype, self.model = layers, dtype, dict(model or {})
        groups: dict[StateTensor, list[int]] = {}
        keys: dict[StateTensor, str] = {}
        places = []
        for index, tensors in enumerate(layers):
            names = [t.name for t in tensors]
            if len(set(names)) < len(names) or not all(name.isidentifier() for name in names):
                raise ValueError(f"layer {index} names its state tensors {names}; give each an identifier of its own")
            for tensor in tensors:
                if tensor not in keys:
                    key = f"{tensor.name}_states"
                    keys[tensor] = f"{key}.{index}" if key in keys.values() else key
                groups.setdefault(tensor, []).append(index)
            places.append(tuple((keys[t], len(groups[t]) - 1) for t in tensors))
        self.stacks = tuple(Stack(keys[t], t, tuple(members)) for t, members in groups.items())
        self.places = tuple(places)

    @property
    def nbytes(self) -> int:
        """Bytes of one slot."""
        return sum(math.prod(t.shape) * t.dtype.itemsize for tensors in self.layers for t in tensors)

    def difference(self, other: StateSpec) -> str | None:
        """Why a state of ``other`` does not fit this one; None where it does. The dtypes of tensors may differ: values
        are converted."""
        if len(self.layers) != len(other.layers):
            return f"{len(other.layers)} layers, not {len(self.layers)}"
        if self._stacked_alike(other):  # a state is compared at every copy: a few stacks are quicker than all layers
            return None
        for index, (ours, theirs) in enumerate(zip(self.layers, other.layers, strict=True)):
            if [(t.name, t.shape) for t in ours] != [(t.name, t.shape) for t in theirs]:
                return f"layer {index} has {_listed(theirs)}, not {_listed(ours)}"
        return "some of its layers have tensors of another dtype than the others"

    def _stacked_alike(self, other: StateSpec) -> bool:
        ours, theirs = ([(s.key, s.tensor.shape, s.layers) for s in spec.stacks] for spec in (self, other))
        return ours == theirs

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StateSpec) and (self.layers, self.dtype) == (other.layers, other.dtype)

    def __hash__(self) -> int:
        return hash((self.layers, self.dtype))

    def __repr__(self) -> str:
        stacks = ", ".join(f"{len(s.layers)} x {s.tensor} {str(s.tensor.dtype)[6:]}" for s in self.stacks)
        return f"StateSpec({len(self.layers)} layers: {stacks or 'no state'})"


def _listed(tensors: tuple[StateTensor, ...]) -> str:
    return ", ".join(map(str, tensors)) or "no state"
