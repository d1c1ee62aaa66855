"""Memory and tokens a second that recorded benchmarks lead one to expect of a shape on a device.

Between two recorded shapes figures are interpolated, in logarithms of the parameters. Outside of them the nearest
shape's utilisation is taken, and the estimate says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

from mambakit.planning.devices import Device
from mambakit.planning.shape import PUBLISHED, Shape

GIB = 2**30
# float32 parameters, gradients, and AdamW's two moments.
_TRAINED = 16
# Bytes of a number in each format, scales included (int8 and int4: one float32 scale for 64).
FORMATS = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0625, "int4": 0.5625}
# Tokens of a prompt that are read at a time, and float32 numbers of a layer that lie in memory then, for each channel.
_CHUNK = {"cpu": 512, "cuda": 4096}
_PREFILL_NUMBERS = 8


@dataclass(frozen=True)
class Estimate:
    """What to expect.

    Attributes:
        gib: memory by what takes it.
        tokens_per_second: of all rows together; None: nothing recorded.
        notes: how far the figures go.
    """

    gib: dict[str, float]
    tokens_per_second: float | None
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> float:
        return sum(self.gib.values())

    def fits(self, device: Device) -> bool:
        return device.gib is None or self.total <= device.gib * 0.94  # the driver and PyTorch take some


def training(shape: Shape, device: Device, batch: int, length: int, how: str = "graph") -> Estimate:
    """A training step of ``batch`` rows of ``length`` tokens.

    Args:
        batch: rows that are computed at a time (batch_size / accumulate).
        how: "graph", "recompute" (recompute_selection) or "checkpoint" (activation_checkpointing).
    """
    tokens, notes = batch * length, [] if not device.scaled else [device.scaled]
    rows = [row for row in device.train if row["how"] == ("recompute" if how == "recompute" else "graph")]
    known = [(PUBLISHED[row["model"]], row) for row in rows]
    per_channel = _between(
        shape, [(s, _bytes_per_channel(s, row)) for s, row in known if row.get("gib")] or device.more["activations"]
    )
    activations = per_channel * shape.num_hidden_layers * shape.inner * tokens
    if how == "checkpoint":  # each layer's input in float32, and one layer's activations while it is computed again
        activations = 4 * shape.hidden_size * shape.num_hidden_layers * tokens + per_channel * shape.inner * tokens
        notes.append("memory with activation_checkpointing is computed, not measured")
    utilised = [(s, row["tokens_per_second"] * s.flops) for s, row in known]
    speed = _between(shape, utilised) / shape.flops * device.speed
    if how == "checkpoint":
        speed *= 3 / 4  # the forward pass again
    notes += _outside(shape, [s for s, _ in utilised])
    if tokens < 8192 and device.kind == "cuda":
        notes.append(f"steps of {tokens:,} tokens are bound by launches: expect less than this rate")
    return Estimate(
        {"weights, gradients, AdamW": _TRAINED * shape.parameters / GIB, "activations": activations / GIB}, speed, notes
    )


def generating(shape: Shape, device: Device, batch: int, format: str) -> Estimate:
    """Decoding ``batch`` texts at a time, with weights in ``format`` (a key of `FORMATS`)."""
    notes = [] if not device.scaled else [device.scaled]
    weights = FORMATS[format] * shape.parameters
    state = batch * shape.state_bytes(4 if format == "float32" else 2)
    chunk = _PREFILL_NUMBERS * 4 * shape.inner * min(batch, 8) * _CHUNK[device.kind]
    gib = {"weights": weights / GIB, "states": state / GIB, "reading a prompt": chunk / GIB}
    if device.kind == "cpu":
        share = device.more["share"][format]
        # A step reads each weight once, whatever the batch, and each row's state; rows share a pass up to a few.
        seconds = (weights + state) / (share * device.bandwidth)
        if batch > 1:
            notes.append("rows beyond the first are bound by arithmetic on a CPU: expect less than this")
        return Estimate(gib, batch / seconds, notes)
    known = [(PUBLISHED[row["shape"]], row) for row in device.step]
    batches = sorted({row["batch"] for _, row in known})
    low = max([b for b in batches if b <= batch], default=batches[0])
    high = min([b for b in batches if b >= batch], default=batches[-1])
    at = {b: _between(shape, [(s, row["seconds"]) for s, row in known if row["batch"] == b]) for b in (low, high)}
    share = 0.0 if high == low else (batch - low) / (high - low)
    seconds = at[low] + share * (at[high] - at[low])
    if batch > batches[-1]:
        seconds *= batch / batches[-1]
        notes.append(f"more rows than recorded ({batches[-1]})")
    if format == "float32":
        seconds *= (weights + state) / (FORMATS["bfloat16"] * shape.parameters + state)
        notes.append("float32 steps were not recorded: bfloat16's, scaled by the weights' bytes")
    elif format != "bfloat16":
        seconds *= device.more["packed"][format]
        if batch > 1:
            notes.append("int8 and int4 were recorded at batch 1, where they gain most")
    notes += _outside(shape, [s for s, _ in known])
    return Estimate(gib, batch / (seconds / device.reading), notes)


def _bytes_per_channel(shape: Shape, row: dict) -> float:
    """Bytes of activations that a recorded step kept for each layer, token and inner channel."""
    kept = row["gib"] * GIB - _TRAINED * shape.parameters
    return kept / (shape.num_hidden_layers * shape.inner * row["batch"] * row["length"])


def _between(shape: Shape, points: list) -> float:
    """The value at ``shape``, from (shape or parameters, value): log-log, and the nearest one's outside."""
    found: dict[int, float] = {}
    for s, value in points:
        found.setdefault(s.parameters if isinstance(s, Shape) else s, value)
    known = sorted(found.items())
    size = shape.parameters
    if size <= known[0][0]:
        return known[0][1]
    for (low, a), (high, b) in pairwise(known):
        if size <= high:
            share = math.log(size / low) / math.log(high / low)
            return math.exp(math.log(a) + share * (math.log(b) - math.log(a)))
    return known[-1][1]


def _outside(shape: Shape, known: list[Shape]) -> list[str]:
    """A note where ``shape`` is smaller or larger than every recorded one."""
    sizes = [s.parameters for s in known]
    if min(sizes) * 0.98 <= shape.parameters <= max(sizes) * 1.02:
        return []
    small = shape.parameters < min(sizes)
    kind = "smaller" if small else "larger"
    more = ", which small layers do not reach" if small else ""
    count = f"{shape.parameters / 1e6:,.1f} M parameters"
    return [f"{count} are {kind} than the recorded models: the nearest one's utilisation{more}"]
