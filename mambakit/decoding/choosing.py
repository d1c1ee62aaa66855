"""How `generate` chooses tokens where nothing needs to wait for the device: transformers' scores and its random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import generation

from mambakit.decoding.scaling import WidePenalty, WideTemperature
from mambakit.errors import LogitsError

# Processors whose work is all on the device. Not among them: EtaLogitsWarper and TopHLogitsWarper, for which torch.distributions
# checks its arguments on the host, and whatever reads token ids as Python numbers.
WITHOUT_WAITING = frozenset({
    generation.RepetitionPenaltyLogitsProcessor, generation.TemperatureLogitsWarper, generation.TopKLogitsWarper,
    generation.TopPLogitsWarper, generation.MinPLogitsWarper, generation.TypicalLogitsWarper, generation.EpsilonLogitsWarper,
    WidePenalty, WideTemperature,
})  # fmt: skip


NO_CHOICE = (
    "the model's logits are NaN or infinite, no token can be chosen from them; check its weights, or load it in a dtype with a "
    "larger range (float16 ends at 65,504: bfloat16 or float32)"
)


NO_SCORE = (
    "the model's log-probabilities are NaN; check its weights, or load it in a dtype with a larger range (float16 ends at 65,504: "
    "bfloat16 or float32)"
)


def require_numbers(log_probs: Tensor) -> Tensor:
    """The same log-probabilities.

    Raises:
        LogitsError: some are NaN. It waits for the device.
    """
    if bool(log_probs.isnan().any()):
        raise LogitsError(NO_SCORE)
    return log_probs


def draw(probabilities: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """One token of each row of ``probabilities`` (b, v), and whether the row was sane: (b,) int64, (b,) bool. Without a ``generator`` the
    global one.

    The token and the generator's next state are those of ``torch.multinomial(probabilities, 1)``, which is the same race of
    exponential numbers after two checks that wait for the device. Here a row of NaN or of zeros is told by the second result.
    """
    times = probabilities / torch.empty_like(probabilities).exponential_(generator=generator)
    token = times.argmax(-1, keepdim=True)
    return token[:, 0], (times.gather(-1, token) > 0)[:, 0]


def are_numbers(logits: Tensor, tokens: Tensor) -> Tensor:
    """(b,) bool: whether ``logits`` (b, v) of the likeliest ``tokens`` (b,) are numbers. A text that has ended may have padding in the
    token's place, a negative one too."""
    return ~logits.gather(-1, tokens.clamp(min=0)[:, None])[:, 0].isnan()


@dataclass
class Choosing:
    """The choice of one token after another for b texts, as transformers' loop makes it.

    Args:
        processors: transformers' processors of ``(text (b, l), scores (b, v))``, applied in turn.
        sample: draw from the scores' softmax with the global generator; else the most probable token.
        ends: (e,) int64, the tokens that end a text; None where nothing does.
        padding: what follows a text's end.
    """

    processors: Sequence[Any]
    sample: bool
    ends: Tensor | None
    padding: int = 0
    _sane: list[Tensor] = field(default_factory=list)

    @property
    def plain(self) -> bool:
        """Whether each token is the most probable one of the logits."""
        return not self.sample and not self.processors

    @property
    def reads_text(self) -> bool:
        """Whether the tokens so far matter."""
        return any(isinstance(p, generation.RepetitionPenaltyLogitsProcessor) for p in self.processors)

    def __call__(self, text: Tensor, logits: Tensor) -> Tensor:
        """(b,) the next tokens, after ``text`` (b, l) and from ``logits`` (b, v), which stay as they are."""
        scores = logits.float()
        for processor in self.processors:
            scores = processor(text, scores)
        if not self.sample:
            return scores.argmax(-1)
        token, sane = draw(scores.softmax(-1))
        self._sane.append(sane.all())
        return token

    def is_end(self, tokens: Tensor) -> Tensor:
        """Which of ``tokens`` end a text."""
        if self.ends is None:
            return torch.zeros_like(tokens, dtype=torch.bool)
        return tokens == self.ends if len(self.ends) == 1 else torch.isin(tokens, self.ends)

    def check(self) -> None:
        """Wait for the device, and raise RuntimeError where a token since the last check was drawn from what is no distribution."""
        if self._sane and not bool(torch.stack(self._sane).all()):
            raise LogitsError(NO_CHOICE)
        self._sane.clear()
