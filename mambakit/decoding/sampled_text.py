"""The sampling state of one text: parameters, random numbers, constraint, and the tokens that penalties count."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from mambakit.decoding.logits import NO_CHOICE
from mambakit.decoding.sampling_params import BLOCK, DRAW, SamplingParams, random_numbers
from mambakit.decoding.transfers import integers, to_device
from mambakit.ops.sampling.api import NO_TOKEN
from mambakit.quoting import cut


class SampledText:
    """The sampling state of one text, independent of its batch.

    Args:
        params: how tokens are chosen.
        vocab_size: v.
        device: of the logits.
        read: (p,) integers on any device, the prompt, which a repetition penalty counts, too.
        log_probs: how many of the likeliest tokens are recorded at every token, with their log-probabilities and the
            chosen one's; None: nothing is.
        ends: end-of-text tokens, none of which is chosen as one of the first ``least`` tokens.

    Attributes:
        position: the number of chosen tokens. While the text is in a `Sampler`, that updates it only from time to time.
        error: why the last token could not be chosen; "" where it could.
        exception: the exception of the constraint, if that was the reason.
    """

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        device: torch.device,
        read: Tensor,
        *,
        log_probs: int | None = None,
        least: int = 0,
        ends: Iterable[int] = (),
    ):
        # A copy: callers may change their object, and tables are rebuilt from it whenever the batch changes.
        self.params, self.position, self.vocab_size = params.snapshot(), 0, vocab_size
        params = self.params
        self.error: str = ""
        self.exception: Exception | None = None
        self.matcher = params.matcher()
        self._key = params.key()
        self._blocks: dict[tuple[int, int], np.ndarray] = {}  # the latest two of each sequence
        # (v,) each, or None where off: tokens that occur in prompt or text, counts in the text, biases.
        self.seen = self.counts = self.bias = None
        if params.repetition_penalty != 1:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.seen[to_device(device, read.to(torch.int64))] = True
        if params.presence_penalty or params.frequency_penalty:
            self.counts = torch.zeros(vocab_size, dtype=torch.float32, device=device)
        if params.logit_bias:
            self.bias = torch.zeros(vocab_size, dtype=torch.float32, device=device)
            if (largest := max(params.logit_bias)) >= vocab_size:
                raise ValueError(f"logit_bias names token {largest}; the model's are 0 to {vocab_size - 1}")
            values = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device="cpu")
            self.bias[integers(device, list(params.logit_bias))] = to_device(device, values)
        self.log_probs = log_probs
        self.ends = sorted(token for token in ends if token < vocab_size)
        # (1,) how many more tokens come before an end-of-text token may.
        self.held: Tensor | None = None
        if least and self.ends:
            self.held = torch.full((1,), least, dtype=torch.int64, device=device)
        parts = (self.matcher, self.seen, self.counts, self.bias, self.held)
        self.changes_logits = any(part is not None for part in parts)
        """Whether masks, biases or penalties change the model's logits."""
        self.plain = params.greedy and not self.changes_logits
        """Whether each token is the argmax of the unchanged logits."""

    def numbers(self, start: int, count: int, sequence: int = DRAW) -> np.ndarray:
        """(count,) float64, the random numbers of tokens ``start`` onwards; zeros for a greedy text."""
        if self.params.greedy or not count:
            return np.zeros(count)
        first, last = start // BLOCK, (start + count - 1) // BLOCK
        made = [self._block(sequence, block) for block in range(first, last + 1)]
        return np.concatenate(made)[start - first * BLOCK :][:count]

    def _block(self, sequence: int, block: int) -> np.ndarray:
        if (sequence, block) not in self._blocks:
            self._blocks.pop((sequence, block - 2), None)
            self._blocks[sequence, block] = random_numbers(self._key, block, sequence)
        return self._blocks[sequence, block]

    def accept(self, token: int) -> int:
        """Pass the token to the constraint. Returns it, or `NO_TOKEN` where that fails."""
        if token == NO_TOKEN or self.error:
            self.error = self.error or NO_CHOICE
            return NO_TOKEN
        if self.matcher is not None:
            try:
                self.matcher.accept(token)
            except Exception as error:  # any error of a user's constraint ends this text only
                self.fail(error)
                return NO_TOKEN
        return token

    def fail(self, error: Exception) -> None:
        """Record the constraint's exception: the text has no next token. Device errors are raised."""
        if isinstance(error, torch.AcceleratorError):  # the device is unusable for every text
            raise error
        self.exception, self.error = error, f"{type(error).__name__}: {cut(str(error), 500)}"
