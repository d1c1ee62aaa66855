"""Gradients that are not differentiated again: a second derivative raises instead of being 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def differentiated_once(op: str, gradients: tuple[Any, ...], origins: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """``gradients``, tensors or None, that raise when autograd differentiates them again; unchanged without
    ``create_graph=True``.

    Args:
        op: its name, for the error.
        origins: tensors that the gradients were computed from, as autograd knows them.
    """
    if not torch.is_grad_enabled():
        return gradients
    given = [g for g in gradients if g is not None]
    linked = _Once.apply(op, len(given), *given, *(t for t in origins if t is not None and t.requires_grad))
    found = iter(linked)
    return tuple(None if g is None else next(found) for g in gradients)


# What autograd differentiates again, where it is not the op's own `chunked.py`.
_PLAIN = {"projection": "torch.nn.functional.linear", "fused_mixer": "mambakit.ops.selective_scan.chunked.forward"}


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(op: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any):
        plain = _PLAIN.get(ctx.op, f"mambakit.ops.{ctx.op}.chunked.forward")
        raise RuntimeError(
            f"mambakit::{ctx.op} has no second derivative, and its gradient was differentiated (create_graph=True, "
            f"a gradient penalty, a Hessian). {plain} is plain PyTorch, which autograd differentiates any number of "
            "times; where the first derivative is all you need, detach it"
        )
