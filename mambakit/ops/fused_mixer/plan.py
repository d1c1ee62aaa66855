"""A whole Mamba layer on an NVIDIA GPU as a list of launches that is put together once for a shape.

Run eagerly, small layers are bound by the host. A `Plan` has what a call of one signature needs besides addresses:
sizes of memory, compiled kernels, and the list of kernels and products (`launch_list.py`). A call allocates what the
list writes, and enqueues it. The arithmetic is that of the ops one by one (`composed.py`). The gradient is in
`gradient.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambakit.ops._backends.launch_list import Item, LaunchList, Place
from mambakit.ops.fused_mixer.gradient import Gradient
from mambakit.ops.fused_mixer.layout import Layout, Memory
from mambakit.ops.fused_mixer.padding import PreparedPadding
from mambakit.ops.fused_mixer.parameters import PreparedParameters
from mambakit.ops.fused_mixer.signature import PACKABLE, LayerWeights, Signature
from mambakit.ops.selective_scan.schema import CHECKPOINT_INTERVAL

# The arrays of a call. `beside` is memory that the forward alone needs.
_ARRAYS = (
    "x", "residual", *LayerWeights._fields, "kept", "beside", "total", "y", "conv_state", "ssm_state",
    *(f"{name} scales" for name in PACKABLE), "pads",
)  # fmt: skip
_AT = {name: i for i, name in enumerate(_ARRAYS)}
NO_SCALES = (None,) * len(PACKABLE)


class Plan:
    """See above. A call's memory is the caller's, so that a plan serves any number of calls, layers and threads."""

    def __init__(self, signature: Signature):
        from mambakit.ops.causal_conv1d import prepared as conv  # these need Triton
        from mambakit.ops.selective_scan import prepared as scan

        self.signature = s = signature
        self.layout = o = Layout(signature, _AT)
        inputs, before, filter_, filter_bias = o.examples()
        interval = CHECKPOINT_INTERVAL if s.gradient else 0
        conv_step: Any = conv.PreparedForward(before, filter_, filter_bias)
        scan_step: Any = scan.PreparedForward(inputs, interval)
        if s.states is not None:
            conv_step = conv.PreparedInPlace(before, filter_, filter_bias, s.states[0][0])
            if o.length == 1:
                from mambakit.ops.selective_scan.prepared_token import PreparedToken

                scan_step = PreparedToken(inputs)
        o.keep(scan_step.checkpoint_count)
        # What the forward alone needs lies behind what is kept where it is small, or nothing is kept.
        passing = Memory(o.size)
        starts = (
            passing.add(conv_step.final_count, s.dtype.itemsize if s.states is None else 4),
            passing.add(o.b * o.d * o.n, 4), passing.add(scan_step.scratch_bytes, 1),
        )  # fmt: skip
        self._passing_count = passing.count
        self._together = not s.gradient or passing.count * 32 < o.kept_count
        beside = Place(_AT["kept"], o.kept_count * o.size) if self._together else Place(_AT["beside"])
        conv_final, scan_final, scratch = (beside + start * o.size for start in starts)
        items = [*self._entering(), *o.product("entering", "in_proj", "xz", "in_bias")]
        padding, pads = None, Place(_AT["pads"])
        if s.padded:
            padding = PreparedPadding(o.b, o.length, o.d, before.stride(1), o.k - 1, s.dtype, s.device.index)
            items += padding.window(pads, Place(_AT["conv_state"]), o.place("before"))
        of_conv = o.place("before"), Place(_AT["conv"]), Place(_AT["conv_bias"]), o.place("u")
        if s.states is None:
            items += conv_step.items(*of_conv, conv_final)
        else:
            items += conv_step.items(*of_conv, Place(_AT["conv_state"]), conv_final)
        items += o.product("u", "x_proj", "selected")
        items += self._selection_norm()
        items += o.product("dt", "dt_proj", "delta")
        if padding is not None:
            items += padding.steps(pads, o.place("delta"))
        initial = None if s.states is None else Place(_AT["ssm_state"])
        places = scan.ForwardPlaces(
            **o.scan_places(), initial=initial, y=o.place("y"), final=scan_final if initial is None else initial,
            checkpoints=o.place("checkpoints") if interval else None,
        )  # fmt: skip
        items += scan_step.items(places, scratch)
        items += o.product("y", "out_proj", "out", "out_bias")
        self._list = LaunchList(items, len(_ARRAYS), s.dtype, s.device.index)
        self._shape = o.b, o.length, o.out
        if s.gradient:
            self._gradient = Gradient(signature, inputs, before, filter_, filter_bias, interval)

    def _entering(self) -> list[Item]:
        """The norm of the residual stream, and weights and A as the layer reads them."""
        from mambakit.ops.rms_norm import prepared as norm

        o, s, items = self.layout, self.signature, []
        if o.normed and "in_proj" in o.float8:
            from mambakit.ops.linear.prepared import PreparedNormedRows

            rows = PreparedNormedRows(o.rows, o.h, s.eps, s.x, o.kinds["norm"][0], s.residual, s.kept)
            x, weight, residual, total = (Place(_AT[name]) for name in ("x", "norm", "residual", "total"))
            items += rows.items(x, weight, residual, total, o.place("q"), o.place("q scales"))
        elif o.normed:
            step = norm.PreparedForward(o.rows, o.h, s.eps, s.x, o.kinds["norm"][0], s.residual, s.kept, s.dtype)
            x, weight, residual, total = (Place(_AT[name]) for name in ("x", "norm", "residual", "total"))
            items += step.items(x, weight, residual, o.place("entering"), total)
        if o.rounded or s.log:
            counts = [o.count(name) for name in o.rounded]
            parameters = PreparedParameters(counts, o.d * o.n if s.log else 0, s.dtype, s.device.index)
            sources, targets = [Place(_AT[name]) for name in o.rounded], [o.place(name) for name in o.rounded]
            items += parameters.items(sources, targets, Place(_AT["A_log"]), o.place("A"))
        return items

    def _selection_norm(self) -> list[Item]:
        """The norms of dt, B and C, where there are some."""
        from mambakit.ops.selection_norm import prepared as selection_norm

        o, s = self.layout, self.signature
        if s.mixer_eps is None:
            return []
        step = selection_norm.PreparedForward(o.rows, o.r, o.n, s.mixer_eps, s.dtype, o.kinds_of_norms)
        return step.items(o.place("selected"), o.norms(), o.place("chosen"))

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        w: LayerWeights,
        states: tuple[Tensor, Tensor] | None = None,
        scales: tuple[Tensor | None, ...] = NO_SCALES,
        pads: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(b, l, h) of the layer, the residual stream (None without the norm), and what `backward` reads.

        ``x`` and ``residual`` are contiguous; without the norm x has the dtype of the plan. ``states`` (slots, d,
        k - 1) and (slots, d, n), read and written, where the signature has them; ``scales`` of the weights of
        `PACKABLE` and ``pads`` (b,) int64 likewise.
        """
        o, s = self.layout, self.signature
        device, dtype = s.device, s.dtype
        if self._together:
            kept, beside = torch.empty(o.kept_count + self._passing_count, dtype=dtype, device=device), None
        else:
            kept = torch.empty(o.kept_count, dtype=dtype, device=device)
            beside = torch.empty(self._passing_count, dtype=dtype, device=device)
        total = torch.empty(s.shape, dtype=s.kept, device=device) if o.normed else None
        y = torch.empty(self._shape, dtype=dtype, device=device)
        conv_state, ssm_state = (None, None) if states is None else states
        self._list((x, residual, *w, kept, beside, total, y, conv_state, ssm_state, *scales, pads))
        return y, total, kept

    def backward(
        self, dy: Tensor, dtotal: Tensor | None, saved: tuple[Tensor | None, Tensor | None, Tensor], w: LayerWeights,
        needs: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """The gradients of x, of the residual and of the weights.

        ``dy`` (b l, h) and ``dtotal`` (b, l, h) are contiguous; ``saved`` are x (None with a norm), and what `forward`
        returned of the stream and of memory; ``needs`` says which gradients are wanted.
        """
        return self._gradient(dy, dtotal, saved, w, needs)
