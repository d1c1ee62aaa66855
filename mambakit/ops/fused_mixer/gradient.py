"""The gradient of a whole Mamba layer (`plan.py`), likewise as launches that are put together once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mambakit.ops._products import product_into
from mambakit.ops.fused_mixer.layout import Layout, Memory
from mambakit.ops.fused_mixer.signature import LayerWeights, Signature
from mambakit.ops.selective_scan import prepared as scan

_NAMES = ("x", "residual", *LayerWeights._fields)
# Gradients that the kernels write whether they are wanted or not, and those that products write.
_NORMS = ("dt_norm", "B_norm", "C_norm")
_WRITTEN = ("A_log", "D", "dt_bias", "conv", "conv_bias", "norm", *_NORMS)
_PRODUCTS = ("in_proj", "x_proj", "dt_proj", "out_proj")


class _Results:
    """Where the weights' gradients are: one allocation for each dtype, as an allocation costs more than a view."""

    def __init__(self, layout: Layout, needed: dict[str, bool]):
        self._memory: dict[torch.dtype, Memory] = {}
        self._views: dict[str, tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int]] = {}
        for name in (*_PRODUCTS, *_WRITTEN):
            kind = layout.kinds[name]
            if kind is None or (name in _PRODUCTS and not needed[name]):
                continue
            dtype, shape = kind[0], tuple(kind[1])
            memory = self._memory.setdefault(dtype, Memory(dtype.itemsize))
            strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
            self._views[name] = dtype, shape, strides, memory.add(math.prod(shape))

    def make(self, device: torch.device) -> tuple[dict[str, Tensor], dict[str, int]]:
        """The gradients, and their addresses."""
        bases = {t: torch.empty(memory.count, dtype=t, device=device) for t, memory in self._memory.items()}
        starts = {t: base.data_ptr() for t, base in bases.items()}
        found, at = {}, {}
        for name, (dtype, shape, strides, start) in self._views.items():
            found[name] = bases[dtype].as_strided(shape, strides, start)
            at[name] = starts[dtype] + start * dtype.itemsize
        return found, at


