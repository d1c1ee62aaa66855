"""mamba_ssm's models: `create_block`, `MixerModel`, `MambaLMHeadModel`, and their initial values."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections import namedtuple
from typing import Any

import torch
from torch import Tensor, nn

from mambakit.compat.block import Block, added_and_normalized
from mambakit.compat.generation import GenerationMixin
from mambakit.compat.hub import load_config_hf, load_state_dict_hf
from mambakit.compat.mamba import Mamba
from mambakit.compat.mlp import GatedMLP
from mambakit.compat.norm import RMSNorm
from mambakit.compat.replaced import MODEL

CausalLMOutput = namedtuple("CausalLMOutput", ["logits"])


@dataclasses.dataclass
class MambaConfig:
    """mamba_ssm's configuration: its fields, in its order, with its defaults."""

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict = dataclasses.field(default_factory=dict)
    attn_layer_idx: list = dataclasses.field(default_factory=list)
    attn_cfg: dict = dataclasses.field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True


def create_block(
    d_model: int,
    d_intermediate: int = 0,
    ssm_cfg: dict[str, Any] | None = None,
    attn_layer_idx: list[int] | None = None,
    attn_cfg: dict[str, Any] | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: int | None = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> Block:
    """A block of a Mamba mixer.

    Raises:
        NotImplementedError: a layer of attention, or of Mamba-2 or 3.
    """
    if isinstance(d_intermediate, dict):  # (d_model, ssm_cfg, ...) of releases up to 1.2
        raise TypeError(f"create_block: d_intermediate is {d_intermediate!r}; pass ssm_cfg= by name")
    if layer_idx in (attn_layer_idx or []):
        raise NotImplementedError(
            f"layer {layer_idx} is one of attention (attn_layer_idx = {attn_layer_idx}); mambakit has Mamba-1 layers"
        )
    fields = dict(ssm_cfg or {})
    kind = fields.pop("layer", "Mamba1")
    if kind != "Mamba1":
        raise NotImplementedError(f"ssm_cfg has layer = {kind!r}; mambakit has Mamba-1 layers (layer = 'Mamba1')")
    factory = {"device": device, "dtype": dtype}
    mixer = functools.partial(MODEL.get("Mamba", Mamba), layer_idx=layer_idx, **fields, **factory)
    norm = functools.partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **factory)
    mlp: Any = nn.Identity
    if d_intermediate:
        mlp = functools.partial(GatedMLP, hidden_features=d_intermediate, out_features=d_model, **factory)
    make: Any = MODEL.get("Block", Block)
    block = make(d_model, mixer, mlp, norm_cls=norm, fused_add_norm=fused_add_norm, residual_in_fp32=residual_in_fp32)
    block.layer_idx = layer_idx
    return block


def init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:
    """mamba_ssm's ``_init_weights``, for ``model.apply``.

    Biases of linear layers start at 0 unless marked ``_no_reinit``, embeddings as N(0, ``initializer_range``), and the
    end of each residual branch uniform within 1 / sqrt(inputs * n_layer * n_residuals_per_layer).
    """
    if isinstance(module, nn.Linear):
        if module.bias is not None and not getattr(module.bias, "_no_reinit", False):
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    if not rescale_prenorm_residual:
        return
    for name, parameter in module.named_parameters():
        if name in ("out_proj.weight", "fc2.weight"):
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
            with torch.no_grad():
                parameter.div_(math.sqrt(n_residuals_per_layer * n_layer))


