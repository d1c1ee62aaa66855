"""The default sampler of `generate`: transformers' logits processors and the global random generator, without
device-to-host syncs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import generation

from mambakit.decoding.scaling import WidePenalty, WideTemperature
from mambakit.decoding.transfers import integers
from mambakit.ops.sampling import cpu_multinomial
from mambakit.ops.sampling.api import NO_TOKEN

# Processors that run on the device alone. Not EtaLogitsWarper and TopHLogitsWarper, for which torch.distributions
# checks its arguments on the host, nor any that reads token ids as Python numbers.
WITHOUT_WAITING = frozenset({
    generation.RepetitionPenaltyLogitsProcessor, generation.TemperatureLogitsWarper, generation.TopKLogitsWarper,
    generation.TopPLogitsWarper, generation.MinPLogitsWarper, generation.TypicalLogitsWarper,
    generation.EpsilonLogitsWarper, WidePenalty, WideTemperature,
})  # fmt: skip


def multinomial(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a token for each row of ``probabilities`` (b, v) with the global generator.

    Tokens and the generator's next state are those of ``torch.multinomial(probabilities, 1)``, which also takes the
    argmax of p / Exp(1), but checks its input first, with two device-to-host syncs.

    Returns:
        (b,) int64 tokens, and (b,) bool, False for a row of NaN or of zeros, from which nothing can be drawn.
    """
    if cpu_multinomial.serves(probabilities):
        return cpu_multinomial.multinomial(probabilities)
    times = probabilities / torch.empty_like(probabilities).exponential_()
    token = times.argmax(-1, keepdim=True)
    return token[:, 0], (times.gather(-1, token) > 0)[:, 0]


class ProcessorSampler:
    """A `Chooser` for b texts with the scores, tokens and random numbers of transformers' loop.

    Random numbers are drawn for all b texts at every token, even after `select` has dropped some, because a draw
    depends on its row in the batch.

    Args:
        processors: transformers' processors of ``(text (b, l), scores (b, v))``, applied in turn.
        draws: draw from the softmax of the scores with the global generator; False: the most probable token.
        text: (b, l) int64, the tokens before the first one that is chosen.
    """

    def __init__(self, processors: Sequence[Any], draws: bool, text: Tensor):
        self.processors, self.draws, self.text = list(processors), draws, text
        self._reads_text = any(isinstance(p, generation.RepetitionPenaltyLogitsProcessor) for p in self.processors)
        self._slots: Tensor | None = None  # the text of each slot, after some were dropped
        self._logits: Tensor | None = None  # (b, v) then; rows of dropped texts hold any valid logits

    @property
    def plain(self) -> bool:
        """Whether each token is the argmax of the unchanged logits."""
        return not self.draws and not self.processors

    @torch.no_grad()
    def sample(self, logits: Tensor) -> Tensor:
        """(size,) the next tokens, from ``logits`` (size, v), not modified; `NO_TOKEN` where nothing can be drawn."""
        scores = self._of_all(logits).float()
        for processor in self.processors:
            scores = processor(self.text, scores)
        if self.draws:
            tokens, drawable = multinomial(scores.softmax(-1))
            tokens = tokens.masked_fill(~drawable, NO_TOKEN)
        else:
            tokens = scores.argmax(-1)
        if self._reads_text:
            self.text = torch.cat([self.text, tokens.clamp(min=0)[:, None]], 1)
        return tokens if self._slots is None else tokens[self._slots]

    def _of_all(self, logits: Tensor) -> Tensor:
        if self._slots is None:
            return logits
        if self._logits is None:
            self._logits = logits.new_zeros(len(self.text), logits.shape[1])
        return self._logits.index_copy_(0, self._slots, logits)

    def select(self, kept: list[int]) -> None:
        """Slot i becomes the former slot ``kept[i]``; the texts of the other slots have ended."""
        of = integers(self.text.device, kept)
        self._slots = of if self._slots is None else self._slots[of]

    def snapshot(self) -> tuple[Tensor, Tensor]:
        """Text and random state, for `restore`; no device-to-host sync."""
        return self.text, _generator(self.text.device).get_state()

    def restore(self, snapshot: tuple[Tensor, Tensor]) -> None:
        self.text, state = snapshot
        _generator(self.text.device).set_state(state)


def _generator(device: torch.device) -> torch.Generator:
    """The global generator of ``device``. Reading and setting its state is no device-to-host sync."""
    return torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index]
