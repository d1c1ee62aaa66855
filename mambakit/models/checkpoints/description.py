"""`describe`: what a checkpoint is, from its headers alone."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from mambakit.models.auto import read_any_configuration
from mambakit.models.checkpoints.storage import has_tokenizer, read_config, read_headers, resolve, weight_files
from mambakit.models.checkpoints.table import format_of
from mambakit.models.families import FAMILIES

_SHOWN = (
    "hidden_size", "num_hidden_layers", "state_size", "expand", "conv_kernel", "time_step_rank", "vocab_size",
    "use_bias", "use_conv_bias", "tie_word_embeddings",
)  # fmt: skip


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint is, from its headers alone."""

    name: str
    folder: str
    format: str
    architecture: str
    config: dict[str, Any]
    parameters: int
    dtypes: dict[str, int]
    """Parameters of each dtype."""
    files: dict[str, int]
    """Bytes of each weight file."""
    state_bytes: int
    """Bytes of the state of one sequence."""
    tokenizer: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe(name: str | os.PathLike, **hub: Any) -> CheckpointInfo:
    """Read what a checkpoint is without loading its weights.

    Args:
        name: hub id, folder or GGUF file.
        hub: where it is on the hub, as of `storage.resolve`.

    Raises:
        CheckpointError: it cannot be read, or is of another architecture.
    """
    folder = resolve(name, **hub)
    config, _ = read_any_configuration(folder)
    format = format_of(folder, read_config(folder)[0])
    files = weight_files(folder)
    found = read_headers(files)
    embeddings = any(format.name_in_model(stored).endswith("embeddings.weight") for stored in found)
    tied_copy = config.tie_word_embeddings and embeddings
    dtypes: dict[str, int] = {}
    for stored, tensor in found.items():
        if tied_copy and stored in ("lm_head.weight", "lm_head.data"):
            continue
        kind, count = format.count(stored, tensor, config)
        if count:
            dtypes[kind] = dtypes.get(kind, 0) + count
    return CheckpointInfo(
        name=str(name), folder=str(folder), format=format.name, architecture=FAMILIES[config.model_type].prefix,
        config={field: getattr(config, field) for field in _SHOWN},
        parameters=sum(dtypes.values()), dtypes=dtypes, files={f.name: f.stat().st_size for f in files},
        state_bytes=config.state_spec(format.dtype(found)).nbytes, tokenizer=has_tokenizer(folder),
    )  # fmt: skip
