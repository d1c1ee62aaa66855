"""Where a plan's arrays are: in the memory that is kept for the gradient, or among a call's own arrays."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mambakit.ops._backends.launch_list import Item, Matrix, Place, Product
from mambakit.ops.fused_mixer.parameters import PreparedBias
from mambakit.ops.fused_mixer.signature import Kinds, LayerWeights, Signature
from mambakit.ops.selective_scan.prepared import Inputs
from mambakit.ops.selective_scan.schema import CHECKPOINT_INTERVAL

# Weights that the products take, which are rounded to the dtype that the layer computes in.
_PRODUCTS = ("in_proj", "x_proj", "dt_proj", "out_proj", "in_bias", "out_bias")

_NORMS = ("dt_norm", "B_norm", "C_norm")
_WITHIN = {"before": "xz"}  # arrays at the beginning of another one
_GIVEN = ("entering", "xz", "before")  # x where no part of the layer computes them


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
    """Sizes, and where the arrays of a call of a list are.

    In the memory that is kept from the forward to the backward pass, in this order: ``entering``, in_proj's input
    (b l, h) where that is a norm's output; ``xz``, in_proj's output (b l, 2 d), its first half being ``before``, the
    convolution's input, its second ``z``; ``u``, the convolution's output (b l, d); ``selected``, x_proj's output
    (b l, r + 2 n), and ``chosen``, that after the norms of dt, B and C where there are some; ``delta``, dt_proj's
    output (b l, d); ``y``, out_proj's input (b l, d); the weights that are rounded, by their names; ``A`` (d, n)
    float32; the scan's ``checkpoints``.

    Packed weights (without gradients) add, before the checkpoints: memory for the largest slab of widened weight, which
    they use in turn; ``q`` and ``q scales``, the rows of a float8 product's input. The norm before a float8 product
    writes ``q``: there is no ``entering``.

    Args:
        numbers: of the arrays of a call: x, kept, y and the weights' names.

    Attributes:
        rounded: the names of the weights that are rounded.
        out: channels of the layer's output.
    """

    def __init__(self, signature: Signature, numbers: dict[str, int]):
        s = self._signature = signature
        self._numbers = numbers
        self.kinds = s.kinds()
        self.b, self.length, self.h = s.shape
        self.d, self.n = self.kinds["A_log"][1]
        self.r, self.k = self.kinds["dt_proj"][1][1], self.kinds["conv"][1][-1]
        self.out = self.d if self.kinds["out_proj"] is None else self.kinds["out_proj"][1][0]
        self.rows, self.size = self.b * self.length, s.dtype.itemsize
        self.normed = self.kinds["norm"] is not None
        self.rounded = [name for name in _PRODUCTS if (kind := self.kinds[name]) is not None and kind[0] != s.dtype]
        # How packed weights are multiplied, by their names: tiles that widen in registers, rows in float8, or products
        # of what was widened in memory.
        self._tiles = {name: tile for name in s.packed_kinds() if (tile := s.tile_of(name)) is not None}
        self.float8 = [name for name in s.packed_kinds() if s.in_float8(name)]
        self._widened: dict[str, Any] = {}
        self.kinds_of_norms: Any = tuple(kind and kind[0] for kind in (self.kinds[name] for name in _NORMS))
        kept, rows, d = Memory(self.size), self.rows, self.d
        self.width = width = self.r + 2 * self.n
        self._starts: dict[str, int] = {}
        starts = self._starts
        if self.normed and "in_proj" not in self.float8:
            starts["entering"] = kept.add(rows * self.h)
        if self.kinds["in_proj"] is not None:
            starts["xz"] = kept.add(2 * rows * d)
        starts["u"], starts["selected"] = kept.add(rows * d), kept.add(rows * width)
        if s.mixer_eps is not None:
            starts["chosen"] = kept.add(rows * width)
        starts["delta"] = kept.add(rows * d)
        if self.kinds["out_proj"] is not None:
            starts["y"] = kept.add(rows * d)
        for name in self.rounded:
            starts[name] = kept.add(self.count(name))
        if s.log:
            starts["A"] = kept.add(self.d * self.n, 4)
        if s.packed is not None:
            self._add_packed(kept)
        starts["checkpoints"] = self.kept_count = kept.count
        self._kept = kept

    def _add_packed(self, kept: Memory) -> None:
        from mambakit.ops.linear.prepared import PreparedWidened  # needs Triton

        s = self._signature
        for name, kind in s.packed_kinds().items():
            n, k = self.kinds[name][1]
            if name not in self._tiles and name not in self.float8:
                self._widened[name] = PreparedWidened(self.rows, n, k, kind.format, kind.group, s.dtype)
        if self._widened:
            start = kept.add(max(way.count for way in self._widened.values()))
            self._starts |= dict.fromkeys(self._widened, start)
        if self.float8:
            widest = max(self.kinds[name][1][1] for name in self.float8)
            self._starts["q"] = kept.add(self.rows * widest, 1)
            self._starts["q scales"] = kept.add(self.rows, 4)

    def keep(self, checkpoints: int) -> None:
        """Make room for so many elements of checkpoints."""
        self._kept.add(checkpoints, 4)
        self.kept_count = self._kept.count

    def count(self, name: str) -> int:
        return math.prod(self.kinds[name][1])

    def examples(self) -> tuple[Inputs, Tensor, Tensor, Tensor | None]:
        """The scan's inputs, the convolution's (b, l, d), its filter (d, k) and bias, with every call's strides."""
        s = self._signature

        def empty(*shape: int, dtype: torch.dtype = s.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=s.device)

        b, length, d, n, r = self.b, self.length, self.d, self.n, self.r
        before, z = empty(b, length, 2 * d).chunk(2, -1)
        _, B, C = empty(b, length, r + 2 * n).split([r, n, n], -1)
        A, D, bias = (empty(*self.kinds[name][1], dtype=torch.float32) for name in ("A_log", "D", "dt_bias"))
        filter_ = empty(d, self.k, dtype=self.kinds["conv"][0])
        kind = self.kinds["conv_bias"]
        filter_bias = None if kind is None else empty(d, dtype=kind[0])
        return Inputs(empty(b, length, d), empty(b, length, d), A, B, C, D, z, bias), before, filter_, filter_bias

    def place(self, name: str) -> Place:
        """Where an array begins, of those that the class's docstring names."""
        if name == "z":
            return self.place("before") + self.d * self.size
        start = self._starts.get(_WITHIN.get(name, name))
        if name in ("dt", "B", "C"):
            start = self._starts["selected"] if self._signature.mixer_eps is None else self._starts["chosen"]
            start += {"dt": 0, "B": self.r, "C": self.r + self.n}[name]
        if start is not None:
            return Place(self._numbers["kept"], start * self.size)
        if name == "A":
            return Place(self._numbers["A_log"])
        return Place(self._numbers["x" if name in _GIVEN else name])

    def scan_places(self) -> dict[str, Place]:
        """Of what the scan reads: u, delta, A, B, C, D, z and the steps' bias."""
        found = {name: self.place(name) for name in ("u", "delta", "A", "B", "C", "z")}
        return found | {"D": Place(self._numbers["D"]), "bias": Place(self._numbers["dt_bias"])}

    def matrix(self, name: str) -> Matrix:
        """One of those arrays, or a weight, or the layer's output ``out``, as a matrix: rows are tokens, or a weight's
        outputs."""
        array, offset = Place(self._numbers["y"]) if name == "out" else self.place(name)
        columns = {
            "entering": self.h, "xz": 2 * self.d, "u": self.d, "selected": self.width, "dt": self.r, "delta": self.d,
            "y": self.d, "out": self.out,
        }.get(name)  # fmt: skip
        start = offset // self.size
        if columns is None:
            shape = tuple(self.kinds[name][1])
            return Matrix(array, shape, (shape[1], 1), start)
        return Matrix(array, (self.rows, columns), (self.width if name == "dt" else columns, 1), start)

    def product(self, x: str, weight: str, out: str, bias: str = "") -> list[Item]:
        """``x`` (b l, in) times a weight (out, in), and a bias where there is one; nothing where there is no weight."""
        if self.kinds[weight] is None:
            return []
        s, to, on_gpu = self._signature, self.matrix(out), self._signature.device.type == "cuda"
        if weight in self.float8:
            return self._float8_product(x, weight, to)
        if weight in self._tiles:
            return [self._product_in_registers(x, weight, to, bias)]
        items: list[Item] = []
        if bias and self.kinds[bias] is not None:
            spread = PreparedBias(self.rows, to.shape[1], s.dtype, s.device.index)
            items += spread.items(self.place(bias), Place(to.array, to.start * self.size))
        if weight in self._widened:
            places = Place(self._numbers[weight]), Place(self._numbers[f"{weight} scales"])
            memory = self.matrix(weight)
            return items + self._widened[weight].items(self.matrix(x), *places, memory, to, on_gpu, bool(items))
        return [*items, Product(self.matrix(x), self.matrix(weight).t, to, s.dtype, s.dtype, on_gpu, bool(items))]

    def _product_in_registers(self, x: str, weight: str, to: Matrix, bias: str) -> Item:
        from mambakit.ops.linear.prepared import ProductInRegisters

        number, kind = self._numbers, self._signature.packed_kinds()[weight]
        of_bias = number[bias] if bias and self.kinds[bias] is not None else None
        parts = number[weight], number[f"{weight} scales"], of_bias
        return ProductInRegisters(self.matrix(x), kind, *parts, to, self._tiles[weight])

    def _float8_product(self, x: str, weight: str, to: Matrix) -> list[Item]:
        """The norm has written in_proj's rows; others are rounded here."""
        from mambakit.ops.linear.prepared import Float8Product, PreparedRows

        k = self.kinds[weight][1][1]
        q, scales = self.place("q"), self.place("q scales")
        items: list[Item] = []
        if not (x == "entering" and self.normed):
            items += PreparedRows(self.rows, k, self._signature.dtype).items(self.place(x), q, scales)
        data, weight_scales = self._numbers[weight], self._numbers[f"{weight} scales"]
        return [*items, Float8Product(q, scales, self.rows, k, data, weight_scales, to)]

    def norms(self) -> tuple[Place, ...]:
        """Of the weights of the norms of dt, B and C."""
        return tuple(Place(self._numbers[name]) for name in _NORMS if self.kinds[name] is not None)


# Numbers of a layout that is asked for sizes alone.
_NONE: dict[str, int] = {}


def signature_of(
    x: Tensor, has_residual: bool, w: LayerWeights, eps: float, kept: torch.dtype, dtype: torch.dtype, gradient: bool,
    mixer_eps: float | None = None,
) -> Signature:  # fmt: skip
    """Of `mambakit::whole_layer`; its kinds are no interned ones, as sizes may be symbols."""
    kinds = Kinds(tuple(None if t is None else (t.dtype, t.shape) for t in w))
    residual = kept if has_residual else None
    return Signature(x.shape, x.dtype, residual, kept, dtype, kinds, eps, x.device, gradient, True, None, mixer_eps)


def memory_size(signature: Signature) -> int:
    """Elements that a layer keeps for its gradient; 0 without one."""
    if not signature.gradient:
        return 0
    o = Layout(signature, _NONE)
    o.keep(o.b * ((o.length + CHECKPOINT_INTERVAL - 1) // CHECKPOINT_INTERVAL) * o.d * o.n)
    return o.kept_count
