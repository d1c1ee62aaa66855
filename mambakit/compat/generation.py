"""``mamba_ssm.utils.generation``: `InferenceParams`, and `GenerationMixin.generate`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mambakit.compat.forms import require
from mambakit.compat.replaced import GENERATION
from mambakit.compat.sampling import modify_logit_for_repetition_penalty, sample
from mambakit.ops._backends.captured_graph import CapturedGraph


@dataclass
class InferenceParams:
    """What a model has read so far: the number of tokens, and each layer's states by its ``layer_idx``."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Start again. States of another number of rows than ``max_batch_size`` are dropped, and made anew."""
        kept = self.key_value_memory_dict
        for layer in [layer for layer, states in kept.items() if states[0].shape[0] != max_batch_size]:
            del kept[layer]
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


@dataclass
class GenerateDecoderOnlyOutput:
    """``sequences`` (b, l), and with ``output_scores`` the logits (b, v) of each new token, else None.

    They are found by name and by place, too, as in transformers' outputs: ``output["sequences"]``, ``output[0]``.
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None

    def keys(self) -> tuple[str, ...]:
        return ("sequences",) if self.scores is None else ("sequences", "scores")

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.keys())

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key)


@torch.inference_mode()
def decode(
    input_ids: Tensor,
    model: Any,
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | None = None,
    teacher_outputs: Tensor | None = None,
    vocab_size: int | None = None,
    cg: bool = False,
    enable_timing: bool = False,
    output_scores: bool = False,
    streamer: Any = None,
) -> GenerateDecoderOnlyOutput:
    """Continue a batch of prompts of one length.

    Args:
        input_ids: (b, l). max_length: of prompt and new tokens together.
        top_k: 1 takes the likeliest token; 0 samples from all.
        eos_token_id: a row that has written it writes nothing else, and the batch ends when all rows have. Upstream
            ends when all rows write it at one step, and rows run past their own.
        teacher_outputs: (b, l') tokens that are taken in place of sampled ones while they last.
        vocab_size: leave out the logits of the padded vocabulary.
        cg: record the decoding step as a CUDA graph; without effect on tokens, and on a CPU without effect.
        enable_timing: print the time that it took.
        streamer: has ``put(tokens)`` and ``end()``, as transformers' streamers.
    """
    require(
        input_ids.dim() == 2 and input_ids.shape[1] > 0,
        f"generate: input_ids has shape {tuple(input_ids.shape)}, expected (b, l) with at least one token",
    )
    began = time.perf_counter()
    b = input_ids.shape[0]
    state = InferenceParams(max_seqlen=max_length, max_batch_size=b)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    step = _GraphStep(model, b, max_length) if cg and input_ids.is_cuda else None
    if step is not None:
        state.key_value_memory_dict = step.states
    sequences, scores, new = input_ids, [], input_ids
    ended = torch.zeros(b, dtype=torch.bool, device=input_ids.device)
    while sequences.shape[1] < max_length and not (eos_token_id is not None and bool(ended.all())):
        if step is not None and state.seqlen_offset > 0:
            logits = step(new)
        else:
            logits = model(new, inference_params=state, num_last_tokens=1).logits[:, -1]
        state.seqlen_offset += new.shape[1]
        logits = logits if vocab_size is None else logits[:, :vocab_size]
        if output_scores:
            scores.append(logits.clone())
        if repetition_penalty != 1.0:
            logits = modify_logit_for_repetition_penalty(logits.clone(), sequences, repetition_penalty)
        if teacher_outputs is not None and sequences.shape[1] < teacher_outputs.shape[1]:
            tokens = teacher_outputs[:, sequences.shape[1]]
        else:
            draw = GENERATION.get("sample", sample)
            tokens = draw(logits, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
        if eos_token_id is not None:
            tokens = tokens.masked_fill(ended, eos_token_id)
            ended |= tokens == eos_token_id
        new = tokens[:, None].to(input_ids.dtype)
        sequences = torch.cat([sequences, new], 1)
        if streamer is not None:
            streamer.put(new.cpu())
    if streamer is not None:
        streamer.end()
    if enable_timing:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        print(f"Prompt processing + decoding time: {(time.perf_counter() - began) * 1000:.0f}ms")
    return GenerateDecoderOnlyOutput(sequences, tuple(scores) if output_scores else None)


class GenerationMixin:
    """`generate` for a model that takes ``inference_params`` and ``num_last_tokens`` and returns ``logits``."""

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no allocate_inference_cache")

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """`decode`: the sequences (b, l), or with ``return_dict_in_generate`` also the scores."""
        output = GENERATION.get("decode", decode)(
            input_ids, self, max_length, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature,
            output_scores=output_scores, **kwargs,
        )  # fmt: skip
        return output if return_dict_in_generate else output.sequences


class _GraphStep:
    """One token for every row as a CUDA graph, over states that the prompt's reading has filled."""

    def __init__(self, model: Any, batch: int, max_length: int):
        device = next(model.parameters()).device
        self.states = model.allocate_inference_cache(batch, max_length)
        self._tokens = torch.zeros((batch, 1), dtype=torch.long, device=device)
        kept = {layer: [t.clone() for t in states] for layer, states in self.states.items()}
        parameters = InferenceParams(max_length, batch, seqlen_offset=1, key_value_memory_dict=self.states)

        def run() -> Tensor:
            return model(self._tokens, inference_params=parameters, num_last_tokens=1).logits[:, -1]

        self._graph = CapturedGraph(run, device, warm_ups=2)
        for layer, states in self.states.items():
            for state, before in zip(states, kept[layer], strict=True):
                state.copy_(before)

    def __call__(self, tokens: Tensor) -> Tensor:
        self._tokens.copy_(tokens)
        self._graph.replay()
        return self._graph.result
