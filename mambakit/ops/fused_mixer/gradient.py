"""The gradient of a whole Mamba layer (`plan.py`), likewise as a list of launches that is put together once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mambakit.ops._backends.launch_list import Item, LaunchList, Matrix, Place, Product
from mambakit.ops.fused_mixer.layout import Layout, Memory
from mambakit.ops.fused_mixer.signature import LayerWeights, Signature
from mambakit.ops.selective_scan import prepared as scan

_NAMES = ("x", "residual", *LayerWeights._fields)
# Gradients that the kernels write whether they are wanted or not, and those that products write.
_NORMS = ("dt_norm", "B_norm", "C_norm")
_WRITTEN = ("A_log", "D", "dt_bias", "conv", "conv_bias", "norm", *_NORMS)
_PRODUCTS = ("in_proj", "x_proj", "dt_proj", "out_proj")
# The arrays of a call: `wide` and `narrow` are the weights' gradients in float32 and in the layer's dtype.
_ARRAYS = (
    "dy", "dtotal", "x", "total", "kept", *LayerWeights._fields, "scratch", "dx", "dresidual", "wide", "narrow",
)  # fmt: skip
_AT = {name: i for i, name in enumerate(_ARRAYS)}


class _Results:
    """Where the weights' gradients are: one allocation for each dtype, as an allocation costs more than a view."""

    def __init__(self, layout: Layout, dtype: torch.dtype, needed: dict[str, bool]):
        memory = {"wide": Memory(4), "narrow": Memory(dtype.itemsize)}
        self._dtypes = {"wide": torch.float32, "narrow": dtype}
        self._starts: dict[str, tuple[str, int]] = {}
        # Of those that are wanted: the number of their memory, and arguments of as_strided.
        self._views: list[tuple[str, int, tuple]] = []
        for name in (*_PRODUCTS, *_WRITTEN):
            kind = layout.kinds[name]
            if kind is None or (name in _PRODUCTS and not needed[name]):
                continue
            which, shape = "wide" if kind[0] == torch.float32 else "narrow", tuple(kind[1])
            start = memory[which].add(math.prod(shape))
            self._starts[name] = which, start
            if needed[name]:
                strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
                self._views.append((name, 0 if which == "wide" else 1, (shape, strides, start)))
        self._counts = [memory[which].count for which in ("wide", "narrow")]

    def place(self, name: str) -> Place:
        which, start = self._starts[name]
        return Place(_AT[which], start * self._dtypes[which].itemsize)

    def matrix(self, name: str, shape: tuple[int, int]) -> tuple[Matrix, torch.dtype]:
        which, start = self._starts[name]
        return Matrix(_AT[which], shape, (shape[1], 1), start), self._dtypes[which]

    def new(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Memory for a call."""
        wide, narrow = (
            torch.empty(count, dtype=dtype, device=device) if count else None
            for count, dtype in zip(self._counts, self._dtypes.values(), strict=True)
        )
        return wide, narrow

    def views(self, *memory: Tensor | None) -> dict[str, Any]:
        """The gradients that are wanted."""
        return {name: memory[which].as_strided(*how) for name, which, how in self._views}  # type: ignore[union-attr]


class Gradient:
    """Called as `Plan.backward`. The other arguments are the forward's: its inputs with their strides."""

    def __init__(
        self, signature: Signature, inputs: scan.Inputs, before: Tensor, filter_: Tensor, filter_bias: Tensor | None,
        interval: int,
    ):  # fmt: skip
        from mambakit.ops.causal_conv1d import prepared as conv  # these need Triton
        from mambakit.ops.selection_norm import prepared as selection_norm

        self.signature = s = signature
        self.layout = o = Layout(signature, _AT)
        dbefore, dz = before.new_empty((o.b, o.length, 2 * o.d)).chunk(2, -1)
        self._scan = scan.PreparedBackward(inputs, inputs.u, dz, scan.checkpoints(inputs, interval), interval, o.width)
        self._conv = conv.PreparedBackward(before, dbefore, filter_, filter_bias)
        memory = Memory(o.size)
        sizes = {
            "dgated": o.rows * o.d if o.kinds["out_proj"] is not None else 0, "du": o.rows * o.d,
            "ddelta": o.rows * o.d, "dxz": 0 if o.kinds["in_proj"] is None else 2 * o.rows * o.d,
            "dselected": o.rows * o.width, "dentering": o.rows * o.h if o.normed else 0,
        }  # fmt: skip
        self._starts = {name: memory.add(count) for name, count in sizes.items()}
        self._starts["draw"] = self._starts["dselected"]  # of x_proj's output, before the norms of dt, B and C
        if s.mixer_eps is not None:
            self._selection_norm = selection_norm.PreparedBackward(
                o.rows, o.r, o.n, s.mixer_eps, s.device, s.dtype, o.kinds_of_norms
            )
            self._starts["draw"] = memory.add(o.rows * o.width)
            self._starts["norms' parts"] = memory.add(self._selection_norm.partial_count, 4)
        self._starts["scan's"] = memory.add(self._scan.scratch_bytes, 1)
        self._starts["filter's parts"] = memory.add(self._conv.partial_count, 4)
        if o.normed:
            self._starts["norm's parts"] = memory.add(max(self._norm(each).partial_count for each in (True, False)), 4)
        self._count = memory.count
        # By which gradients are wanted, and whether the residual stream has one.
        self._lists: dict[tuple[tuple[bool, ...], bool], tuple[LaunchList, _Results]] = {}

    def _norm(self, has_dtotal: bool) -> Any:
        from mambakit.ops.rms_norm import prepared as norm

        o, s = self.layout, self.signature
        return norm.PreparedBackward(
            o.rows, o.h, s.eps, s.device, s.dtype, o.kinds["norm"][0], s.kept, s.x, has_dtotal, s.residual is not None
        )

    def _work(self, name: str) -> Place:
        """Scratch memory; the gradient of in_proj's output, or of its input, is the result where there is no
        more."""
        if name == ("dxz" if self.layout.kinds["in_proj"] is None else "dentering") and not self.layout.normed:
            return Place(_AT["dx"])
        if name == "dgated" and self.layout.kinds["out_proj"] is None:
            return Place(_AT["dy"])
        return Place(_AT["scratch"], self._starts[name] * self.layout.size)

    def _matrix(self, name: str, columns: int, row: int = 0) -> Matrix:
        array, offset = self._work(name)
        return Matrix(array, (self.layout.rows, columns), (row or columns, 1), offset // self.layout.size)

    def _new_list(self, needed: dict[str, bool], has_dtotal: bool) -> tuple[LaunchList, _Results]:
        o, s, work = self.layout, self.signature, self._work
        d, n, r, width = o.d, o.n, o.r, o.width
        results = _Results(o, s.dtype, needed)
        on_gpu = s.device.type == "cuda"
        items: list[Item] = []

        def product(a: Matrix, b: Matrix, out: Matrix, accumulate: bool = False) -> None:
            items.append(Product(a, b, out, s.dtype, s.dtype, on_gpu, accumulate))

        def of_weight(name: str, dout: Matrix, x: Matrix) -> None:
            if needed[name]:
                into, dtype = results.matrix(name, (dout.shape[1], x.shape[1]))
                items.append(Product(dout.t, x, into, s.dtype, dtype, on_gpu))

        if o.kinds["out_proj"] is not None:
            dy = Matrix(_AT["dy"], (o.rows, o.out), (o.out, 1))
            of_weight("out_proj", dy, o.matrix("y"))
            product(dy, o.matrix("out_proj"), self._matrix("dgated", d))
        dz = work("dxz") + d * o.size
        dB = work("dselected") + r * o.size
        items += self._scan.items(
            scan.BackwardPlaces(
                **o.scan_places(), dy=work("dgated"), checkpoints=o.place("checkpoints"), du=work("du"),
                ddelta=work("ddelta"), dz=dz, dA=results.place("A_log"), dB=dB, dC=dB + n * o.size,
                dD=results.place("D"), dbias=results.place("dt_bias"), dA_scale=o.place("A") if s.log else None,
            ),
            work("scan's"),
        )  # fmt: skip
        ddelta = self._matrix("ddelta", d)
        of_weight("dt_proj", ddelta, o.matrix("dt"))
        # The gradients of dt, B and C lie side by side, as their values do.
        product(ddelta, o.matrix("dt_proj"), self._matrix("dselected", r, width))
        if s.mixer_eps is not None:
            wanted = tuple(results.place(name) for name in _NORMS if o.kinds[name] is not None)
            items += self._selection_norm.items(
                work("dselected"), o.place("selected"), o.norms(), work("draw"), wanted, work("norms' parts")
            )
        draw, du = self._matrix("draw", width), self._matrix("du", d)
        of_weight("x_proj", draw, o.matrix("u"))
        product(draw, o.matrix("x_proj"), du, accumulate=True)
        bias, dbias = (
            (Place(_AT["conv_bias"]), results.place("conv_bias")) if o.kinds["conv_bias"] is not None else (dB, dB)
        )
        items += self._conv.items(
            work("du"), o.place("before"), Place(_AT["conv"]), bias, work("dxz"), results.place("conv"), dbias,
            work("filter's parts"),
        )  # fmt: skip
        if o.kinds["in_proj"] is not None:
            dxz = self._matrix("dxz", 2 * d)
            of_weight("in_proj", dxz, o.matrix("entering"))
            if o.normed or needed["x"]:
                product(dxz, o.matrix("in_proj"), self._matrix("dentering", o.h))
        if o.normed:
            dtotal, total, dx = (Place(_AT[name]) for name in ("dtotal", "total", "dx"))
            dresidual = dx if s.residual is None else Place(_AT["dresidual"])
            items += self._norm(has_dtotal).items(
                work("dentering"), dtotal, total, Place(_AT["norm"]), dx, dresidual, results.place("norm"),
                work("norm's parts"),
            )  # fmt: skip
        return LaunchList(items, len(_ARRAYS), s.dtype, s.device.index), results

    def __call__(
        self, dy: Tensor, dtotal: Tensor | None, saved: tuple[Tensor | None, Tensor | None, Tensor], w: LayerWeights,
        needs: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        s, device = self.signature, self.signature.device
        key = needs, dtotal is not None
        made = self._lists.get(key)
        if made is None:
            made = self._lists[key] = self._new_list(dict(zip(_NAMES, needs, strict=True)), dtotal is not None)
        work, results = made
        memory = results.new(device)
        scratch = torch.empty(self._count, dtype=s.dtype, device=device)
        dx = torch.empty(s.shape, dtype=s.x if self.layout.normed else s.dtype, device=device)
        dresidual = None if s.residual is None else torch.empty(s.shape, dtype=s.kept, device=device)
        work((dy, dtotal, *saved, *w, scratch, dx, dresidual, *memory))
        found = results.views(*memory)
        found["x"], found["residual"] = dx, dresidual
        if w.out_bias is not None:
            found["out_bias"] = dy.sum(0, dtype=w.out_bias.dtype)
        if w.in_bias is not None:
            dxz = self._matrix("dxz", 2 * self.layout.d)
            found["in_bias"] = scratch.as_strided(*dxz[1:]).sum(0, dtype=w.in_bias.dtype)
        return tuple([found.get(name) if need else None for name, need in zip(_NAMES, needs, strict=True)])
