"""The selective scan as the paper writes it, one token at a time in float64: the oracle of the tests.

Gu & Dao 2023, arXiv 2312.00752. Equation numbers are the paper's. Autograd differentiates it any number of times.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, initial_state=None):
    """(y (b, l, d), final_state (b, d, n)), float64, of one call of `mambakit.ops.selective_scan` without packing.

    The input is discretised as algorithm 2's code does: A by zero-order hold, exp(delta A) (equation 4), and B by
    Euler's rule, delta B, of which equation 4's B is a refinement that the released models were not trained with.
    """
    u, delta = u.double(), delta.double()
    wide = torch.complex128 if A.is_complex() else torch.float64
    A, B, C = A.to(wide), _of_channels(B.to(wide), u), _of_channels(C.to(wide), u)
    if delta_bias is not None:
        delta = delta + delta_bias.double()
    if delta_softplus:
        delta = F.softplus(delta)  # algorithm 2, line 4: the step sizes are positive
    # (b, d, n)
    h = u.new_zeros(u.shape[0], *A.shape, dtype=wide) if initial_state is None else initial_state.to(wide)
    ys = []
    for t in range(u.shape[1]):
        A_bar = torch.exp(delta[:, t, :, None] * A)  # equation 4, (b, d, n)
        B_bar = delta[:, t, :, None] * B[:, t]  # (b, d, n)
        h = A_bar * h + B_bar * u[:, t, :, None]  # equation 2a
        y = (C[:, t] * h).sum(-1)  # equation 2b, (b, d)
        ys.append(2 * y.real if A.is_complex() else y)  # a complex state stands for itself and its conjugate
    y = torch.stack(ys, 1) if ys else u
    if D is not None:
        y = y + D.double() * u  # the skip connection
    if z is not None:
        y = y * F.silu(z.double())  # the gate of the block, figure 3
    return y, h


def _of_channels(x, u):
    """B or C as (b, l, d, n), or 1 channel that is all of them: its groups repeated, its constants expanded."""
    x = x[:, :, None] if x.dim() == 3 else x
    g = x.shape[2]
    x = x.expand(u.shape[0], u.shape[1], g, x.shape[3])
    return x if g == 1 else x.repeat_interleave(u.shape[2] // g, 2)
