"""The gradient of a whole Mamba layer (`plan.py`), likewise as launches that are put together once."""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.ops._products import product
from mambakit.ops.fused_mixer.layout import Layout, Memory
from mambakit.ops.fused_mixer.signature import LayerWeights, Signature
from mambakit.ops.selective_scan import prepared as scan

_NAMES = ("x", "residual", *LayerWeights._fields)


class Gradient:
    """Called as `Plan.backward`. The other arguments are the forward's: its inputs with their strides."""

    def __init__(
        self, signature: Signature, layout: Layout, inputs: scan.Inputs, before: Tensor, filter_: Tensor,
        filter_bias: Tensor | None, interval: int,
    ):  # fmt: skip
        from mambakit.ops.causal_conv1d import prepared as conv  # these need Triton
        from mambakit.ops.rms_norm import prepared as norm

        self.signature, self.layout = s, o = signature, layout
        dbefore, dz = before.new_empty((o.b, o.length, 2 * o.d)).chunk(2, -1)
        self._scan = scan.PreparedBackward(inputs, inputs.u, dz, scan.checkpoints(inputs, interval), interval)
        self._conv = conv.PreparedBackward(before, dbefore, filter_, filter_bias)
        scratch = Memory(o.size)
        self._at_du, self._at_ddelta = scratch.add(o.rows * o.d), scratch.add(o.rows * o.d)
        self._at_dB, self._at_dC = scratch.add(o.rows * o.n), scratch.add(o.rows * o.n)
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

    def __call__(
        self, dy: Tensor, dtotal: Tensor | None, saved: tuple, w: LayerWeights, needs: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        x, total, kept, xz, selected, delta = saved
        o, s = self.layout, self.signature
        device, dtype, size, rows, d, n, r = s.device, s.dtype, o.size, o.rows, o.d, o.n, o.r
        xz = x if xz is None else xz
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        needed = dict(zip(_NAMES, needs, strict=True))
        scratch = torch.empty(self._count, dtype=dtype, device=device)
        at, work = kept.data_ptr(), scratch.data_ptr()
        found: dict[str, Tensor] = {}

        def weight(name: str, dout: Tensor, factor: Tensor) -> None:
            if needed[name]:
                like = getattr(w, name)
                found[name] = product(dout.t(), factor, torch.empty(like.shape, dtype=like.dtype, device=device))

        def bias(name: str, dout: Tensor) -> None:
            if needed[name]:
                found[name] = dout.sum(0, dtype=getattr(w, name).dtype)

        def empty(name: str) -> int:
            like = getattr(w, name)
            found[name] = torch.empty(like.shape, dtype=like.dtype, device=device)
            return found[name].data_ptr()

        dgated = dy  # (b l, d)
        if w.out_proj is not None:
            weight("out_proj", dy, kept.as_strided((rows, d), (d, 1), o.at_y))
            bias("out_bias", dy)
            dgated = torch.mm(dy, o.weight(kept, w, "out_proj"))
        dxz = torch.empty((rows, 2 * d), dtype=dtype, device=device)
        u, du, ddelta = at + o.at_u * size, work + self._at_du * size, work + self._at_ddelta * size
        xz_at, dxz_at, selected_at = xz.data_ptr(), dxz.data_ptr(), selected.data_ptr()
        A_at = at + o.at_A * size if s.log else w.A_log.data_ptr()
        self._scan(
            stream,
            (
                dgated.data_ptr(), u, delta.data_ptr(), A_at, selected_at + r * size, selected_at + (r + n) * size,
                w.D.data_ptr(), xz_at + d * size, w.dt_bias.data_ptr(), at + o.at_checkpoints * size, du, ddelta,
                dxz_at + d * size, empty("A_log"), work + self._at_dB * size, work + self._at_dC * size, empty("D"),
                empty("dt_bias"), A_at if s.log else 0,
            ),
            work + self._at_scan * size,
        )  # fmt: skip
        steps = scratch.as_strided((rows, d), (d, 1), self._at_ddelta)
        weight("dt_proj", steps, selected.narrow(1, 0, r))
        dselected = torch.cat(
            [
                torch.mm(steps, o.weight(kept, w, "dt_proj")),
                scratch.as_strided((rows, n), (n, 1), self._at_dB), scratch.as_strided((rows, n), (n, 1), self._at_dC),
            ],
            1,
        )  # fmt: skip
        weight("x_proj", dselected, kept.as_strided((rows, d), (d, 1), o.at_u))
        scratch.as_strided((rows, d), (d, 1), self._at_du).addmm_(dselected, o.weight(kept, w, "x_proj"))
        filter_bias, dfilter_bias = (0, 0) if w.conv_bias is None else (w.conv_bias.data_ptr(), empty("conv_bias"))
        self._conv(
            stream, du, xz_at, w.conv.data_ptr(), filter_bias, dxz_at, empty("conv"), dfilter_bias,
            work + self._at_conv * size,
        )  # fmt: skip
        if w.in_proj is None:
            found["x"] = dxz.view(s.shape)
        else:
            weight("in_proj", dxz, o.entering(x, kept))
            bias("in_bias", dxz)
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
                w.norm.data_ptr(), dx.data_ptr(), residual_at, empty("norm"), work + self._at_norm * size,  # type: ignore[union-attr]
            )  # fmt: skip
            found["x"] = dx
        return tuple(found.get(name) if needed[name] else None for name in _NAMES)
