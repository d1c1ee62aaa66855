"""An inspection cut to the size of a screen: maps, quantiles and pooled attention, for the page and the picture."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mambakit.inspection.numbers import Inspection

# Columns of a map, and rows and columns of an attention map, at most: longer texts are pooled.
_COLUMNS, _CELLS = 1200, 512
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True)
class Map:
    """Values (rows, columns) of 0 to 1 between ``low`` and ``high``, on a logarithmic scale with ``log``."""

    title: str
    values: Tensor
    width: int
    """Tokens of a column."""
    low: float
    high: float
    log: bool


@dataclass(frozen=True)
class Summary:
    """What is shown of an inspection."""

    words: str
    pieces: list[str]
    surprise: list[float]
    maps: dict[str, Map]
    """Of layers and tokens."""
    half_life: list[list[float]]
    """For each layer the `QUANTILES` of all its states, in tokens."""
    attention: dict[int, Map]
    """Of each chosen layer, tokens by tokens."""
    channels: dict[int, list[int]]
    """Those of which its attention is the mean."""


def summarize(found: Inspection) -> Summary:
    return Summary(
        in_words(found), found.pieces, found.surprise.tolist(), layer_maps(found), half_life_quantiles(found),
        {layer: attention_map(found, layer) for layer in found.layers},
        {layer: trace.channels.tolist() for layer, trace in found.layers.items()},
    )  # fmt: skip


def layer_maps(found: Inspection) -> dict[str, Map]:
    """The three maps of layers and tokens: means over the tokens of a column."""
    return {
        "step": _scaled("step size", found.step, log=True),
        "kept": _scaled("fraction of the state kept", found.kept, log=False),
        "let_in": _scaled("size of what is let in", found.let_in, log=True),
    }


def _scaled(title: str, values: Tensor, log: bool) -> Map:
    values = values.double()
    width = math.ceil(values.shape[1] / _COLUMNS)
    short = -values.shape[1] % width
    if width > 1:
        padded = torch.nn.functional.pad(values, (0, short), value=math.nan)
        values = padded.view(len(values), -1, width).nanmean(-1)
    flat = values.flatten().sort().values
    low, high = (_rounded(float(flat[round(q * (len(flat) - 1))])) for q in (0.005, 0.995))
    if log:
        low, high = max(low, 1e-6), max(high, 1.01 * low, 2e-6)
        shares = (values.clamp(min=1e-12).log() - math.log(low)) / (math.log(high) - math.log(low))
    else:
        high = max(high, low + 1e-3)
        shares = (values - low) / (high - low)
    return Map(title, shares.clamp(0, 1), width, low, high, log)


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")


def attention_map(found: Inspection, layer: int) -> Map:
    """A layer's shares, each row scaled to its largest; the square root, so that small shares show."""
    trace = found.layers[layer]
    shares = trace.shares(_CELLS).double()
    shares = (shares / shares.amax(1, keepdim=True).clamp(min=1e-30)).sqrt()
    return Map("share of attention", shares, math.ceil(len(found.tokens) / _CELLS), 0.0, 1.0, False)


def half_life_quantiles(found: Inspection) -> list[list[float]]:
    """For each layer the `QUANTILES` of all its states' half-lives, in tokens."""
    result = []
    for values in found.half_life.double():
        flat = values.flatten().sort().values
        result.append([float(flat[round(q * (len(flat) - 1))]) for q in QUANTILES])
    return result


def in_words(found: Inspection) -> str:
    """One sentence on the text."""
    count, nats = len(found.tokens) - 1, float(found.surprise.double().sum())
    characters = max(1, sum(map(len, found.pieces[1:])))
    return (
        f"{count:,} tokens, {nats / count:.2f} nats each, {nats / math.log(2) / characters:.2f} bits per character; "
        f"{len(found.half_life)} layers"
    )
