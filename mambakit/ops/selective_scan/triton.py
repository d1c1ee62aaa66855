"""The selective scan in Triton, for GPUs and shapes that the CUDA C++ kernels do not serve.

One program scans one sequence for a block of channels, the state in registers; packed sequences are simply more
programs. The gradient goes through the checkpoint intervals from the last to the first: it recomputes an interval's
states into scratch memory that stays in cache, then steps back through them. Sums over channels (dB, dC) and over rows
(dA, dD, ddelta_bias) are written as partial sums and added in a fixed order: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambakit.ops._sums import ALIKE


def _block_d(sequences: int, d: int) -> int:
    """Channels of a program (one warp): 32 if 132 SMs have 20 warps each, else 16, for more programs."""
    return 32 if sequences * triton.cdiv(d, 32) >= 132 * 20 else 16


@triton.jit
def _step_size(delta, bias, SOFTPLUS: tl.constexpr):
    """delta + bias, through softplus = log1p(exp(x)) (x above 20 passes)."""
    raw = delta + bias
    if SOFTPLUS:
        e = tl.exp(-tl.abs(raw))
        # log1p(e) for e in (0, 1]: e alone where adding it to 1 would round it away
        log1p = tl.where(e < 1e-4, e * (1.0 - 0.5 * e), tl.log(1.0 + e))
        return raw, tl.maximum(raw, 0.0) + log1p
    return raw, raw


@triton.jit
def _forward_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, cu_ptr, init_ptr, final_ptr, slot_ptr, y_ptr,
    check_ptr,
    length, d, n,
    su, sdelta, sz, sB, sC, su_b, sdelta_b, sz_b, sB_b, sC_b,
    n_checks,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, PACKED: tl.constexpr,
    HAS_INIT: tl.constexpr, HAS_SLOTS: tl.constexpr, INTERVAL: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    seq = tl.program_id(0).to(tl.int64)
    ds = tl.program_id(1) * BD + tl.arange(0, BD)
    ns = tl.arange(0, BN)
    dmask = ds < d
    nmask = ns < n
    mask = dmask[:, None] & nmask[None, :]
    row = seq
    begin = seq * 0
    end = begin + length
    if PACKED:
        row = seq * 0
        begin = tl.load(cu_ptr + seq).to(tl.int64)
        end = tl.load(cu_ptr + seq + 1).to(tl.int64)
    A = tl.load(A_ptr + ds[:, None] * n + ns[None, :], mask, 0.0)
    bias = tl.load(bias_ptr + ds, dmask, 0.0) if HAS_BIAS else tl.zeros([BD], tl.float32)
    D = tl.load(D_ptr + ds, dmask, 0.0) if HAS_D else tl.zeros([BD], tl.float32)
    slot = seq
    if HAS_SLOTS:
        slot = tl.load(slot_ptr + seq).to(tl.int64)
    state = slot * d * n + ds[:, None].to(tl.int64) * n + ns[None, :]
    h = tl.zeros([BD, BN], tl.float32)
    if HAS_INIT:
        h = tl.load(init_ptr + state, mask & (slot >= 0), 0.0)
    # The loads of the next token are issued before this one's arithmetic: a lone warp would otherwise wait for memory.
    more = begin < end
    u_next = tl.load(u_ptr + row * su_b + begin * su + ds, dmask & more, 0.0)
    delta_next = tl.load(delta_ptr + row * sdelta_b + begin * sdelta + ds, dmask & more, 0.0)
    B_next = tl.load(B_ptr + row * sB_b + begin * sB + ns, nmask & more, 0.0)
    C_next = tl.load(C_ptr + row * sC_b + begin * sC + ns, nmask & more, 0.0)
    if HAS_Z:
        z_next = tl.load(z_ptr + row * sz_b + begin * sz + ds, dmask & more, 0.0)
    t = begin
    while t < end:
        if INTERVAL > 0:
            if t % INTERVAL == 0:
                at = ((row * n_checks + t // INTERVAL) * d + ds[:, None]) * n + ns[None, :]
                tl.store(check_ptr + at, h, mask)
        u = u_next.to(tl.float32)
        delta = delta_next.to(tl.float32)
        B = B_next.to(tl.float32)
        C = C_next.to(tl.float32)
        more = t + 1 < end
        u_next = tl.load(u_ptr + row * su_b + (t + 1) * su + ds, dmask & more, 0.0)
        delta_next = tl.load(delta_ptr + row * sdelta_b + (t + 1) * sdelta + ds, dmask & more, 0.0)
        B_next = tl.load(B_ptr + row * sB_b + (t + 1) * sB + ns, nmask & more, 0.0)
        C_next = tl.load(C_ptr + row * sC_b + (t + 1) * sC + ns, nmask & more, 0.0)
        _, step = _step_size(delta, bias, SOFTPLUS)
        h = tl.exp(step[:, None] * A) * h + (step * u)[:, None] * B[None, :]
        y = tl.sum(h * C[None, :], 1) + D * u
        if HAS_Z:
            z = z_next.to(tl.float32)
            z_next = tl.load(z_ptr + row * sz_b + (t + 1) * sz + ds, dmask & more, 0.0)
            y = y * z * tl.sigmoid(z)
        tl.store(y_ptr + (row * length + t) * d + ds, y.to(y_ptr.dtype.element_ty), dmask)
        t += 1
    tl.store(final_ptr + state, h, mask & (slot >= 0))


@triton.jit
def _backward_kernel(
    dy_ptr, dfinal_ptr, u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, cu_ptr, init_ptr, check_ptr,
    scratch_ptr, du_ptr, ddelta_ptr, dz_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dbias_ptr, dinit_ptr,
    length, tokens, d, n,
    sdy, su, sdelta, sz, sB, sC, sdy_b, su_b, sdelta_b, sz_b, sB_b, sC_b,
    n_checks,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, PACKED: tl.constexpr,
    HAS_INIT: tl.constexpr, HAS_DFINAL: tl.constexpr, INTERVAL: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    seq = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    ds = block * BD + tl.arange(0, BD)
    ns = tl.arange(0, BN)
    dmask = ds < d
    nmask = ns < n
    mask = dmask[:, None] & nmask[None, :]
    row = seq
    begin = seq * 0
    end = begin + length
    if PACKED:
        row = seq * 0
        begin = tl.load(cu_ptr + seq).to(tl.int64)
        end = tl.load(cu_ptr + seq + 1).to(tl.int64)
    A = tl.load(A_ptr + ds[:, None] * n + ns[None, :], mask, 0.0)
    bias = tl.load(bias_ptr + ds, dmask, 0.0) if HAS_BIAS else tl.zeros([BD], tl.float32)
    D = tl.load(D_ptr + ds, dmask, 0.0) if HAS_D else tl.zeros([BD], tl.float32)
    state = seq * d * n + ds[:, None].to(tl.int64) * n + ns[None, :]
    scratch = (seq * tl.num_programs(1) + block) * INTERVAL * BD * BN
    tile = tl.arange(0, BD)[:, None] * BN + ns[None, :]

    g = tl.zeros([BD, BN], tl.float32)
    if HAS_DFINAL:
        g = tl.load(dfinal_ptr + state, mask, 0.0)
    dA = tl.zeros([BD, BN], tl.float32)
    dD = tl.zeros([BD], tl.float32)
    dbias = tl.zeros([BD], tl.float32)
    first = begin // INTERVAL
    last = tl.where(end > begin, (end - 1) // INTERVAL, first - 1)
    c = last
    while c >= first:
        low = tl.maximum(begin, c * INTERVAL)
        high = tl.minimum(end, (c + 1) * INTERVAL)
        h = tl.zeros([BD, BN], tl.float32)
        if low > begin:
            at = ((row * n_checks + c) * d + ds[:, None]) * n + ns[None, :]
            h = tl.load(check_ptr + at, mask, 0.0)
        else:
            if HAS_INIT:
                h = tl.load(init_ptr + state, mask, 0.0)
        u_next = tl.load(u_ptr + row * su_b + low * su + ds, dmask, 0.0)
        delta_next = tl.load(delta_ptr + row * sdelta_b + low * sdelta + ds, dmask, 0.0)
        B_next = tl.load(B_ptr + row * sB_b + low * sB + ns, nmask, 0.0)
        t = low
        while t < high:
            tl.store(scratch_ptr + scratch + (t - low) * BD * BN + tile, h)
            u = u_next.to(tl.float32)
            delta = delta_next.to(tl.float32)
            B = B_next.to(tl.float32)
            more = t + 1 < high
            u_next = tl.load(u_ptr + row * su_b + (t + 1) * su + ds, dmask & more, 0.0)
            delta_next = tl.load(delta_ptr + row * sdelta_b + (t + 1) * sdelta + ds, dmask & more, 0.0)
            B_next = tl.load(B_ptr + row * sB_b + (t + 1) * sB + ns, nmask & more, 0.0)
            _, step = _step_size(delta, bias, SOFTPLUS)
            h = tl.exp(step[:, None] * A) * h + (step * u)[:, None] * B[None, :]
            t += 1
        tl.debug_barrier()
        t = high - 1
        u_next = tl.load(u_ptr + row * su_b + t * su + ds, dmask, 0.0)
        delta_next = tl.load(delta_ptr + row * sdelta_b + t * sdelta + ds, dmask, 0.0)
        B_next = tl.load(B_ptr + row * sB_b + t * sB + ns, nmask, 0.0)
        C_next = tl.load(C_ptr + row * sC_b + t * sC + ns, nmask, 0.0)
        dy_next = tl.load(dy_ptr + row * sdy_b + t * sdy + ds, dmask, 0.0)
        if HAS_Z:
            z_next = tl.load(z_ptr + row * sz_b + t * sz + ds, dmask, 0.0)
        before_next = tl.load(scratch_ptr + scratch + (t - low) * BD * BN + tile)
        while t >= low:
            u = u_next.to(tl.float32)
            delta = delta_next.to(tl.float32)
            B = B_next.to(tl.float32)
            C = C_next.to(tl.float32)
            dy = dy_next.to(tl.float32)
            before = before_next
            more = t > low
            u_next = tl.load(u_ptr + row * su_b + (t - 1) * su + ds, dmask & more, 0.0)
            delta_next = tl.load(delta_ptr + row * sdelta_b + (t - 1) * sdelta + ds, dmask & more, 0.0)
            B_next = tl.load(B_ptr + row * sB_b + (t - 1) * sB + ns, nmask & more, 0.0)
            C_next = tl.load(C_ptr + row * sC_b + (t - 1) * sC + ns, nmask & more, 0.0)
            dy_next = tl.load(dy_ptr + row * sdy_b + (t - 1) * sdy + ds, dmask & more, 0.0)
            before_next = tl.load(
                scratch_ptr + scratch + (t - 1 - low) * BD * BN + tile, (ns >= 0)[None, :] & more, 0.0
            )
            raw, step = _step_size(delta, bias, SOFTPLUS)
            a = tl.exp(step[:, None] * A)
            h = a * before + (step * u)[:, None] * B[None, :]
            out = (row * length + t) * d + ds
            if HAS_Z:
                z = z_next.to(tl.float32)
                z_next = tl.load(z_ptr + row * sz_b + (t - 1) * sz + ds, dmask & more, 0.0)
                sigmoid = tl.sigmoid(z)
                y = tl.sum(h * C[None, :], 1) + D * u
                dz = dy * y * sigmoid * (1.0 + z * (1.0 - sigmoid))
                tl.store(dz_ptr + out, dz.to(dz_ptr.dtype.element_ty), dmask)
                dy = dy * z * sigmoid
            part = (block.to(tl.int64) * tokens + row * length + t) * n + ns
            tl.store(dC_ptr + part, tl.sum(h * dy[:, None], 0), nmask)
            g += dy[:, None] * C[None, :]
            tl.store(dB_ptr + part, tl.sum(g * (step * u)[:, None], 0), nmask)
            gB = tl.sum(g * B[None, :], 1)
            gah = g * a * before
            dstep = tl.sum(gah * A, 1) + gB * u
            dA += gah * step[:, None]
            du = gB * step
            if HAS_D:
                du += D * dy
                dD += dy * u
            if SOFTPLUS:
                dstep = dstep * tl.sigmoid(raw)
            dbias += dstep
            tl.store(du_ptr + out, du.to(du_ptr.dtype.element_ty), dmask)
            tl.store(ddelta_ptr + out, dstep.to(ddelta_ptr.dtype.element_ty), dmask)
            g = g * a
            t -= 1
        tl.debug_barrier()
        c -= 1
    tl.store(dA_ptr + state, dA, mask)
    tl.store(dinit_ptr + state, g, mask)
    tl.store(dD_ptr + seq * d + ds, dD, dmask)
    tl.store(dbias_ptr + seq * d + ds, dbias, dmask)


def _channels_adjacent(*tensors: Tensor | None) -> list[Tensor | None]:
    """The kernels step through rows and time by stride; only the last dimension must be adjacent."""
    return [t if t is None or t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _strides(tensors: list[Tensor | None]) -> list[int]:
    steps = [0 if t is None else t.stride(1) for t in tensors]
    return steps + [0 if t is None else t.stride(0) for t in tensors]


def _launch_forward(
    u, delta, A, B, C, D, z, delta_bias, softplus, cu_seqlens, initial, final, slots, interval
) -> tuple[Tensor, Tensor]:
    b, length, d = u.shape
    n = A.shape[1]
    sequences = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    count = -(-length // interval) if interval else 0
    y = torch.empty((b, length, d), dtype=u.dtype, device=u.device)
    shape = (b, count, d, n) if interval else (0,)
    checkpoints = torch.empty(shape, dtype=torch.float32, device=u.device)
    u, delta, z, B, C = _channels_adjacent(u, delta, z, B, C)
    BD = _block_d(sequences, d)
    if sequences and d:
        _forward_kernel[(sequences, triton.cdiv(d, BD))](
            u, delta, A.contiguous(), B, C, D, z, delta_bias, cu_seqlens, initial, final, slots, y, checkpoints,
            length, d, n, *_strides([u, delta, z, B, C]), count,
            HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=softplus,
            PACKED=cu_seqlens is not None, HAS_INIT=initial is not None, HAS_SLOTS=slots is not None, INTERVAL=interval,
            BD=BD, BN=triton.next_power_of_2(n), num_warps=1, **ALIKE,
        )  # fmt: skip
    return y, checkpoints


def forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, checkpoint_interval):
    """`mambakit::selective_scan`."""
    sequences = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = torch.empty((sequences, u.shape[2], A.shape[1]), dtype=torch.float32, device=u.device)
    initial = None if initial_state is None else initial_state.contiguous()
    y, checkpoints = _launch_forward(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, initial, final, None, checkpoint_interval
    )
    return y, final, checkpoints


def forward_(state, slot_indices, u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens):
    """`mambakit::selective_scan_`."""
    pool = state if state.is_contiguous() else state.contiguous()
    y, _ = _launch_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, pool, pool, slot_indices, 0)
    if pool is not state:
        state.copy_(pool)
    return y


def backward(
    dy, dfinal, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, checkpoints, interval
):  # fmt: skip
    """`mambakit::selective_scan_backward`."""
    b, length, d = u.shape
    n = A.shape[1]
    sequences = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    BD, BN = _block_d(sequences, d), triton.next_power_of_2(n)
    blocks = triton.cdiv(d, BD)
    f32 = {"dtype": torch.float32, "device": u.device}
    du, ddelta, dz = (torch.empty((b, length, d), dtype=u.dtype, device=u.device) for _ in range(3))
    dA, dinitial = (torch.empty((sequences, d, n), **f32) for _ in range(2))
    dD, dbias = (torch.empty((sequences, d), **f32) for _ in range(2))
    dB, dC = (torch.empty((blocks, b, length, n), **f32) for _ in range(2))
    scratch = torch.empty(sequences * blocks * interval * BD * BN, **f32)
    dy, u, delta, z, B, C = _channels_adjacent(dy, u, delta, z, B, C)
    if sequences and d:
        _backward_kernel[(sequences, blocks)](
            dy, None if dfinal is None else dfinal.contiguous(), u, delta, A.contiguous(), B, C, D, z, delta_bias,
            cu_seqlens, None if initial_state is None else initial_state.contiguous(), checkpoints,
            scratch, du, ddelta, dz, dA, dB, dC, dD, dbias, dinitial,
            length, b * length, d, n, *_strides([dy, u, delta, z, B, C]), checkpoints.shape[1],
            HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=delta_softplus,
            PACKED=cu_seqlens is not None, HAS_INIT=initial_state is not None, HAS_DFINAL=dfinal is not None,
            INTERVAL=interval, BD=BD, BN=BN, num_warps=1, **ALIKE,
        )  # fmt: skip
    empty = torch.empty(0, **f32)
    return (
        du, ddelta, dA.sum(0), dB.sum(0).to(u.dtype), dC.sum(0).to(u.dtype),
        empty if D is None else dD.sum(0), empty.to(u.dtype) if z is None else dz,
        empty if delta_bias is None else dbias.sum(0), empty if initial_state is None else dinitial,
    )  # fmt: skip
