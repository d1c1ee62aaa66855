"""Argument checks shared by the ops. Each raises ValueError or TypeError naming the value, the limit and the remedy."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def shape(op: str, name: str, tensor: Tensor, expected: tuple[int, ...], letters: str) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {letters} = {expected}")


def dtype(op: str, name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{op}: {name} is {tensor.dtype}, expected {names}; convert it with .to(...)")


def same_device(op: str, device: torch.device, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device}, the input is on {device}; move it with .to({device.type!r})"
            )


def cu_seqlens(op: str, cu: Tensor, batch: int, length: int) -> None:
    """Check the cumulative lengths of a packed row: ``(s + 1,)`` int32, from 0 to ``length``, never falling.

    The values are read on the CPU only: on a GPU that would stall the stream at every call. `MambaModel.forward`
    checks them once per forward whatever the device.
    """
    require(cu.dim() == 1 and cu.shape[0] >= 1, f"{op}: cu_seqlens has shape {tuple(cu.shape)}, expected (s + 1,)")
    dtype(op, "cu_seqlens", cu, (torch.int32,))
    require(
        batch == 1,
        f"{op}: cu_seqlens packs sequences into one row, but the batch is {batch}; flatten it to (1, b*l, ...)",
    )
    if cu.device.type == "cpu" and not torch.compiler.is_compiling() and type(cu) is Tensor:
        cu_values(op, cu.tolist(), length)


def cu_values(op: str, values: list[int], length: int) -> None:
    ends_right = values[0] == 0 and values[-1] == length
    require(
        ends_right and values == sorted(values),
        f"{op}: cu_seqlens must rise from 0 to the packed length {length}, got {values[:4]} ... {values[-2:]}",
    )


def slots(op: str, slot_indices: Tensor | None, rows: int, pool: int) -> None:
    """Check ``slot_indices`` (rows,) int32 against a pool of ``pool`` states; values are read on the CPU only."""
    if slot_indices is None:
        require(
            rows <= pool, f"{op}: {rows} rows but only {pool} states in the pool; pass slot_indices or a larger pool"
        )
        return
    shape(op, "slot_indices", slot_indices, (rows,), "(b,) or (s,) when packed")
    dtype(op, "slot_indices", slot_indices, (torch.int32,))
    if slot_indices.device.type == "cpu" and not torch.compiler.is_compiling() and type(slot_indices) is Tensor:
        used = [i for i in slot_indices.tolist() if i >= 0]
        require(
            not used or max(used) < pool, f"{op}: slot index {max(used, default=0)} is past the pool of {pool} states"
        )
        require(
            len(set(used)) == len(used),
            f"{op}: slot_indices {used} name a slot twice; each row needs a slot of its own",
        )


def no_grad_needed(op: str, *tensors: Tensor | None) -> None:
    no_forward_mode(op.rstrip("_"), *tensors)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            f"{op} updates its state in place and is for inference; use torch.no_grad(), or {op.rstrip('_')}"
        )


def no_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """Raise for forward-mode AD: the ops have a backward pass only, and would drop tangents without an error."""
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            f"{op} has no forward-mode derivative (torch.func.jvp, jacfwd, forward_ad); use reverse mode "
            f"(torch.autograd.grad, backward), or mambakit.ops.{op}.chunked.forward, which is plain PyTorch"
        )
