"""A whole Mamba layer on an NVIDIA GPU as launches that are put together once for a shape.

A `Plan` has what a call of one signature needs besides addresses: sizes of memory, compiled kernels, launches. Run
eagerly, small layers are bound by the host, so a call makes few of torch's calls: the matrix products, and one
allocation for all that the kernels write. The arithmetic is that of the ops one by one (`composed.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambakit.ops._products import product
from mambakit.ops.fused_mixer.parameters import PreparedParameters
from mambakit.ops.fused_mixer.signature import LayerWeights, Signature
from mambakit.ops.selective_scan.schema import CHECKPOINT_INTERVAL

# Weights that the products take, which are rounded to the dtype that the layer computes in.
_PRODUCTS = ("in_proj", "x_proj", "dt_proj", "out_proj", "in_bias", "out_bias")


class _Memory:
    """Arrays in one allocation."""

    def __init__(self, itemsize: int):
        self._itemsize, self.count = itemsize, 0  # elements

    def add(self, count: int, itemsize: int = 0) -> int:
        """The element at which an array of ``count`` elements begins, of this size or of ``itemsize`` bytes."""
        start = self.count
        size = count * (itemsize or self._itemsize)
        self.count += -(-size // 256) * 256 // self._itemsize
        return start


class Plan:
    """See above. A call's memory is the caller's, so that a plan serves any number of calls, layers and threads."""

    def __init__(self, signature: Signature):
        from mambakit.ops.causal_conv1d import prepared as conv  # these need Triton
        from mambakit.ops.rms_norm import prepared as norm

        self.signature = s = signature
        kinds: dict[str, Any] = dict(zip(LayerWeights._fields, s.weights, strict=True))
        self.b, self.length, self.h = b, length, h = s.shape
        self.d, self.n = d, n = kinds["A_log"][1]
        self.r = kinds["dt_proj"][1][1]
        self.rows, self.size, self.dtype, self.device = b * length, s.dtype.itemsize, s.dtype, s.device
        self.normed = kinds["norm"] is not None
        self._index, self._interval = s.device.index, CHECKPOINT_INTERVAL if s.gradient else 0
        self._rounded = [name for name in _PRODUCTS if (kind := kinds[name]) is not None and kind[0] != s.dtype]
        counts = {name: kinds[name][1].numel() for name in self._rounded}
        self._shapes = {name: tuple(kinds[name][1]) for name in self._rounded}

        def empty(*shape: int, dtype: torch.dtype = s.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=s.device)

        def like(name: str) -> Tensor | None:
            kind = kinds[name]
            return None if kind is None else empty(*kind[1], dtype=kind[0])

        # Tensors of the layout that every call has; they are dropped with this call.
        xz, u, delta = empty(b, length, 2 * d), empty(b, length, d), empty(b, length, d)
        (before, z), selected = xz.chunk(2, -1), empty(b, length, self.r + 2 * n)
        _, B, C = selected.split([self.r, n, n], -1)
        A, D, dt_bias, filter_, filter_bias = map(like, ("A_log", "D", "dt_bias", "conv", "conv_bias"))
        assert A is not None and filter_ is not None  # noqa: PT018
        from mambakit.ops.selective_scan import prepared as scan

        inputs = scan.Inputs(u, delta, A, B, C, D, z, dt_bias)
        self._parameters = PreparedParameters(list(counts.values()), d * n, s.dtype, s.device.index)
        self._conv: Any = conv.PreparedForward(before, filter_.squeeze(1), filter_bias)
        self._scan: Any = scan.PreparedForward(inputs, self._interval)
        if s.states is not None:
            self._conv = conv.PreparedInPlace(before, filter_.squeeze(1), filter_bias, s.states[0][0])
            if length == 1:
                from mambakit.ops.selective_scan.prepared_token import PreparedToken

                self._scan = PreparedToken(inputs)
        kept = _Memory(self.size)  # until the backward pass
        if self.normed:
            self._norm = norm.PreparedForward(
                self.rows, h, s.eps, s.x, kinds["norm"][0], s.residual, s.kept, s.dtype,
            )  # fmt: skip
            self._at_normed = kept.add(self.rows * h)
        self._at_u, self._at_y = kept.add(self.rows * d), kept.add(self.rows * d)
        self._at_rounded = {name: kept.add(count) for name, count in counts.items()}
        self._at_A = kept.add(d * n, 4)
        self._at_checkpoints = kept.add(self._scan.checkpoint_count, 4)
        self._kept_count = kept.count
        passing = _Memory(self.size)  # of the forward alone
        self._at_conv_final = passing.add(self._conv.final_count, s.dtype.itemsize if s.states is None else 4)
        self._at_scan_final = passing.add(b * d * n, 4)
        self._at_scan_scratch = passing.add(self._scan.scratch_bytes, 1)
        self._passing_count = passing.count
        if not s.gradient:
            return
        self._scan_backward = scan.PreparedBackward(
            inputs, u, empty(b, length, 2 * d).chunk(2, -1)[1], scan.checkpoints(inputs, self._interval), self._interval
        )
        self._conv_backward = conv.PreparedBackward(
            before, empty(b, length, 2 * d).chunk(2, -1)[0], filter_.squeeze(1), filter_bias
        )
        scratch = _Memory(self.size)
        self._at_du, self._at_ddelta = scratch.add(self.rows * d), scratch.add(self.rows * d)
        self._at_dB, self._at_dC = scratch.add(self.rows * n), scratch.add(self.rows * n)
        self._at_scan_backward = scratch.add(self._scan_backward.scratch_bytes, 1)
        self._at_conv_backward = scratch.add(self._conv_backward.partial_count, 4)
        if self.normed:
            self._norm_backward = {
                has_dkept: norm.PreparedBackward(
                    self.rows, h, s.eps, s.device, s.dtype, kinds["norm"][0], s.kept, s.x,
                    has_dkept, s.residual is not None,
                )
                for has_dkept in (True, False)
            }  # fmt: skip
            self._at_norm_backward = scratch.add(self._norm_backward[True].partial_count, 4)
        self._scratch_count = scratch.count

    def _weight(self, kept: Tensor, w: LayerWeights, name: str) -> Tensor:
        """A weight (out, in) in the dtype that the layer computes in."""
        if name not in self._at_rounded:
            return getattr(w, name)
        shape = self._shapes[name]
        return kept.as_strided(shape, (*shape[1:], 1), self._at_rounded[name])

    def _product(self, x: Tensor, kept: Tensor, w: LayerWeights, name: str, bias: str = "") -> Tensor:
        weight = self._weight(kept, w, name).t()
        if bias and getattr(w, bias) is not None:
            return torch.addmm(self._weight(kept, w, bias), x, weight)
        return torch.mm(x, weight)

    def forward(
        self, x: Tensor, residual: Tensor | None, w: LayerWeights, states: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None, tuple]:
        """(b, l, h) of the layer, the residual stream (None without the norm), and what `backward` reads.

        ``x`` (b, l, h) and ``residual`` (b, l, h) are contiguous; without the norm x has the dtype of the plan.
        ``states`` (slots, d, k - 1) and (slots, d, n), read and written, where the signature has them.
        """
        device, dtype, size, rows, d = self.device, self.dtype, self.size, self.rows, self.d
        stream = torch._C._cuda_getCurrentRawStream(self._index)
        kept = torch.empty(self._kept_count, dtype=dtype, device=device)
        passing = torch.empty(self._passing_count, dtype=dtype, device=device)
        at, beside = kept.data_ptr(), passing.data_ptr()
        total = None
        if self.normed:
            total = torch.empty(x.shape, dtype=self.signature.kept, device=device)
            self._norm(
                stream, x.data_ptr(), w.norm.data_ptr(), 0 if residual is None else residual.data_ptr(),  # type: ignore[union-attr]
                at + self._at_normed * size, total.data_ptr(),
            )  # fmt: skip
            entering = kept.as_strided((rows, self.h), (self.h, 1), self._at_normed)
        else:
            entering = x.view(rows, self.h)
        self._parameters(
            stream, [getattr(w, name).data_ptr() for name in self._rounded],
            [at + start * size for start in self._at_rounded.values()], w.A_log.data_ptr(), at + self._at_A * size,
        )  # fmt: skip
        xz = self._product(entering, kept, w, "in_proj", "in_bias")  # (b l, 2 d)
        u, y = at + self._at_u * size, at + self._at_y * size
        xz_at = xz.data_ptr()
        conv_final, initial, final = beside + self._at_conv_final * size, 0, beside + self._at_scan_final * size
        filter_ = w.conv.data_ptr(), 0 if w.conv_bias is None else w.conv_bias.data_ptr()
        if states is None:
            self._conv(stream, xz_at, *filter_, u, conv_final)
        else:
            self._conv(stream, xz_at, *filter_, u, states[0].data_ptr(), conv_final)
            initial = final = states[1].data_ptr()
        selected = self._product(kept.as_strided((rows, d), (d, 1), self._at_u), kept, w, "x_proj")  # (b l, r + 2 n)
        delta = self._product(selected.narrow(1, 0, self.r), kept, w, "dt_proj")  # (b l, d)
        dt, width = selected.data_ptr(), self.r * size
        self._scan(
            stream,
            (
                u, delta.data_ptr(), at + self._at_A * size, dt + width, dt + width + self.n * size, w.D.data_ptr(),
                xz_at + d * size, w.dt_bias.data_ptr(), initial, y, final,
                at + self._at_checkpoints * size if self._interval else 0,
            ),
            beside + self._at_scan_scratch * size,
        )  # fmt: skip
        out = self._product(kept.as_strided((rows, d), (d, 1), self._at_y), kept, w, "out_proj", "out_bias")
        return out.view(x.shape), total, (None if self.normed else x, total, kept, xz, selected, delta)

    def backward(
        self, dy: Tensor, dtotal: Tensor | None, saved: tuple, w: LayerWeights, needs: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """The gradients of x, of the residual and of the weights.

        ``dy`` (b l, h) and ``dtotal`` (b, l, h) are contiguous, ``needs`` says which are wanted.
        """
        x, total, kept, xz, selected, delta = saved
        device, dtype, size, rows, d, n, r = self.device, self.dtype, self.size, self.rows, self.d, self.n, self.r
        stream = torch._C._cuda_getCurrentRawStream(self._index)
        needed = dict(zip(("x", "residual", *LayerWeights._fields), needs, strict=True))
        scratch = torch.empty(self._scratch_count, dtype=dtype, device=device)
        at, work = kept.data_ptr(), scratch.data_ptr()
        found: dict[str, Tensor] = {}

        def weight(name: str, dout: Tensor, factor: Tensor) -> None:
            if needed[name]:
                like = getattr(w, name)
                found[name] = product(dout.t(), factor, torch.empty(like.shape, dtype=like.dtype, device=device))

        def bias(name: str, dout: Tensor) -> None:
            if needed[name]:
                found[name] = dout.sum(0, dtype=getattr(w, name).dtype)

        def empty(name: str) -> Tensor:
            like = getattr(w, name)
            found[name] = torch.empty(like.shape, dtype=like.dtype, device=device)
            return found[name]

        weight("out_proj", dy, kept.as_strided((rows, d), (d, 1), self._at_y))
        bias("out_bias", dy)
        dgated = torch.mm(dy, self._weight(kept, w, "out_proj"))  # (b l, d)
        dxz = torch.empty((rows, 2 * d), dtype=dtype, device=device)
        u, du, ddelta = at + self._at_u * size, work + self._at_du * size, work + self._at_ddelta * size
        xz_at, dxz_at, selected_at = xz.data_ptr(), dxz.data_ptr(), selected.data_ptr()
        self._scan_backward(
            stream,
            (
                dgated.data_ptr(), u, delta.data_ptr(), at + self._at_A * size, selected_at + r * size,
                selected_at + (r + n) * size, w.D.data_ptr(), xz_at + d * size, w.dt_bias.data_ptr(),
                at + self._at_checkpoints * size, du, ddelta, dxz_at + d * size, empty("A_log").data_ptr(),
                work + self._at_dB * size, work + self._at_dC * size, empty("D").data_ptr(),
                empty("dt_bias").data_ptr(), at + self._at_A * size,
            ),
            work + self._at_scan_backward * size,
        )  # fmt: skip
        steps = scratch.as_strided((rows, d), (d, 1), self._at_ddelta)
        weight("dt_proj", steps, selected.narrow(1, 0, r))
        dselected = torch.cat(
            [
                torch.mm(steps, self._weight(kept, w, "dt_proj")),
                scratch.as_strided((rows, n), (n, 1), self._at_dB), scratch.as_strided((rows, n), (n, 1), self._at_dC),
            ],
            1,
        )  # fmt: skip
        weight("x_proj", dselected, kept.as_strided((rows, d), (d, 1), self._at_u))
        scratch.as_strided((rows, d), (d, 1), self._at_du).addmm_(dselected, self._weight(kept, w, "x_proj"))
        dconv_bias = 0 if w.conv_bias is None else empty("conv_bias").data_ptr()
        self._conv_backward(
            stream, du, xz_at, w.conv.data_ptr(), 0 if w.conv_bias is None else w.conv_bias.data_ptr(), dxz_at,
            empty("conv").data_ptr(), dconv_bias, work + self._at_conv_backward * size,
        )  # fmt: skip
        if self.normed:
            entering = kept.as_strided((rows, self.h), (self.h, 1), self._at_normed)
        else:
            entering = x.view(rows, self.h)
        weight("in_proj", dxz, entering)
        bias("in_bias", dxz)
        if not (self.normed or needed["x"]):
            return self._wanted(found, needs)
        dentering = torch.mm(dxz, self._weight(kept, w, "in_proj"))  # (b l, h)
        if not self.normed:
            found["x"] = dentering.view(self.signature.shape)
            return self._wanted(found, needs)
        found["x"] = torch.empty(self.signature.shape, dtype=self.signature.x, device=device)
        has_residual = self.signature.residual is not None
        if has_residual:
            found["residual"] = torch.empty(self.signature.shape, dtype=self.signature.kept, device=device)
        self._norm_backward[dtotal is not None](
            stream, dentering.data_ptr(), 0 if dtotal is None else dtotal.data_ptr(), total.data_ptr(),
            w.norm.data_ptr(), found["x"].data_ptr(), found["residual"].data_ptr() if has_residual else 0,  # type: ignore[union-attr]
            empty("norm").data_ptr(), work + self._at_norm_backward * size,
        )  # fmt: skip
        return self._wanted(found, needs)

    @staticmethod
    def _wanted(found: dict[str, Any], needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        names = ("x", "residual", *LayerWeights._fields)
        return tuple(found.get(name) if needed else None for name, needed in zip(names, needs, strict=True))
