"""The numbers of an inspection, as arrays: surprise, step sizes, what is kept, half-lives, implicit attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.logits import require_numbers
from mambakit.decoding.traced import require_traceable, traced_chunks
from mambakit.errors import UsageError
from mambakit.generation.start_token import start_token
from mambakit.generation.token_ids import require_in_vocabulary, token_ids
from mambakit.generation.token_scores import surprise
from mambakit.inspection.attention import attention_rows, implicit_attention
from mambakit.modules.mixers.selection import Selection

_CHUNK = 256
# Where none are named: so many layers, evenly spaced, and so many channels of each, from short to long memory.
_LAYERS, _CHANNELS = 4, 16


@dataclass(frozen=True)
class LayerTrace:
    """What one layer chose at each token, for some of its channels."""

    channels: Tensor
    """(c,) int64, their indices."""
    u: Tensor
    """(l, c), what the channels were given."""
    delta: Tensor
    """(l, c), step sizes."""
    A: Tensor
    """(c, n), negative."""
    B: Tensor
    """(l, n)."""
    C: Tensor
    """(l, n)."""

    def attention(self, channel: int) -> Tensor:
        """(l, l): what each token reads of each earlier one in ``channel``, which is one of `channels`."""
        at = self._place(channel)
        return implicit_attention(self.delta[:, at], self.A[at], self.B, self.C)

    def shares(self, cells: int | None = None) -> Tensor:
        """How a token's attention is divided over earlier ones, mean over the channels: |alpha_ts| / sum_s |alpha_ts|.

        Args:
            cells: pool neighbouring tokens, so that the result has at most this many rows and columns: a cell is the
                mean over its rows of the sum over its columns. None: no pooling.

        Returns:
            (l, l), or (m, m) with m = ceil(l / ceil(l / cells)). Rows sum to 1.
        """
        length = len(self.delta)
        width = 1 if cells is None else math.ceil(length / cells)
        size = math.ceil(length / width)
        of = torch.arange(length, dtype=torch.int64, device="cpu") // width
        total = self.delta.new_zeros(size, size)
        for at in range(len(self.channels)):
            for start, rows in attention_rows(self.delta[:, at], self.A[at], self.B, self.C):
                rows = rows.abs()
                rows /= rows.sum(1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
                if width > 1:
                    rows = rows.new_zeros(len(rows), size).index_add_(1, of[: rows.shape[1]], rows)
                total[:, : rows.shape[1]].index_add_(0, of[start : start + len(rows)], rows)
        counts = torch.bincount(of, minlength=size)
        return total / (counts * len(self.channels))[:, None]

    def _place(self, channel: int) -> int:
        found = (self.channels == channel).nonzero()
        if not len(found):
            raise ValueError(f"channel {channel} was not traced; those that were are {self.channels.tolist()}")
        return int(found)


@dataclass(frozen=True)
class Inspection:
    """What a model did with a text of l - 1 tokens, behind the token that starts a document. All on the CPU.

    Floating arrays are float32 (float64 of a float64 model).
    """

    tokens: Tensor
    """(l,) int64; the first is the start token."""
    pieces: list[str]
    """The text of each token; a character that several tokens share belongs to the last of them."""
    surprise: Tensor
    """(l,) -ln p of each token given those before it; 0 of the start token."""
    step: Tensor
    """(layers, l) step sizes delta, mean over the channels: large where a token is let in and earlier ones are
    forgotten."""
    let_in: Tensor
    """(layers, l) root mean square over channels and states of delta B u, what is added to the state."""
    kept: Tensor
    """(layers, l) mean over channels and states of exp(delta A), the fraction of the state that stays."""
    half_life: Tensor
    """(layers, d, n) tokens, ln 2 / (delta |A|) with each channel's mean step in this text."""
    layers: dict[int, LayerTrace] = field(default_factory=dict)
    """The layers that were chosen, by index."""

    def arrays(self) -> dict[str, Any]:
        """Everything as NumPy arrays: the fields, and ``layer<i>_<field>`` of each chosen layer."""
        names = ("tokens", "surprise", "step", "let_in", "kept", "half_life")
        found: dict[str, Any] = {name: getattr(self, name).numpy() for name in names}
        for index, trace in self.layers.items():
            found |= {f"layer{index}_{name}": value.numpy() for name, value in vars(trace).items()}
        return found


