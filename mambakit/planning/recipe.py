"""A training recipe for a shape, a device and a number of tokens: the fields of a configuration."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from mambakit.planning.devices import Device
from mambakit.planning.estimate import Estimate, training
from mambakit.planning.shape import Shape

# (parameters, peak learning rate): arXiv 2312.00752, appendix E.2; the first is this repository's small models'.
_RATES = ((130e6, 3e-3), (370e6, 1.5e-3), (790e6, 1.25e-3), (1.4e9, 1e-3), (2.8e9, 8e-4))
# Tokens of a step: the paper's 0.5 M from 130 M parameters on, and configs/embedded.toml's below.
_STEP_TOKENS, _SMALL_STEP_TOKENS, _SMALL = 2**19, 2**15, 100e6
_TOKENS_PER_PARAMETER = 20  # arXiv 2203.15556
_WAYS = ("graph", "recompute", "checkpoint")


@dataclass(frozen=True)
class Recipe:
    """A training run.

    Attributes:
        fields: of `mambakit.training.config.TrainConfig`.
        estimate: of one micro-batch.
        tokens: to train on.
        seconds: that they take; None: nothing recorded.
        remedy: what to do where nothing fits, or "".
    """

    fields: dict[str, object]
    estimate: Estimate
    tokens: int
    seconds: float | None
    remedy: str = ""

    def toml(self) -> str:
        """The fields as a configuration file."""
        return "".join(f"{name} = {json.dumps(value)}\n" for name, value in self.fields.items())


def recipe(
    shape: Shape, device: Device, length: int = 1024, batch: int | None = None, tokens: int | None = None
) -> Recipe:
    """The recipe whose step fits the device's memory: the largest micro-batch, with as little computed again as can be.

    Args:
        length: tokens of a row.
        batch: rows of a step; the published runs' when None.
        tokens: to train on; 20 for each parameter when None.
    """
    tokens = tokens or _TOKENS_PER_PARAMETER * shape.parameters
    if batch is None:
        step = _SMALL_STEP_TOKENS if shape.parameters < _SMALL else _STEP_TOKENS
        batch = max(1, 2 ** round(math.log2(step / length)))
    how, rows, estimate, remedy = _fitting(shape, device, batch, length)
    fields: dict[str, object] = {
        "hidden_size": shape.hidden_size, "num_hidden_layers": shape.num_hidden_layers,
        "state_size": shape.state_size, "expand": shape.expand, "conv_kernel": shape.conv_kernel,
        "tie_word_embeddings": shape.tie_word_embeddings, "vocab_size": shape.vocab_size,
        "sequence_length": length, "batch_size": batch, "accumulate": batch // rows,
        "learning_rate": next((rate for size, rate in _RATES if shape.parameters <= size * 1.05), _RATES[-1][1]),
        "warmup": 0.02 if shape.parameters < _SMALL else 0.1,
        "steps": max(1, round(tokens / (batch * length))), "validation_fraction": 0.02, "keep_best": True,
        "out": "runs/plan",
    }  # fmt: skip
    if how == "recompute":
        fields["recompute_selection"] = True
    elif how == "checkpoint":
        fields["activation_checkpointing"] = True
    if device.kind == "cpu":
        fields["autocast"] = "float32"
    rate = estimate.tokens_per_second
    return Recipe(fields, estimate, tokens, tokens / rate if rate else None, remedy)


def _fitting(shape: Shape, device: Device, batch: int, length: int) -> tuple[str, int, Estimate, str]:
    """(way, rows at a time, estimate, remedy)."""
    cuts = [batch // parts for parts in range(1, batch + 1) if batch % parts == 0]
    for how in _WAYS:
        for rows in cuts:
            estimate = training(shape, device, rows, length, how)
            if estimate.fits(device):
                return how, rows, estimate, ""
    each = estimate.gib["weights, gradients, AdamW"]
    count = 2 ** math.ceil(math.log2(max(2.0, 1.3 * estimate.total / (device.gib or estimate.total))))
    remedy = (
        f"one row of {length:,} tokens does not fit ({estimate.total:,.0f} GiB, of which {each:,.0f} are weights and "
        f"moments): torchrun --nproc-per-node {count} -m mambakit train plan.toml parallel=fsdp, or a shorter "
        "sequence_length"
    )
    return how, 1, estimate, remedy
