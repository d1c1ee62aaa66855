"""The limits of a training configuration's fields, checked before anything is read or made."""

from __future__ import annotations

import math
import re
from typing import Any

from mambakit.errors import UsageError

_MOST = 2**31 - 1
# field -> (least, most), both included.
_WHOLE = {
    "vocab_size": (1, _MOST), "sample_rate": (0, _MOST), "sequence_length": (1, _MOST), "initial_length": (0, _MOST),
    "hidden_size": (1, 2**20), "num_hidden_layers": (1, 2**12), "state_size": (1, 2**16), "expand": (1, 2**10),
    "conv_kernel": (1, 2**10), "lora_rank": (0, 2**16), "batch_size": (1, _MOST), "accumulate": (1, _MOST),
    "max_skipped": (1, _MOST), "steps": (0, _MOST), "context_parallel": (1, _MOST), "seed": (0, 2**63 - 1),
    "log_every": (1, _MOST), "eval_every": (1, _MOST), "checkpoint_every": (0, _MOST), "keep_checkpoints": (1, _MOST),
    "early_stopping_patience": (0, _MOST),
}  # fmt: skip
# field -> (least, most, what it must be)
_REAL: dict[str, tuple[float, float, str]] = {
    "validation_fraction": (0, math.nextafter(1, 0), "from 0 up to but not 1"),
    "warmup": (0, math.nextafter(1, 0), "a fraction of the run, from 0 up to but not 1"),
    "fresh_rows": (0, 1, "a fraction of the rows, 0 to 1"),
    "lora_alpha": (0, math.inf, "0 or more"),
    "learning_rate": (math.nextafter(0, 1), math.inf, "above 0"),
    "final_learning_rate": (0, math.inf, "0 or more"),
    "weight_decay": (0, math.inf, "0 or more"),
    "beta1": (0, math.nextafter(1, 0), "from 0 up to but not 1"),
    "beta2": (0, math.nextafter(1, 0), "from 0 up to but not 1"),
    "clip": (math.nextafter(0, 1), math.inf, "above 0"),
    "epochs": (math.nextafter(0, 1), math.inf, "above 0"),
    "max_minutes": (0, math.inf, "0 or more"),
}
# Strings that may be empty; each field's explanation says what an empty one means.
_MAY_BE_EMPTY = {"tokenizer", "token_cache", "init_from", "separator", "sample_prompt"}
_SHARD_SIZE = re.compile(r"\d+(\.\d+)?\s*[KMGT]B", re.IGNORECASE)


def check_limits(config: Any) -> None:
    """UsageError for a number outside of its limits, an empty text, or a malformed size."""
    for name, value in vars(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{name} is {value}; it must be a finite number")
        if isinstance(value, str):
            _require_text(name, value)
        if isinstance(value, list):
            for item in value:
                if not item.strip():
                    raise UsageError(f"{name} holds an empty name ({item!r}); remove it (is a variable not set?)")
    for name, (low, high) in _WHOLE.items():
        value = getattr(config, name)
        if not low <= value <= high:
            limits = f"{low} or more" if value < low else f"at most {high}"
            raise UsageError(f"{name} is {value}; it must be {limits}")
    for name, (least, most, what) in _REAL.items():
        if not least <= getattr(config, name) <= most:
            raise UsageError(f"{name} is {getattr(config, name)}; it must be {what}")
    if not _SHARD_SIZE.fullmatch(config.max_shard_size.strip()):
        raise UsageError(f"max_shard_size is {config.max_shard_size!r}; give a number and KB, MB, GB or TB, as in 5GB")


def _require_text(name: str, value: str) -> None:
    if value.strip() or (name in _MAY_BE_EMPTY and (not value or name in ("separator", "sample_prompt"))):
        return
    raise UsageError(f"{name} is empty ({value!r}); give it a value, or leave it out (is a variable not set?)")
