"""The fused head and cross-entropy in plain PyTorch, a chunk of tokens at a time: it serves where no kernel does.

    z = hidden weight^T ;  loss_t = logsumexp(z_t) - z_t,target_t ;  d loss_t / d z_t = softmax(z_t) - onehot(target_t)

A chunk's logits give its loss and both gradients before the next chunk's are formed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.ops._autocast import no_autocast

# Logits held at once: 64 MiB of float32.
_CHUNK_LOGITS = 2**24


def loss_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32


def forward(hidden, weight, targets, ignore_index, need_dhidden, need_dweight):
    """`mambakit::linear_cross_entropy`: (summed loss, dhidden, dweight)."""
    with no_autocast(hidden.device):  # the sums are float32, in the caller's autocast too
        return _forward(hidden, weight, targets, ignore_index, need_dhidden, need_dweight)


def _forward(hidden, weight, targets, ignore_index, need_dhidden, need_dweight):
    dtype = loss_dtype(hidden, weight)
    w = weight.to(dtype)  # (v, h)
    total = torch.zeros((), dtype=dtype, device=hidden.device)
    dhidden = torch.empty(hidden.shape if need_dhidden else (0,), dtype=hidden.dtype, device=hidden.device)
    dweight = torch.zeros(weight.shape if need_dweight else (0,), dtype=dtype, device=weight.device)
    step = max(1, _CHUNK_LOGITS // weight.shape[0])
    for begin in range(0, hidden.shape[0], step):
        chunk = slice(begin, begin + step)
        h = hidden[chunk].to(dtype)
        counted = (targets[chunk] != ignore_index)[:, None]  # (t, 1)
        target = torch.where(counted, targets[chunk, None], 0)  # (t, 1)
        logits = h @ w.T  # (t, v)
        lse = logits.logsumexp(1, keepdim=True)
        total += ((lse - logits.gather(1, target)) * counted).sum()
        if need_dhidden or need_dweight:
            dlogits = logits.sub_(lse).exp_()
            dlogits.scatter_add_(1, target, -torch.ones_like(lse))
            dlogits *= counted
            if need_dhidden:
                dhidden[chunk] = (dlogits @ w).to(hidden.dtype)
            if need_dweight:
                dweight += dlogits.T @ h
    return total, dhidden, dweight.to(weight.dtype)
