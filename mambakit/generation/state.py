"""The state of texts as a value: read a prompt once, then snapshot, fork, extend, save and resume it.

A recurrent model keeps a few small tensors per layer, however many tokens it has read. So a fork copies only those, and
a file of a few megabytes resumes a text of any length.
"""

from __future__ import annotations

import numbers
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.prefill import prefill_states
from mambakit.decoding.transfers import to_device
from mambakit.errors import CheckpointError
from mambakit.generation.fingerprint import fingerprint
from mambakit.generation.token_ids import batch_ids
from mambakit.modules import StateCache
from mambakit.quoting import brief
from mambakit.reading import open_safetensors
from mambakit.writing import replacing, require_place

_AGAIN = "save the state again"
_FORMAT = "mambakit.State/1"


class State:
    """The recurrent states after b texts, and the last token of each, which is not read yet.

    The last token stays unread because reading it gives the logits of the next token, which every continuation needs
    first. A state never changes: `inputs` and `prompt` return copies, `extend` and `fork` make new states.

    Args:
        cache: the states of b rows.
        pending: (b, p) int64, the last tokens, as a rule one of each; (b, 0) where everything has been read: `extend`
            it before it is used.
    """

    def __init__(self, cache: StateCache, pending: Tensor):
        if pending.dim() != 2 or pending.shape[0] != cache.max_batch_size:
            raise ValueError(
                f"pending has shape {tuple(pending.shape)}; it must be {(cache.max_batch_size, 1)}, "
                f"one unread token for each row of the cache, or ({cache.max_batch_size}, p) for any number of them"
            )
        self.cache, self.pending = cache, pending.to(cache.device, torch.long)

    # -- making one ------------------------------------------------------------------------------------------------

    @classmethod
    @torch.no_grad()
    def read(
        cls,
        model: Any,
        prompts: Tensor | Sequence[Tensor],
        *,
        chunk_size: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> State:
        """Read prompts, each once.

        Args:
            model: a causal language model in eval mode.
            prompts: (l,) int64, (b, l) int64, or b tensors (l_i,) of any lengths, which are packed without padding.
            chunk_size: tokens per forward, of all prompts together; memory does not grow with the prompts. Default
                (`mambakit.decoding.chunks.CHUNK_SIZES`): 512 for one prompt on a CPU and 4,096 elsewhere; for several
                prompts 1,024 and 16,384.
            progress: called with the number of tokens read.

        Raises:
            TypeError: tokens that are no whole numbers.
            ValueError: an empty prompt, a token outside of the vocabulary, or a chunk_size below 1.
        """
        rows = batch_ids(prompts, model.config.vocab_size, model.device)
        empty = cls(model.backbone.new_cache(len(rows)), rows[0].new_empty(len(rows), 0))
        return empty._read(model, rows, chunk_size, progress)

    @torch.no_grad()
    def extend(
        self,
        model: Any,
        tokens: Tensor | Sequence[Tensor],
        *,
        chunk_size: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> State:
        """A new state that has read ``tokens``, too, in the shapes of `read`'s prompts; this one is unchanged."""
        rows = batch_ids(tokens, model.config.vocab_size, model.device)
        if len(rows) != self.rows:
            raise ValueError(
                f"tokens are of {len(rows)} texts, but the state holds {self.rows}; fork or select it first"
            )
        rows = [torch.cat([last, row]) for last, row in zip(self.pending, rows, strict=True)]
        return State(self.cache.clone(), self.pending[:, :0])._read(model, rows, chunk_size, progress)

    def _read(
        self, model: Any, rows: list[Tensor], chunk_size: int | None, progress: Callable[[int], None] | None
    ) -> State:
        """Read all but the last token of each of ``rows`` into this state's cache."""
        unread = [row[:-1] for row in rows]
        prefill_states(model, unread, self.cache, chunk_size=chunk_size, progress=progress)
        return State(self.cache, torch.stack([row[-1:] for row in rows]))

    @classmethod
    def stack(cls, states: Sequence[State]) -> State:
        """The rows of several states of one model as one state: texts that were read separately continue as a batch."""
        if not states:
            raise ValueError("there are no states to stack; give at least one")
        if len({state.pending.shape[1] for state in states}) > 1:
            raise ValueError("some of the states have more unread tokens than others; extend those that have fewer")
        first, at = states[0].cache, 0
        cache = first.empty_like(sum(s.rows for s in states))
        for state in states:
            cache.copy_(state.cache, list(range(state.rows)), list(range(at, at + state.rows)))
            at += state.rows
        return cls(cache, torch.cat([s.pending.to(first.device) for s in states]))

    # -- what it holds ---------------------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        return self.cache.max_batch_size

    def __repr__(self) -> str:
        return (
            f"State({self.rows} rows, {self.cache.nbytes / 2**20:.2f} MiB, {self.pending.shape[1]} unread tokens each)"
        )

    def snapshot(self) -> State:
        """A copy that shares nothing with this one."""
        return State(self.cache.clone(), self.pending.clone())

    def select(self, rows: Tensor | list[int]) -> State:
        """A new state of these rows, in this order; a row may occur several times."""
        chosen = self.cache.select(rows)
        return State(chosen, self.pending[torch.as_tensor(rows, dtype=torch.int64, device=self.cache.device)])

    def fork(self, n: int) -> State:
        """Every row n times, in adjacent rows: n continuations of a text that is read once."""
        if isinstance(n, bool) or not isinstance(n, numbers.Integral) or n < 1:
            raise ValueError(f"fork into {brief(n)}; it must be a whole number, 1 or more")
        return self.select(torch.arange(self.rows, dtype=torch.int64, device="cpu").repeat_interleave(n))

    # -- going on from it ------------------------------------------------------------------------------------------

    def inputs(self) -> dict[str, Any]:
        """Arguments of ``model.generate(**state.inputs(), ...)``, with a copy of the state.

        The sequences that come back begin with the unread token.
        """
        self._require_pending()
        return {"input_ids": self.pending.clone(), "cache_params": self.cache.clone()}

    def prompt(self) -> dict[str, Any]:
        """Arguments of ``Stream(model, tokenizer, **state.prompt(), ...)``, with a copy of the state; of one row."""
        self._require_pending()
        if self.rows != 1:
            raise ValueError(f"a stream continues one text, but the state holds {self.rows}; select one")
        return {"prompt_ids": self.pending[0].clone(), "cache": self.cache.clone()}

    def _require_pending(self) -> None:
        if not self.pending.shape[1]:
            raise ValueError("every token of this state has been read; extend() it with the tokens that come next")

    # -- files -----------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike, model: Any) -> None:
        """Write the state to a safetensors file, bound to ``model``'s configuration and weights."""
        self.save_for(path, fingerprint(model))

    def save_for(self, path: str | os.PathLike, mark: str) -> None:
        """`save` for the model of this `fingerprint`."""
        metadata = {
            "format": _FORMAT,
            "fingerprint": mark,
            "seen_tokens": str(self.cache.get_seq_length()),
        }
        write_tensors(path, self.tensors(), metadata)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors a file holds, on the CPU."""
        tensors = {**self.cache.tensors(), "pending": self.pending}
        return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}

    @classmethod
    def load(cls, path: str | os.PathLike, model: Any) -> State:
        """Read a state written by `save`, onto the model's device; a file of `StateCache.save` too (nothing unread).

        Raises:
            ValueError: the file is not a saved state, is damaged, or belongs to another model.
        """
        with open_safetensors(path, _AGAIN) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                cache = type(model.backbone.new_cache(0)).load(
                    path, model.config, model.device
                )  # or says why it is none
                return cls(cache, torch.empty(cache.max_batch_size, 0, dtype=torch.int64, device=cache.device))
            if metadata.get("fingerprint") != fingerprint(model):
                raise CheckpointError(
                    f"{path} was saved by a model of other weights or another configuration; load it with that model"
                )
            spec = model.backbone.new_cache(0).spec
            tensors = {name: file.get_tensor(name) for name in (*(s.key for s in spec.stacks), "pending")}
        seen = metadata.get("seen_tokens", "")
        if not seen.isdecimal() or len(seen) > 18:
            raise CheckpointError(f"{path}: seen_tokens is {seen[:40]!r}, not a number of tokens; {_AGAIN}")
        pending = tensors["pending"]
        if pending.dtype != torch.long or (len(pending) and not _in_vocabulary(pending, model)):
            raise CheckpointError(f"{path}: its unread tokens are not of the model's vocabulary; {_AGAIN}")
        try:
            return cls(fill_cache(model, tensors, int(seen)), pending)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}; {_AGAIN}") from error


def _in_vocabulary(tokens: Tensor, model: Any) -> bool:
    return bool(((tokens >= 0) & (tokens < model.config.vocab_size)).all())


def fill_cache(model: Any, tensors: dict[str, Tensor], seen_tokens: int) -> StateCache:
    """A cache of the model, on its device, with these tensors (`StateCache.tensors`). The host does not wait for what
    the device works on.

    Raises:
        ValueError: they are not those of a state of this model, or of no slot.
    """
    cache: StateCache = model.backbone.new_cache(0)
    slots = {tensors[s.key].shape[1] for s in cache.spec.stacks if tensors[s.key].dim() > 1}
    if len(slots) > 1 or slots == {0}:
        shapes = ", ".join(f"{s.key} {tuple(tensors[s.key].shape)}" for s in cache.spec.stacks)
        raise ValueError(f"{shapes} are not the states of one or more texts")
    cache = model.backbone.new_cache(slots.pop() if slots else 1)
    return cache.fill_({name: to_device(model.device, t) for name, t in tensors.items()}, seen_tokens)


def write_tensors(path: str | os.PathLike, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file under a temporary name, then rename it, so that readers see all of it or nothing.

    Raises:
        OSError: it cannot be written, as on a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    require_place(path)
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1])), os.fspath(path)) from error
