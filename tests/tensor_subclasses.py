"""Tensors of others: with memory of their own, and without."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class Named(Tensor):
    """A subclass that is nothing but a name."""


class Doubled(Tensor):
    """Half of what it stands for, as torchao's and bitsandbytes' weights are integers and scales: it has no memory to
    read itself, and every op of it is one of its dequantised value."""

    half: Tensor

    @staticmethod
    def __new__(cls, half: Tensor):
        return Tensor._make_wrapper_subclass(cls, half.shape, dtype=half.dtype, device=half.device, requires_grad=False)

    def __init__(self, half: Tensor):
        self.half = half

    def dequantize(self) -> Tensor:
        return self.half * 2

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.clone.default):
            return cls(args[0].half)
        args, kwargs = tree_map_only(Doubled, lambda t: t.dequantize(), (args, kwargs or {}))
        return func(*args, **kwargs)


def doubled(value: Tensor) -> Doubled:
    """What stands for ``value``."""
    return Doubled(value.detach() / 2)
