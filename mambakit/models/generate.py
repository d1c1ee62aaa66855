"""generate(): transformers' GenerationMixin, made exact for a model whose cache is a state.

What is done here and not there: prompts padded on any side, a state that already holds tokens, prompts read in chunks
(``prefill_chunk_size``), a ``seed`` of the call's own, and tokens chosen without waiting for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from mambakit.decoding.bucket_graphs import reads_in_buckets
from mambakit.decoding.chunks import chunk_sizes
from mambakit.decoding.cuda_graph import graphs_serve
from mambakit.decoding.prefill import prefill
from mambakit.decoding.scaling import widened
from mambakit.decoding.transformers_steps import TransformersSteps
from mambakit.models.generate_prompt import (
    cached_columns,
    mask_of_padding,
    padded_left,
    prefill_in_chunks,
    require_left_padding,
    require_prompt,
)
from mambakit.models.generate_tokens import (
    CACHE_ARGUMENT,
    CACHE_RESULT,
    generate_tokens,
    looked_at_by,
    with_each_name,
)
from mambakit.models.inputs import one_cache
from mambakit.models.options import check_generating, drafting_of, setting
from mambakit.models.outputs import CACHE_NAMES
from mambakit.models.pretrained import MambaPreTrainedModel
from mambakit.modules import StateCache
from mambakit.modules.interception import is_ours
from mambakit.number import SEED
from mambakit.quoting import brief


class GenerativeMambaModel(MambaPreTrainedModel, GenerationMixin):
    """A model with a ``backbone`` and `generate`, with transformers' arguments and return values. Abstract."""

    backbone: Any

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config=None,
        *args,
        seed: int | Sequence[int] | None = None,
        **kwargs,
    ):
        """Generate tokens. Arguments and results are those of transformers' `GenerationMixin.generate`.

        Greedy and sampled tokens are chosen without waiting for the device where nothing looks at them in between
        (docs/guides/generation.md). And besides:

        Args:
            inputs: (b, l) prompt ids, padded on either side as ``attention_mask`` says; each row continues after its
                last real token. Without a mask, tokens that are ``pad_token_id`` are padding where that ends no text,
                as in transformers; a row of nothing but them is text.
            cache_params: a `MambaCache` to continue from (``cache`` and ``past_key_values`` are other names).
                ``inputs`` are then the tokens after it; or everything from the first token on, where the cache came
                from `generate` and the attention mask is no longer than ``inputs``. It is brought up to date in place,
                unless rows are multiplied (beams, several return sequences).
            prefill_chunk_size: read the prompt this many tokens at a time; memory does not grow with its length.
                Without it prompts of more than 16,384 tokens in all (1,024 on a CPU) are read in chunks of about so
                many, one text on a GPU in buckets of at most 4,096.
            assistant_model: a smaller model of the same vocabulary, whose guesses are verified several at a time, for
                all rows together: greedy tokens are the same (where a verification sums in another order, up to
                rounding), samples have the same distribution and other random numbers. ``num_assistant_tokens``
                (default 4, at most 15) guesses at a time. docs/guides/generation.md says more.
            prompt_lookup_num_tokens: the same with guesses from the text itself, so many at a time (at most 15), after
                a match of up to ``max_matching_ngram_size`` tokens (default 4).
            seed: seeds this call's sampling alone; the global generator is left as it was. A sequence has a seed for
                each text that is written: a text then has random numbers of its own, those of `mambakit.generation`'s
                streams and engine, whatever else is in the batch. Its logits are the batch's:
                docs/concepts/exactness.md says where their bits may depend on the batch.
        """
        seeds = None
        if isinstance(seed, (list, tuple, range)):
            seeds, seed = [int(SEED.read(f"seed[{i}]", one)) for i, one in enumerate(seed)], None
        seed = SEED.read("seed", seed)
        if seed is not None:
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(seed)
                return self.generate(inputs, generation_config, *args, **kwargs)
        settings = generation_config or self.generation_config
        check_generating(kwargs, settings)
        input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        drafting, generation_config = drafting_of(self, kwargs, generation_config)
        cache = one_cache(**{name: kwargs.pop(name, None) for name in CACHE_NAMES})
        mask = kwargs.pop("attention_mask", None)
        chunk = kwargs.pop("prefill_chunk_size", None)
        chunk = getattr(generation_config, "prefill_chunk_size", None) if chunk is None else chunk
        if chunk is not None and chunk < 1:
            raise ValueError(f"prefill_chunk_size is {brief(chunk)}; it must be 1 or more")
        steps = TransformersSteps(self, seeds, drafting)
        if seeds is not None and setting(kwargs, settings, "num_beams", 1) > 1:
            raise ValueError(f"seed has {len(seeds)} seeds; beams share one random number generator: give one seed")
        kwargs["steps"] = steps
        if input_ids is None:  # from inputs_embeds, or from a bos token alone
            if chunk:
                raise ValueError("prefill_chunk_size reads input_ids in chunks; give the prompt as input_ids")
            if mask is not None:
                require_left_padding(mask)
            if cache is not None:
                kwargs[CACHE_ARGUMENT] = cache
            try:
                result = super().generate(inputs, generation_config, *args, attention_mask=mask, **kwargs)
            finally:
                steps.close()
            return result if isinstance(result, Tensor) else with_each_name(result)

        require_prompt(input_ids, mask, cache)
        given = input_ids
        cached = 0 if cache is None else cached_columns(cache, input_ids, mask)
        new = input_ids.shape[1] - cached
        if mask is None:
            own = self.generation_config
            padding, ends = (
                setting(kwargs, settings, name, getattr(own, name)) for name in ("pad_token_id", "eos_token_id")
            )
            mask = mask_of_padding(input_ids, new, padding, ends)
        if mask is not None:
            input_ids, mask = padded_left(input_ids, mask.to(input_ids.device), new)

        copies = max(setting(kwargs, settings, "num_beams", 1), setting(kwargs, settings, "num_return_sequences", 1))
        use_cache = setting(kwargs, settings, "use_cache", True)
        given_cache = cache
        limit = chunk_sizes(self.device).batch
        whole = bool(setting(kwargs, settings, "output_hidden_states", False))  # of the whole prompt
        if copies == 1 and use_cache and not whole and is_ours(self):  # read by `_sample`, once all is checked
            rows = input_ids.shape[0]
            cache = self.backbone.new_cache(rows) if cache is None else cache
            steps.chunk_size, chunk = int(chunk or (limit if rows == 1 else max(64, limit // rows))), None
        elif not chunk and use_cache and not whole and input_ids.shape[0] * new > limit:
            chunk = max(64, limit // input_ids.shape[0])
        if chunk and not use_cache:
            raise ValueError("prefill_chunk_size keeps the prompt in a cache; drop use_cache=False")
        try:
            if chunk:
                cache = self.backbone.new_cache(input_ids.shape[0]) if cache is None else cache
                prefill_in_chunks(self, input_ids, mask, cache, cached, int(chunk))
                cached = input_ids.shape[1] - 1
            if cache is not None:
                if copies > 1:
                    cache = cache.clone()
                    cache.batch_repeat_interleave(copies)
                steps.own_cache = None if cache is given_cache else cache
                kwargs[CACHE_ARGUMENT] = cache
                steps.cached_columns = cached
            result = super().generate(input_ids, generation_config, *args, attention_mask=mask, **kwargs)
        finally:
            steps.close()

        sequences = result if isinstance(result, Tensor) else result.sequences
        if given is not input_ids:
            repeats = sequences.shape[0] // given.shape[0]
            sequences[:, : given.shape[1]] = given.repeat_interleave(repeats, 0)  # the prompt as it was given
        if isinstance(result, Tensor):
            return result
        if (final := getattr(result, CACHE_RESULT)) is not None:
            final.remember_tail(sequences)
        return with_each_name(result)

    def _get_logits_processor(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' processors, those of extreme numbers computed in float64: its own overflow float32 there."""
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        return widened(processors, beams=generation_config.num_beams or 1)

    def _sample(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        streamer=None,
        **kwargs,
    ):
        """transformers' hook: the loop over tokens; ours (`generate_tokens`) where nothing looks at each token."""
        steps: TransformersSteps | None = kwargs.get("steps")
        cache: StateCache | None = kwargs.get(CACHE_ARGUMENT)
        if steps is not None and steps.chunk_size and cache is not None:
            prompt = input_ids[:, steps.cached_columns :]
            mask = kwargs.get("attention_mask")
            mask = None if mask is None else mask[:, -prompt.shape[1] :]
            if mask is not None and reads_in_buckets(self, len(prompt)) and bool(mask.all()):
                mask = None
            steps.prompt_logits = prefill(self, prompt, cache, attention_mask=mask, chunk_size=steps.chunk_size)
        looked_at = looked_at_by(logits_processor, stopping_criteria, generation_config, streamer, kwargs)
        if synced_gpus:
            looked_at = "synced_gpus"
        seeds = None if steps is None else steps.seeds
        if steps is not None and steps.drafting is not None and (looked_at or not is_ours(self)):
            raise ValueError(
                f"drafts (assistant_model, prompt_lookup_num_tokens) do not go with {looked_at or 'another forward'}; "
                "drop one of them"
            )
        if seeds is not None and looked_at:
            raise ValueError(
                f"seed has {len(seeds)} seeds, which {looked_at} does not go with; drop it, or give one seed"
            )
        own = seeds is not None or (steps is not None and steps.drafting is not None)
        if not own and (looked_at or not is_ours(self) or not (graphs_serve(self) or self.device.type == "cpu")):
            return super()._sample(
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **kwargs
            )
        return generate_tokens(self, input_ids, logits_processor, stopping_criteria, generation_config, seeds, kwargs)

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        """transformers' hook: pass the state on under the one name that this release's loops read."""
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        cache = one_cache(**{name: model_kwargs.pop(name, None) for name in CACHE_NAMES})
        return model_kwargs if cache is None else {**model_kwargs, CACHE_ARGUMENT: cache}

    def _prepare_attention_mask_for_generation(self, *args: Any, **kwargs: Any) -> Tensor:
        """transformers' hook: the mask of a prompt that it made, whose start token may be the padding token, too."""
        mask: Tensor = super()._prepare_attention_mask_for_generation(*args, **kwargs)
        return torch.where(mask.any(1, keepdim=True), mask, 1)

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """transformers' hook: nothing to prepare, the first forward makes a `MambaCache` of the right size."""

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        cache_params: StateCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        steps: TransformersSteps | None = None,
        is_first_iteration: bool | None = False,
        next_sequence_length: int | None = None,
        cache: StateCache | None = None,
        past_key_values: StateCache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The inputs of one step: the prompt's columns that are not in the cache at first, then the last token."""
        cache_params = one_cache(cache=cache, cache_params=cache_params, past_key_values=past_key_values)
        step: dict[str, Any] = {"use_cache": use_cache, "cache_params": cache_params}
        if is_first_iteration and steps is not None and steps.prompt_logits is not None:
            step |= {"input_ids": input_ids[:, -1:], "steps": steps}  # read already: forward returns prompt_logits
        elif is_first_iteration or not use_cache:
            step["attention_mask"] = attention_mask
            if inputs_embeds is not None and is_first_iteration:
                step["inputs_embeds"] = inputs_embeds
            else:
                step["input_ids"] = input_ids[:, 0 if steps is None else steps.cached_columns :]
        else:
            step["input_ids"] = input_ids[:, -1:]  # every row has a real token here, so no mask
            if is_ours(self):  # a forward of another class does not know the argument
                step["steps"] = steps
        for name in ("output_hidden_states", "logits_to_keep", "return_dict"):
            if name in kwargs:
                step[name] = kwargs[name]
        return step
