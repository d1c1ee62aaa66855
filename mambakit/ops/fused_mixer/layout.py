"""Where a plan's arrays are in its memory, and the tensors over them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mambakit.ops.fused_mixer.signature import Kinds, LayerWeights, Signature
from mambakit.ops.selective_scan.prepared import Inputs
from mambakit.ops.selective_scan.schema import CHECKPOINT_INTERVAL

# Weights that the products take, which are rounded to the dtype that the layer computes in.
_PRODUCTS = ("in_proj", "x_proj", "dt_proj", "out_proj", "in_bias", "out_bias")

_NORMS = ("dt_norm", "B_norm", "C_norm")


class Memory:
    """Arrays in one allocation, each 256 bytes aligned."""

    def __init__(self, itemsize: int):
        self._itemsize, self.count = itemsize, 0  # elements

    def add(self, count: int, itemsize: int = 0) -> int:
        """The element at which an array of ``count`` elements begins, of this size or of ``itemsize`` bytes."""
        start = self.count
        size = count * (itemsize or self._itemsize)
        self.count += -(-size // 256) * 256 // self._itemsize
        return start


class Layout:
    """Sizes, and the memory that is kept from the forward to the backward pass, in elements of the plan's dtype.

    Attributes:
        rounded: the weights that are rounded, at ``at_rounded``.
        at_normed, at_u, at_selected, at_y, at_A, at_checkpoints: in_proj's input (b l, h), the convolution's output
            (b l, d), dt, B and C (b l, r + 2 n) after their norms where they have some, out_proj's input (b l, d), A
            (d, n) float32, and the scan's checkpoints.
        out: channels of the layer's output.
    """

    def __init__(self, signature: Signature):
        s = signature
        self.kinds: dict[str, Any] = dict(zip(LayerWeights._fields, s.weights.each, strict=True))
        self.b, self.length, self.h = s.shape
        self.d, self.n = self.kinds["A_log"][1]
        self.r, self.k = self.kinds["dt_proj"][1][1], self.kinds["conv"][1][-1]
        self.out = self.d if self.kinds["out_proj"] is None else self.kinds["out_proj"][1][0]
        self.rows, self.size = self.b * self.length, s.dtype.itemsize
        self.normed = self.kinds["norm"] is not None
        self.rounded = [name for name in _PRODUCTS if (kind := self.kinds[name]) is not None and kind[0] != s.dtype]
        self.kinds_of_norms: Any = tuple(kind and kind[0] for kind in (self.kinds[name] for name in _NORMS))
        self._dtype, self._device = s.dtype, s.device
        kept = self._kept = Memory(self.size)
        self.at_normed = kept.add(self.rows * self.h if self.normed else 0)
        self.at_u = kept.add(self.rows * self.d)
        self.selection_normed, width = s.mixer_eps is not None, self.r + 2 * self.n
        self.at_selected = kept.add(self.rows * width) if self.selection_normed else 0
        self.at_y = kept.add(0 if self.kinds["out_proj"] is None else self.rows * self.d)
        self.at_rounded = [kept.add(self.count(name)) for name in self.rounded]
        self.at_A = kept.add(self.d * self.n if s.log else 0, 4)
        self.at_checkpoints = self.kept_count = kept.count
        # Arguments of as_strided: views are made of few calls.
        self._rounded, self._transposed = {}, {}
        for name, at in zip(self.rounded, self.at_rounded, strict=True):
            shape = tuple(self.kinds[name][1])
            self._rounded[name] = shape, (*shape[1:], 1), at
            self._transposed[name] = shape[::-1], (1, *shape[1:]), at
        rows, d, h = self.rows, self.d, self.h
        self.u, self.y = ((rows, d), (d, 1), self.at_u), ((rows, d), (d, 1), self.at_y)
        self._entering = (rows, h), (h, 1), self.at_normed
        # dt among x_proj's output, or among what its norms give, (b l, r + 2 n).
        self.dt = (rows, self.r), (width, 1), self.at_selected

    def keep(self, checkpoints: int) -> None:
        """Make room for so many elements of checkpoints."""
        self._kept.add(checkpoints, 4)
        self.kept_count = self._kept.count

    def count(self, name: str) -> int:
        return math.prod(self.kinds[name][1])

    def examples(self) -> tuple[Inputs, Tensor, Tensor, Tensor | None]:
        """The scan's inputs, the convolution's (b, l, d), its filter (d, k) and bias, with every call's strides."""

        def empty(*shape: int, dtype: torch.dtype = self._dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=self._device)

        b, length, d, n, r = self.b, self.length, self.d, self.n, self.r
        before, z = empty(b, length, 2 * d).chunk(2, -1)
        _, B, C = empty(b, length, r + 2 * n).split([r, n, n], -1)
        A, D, bias = (empty(*self.kinds[name][1], dtype=torch.float32) for name in ("A_log", "D", "dt_bias"))
        filter_ = empty(d, self.k, dtype=self.kinds["conv"][0])
        kind = self.kinds["conv_bias"]
        filter_bias = None if kind is None else empty(d, dtype=kind[0])
        return Inputs(empty(b, length, d), empty(b, length, d), A, B, C, D, z, bias), before, filter_, filter_bias

    def weight(self, kept: Tensor, w: LayerWeights, name: str) -> Tensor:
        """A weight (out, in) in the dtype that the layer computes in."""
        place = self._rounded.get(name)
        return getattr(w, name) if place is None else kept.as_strided(*place)

    def product(self, x: Tensor, kept: Tensor, w: LayerWeights, name: str, bias: str = "") -> Tensor:
        """x (b l, in) times a weight, and the bias where there is one: (b l, out)."""
        place = self._transposed.get(name)
        weight = getattr(w, name).t() if place is None else kept.as_strided(*place)
        if bias and getattr(w, bias) is not None:
            return torch.addmm(self.weight(kept, w, bias), x, weight)
        return torch.mm(x, weight)

    def norms(self, w: LayerWeights) -> tuple[int, ...]:
        """Addresses of the weights of the norms of dt, B and C."""
        return () if w.dt_norm is None else tuple([getattr(w, name).data_ptr() for name in _NORMS])

    def entering(self, x: Tensor, kept: Tensor) -> Tensor:
        """in_proj's input (b l, h)."""
        return kept.as_strided(*self._entering) if self.normed else x.view(self.rows, self.h)


def signature_of(
    x: Tensor, has_residual: bool, w: LayerWeights, eps: float, kept: torch.dtype, dtype: torch.dtype, gradient: bool,
    mixer_eps: float | None = None,
) -> Signature:  # fmt: skip
    """Of `mambakit::fused_layer`; its kinds are no interned ones, as sizes may be symbols."""
    kinds = Kinds(tuple(None if t is None else (t.dtype, t.shape) for t in w))
    residual = kept if has_residual else None
    return Signature(x.shape, x.dtype, residual, kept, dtype, kinds, eps, x.device, gradient, True, None, mixer_eps)


def memory_sizes(signature: Signature) -> tuple[tuple[int, ...], ...]:
    """Of what a layer keeps for its gradient: `Layout`'s memory, xz, x_proj's output, delta; empty without one."""
    if not signature.gradient:
        return ((0,),) * 4
    o = Layout(signature)
    o.keep(o.b * ((o.length + CHECKPOINT_INTERVAL - 1) // CHECKPOINT_INTERVAL) * o.d * o.n)
    return (o.kept_count,), (o.rows, 2 * o.d), (o.rows, o.r + 2 * o.n), (o.rows, o.d)
