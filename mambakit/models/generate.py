"""generate(): transformers' GenerationMixin, made exact for a model whose cache is a state.

What is done here and not there: prompts padded on any side, a state that already holds tokens, prompts read in chunks
(``prefill_chunk_size``), a ``seed`` of the call's own, and tokens chosen without waiting for the device.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from mambakit.decoding.choosing import WITHOUT_WAITING, Choosing
from mambakit.decoding.cuda_graph import graphs_serve
from mambakit.decoding.prefill import chunk_sizes, prefill, prefill_states, reads_in_buckets
from mambakit.decoding.scaling import widened
from mambakit.decoding.token_loop import GeneratingSteps, write_tokens
from mambakit.models.inputs import one_cache
from mambakit.models.options import check_generating, setting
from mambakit.models.outputs import CACHE_NAMES
from mambakit.models.pretrained import MambaPreTrainedModel
from mambakit.modules import StateCache as MambaCache
from mambakit.modules.interception import is_ours
from mambakit.number import SEED
from mambakit.quoting import brief

# What this release of transformers calls the state: in its token loops' arguments, and in what generate() returns.
_ARGUMENT, _RESULT = (
    ("cache", "cache")
    if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__
    else ("cache_params", "past_key_values")
)
# Of the `generate` call under way in this thread of work.
_steps: ContextVar[GeneratingSteps | None] = ContextVar("steps", default=None)


class GenerativeMambaModel(MambaPreTrainedModel, GenerationMixin):
    """A model with a ``backbone`` and `generate`, with transformers' arguments and return values. Abstract."""

    backbone: Any

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, generation_config=None, *args, seed: int | None = None, **kwargs):
        """Generate tokens. Arguments and results are transformers' `GenerationMixin.generate`; greedy and sampled tokens are chosen
        without waiting for the device where nothing looks at them in between (docs/generation.md). And besides:

        Args:
            inputs: (b, l) prompt ids, padded on either side as ``attention_mask`` says; each row continues after its
                last real token.
            cache_params: a `MambaCache` to continue from (``cache`` and ``past_key_values`` are other names). ``inputs`` are then the
                tokens after it; or everything from the first token on, where the cache came from `generate` and the
                attention mask is no longer than ``inputs``. It is brought up to date in place, unless rows are
                multiplied (beams, several return sequences).
            prefill_chunk_size: read the prompt this many tokens at a time; memory does not grow with its length. Without it
                prompts of more than 16,384 tokens in all (1,024 on a CPU) are read in chunks of about so many, one text on
                a GPU in pieces of at most 4,096.
            seed: seeds this call's sampling alone; the global generator is left as it was.
        """
        seed = SEED.read("seed", seed)
        if seed is not None:
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(seed)
                return self.generate(inputs, generation_config, *args, **kwargs)
        settings = generation_config or self.generation_config
        check_generating(kwargs, settings)
        input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        cache = one_cache(**{name: kwargs.pop(name, None) for name in CACHE_NAMES})
        mask = kwargs.pop("attention_mask", None)
        chunk = kwargs.pop("prefill_chunk_size", None)
        chunk = getattr(generation_config, "prefill_chunk_size", None) if chunk is None else chunk
        if chunk is not None and chunk < 1:
            raise ValueError(f"prefill_chunk_size is {brief(chunk)}; it must be 1 or more")
        if input_ids is None:  # from inputs_embeds, or from a bos token alone
            if chunk:
                raise ValueError("prefill_chunk_size reads input_ids in chunks; give the prompt as input_ids")
            if mask is not None:
                _require_left_padding(mask)
            if cache is not None:
                kwargs[_ARGUMENT] = cache
            result = super().generate(inputs, generation_config, *args, attention_mask=mask, **kwargs)
            return result if isinstance(result, Tensor) else _with_each_name(result)

        given = input_ids
        cached = 0 if cache is None else _cached_columns(cache, input_ids, mask)
        new = input_ids.shape[1] - cached
        if new < 1:
            raise ValueError(
                f"input_ids has {input_ids.shape[1]} tokens, all in the cache already; give at least one more"
            )
        if mask is not None:
            mask = mask.to(input_ids.device)
            order = mask[:, -new:].to(torch.bool).to(torch.int8).argsort(dim=1, stable=True)  # padding to the left
            input_ids = torch.cat([input_ids[:, :cached], input_ids[:, cached:].gather(1, order)], 1)
            mask = torch.cat([mask[:, :-new], mask[:, -new:].gather(1, order)], 1)

        copies = max(setting(kwargs, settings, "num_beams", 1), setting(kwargs, settings, "num_return_sequences", 1))
        use_cache = setting(kwargs, settings, "use_cache", True)
        steps = GeneratingSteps(self)
        given_cache = cache
        limit = chunk_sizes(self.device).batch
        whole = bool(setting(kwargs, settings, "output_hidden_states", False))  # asks for the whole prompt's
        alone = copies == 1 and use_cache and not whole and reads_in_buckets(self, input_ids.shape[0])
        if alone and is_ours(self) and (mask is None or bool(mask[:, -new:].all())):
            cache = self.backbone.new_cache(1) if cache is None else cache
            steps.longest_piece, chunk = int(chunk or limit), None
        elif not chunk and use_cache and not whole and input_ids.shape[0] * new > limit:
            chunk = max(64, limit // input_ids.shape[0])
        if chunk and not use_cache:
            raise ValueError("prefill_chunk_size keeps the prompt in a cache; drop use_cache=False")
        before = _steps.set(steps)
        try:
            if chunk:
                cache = self.backbone.new_cache(input_ids.shape[0]) if cache is None else cache
                last_too = copies == 1 and not whole and is_ours(self)
                cached, logits = self._prefill_in_chunks(input_ids, mask, cache, cached, int(chunk), last_too)
                steps.after_prompt = logits
            if cache is not None:
                if copies > 1:
                    cache = cache.clone()
                    cache.batch_repeat_interleave(copies)
                steps.own_cache = None if cache is given_cache else cache
                kwargs[_ARGUMENT] = cache
                kwargs["cached_columns"] = cached
            result = super().generate(input_ids, generation_config, *args, attention_mask=mask, **kwargs)
        finally:
            _steps.reset(before)
            steps.close()

        sequences = result if isinstance(result, Tensor) else result.sequences
        if given is not input_ids:
            repeats = sequences.shape[0] // given.shape[0]
            sequences[:, : given.shape[1]] = given.repeat_interleave(repeats, 0)  # the prompt as it was given
        if isinstance(result, Tensor):
            return result
        if (final := getattr(result, _RESULT)) is not None:
            final.remember_tail(sequences)
        return _with_each_name(result)

    def next_logits(self, input_ids: Tensor | None, cache: MambaCache | None) -> Tensor | None:
        """(b, v) logits of one more token per row by the fast step of the `generate` under way; None where there is none."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # a trace is of the forward
            return None
        steps = _steps.get()
        if steps is None or steps.model is not self or input_ids is None or cache is None or input_ids.shape[1] != 1:
            return None
        return steps.logits(input_ids[:, 0], cache)

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
        """transformers' token loop, or the same tokens from a loop of our own (`write_tokens`), where nothing looks at them in
        between and no processor waits for the device; a GPU then says no word to the host until texts may have ended."""
        wanted = ("output_scores", "output_logits", "output_hidden_states", "output_attentions")
        looked_at = synced_gpus or streamer is not None or not kwargs.get("use_cache", True)
        looked_at = looked_at or any(type(p) not in WITHOUT_WAITING for p in logits_processor)
        looked_at = looked_at or any(getattr(generation_config, name, None) for name in wanted)
        looked_at = looked_at or any(type(c) not in (MaxLengthCriteria, EosTokenCriteria) for c in stopping_criteria)
        looked_at = looked_at or not is_ours(self)
        if looked_at or not (graphs_serve(self) or self.device.type == "cpu"):
            return super()._sample(
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **kwargs
            )
        output = self(
            **self.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **kwargs), return_dict=True
        )
        cache, logits = output.cache, output.logits[:, -1]
        ends = [c.eos_token_id.to(self.device) for c in stopping_criteria if isinstance(c, EosTokenCriteria)]
        most = min(c.max_length for c in stopping_criteria if isinstance(c, MaxLengthCriteria)) - input_ids.shape[1]
        choose = Choosing(
            list(logits_processor),
            sample=bool(generation_config.do_sample),
            ends=torch.cat(ends) if ends else None,
            padding=int(generation_config._pad_token_tensor) if ends else 0,
        )
        given, steps = kwargs.get(_ARGUMENT), _steps.get()
        own = given is None or (steps is not None and steps.own_cache is given)
        kept = bool(generation_config.return_dict_in_generate) or not own
        tokens = write_tokens(self, cache, input_ids, logits, most, choose, kept)
        sequences = torch.cat([input_ids, tokens], 1)
        if not generation_config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(sequences=sequences, **{_RESULT: cache})

    def _prefill_in_chunks(
        self, ids: Tensor, mask: Tensor | None, cache: MambaCache, cached: int, chunk: int, last_too: bool
    ) -> tuple[int, Tensor | None]:
        """Read the prompt but for its last token, or with it: (the columns of ``ids`` that generation need not read, the logits (b, v) after
        the last)."""
        end = ids.shape[1] if last_too else ids.shape[1] - 1
        if mask is not None:
            mask = mask[:, mask.shape[1] - ids.shape[1] :][:, cached:end]
        read = prefill if last_too else prefill_states
        logits = read(self, ids[:, cached:end], cache, attention_mask=mask, chunk_size=chunk)
        return ids.shape[1] - 1, logits

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        """transformers' hook: the state goes on under the one name that this release's loops look for."""
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        cache = one_cache(**{name: model_kwargs.pop(name, None) for name in CACHE_NAMES})
        return model_kwargs if cache is None else {**model_kwargs, _ARGUMENT: cache}

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """transformers' hook: nothing to prepare, the first forward makes a `MambaCache` of the right size."""

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        cache_params: MambaCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cached_columns: int = 0,
        is_first_iteration: bool | None = False,
        next_sequence_length: int | None = None,
        cache: MambaCache | None = None,
        past_key_values: MambaCache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The inputs of one step: the prompt's columns that are not in the cache at first, then the last token."""
        cache_params = one_cache(cache=cache, cache_params=cache_params, past_key_values=past_key_values)
        step: dict[str, Any] = {"use_cache": use_cache, "cache_params": cache_params}
        steps = _steps.get()
        steps = steps if is_first_iteration and steps is not None and steps.model is self else None
        if steps is not None and steps.longest_piece:
            assert cache_params is not None
            prompt = input_ids[:, cached_columns:]
            steps.after_prompt = prefill(self, prompt, cache_params, chunk_size=steps.longest_piece)
        if steps is not None and steps.after_prompt is not None:
            step["input_ids"] = input_ids[:, -1:]  # it is read: forward is told the logits after it
        elif is_first_iteration or not use_cache:
            step["attention_mask"] = attention_mask
            if inputs_embeds is not None and is_first_iteration:
                step["inputs_embeds"] = inputs_embeds
            else:
                step["input_ids"] = input_ids[:, cached_columns:]
        else:
            step["input_ids"] = input_ids[:, -1:]  # every row has a real token here, so no mask
        for name in ("output_hidden_states", "logits_to_keep", "return_dict"):
            if name in kwargs:
                step[name] = kwargs[name]
        return step


def _with_each_name(result: Any) -> Any:
    """transformers' result, whose final state answers to every name that it has had."""
    for name in CACHE_NAMES:
        if name != _RESULT and not hasattr(type(result), name):
            object.__setattr__(result, name, getattr(result, _RESULT))
    return result


def _cached_columns(cache: MambaCache, input_ids: Tensor, mask: Tensor | None) -> int:
    """How many leading columns of ``input_ids`` the cache already holds: none of them, or all it has seen."""
    seen, length = cache.get_seq_length(), input_ids.shape[1]
    if seen == 0 or length <= seen or (mask is not None and mask.shape[1] == seen + length):
        return 0
    if cache.ends_with(input_ids[:, :seen]):
        return seen
    raise ValueError(
        f"the cache has seen {seen} tokens and input_ids has {length}: it is not clear whether they are all new, and their "
        f"first {seen} are not the tokens this cache was left with. If all are new, pass an attention_mask of shape "
        f"{(input_ids.shape[0], seen + length)}; if not, pass only the new ones"
    )


def _require_left_padding(mask: Tensor) -> None:
    if bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise ValueError("inputs_embeds are padded on the right or inside; pad them on the left, or give input_ids")
