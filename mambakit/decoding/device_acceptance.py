"""Speculative sampling on the device: what `mambakit.decoding.acceptance` chooses, without a device-to-host sync.

Shapes do not depend on values, as a CUDA graph requires. The tokens are those of the host's path: the same numbers
from the same distributions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mambakit.decoding.distributions import Filters, distributions
from mambakit.decoding.logits import are_numbers
from mambakit.ops.sampling.api import NO_TOKEN, OFF, sample


class Numbers(NamedTuple):
    """Random numbers of a round, (b, k + 1) float64 each: column j belongs to the j-th token from now."""

    draw: Tensor
    accept: Tensor


class Proposed(NamedTuple):
    """The guesses of a round.

    Args:
        tokens: (b, k) int64.
        counts: (b,) int64, how many of them are guesses of a row; the others are ignored.
        steps: (s, b, v) float64, the distributions of a draft model's steps; None: no text is drawn.
        late: (b,) int64, by how many steps a row's guesses are late: guess j is of step ``j + late``.
    """

    tokens: Tensor
    counts: Tensor
    steps: Tensor | None
    late: Tensor


def choose(
    logits: Tensor, proposed: Proposed, columns: Tensor, filters: Filters, numbers: Numbers | None
) -> tuple[Tensor, Tensor]:
    """Each row's accepted guesses and one more token.

    Args:
        logits: (b, k + 1, v), after each row's last token and after each of its guesses.
        columns: (b, 6) float64, the sampling parameters of each row.
        filters: those of all rows.
        numbers: None where no text is drawn.

    Returns:
        tokens (b, k + 1) int64, of which those up to the accepted guesses and one more count, and accepted (b,) int64.
        A token is `NO_TOKEN` where none can be chosen.
    """
    b, width, v = logits.shape
    best = logits.argmax(-1)
    best = best.masked_fill(~are_numbers(logits.flatten(0, 1), best.flatten()).view(b, width), NO_TOKEN)
    guesses, k = proposed.tokens, width - 1
    places = torch.arange(k, dtype=torch.int64, device=logits.device)
    right = guesses == best[:, :k]
    greedy = columns[:, 0] == 0
    if not filters.draws:
        return best, accepted_of(right & (places < proposed.counts[:, None]))
    assert numbers is not None
    rows = torch.arange(b, dtype=torch.int64, device=logits.device)
    p = steps = None
    if k:
        assert proposed.steps is not None
        steps = proposed.steps
        of_guesses = columns[:, None].expand(b, k, 6).reshape(b * k, 6)
        p = distributions(logits[:, :k].reshape(b * k, v), of_guesses, filters).view(b, k, v)
        at = (places + proposed.late[:, None]).clamp(max=len(steps) - 1)
        q_of = steps[at, rows[:, None], guesses]
        p_of = p.gather(2, guesses[:, :, None])[:, :, 0]
        right = torch.where(greedy[:, None], right, numbers.accept[:, :k] * q_of < p_of)
    accepted = accepted_of(right & (places < proposed.counts[:, None]))
    weights = logits[rows, accepted].double()
    parameters = columns.float()
    if p is not None and steps is not None:
        rejected = accepted < proposed.counts
        here = accepted.clamp(max=k - 1)
        target = p[rows, here]
        left = (target - steps[(here + proposed.late).clamp(max=len(steps) - 1), rows]).clamp(min=0)
        left = torch.where(left.sum(-1, keepdim=True) > 0, left, target)
        weights = torch.where(rejected[:, None], left.log(), weights)
        # What is left is drawn from as it is. A constant that is made on the device: no copy in a graph.
        off = torch.stack([torch.full_like(parameters[:, 0], value) for value in OFF], 1)
        parameters = torch.where(rejected[:, None], off, parameters)
    drawn = sample(weights, numbers.draw.gather(1, accepted[:, None])[:, 0], parameters)
    drawn = torch.where(greedy, best[rows, accepted], drawn)
    tokens = torch.cat([guesses, guesses.new_zeros(b, 1)], 1)
    tokens = tokens.scatter(1, accepted[:, None], drawn[:, None])
    return torch.where(greedy[:, None], best, tokens), accepted


def accepted_of(right: Tensor) -> Tensor:
    """(b,) the number of leading guesses that are right (b, k)."""
    return right.long().cumprod(1).sum(1)