@torch.no_grad()
def inspect(
    model: Any,
    tokenizer: Any,
    text: str | Tensor,
    *,
    layers: Sequence[int] | None = None,
    channels: Sequence[int] | None = None,
    chunk_size: int = _CHUNK,
) -> Inspection:
    """Read a text and note what every layer does at each token.

    Memory beside the result is that of a chunk. Of the chosen layers, l numbers for each chosen channel are kept.

    Args:
        model: a causal language model with Mamba layers, in eval mode.
        tokenizer: its tokenizer, which has a token to start from.
        text: a text, or token ids (l,).
        layers: those whose channels are traced for `LayerTrace`; None: four, evenly spaced.
        channels: of each of them; None: sixteen, from short memory to long.
        chunk_size: tokens of a forward.

    Raises:
        UsageError: an empty text, or a layer or channel that the model does not have.
        ValueError: a model whose layers cannot be read one by one.
    """
    require_traceable(model)
    config = model.config
    chosen = _chosen("layer", layers, config.num_hidden_layers, _evenly(config.num_hidden_layers, _LAYERS))
    some = None if channels is None else _chosen("channel", channels, config.intermediate_size, [])
    if isinstance(text, str):
        text = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
    ids = token_ids("the text", text, least=0).cpu()
    if not len(ids):
        raise UsageError("the text is empty; give a token or more")
    require_in_vocabulary("the text", ids, config.vocab_size)
    ids = torch.cat([torch.tensor([start_token(tokenizer)], dtype=torch.int64, device="cpu"), ids])
    notes = _Notes(config.num_hidden_layers, len(ids), chosen, some)
    found = []
    for start, hidden in zip(
        range(0, len(ids), chunk_size), traced_chunks(model, ids.to(model.device), chunk_size, notes.visit), strict=True
    ):
        targets = ids[start + 1 : start + 1 + len(hidden)].to(model.device)
        found.append(surprise(model, hidden[: len(targets)], targets))
    surprises = require_numbers(torch.cat([found[0].new_zeros(1), *found]).cpu())
    return notes.result(ids, _pieces(tokenizer, ids), surprises)


def _evenly(count: int, most: int) -> list[int]:
    number = min(count, most)
    return [0] if number == 1 else [round(i * (count - 1) / (number - 1)) for i in range(number)]


def _chosen(what: str, given: Sequence[int] | None, count: int, default: list[int]) -> list[int]:
    if given is None:
        return default
    for index in given:
        if not 0 <= index < count:
            raise UsageError(f"{what} {index} is not among the model's: 0 to {count - 1}")
    if not given:
        raise UsageError(f"no {what} is named; leave it out for the default")
    return sorted(set(given))


def _pieces(tokenizer: Any, ids: Tensor) -> list[str]:
    """The text of each token, so that they make up the whole. Characters of several tokens come with the last."""
    pieces: list[str] = []
    pending: list[int] = []
    for token in ids.tolist():
        pending.append(token)
        text = tokenizer.decode(pending)
        if text.endswith("\ufffd") and len(pending) < 8:  # part of a character
            pieces.append("")
            continue
        pieces.append(text)
        pending = []
    if pending:
        pieces[-1] = tokenizer.decode(pending)
    return pieces


class _Notes:
    """Collects what `traced_chunks` shows."""

    def __init__(self, layers: int, length: int, chosen: list[int], channels: list[int] | None):
        self.length, self.channels = length, channels
        self.step: list[list[Tensor]] = [[] for _ in range(layers)]
        self.let_in: list[list[Tensor]] = [[] for _ in range(layers)]
        self.kept: list[list[Tensor]] = [[] for _ in range(layers)]
        self.sums: list[Any] = [0] * layers  # of the steps, (d,)
        self.A: list[Any] = [None] * layers
        self.parts: dict[int, list[tuple[Tensor, ...]]] = {index: [] for index in chosen}

    def visit(self, _: int, layer: int, chosen: Selection) -> None:
        u, delta, B, C = chosen.u[0], chosen.delta[0], chosen.B[0], chosen.C[0]
        self.A[layer] = chosen.A.cpu()
        self.sums[layer] = self.sums[layer] + delta.sum(0, dtype=torch.float64).cpu()
        self.step[layer].append(delta.mean(1).cpu())
        # |delta u B| over all pairs of a channel and a state is a product of two means.
        let_in = ((delta * u).square().mean(1) * B.square().mean(1)).sqrt()
        self.let_in[layer].append(let_in.cpu())
        kept = [torch.exp(some[..., None] * chosen.A).mean((1, 2)) for some in delta.split(32)]  # fits a cache
        self.kept[layer].append(torch.cat(kept).cpu())
        if layer in self.parts:
            own = slice(None) if self.channels is None else self.channels
            self.parts[layer].append((u[:, own].cpu(), delta[:, own].cpu(), B.cpu(), C.cpu()))

    def result(self, ids: Tensor, pieces: list[str], surprises: Tensor) -> Inspection:
        steps = [total / self.length for total in self.sums]
        half_lives = [math.log(2) / (mean.to(A.dtype)[:, None] * -A) for mean, A in zip(steps, self.A, strict=True)]
        traces = {}
        for index, parts in self.parts.items():
            u, delta, B, C = (torch.cat(column) for column in zip(*parts, strict=True))
            own = self.channels
            if own is None:
                longest = half_lives[index].amax(1).argsort()  # of each channel its slowest state
                own = sorted({int(longest[i]) for i in _evenly(len(longest), _CHANNELS)})
                u, delta = u[:, own].clone(), delta[:, own].clone()
            channels = torch.tensor(own, dtype=torch.int64, device="cpu")
            traces[index] = LayerTrace(channels, u, delta, self.A[index][own], B, C)
        step, let_in, kept = (
            torch.stack([torch.cat(part) for part in found]) for found in (self.step, self.let_in, self.kept)
        )
        return Inspection(ids, pieces, surprises, step, let_in, kept, torch.stack(half_lives), traces)
