"""The state of a model: the tensors that its specification names, whose size does not grow with the tokens seen."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from mambakit.modules.layered import exact_device
from mambakit.modules.state_file import read_state, write_state
from mambakit.modules.state_memory import StateMemory
from mambakit.modules.state_spec import StateSpec

_Cache = TypeVar("_Cache", bound="StateCache")
# Enough last tokens to tell "the whole sequence again" from "new tokens" with certainty for all practical purposes.
_TAIL = 32


class StateCache:
    """The state tensors of every layer, for ``max_batch_size`` slots, made from a specification.

    Everything that a Transformer's cache makes hard is a copy of a few tensors here: `clone` or `snapshot` to keep a
    state, `restore_` to return to it, `select` to fork or reorder slots, `copy_` to move slots between pools, `save`
    and `load` for files. All of it works on any specification; only mixers and kernels know what the tensors mean.

    Attributes:
        spec: what the cache holds.

    Args:
        spec: names, shapes and dtypes of each layer's tensors (`MambaConfig.state_spec`).
        max_batch_size: number of slots, 0 or more.
        device: where the tensors live; torch's default device when absent. A list of devices, one for each layer, for a
            model that lies on several: the stacked tensors are then `LayeredTensor`.

    Raises:
        ValueError: a negative number of slots, or a list of devices that does not name one for each layer.
    """

    # What transformers' generate() reads of a cache: whether to wrap each step in torch.compile, and (since 5.24)
    # whether a layer's part is a state, so that a prompt is not cut to the tokens after it, and may be cut back.
    is_compileable = False
    is_linear = (True,)
    is_croppable = False

    def __init__(
        self,
        spec: StateSpec,
        max_batch_size: int,
        device: torch.device | str | Sequence[torch.device | str] | None = None,
    ):
        self._memory = StateMemory(spec, max_batch_size, device)
        self._seen_tokens = 0
        self._tail: Tensor | None = None

    @classmethod
    def for_model(
        cls: type[_Cache],
        config: Any,
        max_batch_size: int,
        device: torch.device | str | Sequence[torch.device | str] | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> _Cache:
        """A zero state for a model of configuration ``config`` and of ``dtype`` (the configuration's when None)."""
        return cls(config.state_spec(dtype), max_batch_size, device)

    @classmethod
    def over(cls, spec: StateSpec, tensors: Mapping[str, Tensor]) -> StateCache:
        """A cache whose memory is ``tensors`` (by `Stack.key`, (layers, b, *shape), of the specification's dtypes).

        Nothing is copied: inference writes into them, and where gradients flow they flow through them.
        """
        cache = StateCache(spec, 0, "meta")
        cache._memory = cache._memory.mapped(lambda t: t, next((t.shape[1] for t in tensors.values()), 0))
        cache._memory.replace(tensors)
        return cache

    def tensors(self) -> dict[str, Any]:
        """The live memory, by `Stack.key`: (layers, b, *shape) each, a `LayeredTensor` on several devices."""
        return dict(self._memory.tensors())

    def addresses(self) -> tuple[Any, ...]:
        """Where the memory lies: equal as long as in-place updates reach the same tensors."""
        return tuple(t.data_ptr() for t in self.tensors().values())

    @property
    def spec(self) -> StateSpec:
        return self._memory.spec

    @property
    def max_batch_size(self) -> int:
        return self._memory.slots

    @property
    def device(self) -> torch.device:
        """The first layer's."""
        return self._memory.device

    @property
    def dtype(self) -> torch.dtype:
        """The model's; a state tensor may have another."""
        return self.spec.dtype

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of token columns seen (padding included) since the cache was made or reset."""
        return self._seen_tokens

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` more columns; the model calls this once per forward."""
        self._seen_tokens += tokens
        self._tail = None

    def remember_tail(self, sequences: Tensor) -> None:
        """Keep the last tokens seen, of ``sequences`` (b, >= seen); `ends_with` compares against them."""
        self._tail = sequences[:, max(0, self._seen_tokens - _TAIL) : self._seen_tokens].clone()

    def ends_with(self, sequences: Tensor) -> bool:
        """Whether ``sequences`` (b, seen) end with the last tokens this cache has read; False if they are unknown."""
        if self._tail is None or sequences.shape[0] != self._tail.shape[0]:
            return False
        return bool((sequences[:, sequences.shape[1] - self._tail.shape[1] :] == self._tail.to(sequences.device)).all())

    def __repr__(self) -> str:
        layers = ", ".join(f"{len(s.layers)} x {s.tensor}" for s in self.spec.stacks)
        return (
            f"{type(self).__name__}({layers}; slots={self.max_batch_size}, seen={self._seen_tokens}, "
            f"{self.nbytes / 2**20:.2f} MiB on {self.device})"
        )

    def layer(self, index: int, rows: Tensor | None = None) -> tuple[Tensor, ...]:
        """Layer ``index``'s tensors (b, *shape) in the specification's order, of slots ``rows`` (int64; -1 is a zero
        state) or of every slot. To be read: what is written into them may be lost."""
        tensors = self._memory.layer(index, rows)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # autograd keeps no tensor of `torch.inference_mode`, in which a text is often begun.
            return tuple(t.clone() if t.is_inference() else t for t in tensors)
        return tensors

    def memory(self, index: int) -> tuple[Tensor, ...]:
        """Layer ``index``'s own memory (b, *shape), in the specification's order, for inference to write into."""
        return self._memory.own(index)

    def update(self, index: int, *tensors: Tensor, rows: Tensor | None = None) -> None:
        """Replace layer ``index``'s tensors, given in the specification's order, of slots ``rows`` (int64; -1 drops the
        state) or of every slot.

        Out of place, so that a gradient can flow from later tokens through the state into earlier ones. Inference
        writes into `memory` instead.
        """
        self._memory.update(index, tensors, rows)

    def place(self, index: int, device: torch.device) -> None:
        """Move layer ``index``'s tensors to ``device``, where its layer computes."""
        self._memory.place(index, device)

    def clone(self: _Cache) -> _Cache:
        """A copy that later tokens do not change."""
        other = self._with(lambda t: t.clone())
        other._tail = self._tail
        return other

    def snapshot(self: _Cache) -> _Cache:
        """A copy to return to with `restore_`."""
        return self.clone()

    def restore_(self: _Cache, snapshot: StateCache) -> _Cache:
        """Return to a `snapshot`, in place as `load_`."""
        return self.load_(snapshot)

    def detach(self: _Cache) -> _Cache:
        """The same values cut from the autograd graph: truncated backpropagation carries a detached state."""
        return self._with(lambda t: t.detach())

    def select(self: _Cache, indices: Tensor | list[int]) -> _Cache:
        """A new cache whose slot i is this one's slot ``indices[i]``: reorder, drop or fork slots."""
        index = self._memory.index(indices, "indices")
        return self._with(lambda t: t[:, index], len(indices))

    def empty_like(self: _Cache, max_batch_size: int) -> _Cache:
        """A zero state of ``max_batch_size`` slots of the same model, on this one's (first) device."""
        shape, home = (lambda t: (t.shape[0], max_batch_size, *t.shape[2:])), self.device
        other = self._with(lambda t: torch.zeros(shape(t), dtype=t.dtype, device=home), max_batch_size)
        other._seen_tokens = 0
        return other

    def reset(self, rows: Tensor | list[int] | None = None) -> None:
        """Zero every slot, or those of ``rows``: indices, or a mask (b,) bool.

        With ``rows`` it is in place, and with a mask nothing waits for the device.
        """
        if rows is None:
            self._memory = self._memory.mapped(lambda t: t.detach().clone().zero_())
            self._seen_tokens, self._tail = 0, None
        else:
            self._memory.zero_(rows)

    def zero_(self) -> None:
        """Zero every slot in place: the tensors stay where they are."""
        for tensor in self.tensors().values():
            tensor.zero_()
        self._seen_tokens, self._tail = 0, None

    def copy_(self: _Cache, source: StateCache, from_slots: Tensor | list[int], to_slots: Tensor | list[int]) -> _Cache:
        """Copy slots ``from_slots`` of ``source`` into slots ``to_slots`` of this cache; the other slots stay.

        Lists and CPU tensors of indices are checked without waiting for the device, and a list of consecutive slots
        makes no tensor of indices.

        Raises:
            ValueError: a state of another specification, indices beyond a cache, or more of one kind than of the other.
        """
        self._require_alike(source)
        self._memory.copy_(source._memory, from_slots, to_slots)
        self._seen_tokens = max(self._seen_tokens, source._seen_tokens)
        return self

    def gather_(self: _Cache, source: StateCache, slots: Tensor) -> _Cache:
        """Slot i becomes slot ``slots[i]`` of ``source``, in place; ``slots`` (b,) int64 on the caches' device.

        Nothing is checked that would need the device, so that a CUDA graph can hold the copies. Indices must lie within
        ``source``. The number of tokens seen stays.

        Raises:
            ValueError: a state of another specification.
        """
        self._require_alike(source)
        self._memory.gather_(source._memory, slots)
        return self

    def load_(self: _Cache, source: StateCache) -> _Cache:
        """Copy the values and the number of tokens seen of ``source``, which has as many slots, in place: the
        tensors stay where they are, for a captured graph or a native step that holds on to their memory. No gradient
        flows through it.

        Raises:
            ValueError: a state of another specification, or of another number of slots.
        """
        self._require_alike(source)
        if source.max_batch_size != self.max_batch_size:
            raise ValueError(
                f"source has {source.max_batch_size} slots, not {self.max_batch_size}: select or copy_ them"
            )
        self._fill(source.tensors(), source._seen_tokens)
        self._tail = source._tail
        return self

    def fill_(self: _Cache, tensors: Mapping[str, Tensor], seen_tokens: int) -> _Cache:
        """Copy tensors of the names, shapes and kinds of this cache's own (`tensors`), in place.

        Raises:
            ValueError: one is missing, has another shape, or is floating where this cache's is not.
        """
        if wrong := self._memory.misfits(tensors):
            raise ValueError(f"the state does not fit: {'; '.join(wrong)}")
        self._fill(tensors, seen_tokens)
        return self

    def _fill(self, tensors: Mapping[str, Any], seen_tokens: int) -> None:
        self._memory.fill_(tensors)
        self._seen_tokens, self._tail = seen_tokens, None

    def to(self: _Cache, device: torch.device | str | int | None) -> _Cache:
        """This cache, all of it on one device: itself where it lies there already."""
        tensors = self.tensors().values()
        if device is None or all(isinstance(t, Tensor) and t.device == exact_device(device) for t in tensors):
            return self
        return self._with(lambda t: t.to(device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder slots in place (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._memory = self.select(indices)._memory

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every slot ``repeats`` times in place: n continuations of one prompt."""
        slots = self.max_batch_size * repeats
        self._memory = self._memory.mapped(lambda t: t.repeat_interleave(repeats, 1), slots)

    def crop(self, max_length: int) -> None:
        raise NotImplementedError(
            f"a recurrent state cannot be cut back to {max_length} tokens: it has no per-token entries; take a "
            "snapshot with clone() before the tokens that may be taken back, and continue from it"
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write the state to a safetensors file (to a temporary name first, then renamed)."""
        write_state(path, self.tensors(), self.spec, self._seen_tokens)

    @classmethod
    def load(
        cls: type[_Cache], path: str | os.PathLike, config: Any, device: torch.device | str | None = None
    ) -> _Cache:
        """Read a state written by `save`, for a model of configuration ``config``.

        Raises:
            ValueError: the file is not a saved state, is damaged, or belongs to a model of another configuration.
        """
        saved = read_state(path, lambda dtype: cls.for_model(config, 0, "cpu", dtype).spec)
        cache = cls.for_model(config, saved.slots, device, saved.dtype)
        try:
            return cache.fill_(saved.tensors, saved.seen_tokens)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def _with(self: _Cache, function: Callable[[Any], Any], slots: int | None = None) -> _Cache:
        """A cache of the same class and specification, its tensors made from this one's by ``function``."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._memory, other._tail = self._memory.mapped(function, slots), None
        return other

    def _require_alike(self, source: StateCache) -> None:
        if (difference := self.spec.difference(source.spec)) is not None:
            raise ValueError(f"source is of another model: it has {difference}; {source!r} does not fit {self!r}")
