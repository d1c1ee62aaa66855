"""Log-probabilities of chosen tokens and of the likeliest ones, for the texts that ask for them.

They are computed on the device after each step, on the rows of those texts alone, and brought to the host with the
tokens of a look. They are the model's own: of the logits before temperature, filters, biases, penalties and masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TokenLogProb(NamedTuple):
    """A token of a text and its log-probability."""

    token: int
    log_prob: float
    """ln p, given all tokens before it."""
    top: tuple[tuple[int, float], ...] = ()
    """(token, ln p) of the likeliest tokens at its place, best first."""


class Recorder:
    """Records log-probabilities of the slots that ask for them.

    Args:
        asked: per slot, how many of the likeliest tokens it asks for; None: it asks for nothing.
    """

    def __init__(self, asked: Sequence[int | None] = ()):
        self._tops = {slot: top for slot, top in enumerate(asked) if top is not None}
        self._most = max(self._tops.values(), default=0)
        self._slots = list(self._tops) if len(self._tops) < len(asked) else None  # None: all of them
        self._at: Tensor | None = None
        self._steps: list[Tensor] = []

    def record(self, logits: Tensor, tokens: Tensor) -> None:
        """Note a step, without a device-to-host sync.

        Args:
            logits: (size, v), which the model gave.
            tokens: (size,) int64, which were chosen.
        """
        if not self._tops:
            return
        if self._slots is not None:
            if self._at is None:
                at = torch.tensor(self._slots, dtype=torch.int64, device="cpu")
                # A copy from pageable memory would wait for earlier launches.
                self._at = at.pin_memory().to(logits.device, non_blocking=True) if logits.is_cuda else at
            logits, tokens = logits[self._at], tokens[self._at]
        log_probs = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
        most = min(self._most, log_probs.shape[1])
        own, best = log_probs.gather(1, tokens.clamp(min=0)[:, None]), log_probs.topk(most)
        # One tensor, so that one copy brings it to the host; float64 holds every id.
        self._steps.append(torch.cat([own.double(), best.values.double(), best.indices.double()], 1))

    def take(self) -> Recorded | None:
        """What was noted since the last call; None where that is nothing."""
        steps, self._steps = self._steps, []
        return Recorded(self._tops, torch.stack(steps, 1)) if steps else None


class Recorded:
    """Log-probabilities of a look's tokens, on the device.

    Args:
        tops: by slot, how many of the likeliest tokens it asks for.
        values: (m, count, 1 + 2 most) of the m slots in ``tops``: ln p of the token, and ln p and ids of the likeliest.
    """

    def __init__(self, tops: dict[int, int], values: Tensor):
        self._tops, self.values = tops, values

    def by_slot(self, tokens: Sequence[Sequence[int]], values: Tensor | None = None) -> dict[int, list[TokenLogProb]]:
        """On the host, for each slot that asks.

        Args:
            tokens: per slot, the look's tokens.
            values: a copy of ``values`` that is on the host already.
        """
        rows = (self.values if values is None else values).tolist()
        most = (self.values.shape[2] - 1) // 2
        found = {}
        for (slot, top), steps in zip(self._tops.items(), rows, strict=True):
            found[slot] = [
                TokenLogProb(
                    token, own, tuple((int(id), p) for id, p in zip(rest[most : most + top], rest[:top], strict=True))
                )
                for token, (own, *rest) in zip(tokens[slot], steps, strict=True)
            ]
        return found
