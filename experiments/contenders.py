"""The two language models that are compared: equal vocabulary, width and number of parameters, one loss."""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.harness import half_precision, parameter_count
from experiments.transformer import Transformer, TransformerConfig
from mambakit import MambaConfig, MambaForCausalLM
from mambakit.ops import linear_cross_entropy

MAMBA, TRANSFORMER = "mamba", "transformer++"
Contender = MambaForCausalLM | Transformer


def make_mamba(
    vocab_size: int, hidden_size: int, layers: int, tied: bool = True, time_steps: tuple[float, float] = (1e-3, 0.1)
) -> MambaForCausalLM:
    """A new model; ``time_steps`` bound the initial Delta."""
    config = MambaConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, num_hidden_layers=layers, tie_word_embeddings=tied,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
        time_step_min=time_steps[0], time_step_max=time_steps[1], time_step_floor=min(1e-4, time_steps[0]),
    )  # fmt: skip
    return MambaForCausalLM(config).train()


def make_transformer(
    vocab_size: int, hidden_size: int, layers: int, parameters: int, head_size: int, max_length: int
) -> Transformer:
    """A Transformer++ of ``layers`` blocks with as nearly ``parameters`` as a SwiGLU width that 8 divides allows."""
    fixed = vocab_size * hidden_size + layers * (4 * hidden_size**2 + 2 * hidden_size) + hidden_size
    feed_forward = 8 * max(1, round((parameters - fixed) / (layers * 3 * hidden_size * 8)))
    config = TransformerConfig(vocab_size, hidden_size, layers, feed_forward, head_size, max_length)
    return Transformer(config).train()


def make_contender(
    kind: str, vocab_size: int, hidden_size: int, mamba_layers: int, head_size: int, max_length: int
) -> Contender:
    """A Mamba of ``mamba_layers``, or the Transformer++ of half as many blocks and equally many parameters."""
    if kind == MAMBA:
        return make_mamba(vocab_size, hidden_size, mamba_layers)
    if kind != TRANSFORMER:
        raise ValueError(f"unknown model {kind!r}; choose {MAMBA} or {TRANSFORMER}")
    with torch.device("meta"):
        wanted = parameter_count(make_mamba(vocab_size, hidden_size, mamba_layers))
    return make_transformer(vocab_size, hidden_size, max(1, mamba_layers // 2), wanted, head_size, max_length)


def hidden_states(model: Contender, tokens: Tensor) -> Tensor:
    """(b, l) -> (b, l, h), what the head reads."""
    if isinstance(model, MambaForCausalLM):
        return model.backbone(tokens, use_cache=False).last_hidden_state
    return model(tokens)


def head_weight(model: Contender) -> Tensor:
    """(v, h)."""
    return model.lm_head.weight if isinstance(model, MambaForCausalLM) else model.embeddings.weight


def next_token_loss(model: Contender, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of ``targets`` (b, l) given ``tokens`` (b, l); targets of -100 are left out."""
    with half_precision(tokens.device):
        hidden = hidden_states(model, tokens).flatten(0, 1)
        return linear_cross_entropy(hidden, head_weight(model), targets.flatten())