class MixerModel(nn.Module):
    """Embedding, blocks and the last norm. Upstream's arguments; ``initializer_cfg`` are those of ``_init_weights``."""

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        d_intermediate: int = 0,
        vocab_size: int | None = None,
        ssm_cfg: dict[str, Any] | None = None,
        attn_layer_idx: list[int] | None = None,
        attn_cfg: dict[str, Any] | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        initializer_cfg: dict[str, Any] | None = None,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if vocab_size is None:  # (d_model, n_layer, vocab_size, ...) of releases up to 1.2
            raise TypeError("MixerModel: there is no vocab_size; pass vocab_size= by name")
        factory = {"device": device, "dtype": dtype}
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.embedding = nn.Embedding(vocab_size, d_model, **factory)
        self.layers = nn.ModuleList(
            MODEL.get("create_block", create_block)(
                d_model, d_intermediate=d_intermediate, ssm_cfg=ssm_cfg, attn_layer_idx=attn_layer_idx,
                attn_cfg=attn_cfg, norm_epsilon=norm_epsilon, rms_norm=rms_norm, residual_in_fp32=residual_in_fp32,
                fused_add_norm=fused_add_norm, layer_idx=layer_idx, **factory,
            )
            for layer_idx in range(n_layer)
        )  # fmt: skip
        self.norm_f = (RMSNorm if rms_norm else nn.LayerNorm)(d_model, eps=norm_epsilon, **factory)
        residuals = 2 if d_intermediate else 1
        fields = {"n_residuals_per_layer": residuals, **(initializer_cfg or {})}
        self.apply(functools.partial(MODEL.get("_init_weights", init_weights), n_layer=n_layer, **fields))

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, tuple[Tensor, Tensor]]:
        layers: Any = self.layers
        return {
            i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
            for i, layer in enumerate(layers)
        }

    def forward(self, input_ids: Tensor, inference_params: Any = None, **mixer_kwargs: Any) -> Tensor:
        """(b, l) token ids -> (b, l, d_model)."""
        x, residual = self.embedding(input_ids), None
        layers: Any = self.layers
        for layer in layers:
            x, residual = layer(x, residual, inference_params=inference_params, **mixer_kwargs)
        return added_and_normalized(self.norm_f, x, residual, self.fused_add_norm, self.residual_in_fp32)[0]


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """mamba_ssm's language model: `MixerModel` and a head, whose weight is the embedding's where they are tied.

    Its weights are mambakit's own under upstream's names: `save_pretrained` writes what
    `mambakit.AutoModelForCausalLM` and upstream read, and `from_pretrained` reads what they write in this format.
    """

    def __init__(
        self,
        config: MambaConfig,
        initializer_cfg: dict[str, Any] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.config = config
        multiple = config.pad_vocab_size_multiple
        vocab_size = -(-config.vocab_size // multiple) * multiple
        factory = {"device": device, "dtype": dtype}
        self.backbone = MODEL.get("MixerModel", MixerModel)(
            d_model=config.d_model, n_layer=config.n_layer, d_intermediate=config.d_intermediate,
            vocab_size=vocab_size, ssm_cfg=config.ssm_cfg, attn_layer_idx=config.attn_layer_idx,
            attn_cfg=config.attn_cfg, rms_norm=config.rms_norm, initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm, residual_in_fp32=config.residual_in_fp32, **factory,
        )  # fmt: skip
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False, **factory)
        start = MODEL.get("_init_weights", init_weights)
        self.apply(functools.partial(start, n_layer=config.n_layer, **(initializer_cfg or {})))
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, tuple[Tensor, Tensor]]:
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params: Any = None,
        num_last_tokens: int = 0,
        **mixer_kwargs: Any,
    ) -> CausalLMOutput:
        """(b, l) token ids -> logits (b, l, v), or of the last ``num_last_tokens`` tokens alone.

        ``position_ids`` is there for callers that have one; a Mamba layer has no positions.
        """
        x = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        if num_last_tokens > 0:
            x = x[:, -num_last_tokens:]
        return CausalLMOutput(self.lm_head(x))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str | os.PathLike,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> MambaLMHeadModel:
        """A model in the original format, from a folder or a hub id."""
        fields = MODEL.get("load_config_hf", load_config_hf)(pretrained_model_name)
        known = {field.name for field in dataclasses.fields(MambaConfig)}
        if unknown := sorted(fields.keys() - known):
            raise ValueError(
                f"the config.json of {pretrained_model_name} has fields that mamba_ssm's MambaConfig has not: "
                f"{', '.join(unknown[:5])}; a model in transformers' format opens with "
                "mambakit.AutoModelForCausalLM, and `mambakit convert FROM TO --to original` rewrites it"
            )
        model = cls(MambaConfig(**fields), device=device, dtype=dtype, **kwargs)
        load = MODEL.get("load_state_dict_hf", load_state_dict_hf)
        tensors = load(pretrained_model_name, device=device, dtype=dtype)
        tied = ("lm_head.weight", "backbone.embedding.weight")
        if model.config.tie_embeddings and (there := [name for name in tied if name in tensors]):
            # safetensors keeps one name of a tensor that has two.
            tensors = {**dict.fromkeys(tied, tensors[there[-1]]), **tensors}
        model.load_state_dict(tensors)
        return model

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """config.json and pytorch_model.bin."""
        os.makedirs(save_directory, exist_ok=True)
        torch.save(self.state_dict(), os.path.join(save_directory, "pytorch_model.bin"))
        with open(os.path.join(save_directory, "config.json"), "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(self.config), file, indent=4)
