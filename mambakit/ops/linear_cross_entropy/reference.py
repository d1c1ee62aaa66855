"""Head and cross-entropy in float64, one token at a time: the oracle of the tests."""

from __future__ import annotations

import torch


def linear_cross_entropy(hidden, weight, targets, ignore_index=-100):
    """The summed negative log-likelihood, float64, of the targets that are not ``ignore_index``; autograd
    differentiates it.

    z = weight hidden_t ;  loss_t = -log softmax(z)[target_t] = log sum_v exp(z_v) - z[target_t]
    """
    loss = hidden.new_zeros((), dtype=torch.float64)
    for h, target in zip(hidden.double(), targets.tolist(), strict=True):
        if target == ignore_index:
            continue
        z = weight.double() @ h  # (v,) logits of one token
        loss = loss + torch.logsumexp(z, 0) - z[target]
    return loss
