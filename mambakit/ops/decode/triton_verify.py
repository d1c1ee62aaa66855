"""Drafts of several slots through a whole Mamba model, in Triton: the kernels of `triton_many_rows.py` over the tokens
of all slots, so that the weights are read once.

A slot's tokens are neighbouring rows. Products, norms and the head do not know of them; convolution and scan go through
a slot's tokens in turn, read its state once and do not write it. What they feed the recurrence is kept for every layer
(step sizes, u, B, and the convolution's inputs), and `commit` runs the recurrences of all layers over the tokens that
stay, in one launch.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mambakit.ops._sums import ALIKE
from mambakit.ops.decode import triton_verify_kernels as kernels
from mambakit.ops.decode.triton_many_rows import ManyRowsStep, Product, Tile
from mambakit.ops.decode.weights import LayerWeights, ModelWeights, shape_of

_CONV, _SCAN = Tile(256, 1, 4), Tile(32, 1, 2)  # channels of a program


class ManyRowsVerification(ManyRowsStep):
    """``verify()`` reads ``tokens`` (slots * t,), t of each slot, and leaves ``logits`` (slots * t, v) float32; the
    states are unchanged. `commit` then advances slot i by its first ``kept[i]`` tokens, all of them at once.

    Args:
        weights, conv_states, ssm_states, chosen, shared: as `ManyRowsStep`'s, of ``slots`` rows.
        draft: t, the tokens of each slot.

    Attributes:
        kept: (slots,) int64, read by `commit`.

    Raises:
        ValueError: as `ManyRowsStep`, of slots * t rows.
    """

    def __init__(
        self,
        weights: ModelWeights,
        conv_states: Tensor,
        ssm_states: Tensor,
        draft: int,
        chosen: dict[str, Product | Tile] | None = None,
        shared: int | None = None,
    ):
        super().__init__(weights, conv_states, ssm_states, chosen=chosen, draft=draft, shared=shared)
        layers, self.slots, d, n = ssm_states.shape
        self.draft = draft
        device, dtype, rows = ssm_states.device, self._x.dtype, self.rows

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(layers, *shape, device=device, dtype=dtype)

        self.kept = torch.zeros(self.slots, dtype=torch.int64, device=device)
        self._inputs, self._us = buffer(rows, d, dtype=dtype), buffer(rows, d, dtype=dtype)
        self._steps, self._decay, self._Bs = buffer(rows, d), buffer(d, n), buffer(rows, n)

    def _recur(self, i: int, w: LayerWeights) -> None:
        conv_state, state = self.conv_states[i], self.ssm_states[i]
        rows, (r, d) = self.rows, shape_of(w.x_proj)
        width, n, rank, bias = w.conv.shape[1], state.shape[2], w.dt_proj.shape[1], w.in_proj_bias
        kernels.verify_conv_kernel[(triton.cdiv(d, _CONV.channels), rows)](
            self._parts["in_proj"], bias, conv_state, w.conv, w.conv_bias, self._u, self._inputs[i], rows,
            d, width, self.draft, self._splits["in_proj"], BD=_CONV.channels, HAS_BIAS=bias is not None,
            HAS_CONV_BIAS=w.conv_bias is not None, num_warps=_CONV.warps,
        )  # fmt: skip
        self._multiply("x_proj", self._u, w.x_proj)
        kernels.verify_scan_kernel[(triton.cdiv(d, _SCAN.channels), self.slots)](
            self._parts["x_proj"], self._parts["in_proj"], bias, w.dt_proj, w.dt_bias, w.A_log, w.D, self._u, state,
            self._y, self._decay[i], self._steps[i], self._us[i], self._Bs[i], *w.norms(),
            self._mixer_eps, rows,
            r, d, rank, n, self.draft, self._splits["x_proj"], self._splits["in_proj"], BD=_SCAN.channels,
            BR=max(16, triton.next_power_of_2(rank)), BS=triton.next_power_of_2(n),
            BT=max(16, triton.next_power_of_2(self.draft)), HAS_BIAS=bias is not None, NORMS=self._norms,
            num_warps=_SCAN.warps, **ALIKE,
        )  # fmt: skip

    def commit(self) -> None:
        """Advance the states by ``kept`` tokens of each slot."""
        layers, slots, d, width = self.conv_states.shape
        n = self.ssm_states.shape[3]
        kernels.replay_kernel[(triton.cdiv(d, _SCAN.channels), slots, layers)](
            self.kept, self.conv_states, self.ssm_states, self._inputs, self._decay, self._steps, self._us, self._Bs,
            self.rows, slots, d, n, width + 1, self.draft, BD=_SCAN.channels, BS=triton.next_power_of_2(n),
            TAPS=max(2, triton.next_power_of_2(width)), num_warps=_SCAN.warps, **ALIKE,
        )  # fmt: skip
