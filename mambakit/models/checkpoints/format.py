"""The contract of a checkpoint format. To add one, write a class that implements it and a line in `table.FORMATS`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from mambakit.errors import CheckpointError
from mambakit.models.checkpoints.storage import StoredTensor


@dataclass
class Loading:
    """A request to load a model.

    Attributes:
        cls: the model class.
        config: its configuration.
        folder: holds the checkpoint.
        name: of the checkpoint, as the caller gave it.
        dtype: of the weights, as the caller gave it: a dtype, its name, "auto", or None.
        use_safetensors: transformers' argument: True or False where the caller wants one kind of file.
        args, kwargs: transformers' remaining arguments of ``from_pretrained``; without ``dtype``.
    """

    cls: Any
    config: Any
    folder: Path
    name: str
    dtype: Any = None
    use_safetensors: bool | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


class CheckpointFormat(Protocol):
    """One layout of a checkpoint's folder."""

    name: str
    """As `mambakit info` prints it and `convert` takes it."""

    packed: bool
    """It holds packed (quantised) weights, and models with plain weights cannot be written in it."""

    holds_tokenizers: bool
    """Whether a tokenizer belongs to a checkpoint. Where none does, `mambakit.models.vocabularies` chooses."""

    def detect(self, folder: Path, config_json: dict[str, Any]) -> bool:
        """Whether ``folder`` is of this format; the first format of the table that says so is taken.

        Args:
            config_json: what the folder's config.json holds.
        """

    def read_configuration(self, config_json: dict[str, Any], path: Path) -> dict[str, Any]:
        """The configuration under transformers' names, ``model_type`` included.

        Args:
            path: of config.json, for errors.

        Raises:
            CheckpointError: a field has a value that the format does not allow.
        """

    def name_in_model(self, stored: str) -> str:
        """The name in a causal language model of a tensor that a file names ``stored``."""

    def name_in_file(self, name: str) -> str:
        """The name in a file of a tensor that a causal language model names ``name``."""

    def load(self, loading: Loading) -> Any:
        """The model with the stored weights; every name and shape is checked first.

        Returns:
            The model, or (model, loading information) where the caller asked transformers for it.

        Raises:
            CheckpointError: the files do not fit the configuration.
        """

    def write(self, model: Any, folder: Path, *args: Any, **options: Any) -> None:
        """Write the model.

        Args:
            args, options: of transformers' ``save_pretrained``, for a format that it writes.

        Raises:
            CheckpointError: the model has something that the format cannot hold.
        """

    def count(self, stored: str, tensor: StoredTensor, config: Any) -> tuple[str, int]:
        """(dtype or packed format, number of weights) of a stored tensor; 0 for one that only describes others."""

    def dtype(self, found: dict[str, StoredTensor]) -> torch.dtype:
        """The dtype that the model computes in, from the headers."""


def require_whole_expand(config: Any, format: str) -> None:
    """CheckpointError unless the width of the mixers is what ``format`` has: a whole multiple of the hidden size."""
    if config.intermediate_size != config.expand * config.hidden_size:
        raise CheckpointError(
            f"intermediate_size is {config.intermediate_size}; {format} holds expand * hidden_size alone "
            f"({config.expand} * {config.hidden_size}); save in transformers' format"
        )
