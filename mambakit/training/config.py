"""The training configuration: one flat table, each field explained where it is declared."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import sys
from pathlib import Path
from typing import Any, get_type_hints


@dataclasses.dataclass
class TrainConfig:
    # -- data ----------------------------------------------------------------------------------------------------------
    train_files: list[str] = dataclasses.field(default_factory=list)
    """Text files to learn from: .txt, or the same compressed as .xz or .gz."""
    heldout_files: list[str] = dataclasses.field(default_factory=list)
    """Text files to evaluate on, never learned from."""
    separator: str = "<|endoftext|>\n"
    """What stands between documents in a file. Each document ends with the end-of-text token instead."""
    tokenizer: str = ""
    """Folder of an existing tokenizer. Empty: train a byte-level BPE on train_files."""
    vocab_size: int = 4096
    """Vocabulary of the tokenizer to train."""
    sequence_length: int = 512
    """Tokens in a row of a batch."""
    respect_documents: bool = False
    """Keep state from passing between the documents of a row, exactly. Off, a row is cut anywhere from the joined
    documents: for book-length documents few rows see a boundary, and each boundary is marked by the end-of-text token."""

    # -- model (transformers' names) -----------------------------------------------------------------------------------
    hidden_size: int = 320
    num_hidden_layers: int = 12
    state_size: int = 16
    expand: int = 2
    conv_kernel: int = 4
    tie_word_embeddings: bool = True
    init_from: str = ""
    """Checkpoint (id or folder) to start from instead of new weights; the model fields above are then the checkpoint's."""

    # -- optimisation --------------------------------------------------------------------------------------------------
    batch_size: int = 64
    """Rows in a batch."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    final_learning_rate: float = 0.01
    """Where the schedule ends, as a fraction of the peak."""
    schedule: str = "cosine"
    """"cosine" from the peak to the end, or "wsd": stable, then a linear decay over the last fifth."""
    warmup: float = 0.02
    """Fraction of the run over which the rate rises linearly."""
    weight_decay: float = 0.1
    """On matrices only; A_log, D, biases, norms and embeddings are not decayed."""
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    """Largest norm of the gradient."""
    steps: int = 0
    """Optimiser steps. 0: as many as `epochs` take."""
    epochs: float = 1.0
    max_minutes: float = 0.0
    """Wall-clock budget. The schedule then runs on time, so that it ends when the budget does. 0: no budget."""
    autocast: str = "bfloat16"
    """Dtype of matrix products on CUDA ("bfloat16", "float16" is not offered: it needs loss scaling) or "float32"."""
    cuda_graph: bool = True
    """On CUDA, capture the whole step once and replay it: a small model is otherwise bound by launches."""
    seed: int = 0

    # -- run -----------------------------------------------------------------------------------------------------------
    out: str = "runs/model"
    """Folder of the run: the model, metrics.jsonl, config.json, the loss curve and checkpoint/."""
    log_every: int = 20
    eval_every: int = 1000
    """Steps between evaluations on a sample of the held-out text; the whole of it is scored at the end."""
    checkpoint_every: int = 1000
    """Steps between checkpoints to resume from. 0: none."""
    resume: bool = False
    """Continue from the run's checkpoint."""
    export_dtype: str = "bfloat16"
    """Dtype of the saved weights; A_log, D and dt_proj.bias stay float32."""
    max_shard_size: str = "5GB"
    sample_prompt: str = "It was a dark and stormy night"
    """Prompt of the sample in the model card."""

    def __post_init__(self) -> None:
        for name in ("sequence_length", "batch_size", "log_every", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        for name, choices in (
            ("schedule", ("cosine", "wsd")),
            ("autocast", ("bfloat16", "float32")),
            ("export_dtype", ("bfloat16", "float16", "float32")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}; it is a fraction of the run, from 0 up to but not 1")


def load_config(path: str | Path, overrides: list[str]) -> TrainConfig:
    """Read a TOML file and apply ``key=value`` overrides, values in Python's notation (bare words are strings)."""
    values = _read_toml(Path(path))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"override {override!r} is not of the form key=value")
        values[key.strip()] = _literal(text)
    return make_config(values, str(path))


def make_config(values: dict[str, Any], source: str) -> TrainConfig:
    hints = get_type_hints(TrainConfig)
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, 1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{source}: unknown field {key!r}{meant}")
        values[key] = _typed(source, key, value, hints[key])
    return TrainConfig(**values)


def _typed(source: str, key: str, value: Any, hint: Any) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint == list[str]:
        if isinstance(value, str):
            return [value]
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return value
    elif type(value) is hint:
        return value
    expected = "list of strings" if hint == list[str] else hint.__name__
    raise ValueError(f"{source}: {key} is {value!r}, expected a {expected}")


def _read_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"there is no configuration file {path}") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error


def _literal(text: str) -> Any:
    text = text.strip()
    if text in ("true", "false"):
        return text == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