class Gradient:
    """Called as `Plan.backward`. The other arguments are the forward's: its inputs with their strides."""

    def __init__(
        self, signature: Signature, layout: Layout, inputs: scan.Inputs, before: Tensor, filter_: Tensor,
        filter_bias: Tensor | None, interval: int,
    ):  # fmt: skip
        from mambakit.ops.causal_conv1d import prepared as conv  # these need Triton
        from mambakit.ops.rms_norm import prepared as norm
        from mambakit.ops.selection_norm import prepared as selection_norm

        self.signature, self.layout = s, o = signature, layout
        dbefore, dz = before.new_empty((o.b, o.length, 2 * o.d)).chunk(2, -1)
        width, kept = o.r + 2 * o.n, scan.checkpoints(inputs, interval)
        self._scan = scan.PreparedBackward(inputs, inputs.u, dz, kept, interval, width)
        self._conv = conv.PreparedBackward(before, dbefore, filter_, filter_bias)
        scratch = Memory(o.size)
        self._at_du, self._at_ddelta = scratch.add(o.rows * o.d), scratch.add(o.rows * o.d)
        self._at_dxz = scratch.add(2 * o.rows * o.d)
        self._at_dselected = scratch.add(o.rows * width)
        self._at_draw = self._at_dselected  # of x_proj's output, before the norms of dt, B and C
        if s.mixer_eps is not None:
            self._selection_norm = selection_norm.PreparedBackward(
                o.rows, o.r, o.n, s.mixer_eps, s.device, s.dtype, o.kinds_of_norms
            )
            self._at_draw = scratch.add(o.rows * width)
            self._at_selection_norm = scratch.add(self._selection_norm.partial_count, 4)
        self._at_scan = scratch.add(self._scan.scratch_bytes, 1)
        self._at_conv = scratch.add(self._conv.partial_count, 4)
        if o.normed:
            self._norm = {
                has_dkept: norm.PreparedBackward(
                    o.rows, o.h, s.eps, s.device, s.dtype, o.kinds["norm"][0], s.kept, s.x, has_dkept,
                    s.residual is not None,
                )
                for has_dkept in (True, False)
            }  # fmt: skip
            self._at_norm = scratch.add(self._norm[True].partial_count, 4)
        self._count = scratch.count
        # Arguments of as_strided.
        self._du, self._ddelta = (((o.rows, o.d), (o.d, 1), at) for at in (self._at_du, self._at_ddelta))
        self._dxz = (o.rows, 2 * o.d), (2 * o.d, 1), self._at_dxz
        self._steps = (o.d, o.rows), (1, o.d), self._at_ddelta
        self._draw = (o.rows, width), (width, 1), self._at_draw
        self._draw_t = (width, o.rows), (1, width), self._at_draw
        self._ddt = (o.rows, o.r), (width, 1), self._at_dselected
        self._results: dict[tuple[bool, ...], _Results] = {}
        on_gpu = s.device.type == "cuda"
        self._products: dict[str, Any] = {
            name: product_into(s.dtype, kind[0], on_gpu) for name in _PRODUCTS if (kind := o.kinds[name]) is not None
        }

    def __call__(
        self, dy: Tensor, dtotal: Tensor | None, saved: tuple, w: LayerWeights, needs: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        x, total, kept, xz, selected, delta = saved
        o, s, products = self.layout, self.signature, self._products
        device, dtype, size, rows, d, n, r = s.device, s.dtype, o.size, o.rows, o.d, o.n, o.r
        xz = x if xz is None else xz
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        needed = dict(zip(_NAMES, needs, strict=True))
        results = self._results.get(needs)
        if results is None:
            results = self._results[needs] = _Results(o, needed)
        found, to = results.make(device)
        scratch = torch.empty(self._count, dtype=dtype, device=device)
        at, work = kept.data_ptr(), scratch.data_ptr()
        dgated = dy  # (b l, d)
        if w.out_proj is not None:
            if needed["out_proj"]:
                products["out_proj"](dy.t(), kept.as_strided(*o.y), out=found["out_proj"])
            if needed["out_bias"]:
                found["out_bias"] = dy.sum(0, dtype=w.out_bias.dtype)  # type: ignore[union-attr]
            dgated = torch.mm(dy, o.weight(kept, w, "out_proj"))
        if w.in_proj is None:
            dxz = torch.empty((rows, 2 * d), dtype=dtype, device=device)
            dxz_at = dxz.data_ptr()
        else:
            dxz, dxz_at = scratch.as_strided(*self._dxz), work + self._at_dxz * size
        u, du, ddelta = at + o.at_u * size, work + self._at_du * size, work + self._at_ddelta * size
        xz_at, selected_at = xz.data_ptr(), selected.data_ptr()
        chosen, chosen_at = (kept, at + o.at_selected * size) if o.selection_normed else (selected, selected_at)
        dselected_at = work + self._at_dselected * size
        A_at = at + o.at_A * size if s.log else w.A_log.data_ptr()
        self._scan(
            stream,
            (
                dgated.data_ptr(), u, delta.data_ptr(), A_at, chosen_at + r * size, chosen_at + (r + n) * size,
                w.D.data_ptr(), xz_at + d * size, w.dt_bias.data_ptr(), at + o.at_checkpoints * size, du, ddelta,
                dxz_at + d * size, to["A_log"], dselected_at + r * size, dselected_at + (r + n) * size, to["D"],
                to["dt_bias"], A_at if s.log else 0,
            ),
            work + self._at_scan * size,
        )  # fmt: skip
        if needed["dt_proj"]:
            products["dt_proj"](scratch.as_strided(*self._steps), chosen.as_strided(*o.dt), out=found["dt_proj"])
        # The gradients of dt, B and C lie side by side, as their values do.
        ddt = scratch.as_strided(*self._ddt)
        torch.mm(scratch.as_strided(*self._ddelta), o.weight(kept, w, "dt_proj"), out=ddt)
        if o.selection_normed:
            self._selection_norm(
                stream, dselected_at, selected_at, o.norms(w), work + self._at_draw * size,
                tuple([to[name] for name in _NORMS if name in to]), work + self._at_selection_norm * size,
            )  # fmt: skip
        if needed["x_proj"]:
            products["x_proj"](scratch.as_strided(*self._draw_t), kept.as_strided(*o.u), out=found["x_proj"])
        scratch.as_strided(*self._du).addmm_(scratch.as_strided(*self._draw), o.weight(kept, w, "x_proj"))
        filter_bias, dfilter_bias = (0, 0) if w.conv_bias is None else (w.conv_bias.data_ptr(), to["conv_bias"])
        self._conv(
            stream, du, xz_at, w.conv.data_ptr(), filter_bias, dxz_at, to["conv"], dfilter_bias,
            work + self._at_conv * size,
        )  # fmt: skip
        if w.in_proj is None:
            found["x"] = dxz.view(s.shape)
        else:
            if needed["in_proj"]:
                products["in_proj"](dxz.t(), o.entering(x, kept), out=found["in_proj"])
            if needed["in_bias"]:
                found["in_bias"] = dxz.sum(0, dtype=w.in_bias.dtype)  # type: ignore[union-attr]
            if o.normed or needed["x"]:
                dentering = torch.mm(dxz, o.weight(kept, w, "in_proj"))  # (b l, h)
                found["x"] = dentering.view(s.shape)
        if o.normed:
            dx = torch.empty(s.shape, dtype=s.x, device=device)
            residual_at = 0
            if s.residual is not None:
                found["residual"] = torch.empty(s.shape, dtype=s.kept, device=device)
                residual_at = found["residual"].data_ptr()
            self._norm[dtotal is not None](
                stream, dentering.data_ptr(), 0 if dtotal is None else dtotal.data_ptr(), total.data_ptr(),
                w.norm.data_ptr(), dx.data_ptr(), residual_at, to["norm"], work + self._at_norm * size,  # type: ignore[union-attr]
            )  # fmt: skip
            found["x"] = dx
        return tuple([found.get(name) if need else None for name, need in needed.items()])
