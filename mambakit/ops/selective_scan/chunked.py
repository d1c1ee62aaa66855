"""The selective scan in plain PyTorch, over all chunks at once: it serves where no kernel does.

The recurrence (`reference.py` is the plain loop), per channel with n states:

    delta_t = softplus(raw_t + bias)
    h_t     = exp(delta_t A) h_{t-1} + delta_t B_t u_t            a linear recurrence: h_t = a_t h_{t-1} + x_t
    y_t     = C_t . h_t + D u_t                                   then y_t *= silu(z_t)

It is chunked so that neither time nor memory is that of a token-by-token loop. The row is cut into chunks of T tokens,
and one Python step advances *all* chunks by one token:

    1. from a zero state in every chunk: what each chunk adds (its final state)
    2. over chunks: the state that enters each one. A chunk decays it by exp(A sum(delta)), one exponential
    3. from the entering states: the outputs

That is 2T + l/T steps on tensors of (b, l/T, d, n); no (b, l, d, n) tensor exists. The gradient runs the same three
steps backwards and recomputes the states, a group of chunks at a time.
"""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.ops._layout import dense_as

# The gradient holds the states of one group of chunks at a time: 2^24 float32 elements are 64 MiB.
_GROUP_ELEMENTS = 2**24


def _chunk_length(length: int) -> int:
    """A power of two near sqrt(length), at most 32 so that it divides every checkpoint interval."""
    return 1 if length <= 1 else min(32, 2 ** round(math.log2(length) / 2))


