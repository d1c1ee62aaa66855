"""The memory of a state: the layers' tensors, stacked where they are alike, replaced where gradients flow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mambakit.modules.layered import stack_layers, zeros_of_layers
from mambakit.modules.state_spec import StateSpec


class StateMemory:
    """The tensors of a specification, for a number of slots. `StateCache` is the interface to it.

    Args:
        spec: names, shapes and dtypes of each layer's tensors.
        slots: their number, 0 or more.
        device: of all layers, or a list of devices, one for each layer.
    """

    def __init__(self, spec: StateSpec, slots: int, device: Any = None):
        if slots < 0:
            raise ValueError(f"max_batch_size is {slots}; it must be 0 or more")
        if isinstance(device, (list, tuple)) and len(device) != len(spec.layers):
            raise ValueError(
                f"device names {len(device)} devices for {len(spec.layers)} layers; give one of each layer, or one of "
                "all"
            )
        self.spec = spec
        self._slots = slots  # of a model without a state
        self._stacks: dict[str, Any] = {}
        for stack in spec.stacks:
            own = [device[i] for i in stack.layers] if isinstance(device, (list, tuple)) else device
            shape = (slots, *stack.tensor.shape)
            self._stacks[stack.key] = zeros_of_layers(len(stack.layers), shape, own, stack.tensor.dtype)
        # Layers replaced out of place (where gradients flow) since the stacked tensors were last formed.
        self._replaced: dict[int, tuple[Tensor, ...]] = {}

    def tensors(self) -> dict[str, Any]:
        """By `Stack.key`: each (layers, b, *shape), a Tensor or, on several devices, a `LayeredTensor`."""
        if self._replaced:
            now: dict[str, list[Tensor]] = {key: [] for key in self._stacks}
            for index, places in enumerate(self.spec.places):
                for (key, _), tensor in zip(places, self.layer(index), strict=True):
                    now[key].append(tensor)
            self._stacks = {key: stack_layers(tensors) for key, tensors in now.items()}
            self._replaced = {}
        return self._stacks

    def mapped(self, function: Callable[[Any], Any], slots: int | None = None) -> StateMemory:
        """Memory whose stacked tensors ``function`` makes from this one's; ``slots`` where their number changes."""
        other = object.__new__(StateMemory)
        other.spec, other._replaced, other._slots = self.spec, {}, self.slots if slots is None else slots
        other._stacks = {key: function(t) for key, t in self.tensors().items()}
        return other

    def replace(self, tensors: Mapping[str, Any]) -> None:
        """Take these tensors themselves as the memory."""
        self._stacks, self._replaced = {key: tensors[key] for key in self._stacks}, {}

    def fill_(self, tensors: Mapping[str, Any]) -> None:
        """Copy these values, in place and without their gradients."""
        for key, stacked in self.tensors().items():
            stacked.copy_(tensors[key].detach())

    def copy_(self, source: StateMemory, from_slots: Tensor | list[int], to_slots: Tensor | list[int]) -> None:
        """Copy slots of ``source``, of the same specification, into slots of this memory, in place.

        Raises:
            ValueError: indices beyond the slots, or more of one kind than of the other.
        """
        from_index = source.index(from_slots, "from_slots", ranges=True)
        to_index = self.index(to_slots, "to_slots", ranges=True)
        if len(from_slots) != len(to_slots):
            raise ValueError(f"{len(from_slots)} from_slots but {len(to_slots)} to_slots; give as many of each")
        given = source.tensors()
        for key, stacked in self.tensors().items():
            stacked[:, to_index] = given[key][:, from_index].to(self.device, stacked.dtype)

    def gather_(self, source: StateMemory, slots: Tensor) -> None:
        """Slot i becomes slot ``slots[i]`` (b,) of ``source``, on one device, without a look at the indices."""
        given = source.tensors()
        for key, stacked in self.tensors().items():
            torch.index_select(given[key], 1, slots, out=stacked)

    def zero_(self, rows: Tensor | list[int]) -> None:
        """Zero the slots ``rows``, in place: indices, or a mask (b,) bool, with which nothing waits for the device.

        Raises:
            ValueError: indices beyond the slots, or a mask of another shape.
        """
        if isinstance(rows, Tensor) and rows.dtype == torch.bool:
            if rows.shape != (self.slots,):
                raise ValueError(f"the mask has shape {tuple(rows.shape)}; it must be ({self.slots},)")
            for stacked in self.tensors().values():
                mask = rows.to(stacked.device).view(-1, *[1] * (len(stacked.shape) - 2))
                stacked.masked_fill_(mask, 0)
        else:
            index = self.index(rows, "rows")
            for stacked in self.tensors().values():
                stacked[:, index] = 0

    def index(self, indices: Tensor | list[int], name: str, ranges: bool = False) -> Tensor | slice:
        """Slots as int64 on the first layer's device.

        With ``ranges`` a list of consecutive slots becomes a slice, which costs no copy.

        Raises:
            ValueError: indices of more than one dimension, or beyond the slots; they are called ``name``.
        """
        limit = self.slots
        if ranges and isinstance(indices, list) and indices and 0 <= indices[0] <= limit - len(indices):
            consecutive = range(indices[0], indices[0] + len(indices))
            if indices == list(consecutive):
                return slice(consecutive.start, consecutive.stop)
        home = indices.device if isinstance(indices, Tensor) else "cpu"
        index = torch.as_tensor(indices, dtype=torch.long, device=home)
        if index.dim() != 1:
            raise ValueError(f"{name} has shape {tuple(index.shape)}, expected one dimension")
        if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < limit):
            raise ValueError(f"{name} {index.tolist()} reach outside the {limit} rows of the cache")
        return index.to(self.device)

    def misfits(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """What `fill_` cannot take: tensors that are missing, or of another shape or kind (floating, integer)."""
        found = []
        for key, own in self.tensors().items():
            given = tensors.get(key)
            if given is None:
                found.append(f"{key} is missing")
            elif given.shape != own.shape or given.dtype.is_floating_point != own.dtype.is_floating_point:
                found.append(f"{key} is {tuple(given.shape)} {given.dtype}, not {tuple(own.shape)} {own.dtype}")
        return found

    @property
    def slots(self) -> int:
        for stacked in self._stacks.values():
            return stacked.shape[1]
        return self._slots

    @property
    def device(self) -> torch.device:
        """The first layer's."""
        for stacked in self._stacks.values():
            return stacked.device
        return torch.device("cpu")

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self._stacks.values())

    def layer(self, index: int, rows: Tensor | None = None) -> tuple[Tensor, ...]:
        tensors = self._replaced.get(index) or tuple(self._stacks[key][at] for key, at in self.spec.places[index])
        if rows is None:
            return tensors
        at = rows.clamp(min=0)
        return tuple(torch.where((rows >= 0).view(-1, *[1] * (t.dim() - 1)), t[at], 0) for t in tensors)

    def own(self, index: int) -> tuple[Tensor, ...]:
        """Layer ``index``'s memory, to be written to."""
        stacks = self.tensors()
        return tuple(stacks[key][at] for key, at in self.spec.places[index])

    def update(self, index: int, tensors: tuple[Tensor, ...], rows: Tensor | None) -> None:
        named = self.spec.layers[index]
        if len(tensors) != len(named):
            names = ", ".join(t.name for t in named)
            raise ValueError(f"layer {index} was given {len(tensors)} state tensors; it has {len(named)}: {names}")
        tensors = tuple(t.to(own.dtype) for t, own in zip(tensors, named, strict=True))
        if rows is not None:
            at = torch.where(rows >= 0, rows, self.slots)  # a slot beyond the last takes what is dropped
            tensors = tuple(_put(old, at, new) for old, new in zip(self.layer(index), tensors, strict=True))
        self._replaced[index] = tensors

    def place(self, index: int, device: torch.device) -> None:
        if all(t.device == device for t in self.layer(index)):
            return
        stacks = self.tensors()
        for key, at in self.spec.places[index]:
            layers = enumerate(stacks[key])
            stacks[key] = stack_layers([t.to(device) if i == at else t.clone() for i, t in layers])


def _put(old: Tensor, at: Tensor, new: Tensor) -> Tensor:
    """``old`` (b, ...) with slots ``at`` replaced, b for none."""
    return torch.cat([old, torch.zeros_like(new[:1])]).index_put((at,), new)[: old.shape[0]]
