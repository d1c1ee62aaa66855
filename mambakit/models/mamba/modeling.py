"""MambaModel and MambaForCausalLM: transformers' names, keys and arguments."""

from __future__ import annotations

from torch import Tensor, nn

from mambakit.decoding.transformers_steps import TransformersSteps
from mambakit.models.documents import Marks
from mambakit.models.generate import GenerativeMambaModel
from mambakit.models.inputs import one_cache
from mambakit.models.mamba.configuration import MambaConfig
from mambakit.models.mamba.forward import backbone_forward, cache_of, language_model_forward, only_calls_its_layers
from mambakit.models.outputs import MambaCausalLMOutput, MambaOutput
from mambakit.models.pretrained import MambaPreTrainedModel
from mambakit.modules import MambaBlock, RMSNorm, StateCache


class MambaModel(MambaPreTrainedModel):
    """Embeddings, layers and final norm (arXiv 2312.00752, section 3.4)."""

    output_type = MambaOutput

    def __init__(self, config: MambaConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MambaBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def new_cache(self, batch_size: int) -> StateCache:
        """A zero state for ``batch_size`` rows, in this model's dtype, where its layers compute."""
        return cache_of(self, batch_size)

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
            input_ids: (b, l) int64; or ``inputs_embeds`` (b, l, h) in its place.
            cache_params: the state before the first token, for any number of tokens; it is updated in place. ``cache``
                and ``past_key_values`` are other names of the argument.
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
        return backbone_forward(
            self, input_ids, inputs_embeds,
            one_cache(cache=cache, cache_params=cache_params, past_key_values=past_key_values),
            use_cache, output_hidden_states, return_dict, attention_mask,
            Marks(position_ids, cu_seqlens, seq_idx, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k),
            output_attentions,
        )  # fmt: skip


class MambaForCausalLM(GenerativeMambaModel):
    """`MambaModel` with a language modelling head, tied to the embeddings unless the configuration says otherwise."""

    output_type = MambaCausalLMOutput
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
        return language_model_forward(
            self, input_ids, attention_mask, inputs_embeds,
            one_cache(cache=cache, cache_params=cache_params, past_key_values=past_key_values),
            labels, output_hidden_states, return_dict, use_cache, logits_to_keep,
            Marks(position_ids, cu_seqlens, seq_idx, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k),
            output_attentions, num_items_in_batch, steps,
        )  # fmt: skip

    def is_its_layers(self) -> bool:
        """Whether a call of the model only calls its layers in order, so that a caller may pause between them."""
        ours = type(self).forward is MambaForCausalLM.forward and type(self.backbone).forward is MambaModel.forward
        return ours and only_calls_its_layers(self)
