"""BiMambaConfig: `MambaConfig`'s fields, and two of its own."""

from __future__ import annotations

from typing import Any

import torch

from mambakit.models.mamba.configuration import MambaConfig
from mambakit.modules.state_spec import StateSpec
from mambakit.quoting import brief


class BiMambaConfig(MambaConfig):
    """Configuration of a model that reads in both directions.

    Fields besides `MambaConfig`'s:

    - ``tie_projections``: the two directions of a layer share in_proj and out_proj, most of its weights.
    - ``complement``: for each token of the vocabulary its complement's number; the model is then equivariant to the
      reverse complement. None: it reads one strand. A token that has none is its own.
    """

    model_type = "bimamba"
    tie_projections: bool = True
    complement: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if type(self.tie_projections) is not bool:
            raise ValueError(f"tie_projections is {brief(self.tie_projections)}; it must be true or false")
        if self.complement is not None:
            _check_complement(self.complement, self.vocab_size)

    def state_spec(self, dtype: torch.dtype | str | None = None) -> StateSpec:
        """No layer has a state: what follows a token counts as much as what came before it."""
        kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
        return StateSpec(((),) * self.num_hidden_layers, kind, {"model_type": self.model_type})


def _check_complement(complement: Any, vocab_size: int) -> None:
    """ValueError unless ``complement`` gives every token a token, whose complement it is."""
    whole = isinstance(complement, list) and all(type(token) is int for token in complement)
    if not whole or len(complement) != vocab_size:
        count = len(complement) if isinstance(complement, list) else brief(complement)
        raise ValueError(
            f"complement has {count} entries, the vocabulary {vocab_size} tokens; give a list of one number for each"
        )
    for token, other in enumerate(complement):
        if not 0 <= other < vocab_size or complement[other] != token:
            raise ValueError(
                f"complement[{token}] is {other}, which must be a token whose complement is {token}; a token without "
                "one is its own"
            )
