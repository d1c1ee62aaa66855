"""How `generate` chooses tokens: transformers' scores and the global generator's random numbers, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import generation

from mambakit.decoding.scaling import WidePenalty, WideTemperature
from mambakit.ops.sampling.api import NO_TOKEN

# Processors whose work is all on the device. Not among them: EtaLogitsWarper and TopHLogitsWarper, for which torch.distributions
# checks its arguments on the host, and whatever reads token ids as Python numbers.
WITHOUT_WAITING = frozenset({
    generation.RepetitionPenaltyLogitsProcessor, generation.TemperatureLogitsWarper, generation.TopKLogitsWarper,
    generation.TopPLogitsWarper, generation.MinPLogitsWarper, generation.TypicalLogitsWarper, generation.EpsilonLogitsWarper,
    WidePenalty, WideTemperature,
})  # fmt: skip


def multinomial(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """A token for each row of ``probabilities`` (b, v) by the global generator, and whether the row could be drawn from: (b,) int64,
    (b,) bool.

    Tokens and the generator's next state are those of ``torch.multinomial(probabilities, 1)``, which races exponential numbers, too,
    after two checks that wait for the device. Here the second result is False for a row of NaN or of zeros.
    """
    times = probabilities / torch.empty_like(probabilities).exponential_()
    token = times.argmax(-1, keepdim=True)
    return token[:, 0], (times.gather(-1, token) > 0)[:, 0]


class ProcessorSampler:
    """A `Chooser` for b texts that transformers' loop would write: the same scores, tokens and random numbers.

    Random numbers are drawn for all b texts at every token, whichever slots are left (`select`): a draw depends on its place in the
    batch.

    Args:
        processors: transformers' processors of ``(text (b, l), scores (b, v))``, applied in turn.
        draws: draw from the scores' softmax with the global generator; else the most probable token.
        text: (b, l) int64, the tokens before the first one that is chosen.
    """

    def __init__(self, processors: Sequence[Any], draws: bool, text: Tensor):
        self.processors, self.draws, self.text = list(processors), draws, text
        self._reads_text = any(isinstance(p, generation.RepetitionPenaltyLogitsProcessor) for p in self.processors)
        self._slots: Tensor | None = None  # the texts that have a slot, once some were left out
        self._logits: Tensor | None = None  # (b, v) then; of the texts left out whatever can be drawn from

    @property
    def plain(self) -> bool:
        """Whether each token is the most probable one of the logits as they are."""
        return not self.draws and not self.processors

    @torch.no_grad()
    def sample(self, logits: Tensor) -> Tensor:
        """(size,) the next tokens, from ``logits`` (size, v), which stay as they are; `NO_TOKEN` where there is no distribution."""
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
        """Slot i is from now on what slot ``kept[i]`` was; the other texts have ended."""
        of = torch.tensor(kept, dtype=torch.int64, device=self.text.device)
        self._slots = of if self._slots is None else self._slots[of]

    def snapshot(self) -> tuple[Tensor, Tensor]:
        """What `restore` needs to choose the tokens after this moment again; the device is not waited for."""
        return self.text, _generator(self.text.device).get_state()

    def restore(self, snapshot: tuple[Tensor, Tensor]) -> None:
        self.text, state = snapshot
        _generator(self.text.device).set_state(state)


def _generator(device: torch.device) -> torch.Generator:
    """The global one of ``device``; reading and setting its state does not wait for the device."""
    return torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index]
