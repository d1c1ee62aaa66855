"""An order-k Markov model with interpolated smoothing: the baseline that knows only the last k symbols."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class MarkovModel:
    """Counts of (k preceding symbols, next symbol) for every order up to ``order``, mixed from the shortest to the
    longest:

        p_k(x | c) = (count_k(c, x) + weight p_{k-1}(x | c')) / (count_k(c) + weight),   p_{-1} = 1 / symbols

    Args:
        streams: sequences of symbols, (length,) int64 on one device, in [0, symbols).
        symbols: size of the alphabet; ``symbols ** (order + 1)`` counts are held (int32).
        order: the largest k.
        weight: symbols' worth of trust in the shorter context.
    """

    def __init__(self, streams: list[Tensor], symbols: int, order: int, weight: float):
        if weight <= 0 or order < 0:
            raise ValueError(f"order {order} and weight {weight} must be at least 0, and above 0")
        self.symbols, self.order, self.weight = symbols, order, weight
        self.counts = []
        for k in range(order + 1):
            counts = torch.zeros(symbols ** (k + 1), dtype=torch.int32, device=streams[0].device)
            for stream in streams:
                counts += torch.bincount(_codes(stream, k + 1, symbols), minlength=counts.numel()).int()
            self.counts.append(counts.view(-1, symbols))

    def bits_per_symbol(self, stream: Tensor) -> list[float]:
        """Mean bits of each symbol of ``stream`` (length,) under orders 0 to ``order``; early symbols have less
        context."""
        probability = torch.full((stream.numel(),), 1 / self.symbols, dtype=torch.float64, device=stream.device)
        bits = []
        for k, counts in enumerate(self.counts):
            codes = _codes(stream, k + 1, self.symbols)
            context, symbol = codes // self.symbols, codes % self.symbols
            total = counts.sum(1).double()[context]
            seen = counts[context, symbol].double()
            # The first k symbols have no context of k: they keep the shorter one's probability.
            probability[k:] = (seen + self.weight * probability[k:]) / (total + self.weight)
            bits.append(float(-probability.log().mean() / math.log(2)))
        return bits


def _codes(stream: Tensor, width: int, symbols: int) -> Tensor:
    """(length - width + 1,): each window of ``width`` symbols as one number, the oldest symbol the most significant."""
    count = stream.numel() - width + 1
    codes = torch.zeros(max(0, count), dtype=torch.int64, device=stream.device)
    for i in range(width):
        codes = codes * symbols + stream[i : i + count]
    return codes
