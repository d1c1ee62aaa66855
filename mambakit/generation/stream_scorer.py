"""Surprise of streams that never end: a state for each stream, chunks of all of them packed into one forward.

A stream is read chunk by chunk, as it comes. Its state holds all that the model keeps of what was read before, so that
a token's surprise is the same however the stream was cut, and a file of the states continues all streams after a
restart.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.chunks import chunk_sizes
from mambakit.decoding.logits import require_numbers
from mambakit.decoding.prefill import hidden_states
from mambakit.decoding.transfers import integers, to_device
from mambakit.errors import CheckpointError
from mambakit.generation.fingerprint import fingerprint
from mambakit.generation.start_token import start_token
from mambakit.generation.state import fill_cache, write_tensors
from mambakit.generation.token_ids import require_in_vocabulary, texts, token_ids
from mambakit.generation.token_scores import groups, surprise
from mambakit.modules import StateCache
from mambakit.quoting import brief
from mambakit.reading import open_safetensors

_FORMAT = "mambakit.StreamScorer/1"
_AGAIN = "save the streams again"
_FIRST_SLOTS = 16
# Copies of states that a forward may hold besides the streams' own.
_COPIED_BYTES = 1 << 30


def _require_mapping(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} are {brief(value)}; give a dictionary by the streams' names")


@dataclass(frozen=True)
class LineScore:
    """The surprise of one line, line end included."""

    text: str
    surprises: Tensor
    """(l,) float32, -ln p of each of its tokens, on the CPU."""

    @property
    def tokens(self) -> int:
        return len(self.surprises)

    @property
    def nats(self) -> float:
        """-ln p of the whole line."""
        return float(self.surprises.double().sum())

    @property
    def bits(self) -> float:
        return self.nats / math.log(2)

    @property
    def nats_per_token(self) -> float:
        return self.nats / max(1, self.tokens)

    @property
    def peak(self) -> float:
        """The largest surprise of one of its tokens, in nats."""
        return float(self.surprises.max()) if self.tokens else 0.0


class StreamScorer:
    """Scores any number of streams, each from its own state.

    Streams have names, and begin when their first chunk is scored. Before a stream's first token stands
    ``first_token``. The surprise of a token does not depend on how the streams were cut, on their order, or on what
    else is scored with them, up to the rounding of float32 sums.

    Args:
        model: a causal language model in eval mode.
        tokenizer: its tokenizer, for text; None where tokens alone are scored.
        first_token: stands before each stream's first token; the tokenizer's `start_token` when None.

    Attributes:
        notes: the caller's own facts, as JSON has them: saved and loaded with the streams.

    Raises:
        ValueError: neither a tokenizer nor a first token, or a first token outside of the vocabulary.
    """

    def __init__(self, model: Any, tokenizer: Any = None, *, first_token: int | None = None):
        if first_token is None:
            if tokenizer is None:
                raise ValueError("nothing says what stands before a stream's first token; give first_token")
            first_token = start_token(tokenizer)
        require_in_vocabulary(
            "first_token", torch.tensor([first_token], dtype=torch.int64, device="cpu"), model.config.vocab_size
        )
        self.model, self.tokenizer, self.first_token = model, tokenizer, first_token
        self.notes: dict[str, Any] = {}
        self._slots: dict[str, int] = {}
        self._tokens: dict[str, int] = {}
        self._free: list[int] = []
        self._states: StateCache = model.backbone.new_cache(0)
        self._last = torch.empty(0, dtype=torch.int64, device=model.device)  # (slots,) the tokens that come next

    # -- the streams ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, name: str) -> bool:
        return name in self._slots

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def tokens(self, name: str) -> int:
        """How many tokens of a stream were read."""
        self._require(name)
        return self._tokens[name]

    def forget(self, name: str) -> None:
        """End a stream: its slot is free for another one. The same name later begins a new stream."""
        self._require(name)
        self._free.append(self._slots.pop(name))
        del self._tokens[name]

    def _require(self, name: str) -> None:
        if name not in self._slots:
            raise ValueError(f"there is no stream {brief(name)}; the {len(self)} streams began with their first chunk")

    def _begin(self, names: Sequence[str]) -> None:
        """Give new streams a slot each, with a zero state."""
        new = [name for name in names if name not in self._slots]
        if not new:
            return
        while len(self._free) < len(new):
            self._grow()
        slots = [self._free.pop() for _ in new]
        self._states.reset(slots)
        self._last[integers(self._last.device, slots)] = self.first_token
        self._slots.update(zip(new, slots, strict=True))
        self._tokens.update(dict.fromkeys(new, 0))

    def _grow(self) -> None:
        before = self._states.max_batch_size
        size, kept = max(_FIRST_SLOTS, 2 * before), list(range(before))
        states: StateCache = self.model.backbone.new_cache(size)
        self._states = states.copy_(self._states, kept, kept) if kept else states
        self._last = torch.cat([self._last, self._last.new_full((size - before,), self.first_token)])
        self._free += reversed(range(before, size))

    # -- scoring -------------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)  # its states are used again by later calls, which may be outside of inference mode
    @torch.no_grad()
    def score_tokens(self, chunks: Mapping[str, Tensor | Sequence[int]]) -> dict[str, Tensor]:
        """Read the next tokens of some streams.

        Chunks of all streams are packed into forwards of about `mambakit.decoding.chunks.CHUNK_SIZES` tokens together,
        without padding; a longer chunk is read in parts.

        Args:
            chunks: by the stream's name, (l,) int64 of any length l >= 0.

        Returns:
            By name, -ln p of each token given all that the stream had before it, (l,) float32 on the CPU.

        Raises:
            ValueError: tokens outside of the vocabulary; nothing is read then.
            LogitsError: the model's log-probabilities are NaN. The streams have been read on: `load` them again.
        """
        given = self._checked(chunks)
        self._begin(list(given))
        texts = {name: ids for name, ids in given.items() if len(ids)}
        size = chunk_sizes(self.model.device).batch
        most = max(1, _COPIED_BYTES // max(1, self._states.spec.nbytes))
        found: list[Tensor] = []
        for group in groups(list(texts), list(map(len, texts.values())), size, most):
            found += self._read(group, [texts[name] for name in group], size)
        lengths = list(map(len, texts.values()))
        whole = require_numbers(torch.cat(found).cpu()) if found else torch.empty(0, dtype=torch.float32, device="cpu")
        results = dict(zip(texts, whole.split(lengths) if lengths else (), strict=True))
        return {name: results.get(name, whole[:0]) for name in given}

    def _checked(self, chunks: Mapping[str, Tensor | Sequence[int]]) -> dict[str, Tensor]:
        """The chunks as (l,) int64 on the CPU. Their tokens are compared with the vocabulary all at once."""
        given: dict[str, Tensor] = {}
        _require_mapping("chunks", chunks)
        for name, ids in chunks.items():
            if not isinstance(name, str):
                raise TypeError(f"a stream's name is {brief(name)}; it must be text")
            if not (isinstance(ids, Tensor) and ids.dtype == torch.int64 and ids.dim() == 1):
                ids = token_ids(f"the chunk of {brief(name)}", ids, least=0)
            given[name] = ids.cpu()
        whole = torch.cat(list(given.values())) if given else torch.empty(0, dtype=torch.int64, device="cpu")
        if len(whole) and not 0 <= int(whole.min()) <= int(whole.max()) < self.model.config.vocab_size:
            for name, ids in given.items():
                require_in_vocabulary(f"the chunk of {brief(name)}", ids, self.model.config.vocab_size)
        return given

    def _read(self, names: list[str], texts: list[Tensor], size: int) -> list[Tensor]:
        """One group of streams: the surprise of each one's tokens, on the device."""
        slots = [self._slots[name] for name in names]
        index = integers(self._last.device, slots)
        lengths = list(map(len, texts))
        tokens = to_device(self.model.device, torch.cat(texts))
        # Each token is predicted from what stands before it, so that the inputs are the tokens moved by one.
        ends = integers(tokens.device, list(accumulate(lengths)))
        inputs = tokens.roll(1)
        inputs[torch.cat([ends.new_zeros(1), ends[:-1]])] = self._last[index].to(tokens.device)
        copies = self._states.select(slots)
        parts: list[list[Tensor]] = [[] for _ in names]
        rows = list(inputs.split(lengths))
        at = [0] * len(names)
        for hidden in hidden_states(self.model, rows, copies, chunk_size=size):
            counts = list(map(len, hidden))
            targets = [t[a : a + n] for t, a, n in zip(tokens.split(lengths), at, counts, strict=True)]
            scores = surprise(self.model, torch.cat(hidden), torch.cat(targets))
            for part, some in zip(parts, scores.split(counts), strict=True):
                part.append(some)
            at = [a + n for a, n in zip(at, counts, strict=True)]
        self._states.copy_(copies, list(range(len(names))), slots)
        self._last[index] = tokens[ends - 1].to(self._last.device)
        for name, length in zip(names, lengths, strict=True):
            self._tokens[name] += length
        return [torch.cat(part) for part in parts]

    def score_lines(self, lines: Mapping[str, Sequence[str]]) -> dict[str, list[LineScore]]:
        """Read the next lines of some streams, each line with its line end.

        A line is tokenised by itself, so that its tokens do not depend on which lines came with it.

        Raises:
            TypeError: lines that are not texts in a list; nothing is read then.
            ValueError: the scorer was made without a tokenizer, or a line with half of a surrogate pair.
        """
        if self.tokenizer is None:
            raise ValueError("lines are text: make the scorer with the model's tokenizer, or score_tokens")
        _require_mapping("lines", lines)
        for name, some in lines.items():
            texts(f"the lines of {brief(name)}", some)
        flat = [line for some in lines.values() for line in some]
        ids = self.tokenizer(flat, add_special_tokens=False, verbose=False).input_ids if flat else []
        of_line = iter([torch.tensor(row, dtype=torch.int64, device="cpu") for row in ids])
        rows = {name: [next(of_line) for _ in some] for name, some in lines.items()}
        empty = torch.empty(0, dtype=torch.int64, device="cpu")
        scores = self.score_tokens({name: torch.cat([empty, *some]) for name, some in rows.items()})
        return {
            name: [
                LineScore(line, found)
                for line, found in zip(some, scores[name].split(list(map(len, rows[name]))), strict=True)
            ]
            for name, some in lines.items()
        }

    # -- files ---------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Write all streams to a safetensors file, whole or not at all, bound to the model's weights."""
        names, slots = list(self._slots), list(self._slots.values())
        states = self._states.select(slots)
        metadata = {
            "format": _FORMAT,
            "fingerprint": fingerprint(self.model),
            "first_token": str(self.first_token),
            "names": json.dumps(names),
            "tokens": json.dumps([self._tokens[name] for name in names]),
            "notes": json.dumps(self.notes),
        }
        last = self._last[integers(self._last.device, slots)]
        tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in states.tensors().items()}
        write_tensors(path, {**tensors, "last": last.cpu()}, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike, model: Any, tokenizer: Any = None) -> StreamScorer:
        """Read streams written by `save`, onto the model's device.

        Raises:
            CheckpointError: the file does not hold streams, is damaged, or belongs to another model.
        """
        with open_safetensors(path, _AGAIN) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise CheckpointError(
                    f"{path} does not hold streams (format {brief(metadata.get('format'))}); {_AGAIN}"
                )
            if metadata.get("fingerprint") != fingerprint(model):
                raise CheckpointError(
                    f"{path} was saved by a model of other weights or another configuration; load it with that model"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, a safe_open is no dict
        try:
            names, tokens = json.loads(metadata["names"]), json.loads(metadata["tokens"])
            scorer = cls(model, tokenizer, first_token=int(metadata["first_token"]))
            scorer.notes = json.loads(metadata["notes"])
            last = tensors.pop("last")
            require_in_vocabulary(f"{path}", last, model.config.vocab_size)
            scorer._begin(names)
            if names:
                slots = [scorer._slots[name] for name in names]
                states = fill_cache(model, tensors, sum(tokens))
                scorer._states.copy_(states, list(range(len(names))), slots)
                scorer._last[integers(scorer._last.device, slots)] = last.to(model.device)
                scorer._tokens.update(zip(names, tokens, strict=True))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path}: its description of the streams is damaged ({error}); {_AGAIN}") from error
        return scorer