class _Row:
    """The inputs of one call, in the arithmetic's dtype and cut into chunks: (b, l, ...) -> (b, N, T, ...).

    B and C get a dimension of groups, (b, N, T, g, n); b, or N and T, are 1 where they are constant. The last chunk is
    padded with delta = 0: its decay is 1 and its input 0, so the state passes through.
    """

    def __init__(self, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens):
        given = (u, delta, A, B, C, z)
        wide = any(t is not None and t.dtype in (torch.float64, torch.complex128) for t in given)
        self.dtype = torch.float64 if wide else torch.float32
        self.state_dtype = self.dtype.to_complex() if A.is_complex() else self.dtype
        self.b, self.l, self.d = u.shape
        self.n = A.shape[1]
        self.T = _chunk_length(self.l)
        self.N = -(-self.l // self.T)
        self.A = A.to(self.state_dtype)
        self.D = None if D is None else D.to(self.dtype)
        raw = delta.to(self.dtype)
        self.raw = raw if delta_bias is None else raw + delta_bias.to(self.dtype)  # (b, l, d)
        self.softplus = delta_softplus
        step = F.softplus(self.raw) if delta_softplus else self.raw
        self.u = self.chunk(u)
        self.delta = self.chunk(step)
        self.B, self.C = self.chunk_groups(B), self.chunk_groups(C)
        self.z = None if z is None else self.chunk(z)
        self._place_sequences(initial_state, cu_seqlens)

    def chunk(self, x: Tensor) -> Tensor:
        x = F.pad(x.to(self.dtype), (0, 0, 0, self.N * self.T - self.l))
        return x.view(self.b, self.N, self.T, x.shape[-1])

    def chunk_groups(self, x: Tensor) -> Tensor:
        x = (x[:, :, None] if x.dim() == 3 else x).to(self.state_dtype)
        if x.shape[1] != self.l:
            return x[:, None]  # constant over time
        x = F.pad(x, (0, 0, 0, 0, 0, self.N * self.T - self.l))
        return x.view(x.shape[0], self.N, self.T, *x.shape[2:])

    def at(self, x: Tensor, t: int, cs: slice) -> Tensor:
        """B or C at offset ``t`` of the chunks ``cs``, (b, N, g, n); b and N may be 1."""
        return x[:, cs, t] if x.shape[1:3] == (self.N, self.T) else x[:, :, 0]

    def of_channels(self, x: Tensor) -> Tensor:
        """(b, N, g, n) -> (b, N, d, n), or (b, N, 1, n) of one group."""
        g = x.shape[2]
        return x if g in (1, self.d) else x.repeat_interleave(self.d // g, 2)

    def over_states(self, h: Tensor, x: Tensor) -> Tensor:
        """The products of states (b, N, d, n) with B or C (b, N, g, n), summed over n: (b, N, d)."""
        g = x.shape[2]
        return (h.unflatten(2, (g, self.d // g)) @ x[..., None]).squeeze(-1).flatten(2)

    def over_channels(self, x: Tensor, h: Tensor, g: int) -> Tensor:
        """The products of (b, N, d) with states (b, N, d, n), summed over the channels of each group: (b, N, g, n)."""
        shape = (g, self.d // g)
        return (x.unflatten(2, shape)[..., None, :] @ h.unflatten(2, shape)).squeeze(-2)

    def unchunk(self, x: Tensor) -> Tensor:
        return x.reshape(self.b, self.N * self.T, x.shape[-1])[:, : self.l]

    def _place_sequences(self, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> None:
        """Find where sequences start and end: offset in the chunk -> ((row, chunk), sequence) index tensors."""
        if cu_seqlens is None:
            bounds = [(row, 0, self.l) for row in range(self.b)]
        else:
            cu = cu_seqlens.tolist()
            bounds = [(0, start, end) for start, end in pairwise(cu)]
        self.s = len(bounds)
        device = self.A.device
        if initial_state is None:
            self.initial = torch.zeros(self.s, self.d, self.n, dtype=self.state_dtype, device=device)
        else:
            self.initial = initial_state.to(self.state_dtype)
        starts: dict[int, list] = defaultdict(list)
        ends: dict[int, list] = defaultdict(list)
        self.has_start = torch.zeros(self.b, self.N, 1, 1, dtype=torch.bool, device=device)
        for sequence, (row, start, end) in enumerate(bounds):
            if start == end:
                continue  # nothing moves an empty sequence's state
            starts[start % self.T].append((row, start // self.T, sequence))
            ends[(end - 1) % self.T].append((row, (end - 1) // self.T, sequence))

        def as_index(places: dict[int, list]) -> dict[int, tuple[Tensor, ...]]:
            return {t: torch.tensor(p, dtype=torch.int64, device=device).unbind(1) for t, p in places.items()}

        self.starts, self.ends = as_index(starts), as_index(ends)
        for rows, chunks, _ in self.starts.values():
            self.has_start[rows, chunks] = True

    # -- one step of all chunks [c0, c1) ---------------------------------------------------------------------------

    def begin(self, h: Tensor, t: int, c0: int) -> Tensor:
        """Replace the state where a sequence starts at offset ``t`` by that sequence's initial state."""
        if t in self.starts:
            rows, chunks, sequences = self._within(self.starts[t], c0, h.shape[1])
            h = h.index_put((rows, chunks - c0), self.initial[sequences])
        return h

    def _within(self, place, c0: int, count: int):
        rows, chunks, sequences = place
        keep = (chunks >= c0) & (chunks < c0 + count)
        return rows[keep], chunks[keep], sequences[keep]

    def decay(self, t: int, cs: slice) -> Tensor:
        return torch.exp(self.delta[:, cs, t, :, None] * self.A)  # (b, N, d, n)

    def inputs(self, t: int, cs: slice) -> Tensor:
        return (self.delta[:, cs, t] * self.u[:, cs, t])[..., None] * self.of_channels(self.at(self.B, t, cs))

    def chunk_decay(self) -> Tensor:
        """What a chunk does to the state that enters it: exp(A sum(delta)), or nothing passes where a sequence
        starts."""
        decay = torch.exp(self.delta.sum(2)[..., None] * self.A)
        return decay.masked_fill(self.has_start, 0.0)

    def entering_states(self) -> Tensor:
        """Steps 1 and 2: the state that enters each chunk, (b, N, d, n), before any sequence starts in it."""
        every = slice(0, self.N)
        h = self.A.new_zeros(self.b, self.N, self.d, self.n)
        if self.N <= 1:
            return h
        for t in range(self.T):
            h = self.decay(t, every) * self.begin(h, t, 0) + self.inputs(t, every)
        decay = self.chunk_decay()
        entering = [torch.zeros_like(h[:, 0])]
        for c in range(self.N - 1):
            entering.append(h[:, c] + decay[:, c] * entering[-1])
        return torch.stack(entering, 1)


def forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, checkpoint_interval):
    """`mambakit::selective_scan`: (y, final_state, checkpoints)."""
    row = _Row(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens)
    every = slice(0, row.N)
    entering = row.entering_states()
    final = row.initial.clone()
    ys = []
    h = entering
    for t in range(row.T if row.N else 0):
        h = row.decay(t, every) * row.begin(h, t, 0) + row.inputs(t, every)
        y = row.over_states(h, row.at(row.C, t, every))  # C_t . h_t
        ys.append(2 * y.real if y.is_complex() else y)  # a complex state stands for itself and its conjugate
        if t in row.ends:
            rows, chunks, sequences = row.ends[t]
            final = final.index_put((sequences,), h[rows, chunks])  # not in place: vmap may have batched h alone
    y = torch.stack(ys, 2) if ys else torch.zeros_like(row.u)
    if row.D is not None:
        y = y + row.D * row.u
    if row.z is not None:
        y = y * F.silu(row.z)
    return dense_as(row.unchunk(y), u), final, _checkpoints(row, entering, checkpoint_interval)


def _checkpoints(row: _Row, entering: Tensor, interval: int) -> Tensor:
    if interval == 0:
        return entering.new_empty(0)
    if row.N and 0 in row.starts:  # the state of an unpacked row, and of the first packed sequence, before token 0
        rows, chunks, sequences = row.starts[0]
        first = chunks == 0
        entering = entering.index_put((rows[first], chunks[first]), row.initial[sequences[first]])
    return entering[:, :: interval // row.T].contiguous()


def backward(
    dy, dfinal, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, checkpoints, interval
):  # fmt: skip
    """`mambakit::selective_scan_backward`. States are recomputed; the checkpoints that kernels use are not read."""
    row = _Row(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens)
    dy = row.chunk(dy)
    gate = None if row.z is None else F.silu(row.z)
    dy_scan = dy if gate is None else dy * gate  # gradient of the output before the gate
    dfinal = torch.zeros_like(row.initial) if dfinal is None else dfinal.to(row.dtype)
    entering = row.entering_states()
    arriving = _arriving_gradients(row, dy_scan, dfinal)

    du, ddelta, dz = torch.zeros_like(row.u), torch.zeros_like(row.u), torch.zeros_like(row.u)
    dB, dC = torch.zeros_like(row.B), torch.zeros_like(row.C)
    dA = torch.zeros_like(row.A)
    # An empty sequence hands its initial state on; every other sequence's gradient is set where it starts.
    dinitial = dfinal.clone()

    group = max(1, _GROUP_ELEMENTS // max(1, row.b * row.T * row.d * row.n))
    for c0 in range(0, row.N, group):
        cs = slice(c0, min(row.N, c0 + group))
        before, after = [], []  # h_{t-1} and h_t: one tensor in both, except where a sequence starts between them
        h = entering[:, cs]
        for t in range(row.T):
            before.append(row.begin(h, t, c0))
            h = row.decay(t, cs) * before[t] + row.inputs(t, cs)
            after.append(h)
        g = arriving[:, cs]  # the gradient of h_t that comes from the right
        for t in reversed(range(row.T)):
            C_t, B_t = (row.at(x, t, cs) for x in (row.C, row.B))
            g = _add_ends(row, g, dfinal, t, c0) + dy_scan[:, cs, t, :, None] * row.of_channels(C_t)
            a, step, u_t = row.decay(t, cs), row.delta[:, cs, t], row.u[:, cs, t]
            _add(row, dC, t, cs, row.over_channels(dy_scan[:, cs, t], after[t], dC.shape[3]))
            if row.z is not None:
                y = row.over_states(after[t], C_t)
                y = y if row.D is None else y + row.D * u_t
                sigmoid = torch.sigmoid(row.z[:, cs, t])
                dz[:, cs, t] = dy[:, cs, t] * y * sigmoid * (1 + row.z[:, cs, t] * (1 - sigmoid))
            gB = row.over_states(g, B_t)
            _add(row, dB, t, cs, row.over_channels(step * u_t, g, dB.shape[3]))
            ga_h = g * a * before[t]
            ddelta[:, cs, t] = (ga_h * row.A).sum(-1) + gB * u_t
            du[:, cs, t] = gB * step
            dA += (ga_h * step[..., None]).sum((0, 1))
            g = g * a
            if t in row.starts:
                rows, chunks, sequences = row._within(row.starts[t], c0, g.shape[1])
                dinitial[sequences] = g[rows, chunks - c0]
                g = g.index_put((rows, chunks - c0), g.new_zeros(()))

    empty = row.A.new_empty(0)
    dD = empty if row.D is None else (dy_scan * row.u).sum((0, 1, 2))
    if row.D is not None:
        du = du + dy_scan * row.D
    ddelta = row.unchunk(ddelta)
    if row.softplus:
        ddelta = ddelta * torch.sigmoid(row.raw)
    return (
        dense_as(row.unchunk(du), u),
        dense_as(ddelta, delta),
        dA,
        _unchunk_groups(row, dB, B),
        _unchunk_groups(row, dC, C),
        dD,
        empty.to(u.dtype) if z is None else dense_as(row.unchunk(dz), z),
        empty if delta_bias is None else ddelta.sum((0, 1)),
        empty if initial_state is None else dinitial,
    )


def _add(row: _Row, total: Tensor, t: int, cs: slice, gradient: Tensor) -> None:
    """Add the gradient of B or C at offset ``t`` of the chunks ``cs``, (b, N, g, n): of constants, sums."""
    if total.shape[0] != row.b:
        gradient = gradient.sum(0, keepdim=True)
    if total.shape[1:3] == (row.N, row.T):
        total[:, cs, t] = gradient
    else:
        total[:, 0, 0] += gradient.sum(1)


def _unchunk_groups(row: _Row, gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient of B or C, (b, N, T, g, n), in the shape and dtype of ``x``."""
    gradient = gradient.flatten(1, 2)[:, : x.shape[1]]
    return (gradient.squeeze(2) if x.dim() == 3 else gradient).to(x.dtype).contiguous()


def _add_ends(row: _Row, g: Tensor, dfinal: Tensor, t: int, c0: int) -> Tensor:
    """Add the gradient of the final state where a sequence ends at offset ``t``."""
    if t in row.ends:
        rows, chunks, sequences = row._within(row.ends[t], c0, g.shape[1])
        g = g.index_put((rows, chunks - c0), dfinal[sequences], accumulate=True)
    return g


def _arriving_gradients(row: _Row, dy_scan: Tensor, dfinal: Tensor) -> Tensor:
    """The gradient that enters each chunk from its right, (b, N, d, n): steps 1 and 2 backwards."""
    every = slice(0, row.N)
    g = row.A.new_zeros(row.b, row.N, row.d, row.n)
    if row.N <= 1:
        return g
    for t in reversed(range(row.T)):
        C_t = row.of_channels(row.at(row.C, t, every))
        g = _add_ends(row, g, dfinal, t, 0) + dy_scan[:, :, t, :, None] * C_t
        g = g * row.decay(t, every)
        if t in row.starts:
            rows, chunks, _ = row.starts[t]
            g = g.index_put((rows, chunks), g.new_zeros(()))
    decay = row.chunk_decay()
    arriving = [torch.zeros_like(g[:, 0])]
    for c in reversed(range(1, row.N)):
        arriving.append(g[:, c] + decay[:, c] * arriving[-1])
    return torch.stack(arriving[::-1], 1)


def forward_(state, slot_indices, u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens):
    """`mambakit::selective_scan_`: y; ``state`` (slots, d, n) is read and written at ``slot_indices``."""
    rows = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if slot_indices is None:
        initial = state[:rows]
    else:
        owned = (slot_indices >= 0)[:, None, None]
        initial = torch.where(owned, state[slot_indices.clamp(min=0).long()], 0.0)
    y, final, _ = forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial, cu_seqlens, 0)
    if slot_indices is None:
        state[:rows] = final.to(state.dtype)
    else:
        keep = slot_indices >= 0
        state[slot_indices[keep].long()] = final[keep].to(state.dtype)
    return y
