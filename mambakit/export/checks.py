"""What every export asks of a model before it is written, and how a written one is compared with it afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mambakit.errors import CheckpointError
from mambakit.modules.cache import MambaCache

FAMILIES = ("mamba", "falcon_mamba")
"""Model types whose causal language models are exported."""
LIMIT = 1e-4
"""Of a logit's or a state's error, relative to the largest of its tensor."""
LARGEST_BATCH = 4096


def require_exportable(model: Any, only_silu: str = "") -> None:
    """CheckpointError unless ``model`` is a causal language model with a state.

    Args:
        only_silu: what is written, where it has no other activation.
    """
    config = model.config
    if not hasattr(model, "lm_head") or config.model_type not in FAMILIES:
        raise CheckpointError(
            f"a causal language model ({', '.join(FAMILIES)}) is exported, not a {type(model).__name__} "
            f"({config.model_type})"
        )
    if only_silu and config.hidden_act not in ("silu", "swish"):
        raise CheckpointError(f"hidden_act is {config.hidden_act!r}; {only_silu} has silu alone")
    if not config.num_hidden_layers:
        raise CheckpointError("the model has no layers, and so no state to give")


def require_same(model: Any, what: str, run: Callable[..., Iterable[Tensor]], pieces: tuple[int, ...]) -> float:
    """Run what was written beside the model, at two batches, piece after piece of a text.

    Args:
        what: was written, for errors.
        run: (input_ids (b, l), conv_states, ssm_states) -> (logits (b, l, v), both states after the tokens).
        pieces: the number of tokens of each.

    Returns:
        The largest difference, relative to the largest value of its tensor.

    Raises:
        CheckpointError: it is beyond `LIMIT`.
    """
    worst = 0.0
    with torch.no_grad():
        for batch in (1, 3):
            generator = torch.Generator().manual_seed(batch)
            ids = torch.randint(
                0, model.config.vocab_size, (batch, sum(pieces)), generator=generator, dtype=torch.int64, device="cpu"
            ).to(model.device)
            cache = MambaCache(model.config, batch, model.device, model.dtype)
            states = [cache.conv_states.clone(), cache.ssm_states.clone()]
            for piece in ids.split(pieces, 1):
                expected = model(piece, cache_params=cache, use_cache=True).logits
                logits, *states = run(piece.contiguous(), *states)
                wanted = (expected, cache.conv_states, cache.ssm_states)
                worst = max(worst, *map(_difference, (logits, *states), wanted))
    if not worst <= LIMIT:
        raise CheckpointError(f"{what} differs from the model by {worst:.1e}, more than {LIMIT:g}")
    return worst


def _difference(found: Tensor, wanted: Tensor) -> float:
    if not wanted.numel():  # a convolution of one tap has no window
        return 0.0
    largest = wanted.double().abs().max().clamp(min=1e-30)
    return ((found.double() - wanted.double()).abs().max() / largest).item()
