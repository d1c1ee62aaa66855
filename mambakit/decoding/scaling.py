"""Temperatures and repetition penalties so extreme that scaled logits leave float32's range.

transformers divides float32 logits by the temperature. Below about 1e-37 the result is infinite and its softmax NaN, as
if the weights were broken. Yet the limit is well defined: the most probable token. The processors here subtract the
largest logit first, in float64, so that every positive temperature has its exact distribution. For ordinary values
transformers' own processors are used, with the same bits.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper

# Within these ranges, scaled logits of up to 1e30 fit into float32 (3.4e38).
_TEMPERATURES, _PENALTIES = (1e-4, 1e30), (1e-8, 1e8)


def temperature_is_extreme(temperature: float) -> bool:
    """Whether dividing logits by it may leave float32's range."""
    return not _TEMPERATURES[0] <= temperature <= _TEMPERATURES[1]


def penalty_is_extreme(penalty: float) -> bool:
    """Whether scaling logits by it may leave float32's range."""
    return not _PENALTIES[0] <= penalty <= _PENALTIES[1]


class WideTemperature(TemperatureLogitsWarper):
    """(scores - the row's maximum) / temperature, computed in float64, returned as float32; the maximum becomes 0."""

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:
        scores = scores.double()
        return ((scores - scores.amax(-1, keepdim=True)) / self.temperature).float()


class WidePenalty(RepetitionPenaltyLogitsProcessor):
    """The repetition penalty in float64, for `WideTemperature`. Penalties are clamped to 1e-250 ... 1e250."""

    def __init__(self, penalty: float, prompt_ignore_length: Any = None):
        super().__init__(min(max(penalty, 1e-250), 1e250), prompt_ignore_length)

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:
        return super().__call__(input_ids, scores.double())


def processors(penalty: float, temperature: float) -> tuple[LogitsProcessorList, LogitsProcessorList]:
    """transformers' processors of a repetition penalty and of a temperature. Either list may be empty; temperature 0
    (greedy) has none."""
    by_text, by_row = LogitsProcessorList(), LogitsProcessorList()
    wide = temperature != 0 and (temperature_is_extreme(temperature) or penalty_is_extreme(penalty))
    if penalty != 1:
        by_text.append((WidePenalty if penalty_is_extreme(penalty) else RepetitionPenaltyLogitsProcessor)(penalty))
    if wide or temperature not in (0, 1):
        by_row.append((WideTemperature if wide else TemperatureLogitsWarper)(temperature))
    return by_text, by_row


def widened(given: LogitsProcessorList, beams: int = 1) -> LogitsProcessorList:
    """transformers' processors of a `generate` call, with those of extreme values replaced by the wide ones.

    Raises:
        ValueError: an extreme value with beam search, which sums scores: no maximum may be subtracted from them.
    """
    extreme: dict[int, tuple[str, float, tuple[float, float]]] = {}
    for i, one in enumerate(given):
        if type(one) is TemperatureLogitsWarper and temperature_is_extreme(one.temperature):
            extreme[i] = "temperature", one.temperature, _TEMPERATURES
        elif type(one) is RepetitionPenaltyLogitsProcessor and penalty_is_extreme(one.penalty):
            extreme[i] = "repetition_penalty", one.penalty, _PENALTIES
    if not extreme:
        return given
    if beams > 1:
        name, value, (low, high) = next(iter(extreme.values()))
        raise ValueError(
            f"{name} is {value}; with num_beams={beams} it must be {low:g} to {high:g}, "
            "since beams add up scores that would overflow"
        )
    result, scaled = LogitsProcessorList(), False
    for i, one in enumerate(given):
        if type(one) is TemperatureLogitsWarper:
            one, scaled = WideTemperature(one.temperature), True
        elif i in extreme:
            one = WidePenalty(one.penalty, one.prompt_ignore_length)
        result.append(one)
    if not scaled and any(type(one) is WidePenalty for one in result):
        result.append(WideTemperature(1.0))  # back to float32
    return result
