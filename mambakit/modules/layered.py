"""A (layers, b, ...) tensor whose layers lie on several devices, for the states of a model that does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class LayeredTensor:
    """One tensor for each layer, each on its layer's device, with what `StateCache` and its readers ask of one tensor
    of all layers.

    ``t[i]`` is layer i's own memory. ``t[:, slots]`` reads or writes slots of every layer. `to` and `cpu` give one
    tensor of all layers, and so does a function of torch that takes it, as a copy on the first layer's device.
    """

    def __init__(self, layers: Sequence[Tensor]):
        self.layers = list(layers)

    # -- what it is ------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.layers), *self.layers[0].shape))

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].dtype

    @property
    def device(self) -> torch.device:
        """The first layer's."""
        return self.layers[0].device

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.layers)

    def data_ptr(self) -> tuple[int, ...]:
        return tuple(t.data_ptr() for t in self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.layers)

    def __repr__(self) -> str:
        devices = ", ".join(dict.fromkeys(str(t.device) for t in self.layers))
        return f"LayeredTensor(shape={tuple(self.shape)}, {self.dtype}, on {devices})"

    # -- slots of all layers ---------------------------------------------------------------------------------------

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int):
            return self.layers[index]
        _require_every_layer(index)
        return self._each(lambda t: t[_on(t, index[1:])])

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(index, int):
            self.layers[index].copy_(value)
            return
        _require_every_layer(index)
        for i, t in enumerate(self.layers):
            of_layer = isinstance(value, LayeredTensor) or (
                isinstance(value, Tensor) and value.dim() == len(self.shape)
            )
            t[_on(t, index[1:])] = value[i].to(t.device, t.dtype) if of_layer else value

    def copy_(self, source: Tensor | LayeredTensor) -> LayeredTensor:
        for i, t in enumerate(self.layers):
            t.copy_(source[i])
        return self

    def zero_(self) -> LayeredTensor:
        for t in self.layers:
            t.zero_()
        return self

    def mul_(self, factor: Tensor | float) -> LayeredTensor:
        for t in self.layers:
            t.mul_(factor.to(t.device) if isinstance(factor, Tensor) else factor)
        return self

    def masked_fill_(self, mask: Tensor, value: float) -> LayeredTensor:
        for t in self.layers:
            t.masked_fill_(mask.to(t.device), value)
        return self

    def clone(self) -> LayeredTensor:
        return self._each(torch.clone)

    def detach(self) -> LayeredTensor:
        return self._each(torch.detach)

    def repeat_interleave(self, repeats: int, dim: int) -> LayeredTensor:
        return self._each(lambda t: t.repeat_interleave(repeats, dim - 1))

    # -- one tensor ------------------------------------------------------------------------------------------------

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """One tensor (layers, b, ...); the arguments are `Tensor.to`'s, and name a device."""
        return torch.stack([t.to(*args, **kwargs) for t in self.layers])

    def cpu(self) -> Tensor:
        return self.to("cpu")

    def contiguous(self) -> Tensor:
        return self.to(self.device)

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """A function of torch is given a copy of all layers: it can read them."""
        args = tuple(a.contiguous() if isinstance(a, cls) else a for a in args)
        kwargs = {name: a.contiguous() if isinstance(a, cls) else a for name, a in (kwargs or {}).items()}
        return function(*args, **kwargs)

    def _each(self, function: Callable[[Tensor], Tensor]) -> LayeredTensor:
        return LayeredTensor([function(t) for t in self.layers])


def _require_every_layer(index: Any) -> None:
    if not (isinstance(index, tuple) and index and index[0] == slice(None)):
        raise TypeError(
            f"a state on several devices is indexed by a layer, [i], or for every layer, [:, slots]; not by {index!r}: "
            "take one tensor of it first, .to(device)"
        )


def _on(tensor: Tensor, index: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(i.to(tensor.device) if isinstance(i, Tensor) else i for i in index)


def zeros_of_layers(layers: int, shape: tuple[int, ...], device: Any, dtype: torch.dtype) -> Tensor | LayeredTensor:
    """(layers, *shape) zeros on one device, or with a list of devices each layer's on its own."""
    if isinstance(device, (list, tuple)):
        return LayeredTensor([torch.zeros(shape, device=place, dtype=dtype) for place in device])
    return torch.zeros(layers, *shape, device=device, dtype=dtype)


def stack_layers(layers: list[Tensor]) -> Tensor | LayeredTensor:
    """One tensor of all layers where they lie on one device."""
    return torch.stack(layers) if len({t.device for t in layers}) == 1 else LayeredTensor(layers)


def exact_device(device: torch.device | str | int) -> torch.device:
    """A device with its index: "cuda" is the current one."""
    device = torch.device(device)
    return (
        torch.empty(0, dtype=torch.float32, device=device).device
        if device.index is None and device.type != "cpu"
        else device
    )
