"""Configurations that between them turn every field of MambaConfig."""

from __future__ import annotations

import torch
import transformers

import mambakit
from tests.ops.closeness import worst as worst

BASE = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.1}

MAMBA = {
    "plain": {},
    "use_bias": {"use_bias": True},
    "no_conv_bias": {"use_conv_bias": False},
    "conv_kernel_3": {"conv_kernel": 3},
    "conv_kernel_2_bias": {"conv_kernel": 2, "use_bias": True},
    "state_size_8": {"state_size": 8},
    "state_size_64": {"state_size": 64},
    "expand_3": {"expand": 3},
    "time_step_rank_7": {"time_step_rank": 7},
    "untied": {"tie_word_embeddings": False},
    "odd_hidden_size": {"hidden_size": 27, "num_hidden_layers": 3},
    "odd_everything": {
        "hidden_size": 21,
        "state_size": 5,
        "expand": 1,
        "conv_kernel": 5,
        "time_step_rank": 1,
        "use_bias": True,
    },
    "gelu": {"hidden_act": "gelu"},
    "residual_in_model_dtype": {"residual_in_fp32": False},
    "epsilon": {"layer_norm_epsilon": 1e-2},
    "time_step_init": {
        "time_step_init_scheme": "constant",
        "time_step_scale": 2.0,
        "time_step_min": 0.01,
        "time_step_max": 0.5,
        "time_step_floor": 0.02,
    },
}
FALCON = {
    "falcon": {},
    "falcon_eps": {"mixer_rms_eps": 1e-2, "use_bias": True},
    "falcon_odd": {"hidden_size": 27, "state_size": 8, "tie_word_embeddings": False},
}
NAMES = [*MAMBA, *FALCON]


def pair(name: str):
    """(ours, transformers') MambaForCausalLM or FalconMambaForCausalLM with the same random weights, float32, eval
    mode."""
    falcon = name in FALCON
    fields = {**BASE, **(FALCON if falcon else MAMBA)[name]}
    if falcon:
        ours = mambakit.FalconMambaForCausalLM(mambakit.FalconMambaConfig(**fields))
        theirs = transformers.FalconMambaForCausalLM(transformers.FalconMambaConfig(**fields))
    else:
        ours = mambakit.MambaForCausalLM(mambakit.MambaConfig(**fields))
        theirs = transformers.MambaForCausalLM(transformers.MambaConfig(**fields))
    with torch.no_grad():  # biases and norms start at 0 and 1, where a mistake could hide
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours.eval(), theirs.eval()


def tokens(b: int, length: int, vocab: int = 61) -> torch.Tensor:
    return torch.randint(1, vocab, (b, length))
