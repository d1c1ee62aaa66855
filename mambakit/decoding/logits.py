"""The logits of a chunk's last tokens, detection of NaN in logits, and the error messages for users."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambakit.errors import LogitsError

NO_CHOICE = (
    "the model's logits are NaN or infinite, no token can be chosen from them; check its weights, "
    "or load it in a dtype with a larger range (float16 ends at 65,504: bfloat16 or float32)"
)

NO_SCORE = (
    "the model's log-probabilities are NaN; check its weights, "
    "or load it in a dtype with a larger range (float16 ends at 65,504: bfloat16 or float32)"
)


def require_numbers(log_probs: Tensor) -> Tensor:
    """The same log-probabilities, checked with a device-to-host sync.

    Raises:
        LogitsError: some are NaN.
    """
    if bool(log_probs.isnan().any()):
        raise LogitsError(NO_SCORE)
    return log_probs


def are_numbers(logits: Tensor, tokens: Tensor) -> Tensor:
    """(b,) bool: whether ``logits`` (b, v) are not NaN at ``tokens`` (b,).

    With the most probable token this checks the whole row, because argmax returns a NaN if there is one. After a text's
    end the token may be padding, even a negative one.
    """
    return ~logits.gather(-1, tokens.clamp(min=0)[:, None])[:, 0].isnan()


def last_logits(model: Any, hidden: Tensor) -> Tensor:
    """(b, v) logits of (b, 1, h), float32 (float64 in a float64 model)."""
    logits: Tensor = model.lm_head(hidden)[:, -1]
    return logits if logits.dtype == torch.float64 else logits.float()
