"""A tiny model with a real tokenizer, in a folder."""

from __future__ import annotations

from pathlib import Path

import torch

import mambakit
from mambakit.training.tokenizer import save_tokenizer, train_tokenizer
from tests.models.configurations import pair

TEXT = "The cat sat on the mat, and the dog — naïve, tired — slept by the fire. " * 50 + "日本語の文字 🙂 " * 20


def save_tiny(folder: Path, **fields) -> mambakit.MambaForCausalLM:
    """Save a random model of 2 layers with a byte-level BPE of 300 tokens."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([TEXT], 300)
    config = mambakit.MambaConfig(
        **{"vocab_size": 304, "hidden_size": 24, "num_hidden_layers": 2, "initializer_range": 0.3, **fields}
    )
    model = mambakit.MambaForCausalLM(config).eval()
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return model


@torch.no_grad()
def with_own_embeddings(format: str) -> tuple[mambakit.MambaForCausalLM, torch.Tensor]:
    """A tied model as it was quantised before its embeddings were rounded with the head, and those embeddings."""
    model = pair("plain")[0]
    embeddings = model.backbone.embeddings.weight.clone()
    model.quantize(format)
    model.backbone.embeddings.weight.copy_(embeddings)
    return model, embeddings
