"""Several tokens of one sequence through a whole model, with the choice afterwards of how many of them to keep.

Every kernel is called as `DecodeStep` calls it for one token, so logits and states have the bits of decoding token by
token; but the weights are read once for all of them. The state is read and not written: what the layers fed their
recurrences is kept, and `commit` runs the recurrences alone again over the tokens that stay.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mambakit.ops._backends import native
from mambakit.ops._backends.structures import FLOAT32, FLOAT32_OR_BFLOAT16, address, as_float32, check, is_half
from mambakit.ops.causal_conv1d import cpu as conv
from mambakit.ops.decode.cpu import DecodeStep, _Call, _Program, buffer
from mambakit.ops.decode.packed import PackedLayer
from mambakit.ops.linear.cpu import MOST_ROWS
from mambakit.ops.linear.packed import PackedWeight
from mambakit.ops.selective_scan import cpu as scan


class VerifyStep(DecodeStep):
    """``verify(x) -> logits``: (t, h) embeddings of t successive tokens in, (t, v) float32 logits out, for t up to
    ``tokens``.

    ``commit(m)`` then brings the states to after the first m of them.

    Args:
        layers, final_norm, head, eps, mixer_eps: as `DecodeStep`'s.
        conv_states, ssm_states: (layers, 1, d, k - 1) float32 or bfloat16 and (layers, 1, d, n) float32, contiguous: a
            cache's own tensors, of one row. They must not be moved while the step is in use.
        tokens: the most tokens of one call, from 1 to 16.

    Raises:
        ValueError: states that the kernels cannot use in place or of several rows, or ``tokens`` outside 1 to 16.
    """

    def __init__(
        self,
        layers: list[PackedLayer],
        final_norm: Tensor,
        head: PackedWeight,
        eps: float,
        conv_states: Tensor,
        ssm_states: Tensor,
        tokens: int,
        mixer_eps: float | None = None,
    ):
        if not 1 <= tokens <= MOST_ROWS:
            raise ValueError(f"VerifyStep: tokens is {tokens}; it serves 1 to {MOST_ROWS}")
        if ssm_states.shape[1] != 1:
            raise ValueError(f"VerifyStep: the states have {ssm_states.shape[1]} rows; it verifies one sequence")
        if conv_states.dtype not in (torch.float32, torch.bfloat16) or ssm_states.dtype != torch.float32:
            raise ValueError(
                f"VerifyStep: states are {conv_states.dtype} and {ssm_states.dtype}; they must be float32 or bfloat16, "
                "and float32"
            )
        if not (conv_states.is_contiguous() and ssm_states.is_contiguous()):
            raise ValueError("VerifyStep: states must be contiguous to be updated in place; pass a cache's own tensors")
        self._layers, self._final_norm, self._head = layers, final_norm, head
        self._eps, self._mixer_eps = eps, mixer_eps
        self._conv_states, self._ssm_states, self.tokens = conv_states, ssm_states, tokens
        self._threads = native.threads()
        self._run, self._team = native.runner(), ctypes.c_int64(self._threads)
        self._h, self._d, self._n = final_norm.shape[0], ssm_states.shape[2], ssm_states.shape[3]
        self._r = layers[0].dt_proj.in_features
        count = len(layers)
        # Kept for the replay, so one for each layer.
        self._xz = buffer(count, tokens, 2 * self._d)
        self._p = buffer(count, tokens, self._r + 2 * self._n)
        self._u, self._delta = (buffer(count, tokens, self._d) for _ in range(2))
        # Of one layer and used again by the next: the state after each draft token, and a layer's other activations.
        self._conv_draft, self._ssm_draft = torch.zeros_like(conv_states[0]), torch.zeros_like(ssm_states[0])
        self._rows = [buffer(tokens, self._h) for _ in range(3)]
        self._y, self._logits = buffer(tokens, self._d), buffer(tokens, head.out_features)
        self._by_length: dict[int, tuple[_Program, ctypes.Array, ctypes.c_int64]] = {}
        self._replay = self._replay_program()
        self._read = 0

    def __call__(self, x: Tensor) -> Tensor:
        t = x.shape[0]
        if not 1 <= t <= self.tokens:
            raise ValueError(f"VerifyStep: {t} tokens, but it was made for 1 to {self.tokens}")
        if t not in self._by_length:
            self._by_length[t] = self._verify_program(t)
        _, calls, count = self._by_length[t]
        self._rows[0][:t] = x
        self._rows[1].zero_()
        check(self._run(calls, count, self._team))
        self._read = t
        return self._logits[:t]

    def commit(self, m: int) -> None:
        """Bring the states to after the first ``m`` tokens of the last call; the call is then used up.

        Raises:
            ValueError: m outside 0 to the number of tokens of the last call.
        """
        if not 0 <= m <= self._read:
            raise ValueError(f"VerifyStep: commit of {m} tokens, but {self._read} were verified")
        self._read = 0
        if not m:
            return
        _, calls, count = self._replay
        check(self._run(calls, ctypes.c_int64(count.value // self.tokens * m), self._team))
        inputs = self._xz[:, :m, : self._d].transpose(1, 2).to(self._conv_states.dtype)  # (layers, d, m)
        windows = torch.cat([self._conv_states[:, 0], inputs], 2)
        self._conv_states[:, 0] = windows[:, :, m:]

    def _verify_program(self, t: int) -> tuple[_Program, ctypes.Array, ctypes.c_int64]:
        self._program = _Program()
        self._x, self._residual, normed = (rows[:t] for rows in self._rows)
        y, logits = self._y[:t], self._logits[:t]
        for i, w in enumerate(self._layers):
            xz, p, u, delta = self._xz[i, :t], self._p[i, :t], self._u[i, :t], self._delta[i, :t]
            self._norm(w.norm, self._eps, normed)
            self._linear(normed, w.in_proj, w.in_proj_bias, xz)
            for j in range(t):
                self._convolve_token(w, xz[j], self._conv_states[i] if j == 0 else self._conv_draft, u[j])
            self._linear(u, w.x_proj, None, p)
            self._selection_norm(p, w, self._mixer_eps)  # and so the replay reads B and C
            self._linear(p[:, : self._r], w.dt_proj, None, delta)
            for j in range(t):
                state = self._ssm_states[i] if j == 0 else self._ssm_draft
                self._scan_token(w, u[j], delta[j], p[j], xz[j], state, self._ssm_draft, y[j])
            self._linear(y, w.out_proj, w.out_proj_bias, self._x)
        self._norm(self._final_norm, self._eps, normed)
        self._linear(normed, self._head, None, logits)
        return self._finish()

    def _replay_program(self) -> tuple[_Program, ctypes.Array, ctypes.c_int64]:
        """The scans alone, in place: token after token, so that a beginning of the calls is a beginning of the
        tokens."""
        self._program = _Program()
        for j in range(self.tokens):
            for i, w in enumerate(self._layers):
                state = self._ssm_states[i]
                at = (self._u[i, j], self._delta[i, j], self._p[i, j], self._xz[i, j])
                self._scan_token(w, *at, state, state, self._y[j])
        return self._finish()

    def _finish(self) -> tuple[_Program, ctypes.Array, ctypes.c_int64]:
        calls = self._program.calls
        return self._program, (_Call * len(calls))(*calls), ctypes.c_int64(len(calls))

    def _convolve_token(self, w: PackedLayer, xz: Tensor, state: Tensor, u: Tensor) -> None:
        weight, bias = self._program.hold(as_float32(w.conv)), self._program.hold(as_float32(w.conv_bias))
        d, k = self._d, w.conv.shape[1]
        window = (FLOAT32_OR_BFLOAT16, d * (k - 1))
        arguments = conv.Arguments(
            address(xz[:d], FLOAT32, d), address(weight, FLOAT32, d * k), address(bias, FLOAT32, d),
            address(state, *window), None, None, address(self._conv_draft, *window), address(u, FLOAT32, d),
            1, 1, d, k, 1, 1, is_half(state), self._threads, 0, 0,
        )  # fmt: skip
        self._program.add("causal_conv1d", arguments, 0)

    def _scan_token(
        self, w: PackedLayer, u: Tensor, delta: Tensor, p: Tensor, xz: Tensor, state: Tensor, final: Tensor, y: Tensor
    ) -> None:
        A, D, bias = (self._program.hold(as_float32(t)) for t in (w.A, w.D, w.dt_bias))
        d, n = self._d, self._n
        _, B, C = p.split([self._r, n, n])
        arguments = scan.Arguments(
            address(u, FLOAT32, d), address(delta, FLOAT32, d), address(A, FLOAT32, d * n), address(B, FLOAT32, n),
            address(C, FLOAT32, n), address(D, FLOAT32, d), address(xz[d:], FLOAT32, d), address(bias, FLOAT32, d),
            address(state, FLOAT32, d * n), None, None, address(final, FLOAT32, d * n), None, address(y, FLOAT32, d),
            1, 1, d, n, 1, 0, 1, self._threads, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        )  # fmt: skip
        self._program.add("selective_scan", arguments, 0)
