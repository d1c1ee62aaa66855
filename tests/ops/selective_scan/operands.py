"""Operands of the scan that are not the usual ones: groups, constants, layouts and dtypes, for the tests."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from mambakit.ops.selective_scan import reference

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


class Case(NamedTuple):
    """One call. `B` and `C`: the number of groups, 0 for (b, l, n), and a letter for what is constant: "t" over time,
    "b" over the batch, "c" over both. `transposed`: the operands of u, delta, z and y's gradient that are views of
    (b, d, l) memory."""

    shape: tuple[int, int, int, int]  # b, l, d, n
    B: str = "0"
    C: str = "0"
    transposed: str = ""
    dtypes: tuple[torch.dtype, ...] = (F32,) * 5  # u, delta, B, C, z
    lengths: tuple[int, ...] | None = None
    full: bool = True  # with D, z, delta_bias, softplus and an initial state

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        names = "-".join(str(d).removeprefix("torch.") for d in dict.fromkeys(self.dtypes))
        packed = "" if self.lengths is None else "-packed"
        return f"{shape}-B{self.B}-C{self.C}-{self.transposed}-{names}{packed}{'' if self.full else '-bare'}"


def selection(case: Case, which: str, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    b, length, _, n = case.shape
    g = int(which.rstrip("tbc"))
    b, length = 1 if which[-1] in "bc" else b, 1 if which[-1] in "tc" else length
    return torch.randn((b, length, n) if g == 0 else (b, length, g, n)).to(device, dtype)


def channels(case: Case, name: str, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    b, length, d, _ = case.shape
    x = torch.randn(b, length, d).to(device, dtype)
    return x.transpose(1, 2).contiguous().transpose(1, 2) if name in case.transposed else x


def make(case: Case, device: str = "cpu") -> dict:
    """The arguments of `selective_scan`."""
    b, _, d, n = case.shape
    u, delta, B, C, z = case.dtypes
    wide = F64 if F64 in case.dtypes else F32
    rows = b if case.lengths is None else len(case.lengths)
    inputs = {
        "u": channels(case, "u", u, device),
        "delta": channels(case, "d", delta, device),
        "A": (-torch.rand(d, n) * 4).to(device, wide),
        "B": selection(case, case.B, B, device),
        "C": selection(case, case.C, C, device),
        "delta_softplus": case.full,
    }
    if case.full:
        inputs |= {
            "D": torch.randn(d).to(device, wide),
            "z": channels(case, "z", z, device),
            "delta_bias": torch.randn(d).to(device, wide),
            "initial_state": torch.randn(rows, d, n).to(device, wide),
        }
    else:
        inputs["delta"] = inputs["delta"].abs() * 0.3
    if case.lengths is not None:
        bounds = [0, *itertools.accumulate(case.lengths)]
        inputs["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device=device)
    return inputs


def oracle(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, initial_state=None,
           cu_seqlens=None):  # fmt: skip
    """The reference in float64, sequence by sequence where the row is packed."""
    if cu_seqlens is None:
        return reference.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state)
    bounds, length = cu_seqlens.tolist(), u.shape[1]
    ys, finals = [], []
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        cut = lambda x: None if x is None else x[:, start:end] if x.shape[1] == length else x  # noqa: B023, E731
        state = A.new_zeros(1, *A.shape) if initial_state is None else initial_state[i : i + 1]
        if start < end:
            y, state = reference.selective_scan(
                cut(u), cut(delta), A, cut(B), cut(C), D, cut(z), delta_bias, delta_softplus, state
            )
            ys.append(y)
        finals.append(state if state.is_complex() else state.double())
    return torch.cat(ys, 1), torch.cat(finals)


def tensors_of(inputs: dict) -> dict[str, Tensor]:
    found = {name: t for name, t in inputs.items() if isinstance(t, Tensor)}
    return {name: t for name, t in found.items() if t.is_floating_point() or t.is_complex()}


def as_leaf(t: Tensor) -> Tensor:
    """Its values in memory of the same strides."""
    return torch.empty_like(t).copy_(t).requires_grad_()


def differentiate(function, inputs: dict, weights: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """y, the final state, and every gradient of their weighted sums."""
    leaves = {name: as_leaf(t) for name, t in tensors_of(inputs).items()}
    y, final = function(**{**inputs, **leaves})
    outputs = (y, final) if not final.is_complex() else (y, torch.view_as_real(final))
    gradients = torch.autograd.grad(
        outputs, list(leaves.values()), [w.to(o.dtype) for w, o in zip(weights, outputs, strict=True)]
    )
    return y, final, dict(zip(leaves, gradients, strict=True))


def output_gradients(case: Case, device: str = "cpu", dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Weights of the outputs that their dtypes hold exactly."""
    b, _, d, n = case.shape
    rows = b if case.lengths is None else len(case.lengths)
    return channels(case, "y", dtype or case.dtypes[0], device), torch.randn(rows, d, n).to(device)


def in_float64(inputs: dict) -> dict:
    wide = {name: t.to(torch.complex128 if t.is_complex() else F64) for name, t in tensors_of(inputs).items()}
    return {**inputs, **wide}
