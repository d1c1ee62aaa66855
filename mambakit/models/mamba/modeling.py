"""MambaModel and MambaForCausalLM: transformers' names, keys and arguments."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from mambakit.decoding.transformers_steps import TransformersSteps
from mambakit.models.documents import Marks
from mambakit.models.generate import GenerativeMambaModel
from mambakit.models.inputs import one_cache, packing_of, shifted_labels
from mambakit.models.mamba.configuration import MambaConfig
from mambakit.models.outputs import MambaCausalLMOutput, MambaOutput
from mambakit.models.pretrained import MambaPreTrainedModel
from mambakit.models.quantization import require_learning
from mambakit.modules import MambaBlock, RMSNorm, StateCache, new_cache
from mambakit.modules.interception import is_ours
from mambakit.modules.placement import CacheHandle, computing_device, is_dispatched
from mambakit.ops._backends.memory import in_functorch
from mambakit.ops._releases import is_exporting


class MambaModel(MambaPreTrainedModel):
    """Embeddings, layers and final norm (arXiv 2312.00752, section 3.4)."""

    def __init__(self, config: MambaConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MambaBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def new_cache(self, batch_size: int) -> StateCache:
        """A zero state for ``batch_size`` rows, in this model's dtype, where its layers compute."""
        weight = next(self.norm_f.parameters())  # norm_f may be wrapped by another library's module
        devices = [computing_device(block) for block in self.layers]
        place = devices if len(set(devices)) > 1 else next(iter(devices), weight.device)
        return new_cache(self.config, batch_size, place, weight.dtype)

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: StateCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: StateCache | None = None,
        output_attentions: bool | None = None,
        cache: StateCache | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
    ) -> MambaOutput | tuple:
        """Run the model over new tokens.

        Args:
            input_ids: (b, l) int64; or ``inputs_embeds`` (b, l, h) in its place. cache_params: the state before the
            first token, for any number of tokens; it is updated in place. ``cache`` and ``past_key_values`` are other
            names of the argument.
            use_cache: make and return a state when none is given. None: the configuration's value, False in training.
            output_hidden_states: return the residual stream after each layer.
            return_dict: False for a tuple.
            attention_mask: (b, l), 0 where a token is padding, on any side or inside. Padding changes no state, and its
                outputs are zero. A mask that also covers the tokens already in the state is cut to the new ones.
            position_ids: (b, l). Positions that restart begin a new document: no state passes into it.
            cu_seqlens: (s + 1,) int32; ``input_ids`` is one row of s packed sequences. With a cache, sequence i
                continues slot i.
            seq_idx, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: documents, as collators for attention
                mark them. Those that are given must agree (`mambakit.models.documents`).
            output_attentions: must be false; there are no attentions.

        Returns:
            `MambaOutput`, or its fields that are not None as a tuple.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if output_attentions:
            raise ValueError("output_attentions=True: a Mamba model has no attentions; ask for output_hidden_states")
        cache = one_cache(cache=cache, cache_params=cache_params, past_key_values=past_key_values)
        config = self.config
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return_dict = config.return_dict if return_dict is None else return_dict
        if self.training and torch.is_grad_enabled():
            require_learning(self)
        # Without gradients there is no backward pass that recomputes: `generate` in train mode keeps its state.
        checkpointing = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        only_tensors = self._returns_only_tensors()
        if use_cache and cache is None and (checkpointing or only_tensors):
            why = "gradient checkpointing keeps no state" if checkpointing else f"{only_tensors} returns tensors alone"
            warnings.warn(f"use_cache=True: {why}, cache_params is None", stacklevel=2)
        if use_cache is None:
            # torch.func transforms functions of tensors: vmap cannot write into memory from outside of it.
            use_cache = config.use_cache and not self.training and not in_functorch()
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        b, length = x.shape[:2]
        marks = Marks(position_ids, cu_seqlens, seq_idx, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        packing = packing_of((b, length), x.device, attention_mask, marks, cache)
        if checkpointing and cache is not None:
            raise ValueError(
                "gradient checkpointing runs layers twice and would move the state twice; drop the cache, or call "
                "gradient_checkpointing_disable()"
            )
        if cache is None and use_cache and not (checkpointing or only_tensors):
            cache = self.new_cache(b if cu_seqlens is None else len(cu_seqlens) - 1)

        if packing is not None:
            x = packing.pack(x)
        unpack = (lambda t: t) if packing is None else (lambda t: packing.on(t.device).unpack(t))
        streams: list[Tensor] = []  # the residual stream that enters each layer; the first is the embeddings
        residual = None
        for block in self.layers:
            if checkpointing:
                x, residual = self._gradient_checkpointing_func(block.__call__, x, residual, None, packing)
            else:
                state = CacheHandle(cache) if cache is not None and is_dispatched(block) else cache
                x, residual = block(x, residual, state, packing)
            if output_hidden_states:  # else they would stay alive: 4 h bytes for each token and layer
                streams.append(residual)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        x, residual = self.norm_f(x, residual, wide if config.residual_in_fp32 else None)
        x = unpack(x)
        if cache is not None:
            cache.advance(length)
        hidden_states = None
        if output_hidden_states:
            hidden_states = (*(unpack(t) for t in [*streams[1:], residual][: len(streams)]), x)
        output = MambaOutput(last_hidden_state=x, cache=None if only_tensors else cache, hidden_states=hidden_states)
        return output if return_dict else output.to_tuple()

    def _returns_only_tensors(self) -> str:
        """The caller that takes tensors only, to which no state can be returned; "" where there is none."""
        if getattr(self, "_is_replica", False):
            return "a replica of DataParallel"
        return "an exported program" if is_exporting() or torch.jit.is_tracing() else ""


class MambaForCausalLM(GenerativeMambaModel):
    """`MambaModel` with a language modelling head, tied to the embeddings unless the configuration says otherwise."""

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}

    def __init__(self, config: MambaConfig):
        super().__init__(config)
        self.backbone = MambaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: StateCache | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: StateCache | None = None,
        output_attentions: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        cache: StateCache | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        steps: TransformersSteps | None = None,
    ) -> MambaCausalLMOutput | tuple:
        """Next-token logits, and the loss when ``labels`` are given. Arguments not listed are `MambaModel.forward`'s.

        Args:
            labels: (b, l) int64, the input tokens themselves: they are shifted here. -100, padding and the first token
                of each packed document add no loss.
            logits_to_keep: only the last this many positions' logits (0: all), or a tensor of positions.
            num_items_in_batch: divide the summed loss by this instead of the number of labels (gradient accumulation).
            steps: of a `generate` call under way: logits that it knows, or its fast step.

        Returns:
            `MambaCausalLMOutput` with ``logits`` (b, l, v) in float32.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        cache = one_cache(cache=cache, cache_params=cache_params, past_key_values=past_key_values)
        marks = Marks(position_ids, cu_seqlens, seq_idx, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        others = (attention_mask, inputs_embeds, labels)
        if all(t is None for t in others) and not (marks.given or output_hidden_states or output_attentions):
            logits = None if steps is None else steps.logits(input_ids, cache)
            if logits is not None:
                result = MambaCausalLMOutput(logits=logits[:, None], cache=cache)
                return result if return_dict else result.to_tuple()
        output = self.backbone(
            input_ids,
            inputs_embeds=inputs_embeds,
            cache_params=cache,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            attention_mask=attention_mask,
            output_attentions=output_attentions,
            **marks.given,
        )
        hidden = output.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits = self.lm_head(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        loss = None
        if labels is not None:
            if logits.shape[1] != labels.shape[1]:
                raise ValueError(
                    f"labels cover {labels.shape[1]} positions but logits_to_keep left {logits.shape[1]}; "
                    "leave logits_to_keep at 0 when training"
                )
            targets = shifted_labels(labels.to(logits.device), attention_mask, marks)
            loss = nn.functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), reduction="mean" if num_items_in_batch is None else "sum"
            )
            if num_items_in_batch is not None:
                loss = loss / num_items_in_batch
        result = MambaCausalLMOutput(loss=loss, logits=logits, cache=output.cache, hidden_states=output.hidden_states)
        return result if return_dict else result.to_tuple()

    def is_its_layers(self) -> bool:
        """Whether a call of the model only calls its layers in order, so that a caller may pause between them."""
        backbone = self.backbone
        ours = type(self).forward is MambaForCausalLM.forward and type(backbone).forward is MambaModel.forward
        return (
            ours and is_ours(self) and is_ours(backbone) and not self.training and len(backbone.layers) > 0
            and all(isinstance(block, MambaBlock) for block in backbone.layers)
        )  # fmt: skip
