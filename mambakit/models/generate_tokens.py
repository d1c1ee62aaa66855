"""The tokens of a `generate` call, written without a look at each: when that is possible, and the call's result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from mambakit.decoding.batch import write_tokens
from mambakit.decoding.drafted_batch import write_drafted_tokens
from mambakit.decoding.processor_sampler import WITHOUT_WAITING, ProcessorSampler
from mambakit.decoding.sampler import Chooser, Sampler
from mambakit.decoding.seeded import seeded_texts
from mambakit.decoding.transformers_steps import TransformersSteps
from mambakit.models.outputs import CACHE_NAMES

# What this release of transformers calls the state: in its token loops' arguments, and in what generate() returns.
CACHE_ARGUMENT, CACHE_RESULT = (
    ("cache", "cache")
    if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__
    else ("cache_params", "past_key_values")
)


def looked_at_by(processors: Any, criteria: Any, settings: Any, streamer: Any, kwargs: dict[str, Any]) -> str:
    """The name of something that needs each token or its scores as it is chosen; "" where nothing does."""
    if streamer is not None:
        return "a streamer"
    if not kwargs.get("use_cache", True):
        return "use_cache=False"
    for one in processors:
        if type(one) not in WITHOUT_WAITING:
            return type(one).__name__
    for name in ("output_scores", "output_logits", "output_hidden_states", "output_attentions"):
        if getattr(settings, name, None):
            return name
    for one in criteria:
        if type(one) not in (MaxLengthCriteria, EosTokenCriteria):
            return type(one).__name__
    return ""


def generate_tokens(
    model: Any,
    input_ids: Tensor,
    processors: Any,
    criteria: Any,
    settings: Any,
    seeds: Sequence[int] | None,
    kwargs: dict[str, Any],
) -> Tensor | GenerateDecoderOnlyOutput:
    """What transformers' `_sample` returns, written by `write_tokens`.

    There is no device-to-host sync until texts may have ended.

    Args:
        model: one of `GenerativeMambaModel`.
        input_ids: (b, l) the prompt.
        processors, criteria, settings: transformers' logits processors, stopping criteria and generation configuration,
            none of which look at each token (`looked_at_by`).
        seeds: one for each text; None for transformers' tokens, of the global generator.
        kwargs: the arguments of forward, with ``steps`` where `generate` made them.
    """
    steps: TransformersSteps | None = kwargs.get("steps")
    given, sampled = kwargs.get(CACHE_ARGUMENT), bool(settings.do_sample)
    mask, drafting = kwargs.get("attention_mask"), None if steps is None else steps.drafting
    if seeds is None and drafting is not None:  # each text has random numbers of its own, from the global generator
        seeds = torch.randint(2**63 - 1, (len(input_ids),), dtype=torch.int64, device="cpu").tolist()
    if seeds is None:
        sampler: Chooser = ProcessorSampler(processors, sampled, input_ids)
    else:
        texts = seeded_texts(model, seeds, processors, sampled, input_ids, mask)
        sampler = Sampler(texts if drafting is None else ())
    if steps is not None and steps.prompt_logits is not None:
        cache, logits, steps.prompt_logits = given, steps.prompt_logits, None
    else:
        step = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **kwargs)
        output = model(**step, return_dict=True)
        cache, logits = output.cache, output.logits[:, -1]
    ends = [c.eos_token_id.to(model.device) for c in criteria if isinstance(c, EosTokenCriteria)]
    most = min(c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)) - input_ids.shape[1]
    padding = int(settings._pad_token_tensor) if ends else 0
    own = given is None or (steps is not None and steps.own_cache is given)
    kept = bool(settings.return_dict_in_generate) or not own
    assert cache is not None
    stops = torch.cat(ends) if ends else None
    if drafting is None:
        tokens = write_tokens(model, cache, input_ids, logits, most, sampler, kept, stops, padding)
    else:
        prompts = list(input_ids)
        if mask is not None:
            prompts = [i[m[-len(i) :].bool()] for i, m in zip(input_ids, mask, strict=True)]
        tokens = write_drafted_tokens(model, cache, prompts, logits, most, texts, drafting, kept, stops, padding)
    sequences = torch.cat([input_ids, tokens], 1)
    if not settings.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(sequences=sequences, **{CACHE_RESULT: cache})


def with_each_name(result: Any) -> Any:
    """transformers' result, with the final state as an attribute under every name that it has had."""
    for name in CACHE_NAMES:
        if name != CACHE_RESULT and not hasattr(type(result), name):
            object.__setattr__(result, name, getattr(result, CACHE_RESULT))
    return result
