"""`generate(seed=[...])` and drafts: texts with the settings of transformers' processors, and a seed for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import generation

from mambakit.decoding.sampled_text import SampledText
from mambakit.decoding.sampling_params import SamplingParams
from mambakit.decoding.scaling import WidePenalty, WideTemperature

# The field of `SamplingParams`, and the processor's attribute that holds its value.
_FIELDS = {
    generation.RepetitionPenaltyLogitsProcessor: ("repetition_penalty", "penalty"),
    WidePenalty: ("repetition_penalty", "penalty"),
    generation.TemperatureLogitsWarper: ("temperature", "temperature"),
    WideTemperature: ("temperature", "temperature"),
    generation.TopKLogitsWarper: ("top_k", "top_k"),
    generation.TopPLogitsWarper: ("top_p", "top_p"),
    generation.MinPLogitsWarper: ("min_p", "min_p"),
    generation.TypicalLogitsWarper: ("typical_p", "mass"),
    generation.EpsilonLogitsWarper: ("epsilon_cutoff", "epsilon"),
}


def seeded_texts(
    model: Any, seeds: Sequence[int], processors: Sequence[Any], draws: bool, text: Tensor, mask: Tensor | None
) -> list[SampledText]:
    """One text per row of ``text`` (b, l), with the settings of transformers' processors.

    Args:
        seeds: one per text.
        processors: from `processor_sampler.WITHOUT_WAITING`.
        draws: False: the most probable tokens.
        mask: (b, >= l), 0 where a token is padding, which a penalty does not count.

    Raises:
        ValueError: another number of seeds, or one parameter with two values.
    """
    if len(seeds) != len(text):
        raise ValueError(
            f"seed has {len(seeds)} seeds, but {len(text)} texts are written; give one for each, or a single seed"
        )
    unread = [0] * len(text)  # leading tokens that a penalty does not count
    values: dict[str, Any] = {} if draws else {"temperature": 0}
    for one in processors:
        field, name = _FIELDS[type(one)]
        value = getattr(one, name)
        if field == "repetition_penalty" and one.prompt_ignore_length is not None:
            ignored = one.prompt_ignore_length  # an int, or one for each text (b,)
            unread = ignored.tolist() if isinstance(ignored, Tensor) else [ignored] * len(text)
        if field == "temperature" and type(one) is WideTemperature and value == 1:
            continue  # only converts the scores of a wide penalty back to float32
        if values.get(field, value) != value and field != "temperature":
            raise ValueError(f"{field} is given twice, {values[field]} and {value}; give it once")
        if draws or field == "repetition_penalty":
            values[field] = float(value) if field != "top_k" else int(value)
    texts = []
    for row, seed in enumerate(seeds):
        read = text[row, unread[row] :]
        if mask is not None:
            read = read[mask[row, mask.shape[1] - len(read) :].bool()]
        params = SamplingParams(**values, seed=seed)
        texts.append(SampledText(params, model.config.vocab_size, text.device, read))
    return texts
