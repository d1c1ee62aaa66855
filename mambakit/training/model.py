"""The model a run trains: new, or a checkpoint's, whole or through adapters."""

from __future__ import annotations

import functools
from typing import Any

import torch
from rich.console import Console
from torch.utils.checkpoint import checkpoint

from mambakit.models.auto import AutoModelForCausalLM
from mambakit.models.mamba.configuration import MambaConfig
from mambakit.models.mamba.modeling import MambaForCausalLM
from mambakit.models.quantization import is_quantized
from mambakit.modules import MambaMixer
from mambakit.output import say
from mambakit.training.config import TrainConfig
from mambakit.training.lora import add_adapters
from mambakit.training.state_tuning import add_initial_state, freeze_weights
from mambakit.training.tokenizer import Vocabulary


def make_model(config: TrainConfig, vocabulary: Vocabulary, console: Console) -> Any:
    """The model in training mode on the CPU, its parameters float32; packed weights are unpacked."""
    model = _load(config, vocabulary, console) if config.init_from else _new(config, vocabulary)
    if config.tune == "state":
        freeze_weights(model)
    if config.lora_rank:
        add_adapters(model, config.lora_rank, config.lora_alpha, config.lora_targets)
    if config.activation_checkpointing:
        # What gradient_checkpointing_enable sets, under the one name that all releases of transformers share.
        model.backbone.gradient_checkpointing = True
        model.backbone._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
    if config.recompute_selection:
        recompute_selection(model)
    return model.train()


def recompute_selection(model: Any) -> None:
    """Have every layer compute its convolution and time steps again in the backward pass, in place of keeping them.

    Raises:
        ValueError: layers that cannot: those with another activation, or with adapters on x_proj or dt_proj.
    """
    for mixer in (module for module in model.modules() if isinstance(module, MambaMixer)):
        if not mixer.can_fuse():
            raise ValueError(
                "recompute_selection takes Mamba layers with SiLU, without adapters on x_proj and dt_proj; this "
                f"{model.config.model_type} model has others; set activation_checkpointing instead"
            )
        mixer.recompute_selection = True


def _load(config: TrainConfig, vocabulary: Vocabulary, console: Console) -> Any:
    model = AutoModelForCausalLM.from_pretrained(config.init_from, dtype=torch.float32)
    if config.tune == "state":
        add_initial_state(model)
    if is_quantized(model.config):
        packing = model.config.quantization_config["format"]
        model.dequantize()
        say(console, f"{config.init_from} is quantised ({packing}): dequantised to float32, which learns")
    if model.config.vocab_size < vocabulary.size:
        raise ValueError(
            f"the tokenizer has {vocabulary.size} tokens but {config.init_from} only {model.config.vocab_size}; "
            "leave `tokenizer` empty to take the checkpoint's own"
        )
    return model


def _new(config: TrainConfig, vocabulary: Vocabulary) -> MambaForCausalLM:
    return MambaForCausalLM(
        MambaConfig(
            vocab_size=-(-vocabulary.size // 8) * 8,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            state_size=config.state_size,
            expand=config.expand,
            conv_kernel=config.conv_kernel,
            tie_word_embeddings=config.tie_word_embeddings,
            bos_token_id=vocabulary.end,
            eos_token_id=vocabulary.end,
            pad_token_id=vocabulary.end,
        )
    )
