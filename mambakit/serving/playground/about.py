"""What the page must know of the model: the size of its state, and of what a Transformer would hold in its place."""

from __future__ import annotations

from typing import Any

_HALF = 2  # bytes of a number in a Transformer's cache, which is kept in 16 bits


def about(model: str) -> dict[str, Any]:
    """Facts of a checkpoint, from its configuration.

    ``transformer_bytes_per_token``: keys and values, in 16 bits, of a Transformer of the same number of parameters,
    whose layers have about twice those of a Mamba layer of the same width (12 h^2 and 6 h^2), without grouped queries.
    """
    from mambakit.models.auto import AutoConfig

    config = AutoConfig.from_pretrained(model)
    layers = config.num_hidden_layers
    return {
        "layers": layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "state_bytes": config.state_spec().nbytes,
        "transformer_bytes_per_token": 2 * max(1, layers // 2) * config.hidden_size * _HALF,
    }
