"""Many tokens of each of several sequences through a whole model on a CPU: a call into C for each layer.

The kernels are those of `DecodeStep`, with its activations in float32. A row of a product has the same bits whatever
rows are beside it, and convolution and scan run over each sequence on its own. So the result of a sequence depends on
its own tokens alone, and not on the batch.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambakit.ops._backends import native
from mambakit.ops._backends.memory import empty
from mambakit.ops._backends.structures import FLOAT32, FLOAT32_OR_BFLOAT16, address, check
from mambakit.ops.causal_conv1d import cpu as conv
from mambakit.ops.decode.cpu import DecodeStep, _Call, _Program, buffer
from mambakit.ops.decode.packed import PackedLayer
from mambakit.ops.linear import cpu as matvec
from mambakit.ops.linear.packed import PackedWeight
from mambakit.ops.rms_norm import cpu as norm
from mambakit.ops.rms_norm.api import rms_norm
from mambakit.ops.selection_norm import cpu as selection_norm
from mambakit.ops.selective_scan import cpu as scan


@dataclass(frozen=True)
class Stream:
    """The residual stream of the tokens of b sequences, between two layers."""

    x: Tensor  # (b, l, h) float32, the last mixer's output
    residual: Tensor  # (b, l, h) float32, what it is added to


@dataclass(frozen=True)
class _Layer:
    """A layer's calls, and those of their arguments that differ from one call to the next."""

    program: _Program
    calls: ctypes.Array
    products: list[Any]
    selection: list[Any]  # the norm of dt, B and C, where there is one
    norm: Any
    conv: Any
    scan: Any


class PrefillStep(DecodeStep):
    """Reads tokens of several sequences: `begin`, `read` for each layer in order, then `last_logits`.

    Several prompts may be read in turn, and by several threads: nothing of them is kept here between two calls.

    Args:
        layers, final_norm, head, eps, mixer_eps: as `DecodeStep`'s.
        conv_dtype: of the convolutions' states, float32 or bfloat16.
        tokens: the most in one call, of all sequences together.

    Raises:
        ValueError: another dtype, or fewer than one token.
    """

    def __init__(
        self,
        layers: list[PackedLayer],
        final_norm: Tensor,
        head: PackedWeight,
        eps: float,
        conv_dtype: torch.dtype,
        tokens: int,
        mixer_eps: float | None = None,
    ):
        if conv_dtype not in FLOAT32_OR_BFLOAT16:
            raise ValueError(f"PrefillStep: conv_dtype is {conv_dtype}; it must be float32 or bfloat16")
        if tokens < 1:
            raise ValueError(f"PrefillStep: tokens is {tokens}; it must be 1 or more")
        self.tokens, self._eps, self._head, self._final_norm = tokens, eps, head, final_norm
        self._threads, self._run, self._lock = native.threads(), native.runner(), threading.Lock()
        self._team = ctypes.c_int64(self._threads)
        self._h, (self._d, self._n) = final_norm.shape[0], layers[0].A.shape
        self._k, self._r, self._conv_dtype = layers[0].conv.shape[1], layers[0].dt_proj.in_features, conv_dtype
        h, d, r, n = self._h, self._d, self._r, self._n
        normed, xz, p = buffer(tokens, h), buffer(tokens, 2 * d), buffer(tokens, r + 2 * n)
        u, delta, y = (buffer(tokens, d) for _ in range(3))
        # Recorded as a step of one token: `read` sets the numbers of tokens, the stream and the states.
        self._x, self._residual = buffer(1, h), buffer(1, h)
        conv_state = torch.zeros(1, d, self._k - 1, dtype=conv_dtype, device="cpu")
        ssm_state = buffer(1, d, n)
        one = slice(0, 1)
        self._held = layers, head, normed, xz, p, u, delta, y
        self._layers = []
        for w in layers:
            self._program = _Program()
            self._norm(w.norm, eps, normed[one])
            self._linear(normed[one], w.in_proj, w.in_proj_bias, xz[one])
            self._conv(xz[one, :d], w, conv_state, u[one])
            self._linear(u[one], w.x_proj, None, p[one])
            self._selection_norm(p[one], w, mixer_eps)
            self._linear(p[one, :r], w.dt_proj, None, delta[one])
            self._scan(u[one], delta[one], p[one, r:], xz[one, d:], w, ssm_state, y[one])
            self._linear(y[one], w.out_proj, w.out_proj_bias, self._x)
            self._layers.append(self._recorded())
        del self._x, self._residual, self._program

    def _recorded(self) -> _Layer:
        program = self._program

        def of(kind: Any) -> list[Any]:
            return [one for one in program.held if isinstance(one, kind)]

        calls = (_Call * len(program.calls))(*program.calls)
        (norm_,), (conv_,), (scan_,) = of(norm.Arguments), of(conv.Arguments), of(scan.Arguments)
        return _Layer(program, calls, of(matvec.Arguments), of(selection_norm.Arguments), norm_, conv_, scan_)

    @property
    def layers(self) -> int:
        """The number of layers."""
        return len(self._layers)

    def begin(self, x: Tensor) -> Stream:
        """The stream of (b, l, h) embeddings.

        Raises:
            ValueError: more tokens than the step was made for, or none.
        """
        b, length, _ = x.shape
        if not 1 <= b * length <= self.tokens:
            raise ValueError(f"PrefillStep: {b} x {length} tokens; it was made for 1 to {self.tokens}")
        stream = Stream(empty(*x.shape, dtype=torch.float32), buffer(*x.shape))
        stream.x.copy_(x)
        return stream

    def read(self, index: int, stream: Stream, conv_state: Tensor, ssm_state: Tensor) -> None:
        """Layer ``index``: the stream and the states are updated in place.

        Args:
            conv_state, ssm_state: (b, d, k - 1) in ``conv_dtype`` and (b, d, n) float32, contiguous.
        """
        (b, length, h), d, n, selected = stream.x.shape, self._d, self._n, self._r + 2 * self._n
        layer, tokens = self._layers[index], b * length
        x, residual = address(stream.x, FLOAT32, tokens * h), address(stream.residual, FLOAT32, tokens * h)
        window = address(conv_state, (self._conv_dtype,), b * d * (self._k - 1))
        state = address(ssm_state, FLOAT32, b * d * n)
        with self._lock:
            a = layer.norm
            a.x, a.residual, a.residual_out, a.rows = x, residual, residual, tokens
            for a in layer.products:
                a.b = tokens
            layer.products[-1].y = x
            for a in layer.selection:
                a.rows = tokens
            a = layer.conv
            a.initial = a.final_state = window
            a.b = a.sequences = b
            a.l, a.x_b, a.x_l = length, length * 2 * d, 2 * d
            a = layer.scan
            a.initial = a.final_state = state
            a.b = a.sequences = b
            a.l, a.u_b, a.delta_b, a.z_b = length, length * d, length * d, length * 2 * d
            a.u_l, a.delta_l, a.z_l, a.B_l, a.C_l = d, d, 2 * d, selected, selected
            a.B_b = a.C_b = length * selected
            check(self._run(layer.calls, ctypes.c_int64(len(layer.calls)), self._team))

    def last_logits(self, stream: Stream) -> Tensor:
        """(b, v) float32 after the last token of each sequence."""
        x, residual = stream.x[:, -1], stream.residual[:, -1]
        y, _ = rms_norm(x, self._final_norm, self._eps, residual=residual, out_dtype=torch.float32)
        return matvec.linear(y, self._head, None)
