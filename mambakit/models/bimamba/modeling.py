"""BiMambaModel: embeddings, layers of two directions, final norm; two strands where there is a complement."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from mambakit.models.bimamba.configuration import BiMambaConfig
from mambakit.models.documents import Marks
from mambakit.models.inputs import packing_of, require_inputs
from mambakit.models.outputs import MambaOutput
from mambakit.models.pretrained import MambaPreTrainedModel
from mambakit.modules import MambaMixer, RMSNorm
from mambakit.modules.packing import Packing

_SHARED = ("in_proj", "out_proj")


class BiMambaBlock(nn.Module):
    """Norm, then the sum of a mixer that reads forwards and one that reads backwards; residual as in `MambaBlock`."""

    def __init__(self, config: BiMambaConfig, layer_idx: int):
        super().__init__()
        self.residual_in_fp32, self.tied = config.residual_in_fp32, config.tie_projections
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = MambaMixer(config, layer_idx)
        self.backward_mixer = MambaMixer(config, layer_idx)
        if self.tied:
            for name in _SHARED:
                delattr(self.backward_mixer, name)
            self._share()

    def _share(self) -> None:
        """Let the backward mixer read the forward one's projections, whatever these are now (adapted, say).

        They stand in its dictionary and not among its modules: the weights have one name.
        """
        for name in _SHARED:
            self.backward_mixer.__dict__[name] = getattr(self.mixer, name)

    def forward(self, x: Tensor, residual: Tensor | None, packing: Packing | None) -> tuple[Tensor, Tensor]:
        """(b, l, h) output of the layer before, and the residual stream; both after this layer."""
        if self.tied:
            self._share()
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        y, residual = self.norm(x, residual, wide if self.residual_in_fp32 else self.norm.weight.dtype)
        backwards = self.backward_mixer(y.flip(1), None, None if packing is None else _reversed(packing))
        return self.mixer(y, None, packing) + backwards.flip(1), residual


def _reversed(packing: Packing) -> Packing:
    """The sequences of the packed row that is read from its end."""
    cu_seqlens = packing.cu_seqlens
    return replace(packing, cu_seqlens=(cu_seqlens[-1] - cu_seqlens.flip(0)).contiguous(), _elsewhere={})


class BiMambaModel(MambaPreTrainedModel):
    """Reads each token with all that is before and after it.

    With a complement it reads both strands with the same weights: `forward` gives (b, l, 2 h), the given strand's
    states, and those of the other strand at the same places. Of the reverse complement it gives the halves swapped and
    the places reversed.
    """

    config_class = BiMambaConfig
    _no_split_modules = ["BiMambaBlock"]

    def __init__(self, config: BiMambaConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(BiMambaBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def quantize(self, format: str, group: int | None = None) -> BiMambaModel:
        raise ValueError("a bidirectional model decodes no tokens, and its weights are not packed; keep it plain")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MambaOutput | tuple:
        """Run the model.

        Args:
            input_ids: (b, l) int64; or ``inputs_embeds`` (b, l, h) in its place, of a model without a complement.
            attention_mask: (b, l), 0 where a token is padding. Padding changes nothing, and its outputs are zero.
            cu_seqlens: (s + 1,) int32; ``input_ids`` is one row of s packed sequences.
            output_hidden_states: return the residual stream after each layer.

        Returns:
            `MambaOutput` with ``last_hidden_state`` (b, l, h), or (b, l, 2 h) of both strands; without a state.
        """
        require_inputs(input_ids, inputs_embeds)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        given = (attention_mask, cu_seqlens, bool(wanted))
        if self.config.complement is None:
            streams = self._read(self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds, *given)
        elif input_ids is None:
            raise ValueError("inputs_embeds has no complement; give input_ids")
        else:
            mask = None if attention_mask is None else attention_mask.flip(1)
            cuts = None if cu_seqlens is None else (cu_seqlens[-1] - cu_seqlens.flip(0)).to(cu_seqlens.dtype)
            other = self._read(self.embeddings(self.complement_of(input_ids).flip(1)), mask, cuts, bool(wanted))
            both = zip(self._read(self.embeddings(input_ids), *given), other, strict=True)
            streams = [torch.cat([strand, there.flip(1)], -1) for strand, there in both]
        output = MambaOutput(last_hidden_state=streams[-1], hidden_states=tuple(streams) if wanted else None)
        return output if return_dict else output.to_tuple()

    def complement_of(self, tokens: Tensor) -> Tensor:
        """The complement of each token, at its place."""
        table = torch.tensor(self.config.complement, dtype=torch.int64, device=tokens.device)
        return table[tokens]

    def _read(
        self, x: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None, all_layers: bool
    ) -> list[Tensor]:
        """The residual stream after each layer where ``all_layers``, and the last hidden state: each (b, l, h)."""
        marks = Marks(None, cu_seqlens, None, None, None, None, None)
        packing = packing_of((x.shape[0], x.shape[1]), x.device, attention_mask, marks, None)
        unpack = (lambda t: t) if packing is None else packing.unpack
        x = x if packing is None else packing.pack(x)
        residual, streams = None, []
        checkpointing = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for block in self.layers:
            if checkpointing:
                x, residual = self._gradient_checkpointing_func(block.__call__, x, residual, packing)
            else:
                x, residual = block(x, residual, packing)
            streams.append(residual)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        x, residual = self.norm_f(x, residual, wide if self.config.residual_in_fp32 else None)
        kept = [*streams[1:], residual][: len(streams)] if all_layers else []
        return [unpack(t) for t in (*kept, x)]
