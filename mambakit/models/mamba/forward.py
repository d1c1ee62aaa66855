"""What a Mamba language model computes, whatever class holds its modules: transformers' interface or inference alone.

`mambakit.models.mamba.modeling` has the classes for everything, `mambakit.models.mamba.inference` those that the
command line loads in half the time. Arguments are those of the forward methods, with the cache under one name. Each
class names its ``output_type``.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from mambakit.decoding.transformers_steps import TransformersSteps
from mambakit.models.documents import Marks, given_marks
from mambakit.models.inputs import packing_of, require_inputs, require_labels, shifted_labels
from mambakit.models.quantization import require_learning
from mambakit.modules import MambaBlock, StateCache, new_cache
from mambakit.modules.interception import is_ours
from mambakit.modules.placement import CacheHandle, computing_device, is_dispatched
from mambakit.ops._backends.memory import in_functorch
from mambakit.ops._releases import is_exporting


def cache_of(backbone: Any, batch_size: int) -> StateCache:
    """A zero state for ``batch_size`` rows, in the backbone's dtype, where its layers compute."""
    weight = next(backbone.norm_f.parameters())  # norm_f may be wrapped by another library's module
    devices = [computing_device(block) for block in backbone.layers]
    place = devices if len(set(devices)) > 1 else next(iter(devices), weight.device)
    return new_cache(backbone.config, batch_size, place, weight.dtype)


def backbone_forward(
    model: Any,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    cache: StateCache | None,
    use_cache: bool | None,
    output_hidden_states: bool | None,
    return_dict: bool | None,
    attention_mask: Tensor | None,
    marks: Marks,
    output_attentions: bool | None,
) -> Any:
    """`MambaModel.forward`, of modules ``embeddings``, ``layers`` and ``norm_f`` (arXiv 2312.00752, section 3.4)."""
    require_inputs(input_ids, inputs_embeds)
    if output_attentions:
        raise ValueError("output_attentions=True: a Mamba model has no attentions; ask for output_hidden_states")
    config = model.config
    output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
    return_dict = config.return_dict if return_dict is None else return_dict
    if model.training and torch.is_grad_enabled():
        require_learning(model)
    # Without gradients there is no backward pass that recomputes: `generate` in train mode keeps its state.
    checkpointing = model.gradient_checkpointing and model.training and torch.is_grad_enabled()
    only_tensors = _returns_only_tensors(model)
    if use_cache and cache is None and (checkpointing or only_tensors):
        why = "gradient checkpointing keeps no state" if checkpointing else f"{only_tensors} returns tensors alone"
        warnings.warn(f"use_cache=True: {why}, cache_params is None", stacklevel=3)
    if use_cache is None:
        # torch.func transforms functions of tensors: vmap cannot write into memory from outside of it.
        use_cache = config.use_cache and not model.training and not in_functorch()
    x = model.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
    b, length = x.shape[:2]
    packing = packing_of((b, length), x.device, attention_mask, marks, cache)
    if checkpointing and cache is not None:
        raise ValueError(
            "gradient checkpointing runs layers twice and would move the state twice; drop the cache, or call "
            "gradient_checkpointing_disable()"
        )
    if cache is None and use_cache and not (checkpointing or only_tensors):
        cache = model.new_cache(b if marks.cu_seqlens is None else len(marks.cu_seqlens) - 1)

    if packing is not None:
        x = packing.pack(x)
    unpack = (lambda t: t) if packing is None else (lambda t: packing.on(t.device).unpack(t))
    streams: list[Tensor] = []  # the residual stream that enters each layer; the first is the embeddings
    residual = None
    for block in model.layers:
        if checkpointing:
            x, residual = model._gradient_checkpointing_func(block.__call__, x, residual, None, packing)
        else:
            state = CacheHandle(cache) if cache is not None and is_dispatched(block) else cache
            x, residual = block(x, residual, state, packing)
        if output_hidden_states:  # else they would stay alive: 4 h bytes for each token and layer
            streams.append(residual)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, residual = model.norm_f(x, residual, wide if config.residual_in_fp32 else None)
    x = unpack(x)
    if cache is not None:
        cache.advance(length)
    hidden_states = None
    if output_hidden_states:
        hidden_states = (*(unpack(t) for t in [*streams[1:], residual][: len(streams)]), x)
    output = model.output_type(last_hidden_state=x, cache=None if only_tensors else cache, hidden_states=hidden_states)
    return output if return_dict else output.to_tuple()


def _returns_only_tensors(model: Any) -> str:
    """The caller that takes tensors only, to which no state can be returned; "" where there is none."""
    if getattr(model, "_is_replica", False):
        return "a replica of DataParallel"
    return "an exported program" if is_exporting() or torch.jit.is_tracing() else ""


def language_model_forward(
    model: Any,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    inputs_embeds: Tensor | None,
    cache: StateCache | None,
    labels: Tensor | None,
    output_hidden_states: bool | None,
    return_dict: bool | None,
    use_cache: bool | None,
    logits_to_keep: int | Tensor,
    marks: Marks,
    output_attentions: bool | None,
    num_items_in_batch: Tensor | int | None,
    steps: TransformersSteps | None,
) -> Any:
    """`MambaForCausalLM.forward`, of modules ``backbone`` and ``lm_head``."""
    return_dict = model.config.return_dict if return_dict is None else return_dict
    others = (attention_mask, inputs_embeds, labels)
    if all(t is None for t in others) and not (given_marks(marks) or output_hidden_states or output_attentions):
        logits = None if steps is None else steps.logits(input_ids, cache)
        if logits is not None:
            result = model.output_type(logits=logits[:, None], cache=cache)
            return result if return_dict else result.to_tuple()
    output = model.backbone(
        input_ids,
        inputs_embeds=inputs_embeds,
        cache_params=cache,
        use_cache=use_cache,
        output_hidden_states=output_hidden_states,
        return_dict=True,
        attention_mask=attention_mask,
        output_attentions=output_attentions,
        **given_marks(marks),
    )
    hidden = output.last_hidden_state
    if isinstance(logits_to_keep, Tensor):
        hidden = hidden[:, logits_to_keep]
    elif logits_to_keep:
        hidden = hidden[:, -logits_to_keep:]
    logits = model.lm_head(hidden)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = None
    if labels is not None:
        kept = "" if isinstance(logits_to_keep, int) and not logits_to_keep else "; leave logits_to_keep at 0 to train"
        require_labels(labels, logits.shape[:2], kept)
        targets = shifted_labels(labels.to(logits.device), attention_mask, marks)
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="mean" if num_items_in_batch is None else "sum"
        )
        if num_items_in_batch is not None:
            loss = loss / num_items_in_batch
    result = model.output_type(loss=loss, logits=logits, cache=output.cache, hidden_states=output.hidden_states)
    return result if return_dict else result.to_tuple()


def only_calls_its_layers(model: Any) -> bool:
    """Whether nothing but the forward methods of this package runs in a call: no hook, no training, no other block."""
    backbone = model.backbone
    return (
        is_ours(model) and is_ours(backbone) and not model.training and len(backbone.layers) > 0
        and all(isinstance(block, MambaBlock) for block in backbone.layers)
    )  # fmt: skip
