"""A whole Mamba layer on an NVIDIA GPU as launches that are put together once for a shape.

A `Plan` has what a call of one signature needs besides addresses: sizes of memory, compiled kernels, launches. Run
eagerly, small layers are bound by the host, so a call makes few of torch's calls: the matrix products, and one
allocation for all that the kernels write. The arithmetic is that of the ops one by one (`composed.py`). The gradient is
in `gradient.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambakit.ops.fused_mixer.gradient import Gradient
from mambakit.ops.fused_mixer.layout import Layout, Memory
from mambakit.ops.fused_mixer.parameters import PreparedParameters
from mambakit.ops.fused_mixer.signature import LayerWeights, Signature
from mambakit.ops.selective_scan.schema import CHECKPOINT_INTERVAL


class Plan:
    """See above. A call's memory is the caller's, so that a plan serves any number of calls, layers and threads."""

    def __init__(self, signature: Signature):
        from mambakit.ops.causal_conv1d import prepared as conv  # these need Triton
        from mambakit.ops.rms_norm import prepared as norm
        from mambakit.ops.selection_norm import prepared as selection_norm
        from mambakit.ops.selective_scan import prepared as scan

        self.signature = s = signature
        self.layout = o = Layout(signature)
        inputs, before, filter_, filter_bias = o.examples()
        self.interval = CHECKPOINT_INTERVAL if s.gradient else 0
        self._parameters = None
        if o.rounded or s.log:
            counts = [o.count(name) for name in o.rounded]
            self._parameters = PreparedParameters(counts, o.d * o.n if s.log else 0, s.dtype, s.device.index)
        self._conv: Any = conv.PreparedForward(before, filter_, filter_bias)
        self._scan: Any = scan.PreparedForward(inputs, self.interval)
        if s.states is not None:
            self._conv = conv.PreparedInPlace(before, filter_, filter_bias, s.states[0][0])
            if o.length == 1:
                from mambakit.ops.selective_scan.prepared_token import PreparedToken

                self._scan = PreparedToken(inputs)
        if s.mixer_eps is not None:
            self._selection_norm = selection_norm.PreparedForward(
                o.rows, o.r, o.n, s.mixer_eps, s.dtype, o.kinds_of_norms
            )
        if o.normed:
            self._norm = norm.PreparedForward(
                o.rows, o.h, s.eps, s.x, o.kinds["norm"][0], s.residual, s.kept, s.dtype
            )  # fmt: skip
        o.keep(self._scan.checkpoint_count)
        # What the forward alone needs lies behind what is kept where it is small, or nothing is kept.
        passing = Memory(o.size)
        self._at_conv_final = passing.add(self._conv.final_count, s.dtype.itemsize if s.states is None else 4)
        self._at_scan_final = passing.add(o.b * o.d * o.n, 4)
        self._at_scan_scratch = passing.add(self._scan.scratch_bytes, 1)
        self._passing_count = passing.count
        self._together = not s.gradient or passing.count * 32 < o.kept_count
        if s.gradient:
            self._gradient = Gradient(signature, o, inputs, before, filter_, filter_bias, self.interval)

    def forward(
        self, x: Tensor, residual: Tensor | None, w: LayerWeights, states: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None, tuple]:
        """(b, l, h) of the layer, the residual stream (None without the norm), and what `backward` reads.

        ``x`` and ``residual`` are contiguous; without the norm x has the dtype of the plan. ``states`` (slots, d,
        k - 1) and (slots, d, n), read and written, where the signature has them.
        """
        o, s = self.layout, self.signature
        device, dtype, size, d = s.device, s.dtype, o.size, o.d
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        if self._together:
            kept = torch.empty(o.kept_count + self._passing_count, dtype=dtype, device=device)
            at = kept.data_ptr()
            beside = at + o.kept_count * size
        else:
            kept = torch.empty(o.kept_count, dtype=dtype, device=device)
            passing = torch.empty(self._passing_count, dtype=dtype, device=device)
            at, beside = kept.data_ptr(), passing.data_ptr()
        total, y = None, None
        if o.normed:
            total = torch.empty(s.shape, dtype=s.kept, device=device)
            self._norm(
                stream, x.data_ptr(), w.norm.data_ptr(), 0 if residual is None else residual.data_ptr(),  # type: ignore[union-attr]
                at + o.at_normed * size, total.data_ptr(),
            )  # fmt: skip
        A_at = w.A_log.data_ptr()
        if self._parameters is not None:
            sources, targets = (
                [getattr(w, name).data_ptr() for name in o.rounded],
                [at + i * size for i in o.at_rounded],
            )
            self._parameters(stream, sources, targets, A_at, at + o.at_A * size)
            A_at = at + o.at_A * size if s.log else A_at
        xz = x if w.in_proj is None else o.product(o.entering(x, kept), kept, w, "in_proj", "in_bias")  # (b l, 2 d)
        u, xz_at = at + o.at_u * size, xz.data_ptr()
        conv_final, initial, final = beside + self._at_conv_final * size, 0, beside + self._at_scan_final * size
        filter_ = w.conv.data_ptr(), 0 if w.conv_bias is None else w.conv_bias.data_ptr()
        if states is None:
            self._conv(stream, xz_at, *filter_, u, conv_final)
        else:
            self._conv(stream, xz_at, *filter_, u, states[0].data_ptr(), conv_final)
            initial = final = states[1].data_ptr()
        selected = o.product(kept.as_strided(*o.u), kept, w, "x_proj")  # (b l, r + 2 n)
        chosen, dt = selected, selected.data_ptr()
        if o.selection_normed:
            chosen, raw, dt = kept, dt, at + o.at_selected * size
            self._selection_norm(stream, raw, o.norms(w), dt)
        delta = o.product(chosen.as_strided(*o.dt), kept, w, "dt_proj")  # (b l, d)
        if w.out_proj is None:
            y = torch.empty((o.b, o.length, d), dtype=dtype, device=device)
        width = o.r * size
        self._scan(
            stream,
            (
                u, delta.data_ptr(), A_at, dt + width, dt + width + o.n * size, w.D.data_ptr(), xz_at + d * size,
                w.dt_bias.data_ptr(), initial, at + o.at_y * size if y is None else y.data_ptr(), final,
                at + o.at_checkpoints * size if self.interval else 0,
            ),
            beside + self._at_scan_scratch * size,
        )  # fmt: skip
        saved = (None if o.normed else x, total, kept, None if xz is x else xz, selected, delta)
        if y is None:
            y = o.product(kept.as_strided(*o.y), kept, w, "out_proj", "out_bias").view(o.b, o.length, o.out)
        return y, total, saved

    def backward(
        self, dy: Tensor, dtotal: Tensor | None, saved: tuple, w: LayerWeights, needs: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """The gradients of x, of the residual and of the weights.

        ``dy`` (b l, h) and ``dtotal`` (b, l, h) are contiguous, ``needs`` says which are wanted.
        """
        return self._gradient(dy, dtotal, saved, w, needs)
