"""The state of a model: the tensors that its specification names, of a fixed size whatever the number of tokens seen."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mambakit.modules.layered import exact_device, stack_layers, zeros_of_layers
from mambakit.modules.state_file import read_state, write_state
from mambakit.modules.state_spec import StateSpec

if TYPE_CHECKING:
    from typing_extensions import Self

# Enough last tokens to tell "the whole sequence again" from "new tokens" with certainty for all practical purposes.
_TAIL = 32


class StateCache:
    """The state tensors of every layer, for ``max_batch_size`` slots, made from a specification.

    Everything that a Transformer's cache makes hard is a copy of a few tensors here: `clone` or `snapshot` to keep a state,
    `restore_` to return to it, `select` to fork or reorder slots, `copy_` to move slots between pools, `save` and `load` for
    files. All of it works on any specification; only mixers and kernels know what the tensors mean.

    Attributes:
        spec: what the cache holds.

    Args:
        spec: names, shapes and dtypes of each layer's tensors (`MambaConfig.state_spec`).
        max_batch_size: number of slots, 0 or more.
        device: where the tensors live; torch's default device when absent. A list of devices, one for each layer, for a model
            that lies on several: the stacked tensors are then `LayeredTensor`.

    Raises:
        ValueError: a negative number of slots, or a list of devices that does not name one for each layer.
    """

    # What transformers' generate() asks of a cache: whether to wrap each step in torch.compile, and (since 5.24) whether a
    # layer's part is a state, so that a prompt is not cut to the tokens after it, and may be cut back.
    is_compileable = False
    is_linear = (True,)
    is_croppable = False

    def __init__(
        self,
        spec: StateSpec,
        max_batch_size: int,
        device: torch.device | str | Sequence[torch.device | str] | None = None,
    ):
        if max_batch_size < 0:
            raise ValueError(f"max_batch_size is {max_batch_size}; it must be 0 or more")
        if isinstance(device, (list, tuple)) and len(device) != len(spec.layers):
            raise ValueError(
                f"device names {len(device)} devices for {len(spec.layers)} layers; give one of each layer, or one of all"
            )
        self.spec = spec
        self._stacks: dict[str, Any] = {}
        for stack in spec.stacks:
            own = [device[i] for i in stack.layers] if isinstance(device, (list, tuple)) else device
            shape = (max_batch_size, *stack.tensor.shape)
            self._stacks[stack.key] = zeros_of_layers(len(stack.layers), shape, own, stack.tensor.dtype)
        # Layers replaced out of place (where gradients flow) since the stacked tensors were last formed.
        self._replaced: dict[int, tuple[Tensor, ...]] = {}
        self._slots = max_batch_size  # of a model without a state
        self._seen_tokens = 0
        self._tail: Tensor | None = None

    @classmethod
    def for_model(
        cls,
        config: Any,
        max_batch_size: int,
        device: torch.device | str | Sequence[torch.device | str] | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> Self:
        """A zero state for a model of configuration ``config`` and of ``dtype`` (the configuration's when None)."""
        return cls(config.state_spec(dtype), max_batch_size, device)

    # -- what it holds ---------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Any]:
        """The live memory, by `Stack.key`: each (layers, b, *shape), a Tensor or, on several devices, a `LayeredTensor`."""
        self._stack()
        return dict(self._stacks)

    def addresses(self) -> tuple[Any, ...]:
        """Where the memory lies: equal as long as in-place updates reach the same tensors."""
        return tuple(t.data_ptr() for t in self.tensors().values())

    @property
    def max_batch_size(self) -> int:
        for stacked in self._stacks.values():
            return stacked.shape[1]
        return self._slots

    @property
    def device(self) -> torch.device:
        """The first layer's."""
        for stacked in self._stacks.values():
            return stacked.device
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The model's; a state tensor may have another."""
        return self.spec.dtype

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self._stacks.values())

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
        """Whether ``sequences`` (b, seen) end with the tokens this cache was left with, as far as it knows them."""
        if self._tail is None or sequences.shape[0] != self._tail.shape[0]:
            return False
        return bool((sequences[:, sequences.shape[1] - self._tail.shape[1] :] == self._tail.to(sequences.device)).all())

    def __repr__(self) -> str:
        layers = ", ".join(f"{len(s.layers)} x {s.tensor}" for s in self.spec.stacks)
        return (
            f"{type(self).__name__}({layers}; slots={self.max_batch_size}, seen={self._seen_tokens}, "
            f"{self.nbytes / 2**20:.2f} MiB on {self.device})"
        )

    # -- one layer's tensors, as its mixer uses them ---------------------------------------------------------------

    def layer(self, index: int, rows: Tensor | None = None) -> tuple[Tensor, ...]:
        """Layer ``index``'s tensors (b, *shape) in the specification's order, of slots ``rows`` (int64; -1 is a zero state) or
        of every slot. To be read: what is written into them may be lost."""
        tensors = self._replaced.get(index) or tuple(self._stacks[key][at] for key, at in self.spec.places[index])
        if rows is None:
            return tensors
        at = rows.clamp(min=0)
        return tuple(torch.where((rows >= 0).view(-1, *[1] * (t.dim() - 1)), t[at], 0) for t in tensors)

    def memory(self, index: int) -> tuple[Tensor, ...]:
        """Layer ``index``'s own memory (b, *shape), in the specification's order, for inference to write into."""
        self._stack()
        return tuple(self._stacks[key][at] for key, at in self.spec.places[index])

    def update(self, index: int, *tensors: Tensor, rows: Tensor | None = None) -> None:
        """Replace layer ``index``'s tensors, given in the specification's order, of slots ``rows`` (int64; -1 drops the state)
        or of every slot.

        Out of place, so that a gradient can flow from later tokens through the state into earlier ones. Inference writes
        into `memory` instead.
        """
        named = self.spec.layers[index]
        if len(tensors) != len(named):
            names = ", ".join(t.name for t in named)
            raise ValueError(f"layer {index} was given {len(tensors)} state tensors; it has {len(named)}: {names}")
        tensors = tuple(t.to(own.dtype) for t, own in zip(tensors, named, strict=True))
        if rows is not None:
            old = self.layer(index)
            at = torch.where(rows >= 0, rows, self.max_batch_size)  # a slot beyond the last takes what is dropped
            tensors = tuple(_put(before, at, t) for before, t in zip(old, tensors, strict=True))
        self._replaced[index] = tensors

    def _stack(self) -> None:
        """Form the stacked tensors anew from the layers that were replaced."""
        if not self._replaced:
            return
        now: dict[str, list[Tensor]] = {key: [] for key in self._stacks}
        for index, places in enumerate(self.spec.places):
            for (key, _), tensor in zip(places, self.layer(index), strict=True):
                now[key].append(tensor)
        self._stacks = {key: stack_layers(tensors) for key, tensors in now.items()}
        self._replaced = {}

    def place(self, index: int, device: torch.device) -> None:
        """Have layer ``index``'s tensors on ``device``, where its layer computes; the other layers' stay where they are."""
        if all(t.device == device for t in self.layer(index)):
            return
        self._stack()
        for key, at in self.spec.places[index]:
            stacked = self._stacks[key]
            self._stacks[key] = stack_layers([t.to(device) if i == at else t.clone() for i, t in enumerate(stacked)])

    # -- operations on whole states --------------------------------------------------------------------------------

    def clone(self) -> Self:
        """A copy that later tokens do not change."""
        other = self._with(lambda t: t.clone())
        other._tail = self._tail
        return other

    def snapshot(self) -> Self:
        """A copy to return to with `restore_`."""
        return self.clone()

    def restore_(self, snapshot: StateCache) -> Self:
        """Return to a `snapshot`, in place as `load_`."""
        return self.load_(snapshot)

    def detach(self) -> Self:
        """The same values cut from the autograd graph: truncated backpropagation carries a detached state."""
        return self._with(lambda t: t.detach())

    def select(self, indices: Tensor | list[int]) -> Self:
        """A new cache whose slot i is this one's slot ``indices[i]``: reorder, drop or fork slots."""
        index = self._index(indices, self.max_batch_size, "indices")
        other = self._with(lambda t: t[:, index])
        other._slots = len(index)
        return other

    def empty_like(self, max_batch_size: int) -> Self:
        """A zero state of ``max_batch_size`` slots of the same model, on this one's (first) device."""
        other = self._with(lambda t: torch.zeros(
            t.shape[0], max_batch_size, *t.shape[2:], dtype=t.dtype, device=self.device
        ))  # fmt: skip
        other._slots, other._seen_tokens = max_batch_size, 0
        return other

    def reset(self, rows: Tensor | list[int] | None = None) -> None:
        """Zero every slot, or those of ``rows``: indices, or a mask (b,) bool.

        With ``rows`` it is in place, and with a mask nothing waits for the device.
        """
        if rows is None:
            self._replaced = {}
            self._stacks = {key: t.detach().clone().zero_() for key, t in self._stacks.items()}
            self._seen_tokens, self._tail = 0, None
        elif isinstance(rows, Tensor) and rows.dtype == torch.bool:
            if rows.shape != (self.max_batch_size,):
                raise ValueError(f"the mask has shape {tuple(rows.shape)}; it must be ({self.max_batch_size},)")
            for stacked in self.tensors().values():
                mask = rows.to(stacked.device).view(-1, *[1] * (len(stacked.shape) - 2))
                stacked.masked_fill_(mask, 0)
        else:
            index = self._index(rows, self.max_batch_size, "rows")
            for stacked in self.tensors().values():
                stacked[:, index] = 0

    def copy_(self, source: StateCache, from_slots: Tensor | list[int], to_slots: Tensor | list[int]) -> Self:
        """Copy slots ``from_slots`` of ``source`` into slots ``to_slots`` of this cache; the other slots stay.

        Lists and CPU tensors of indices are checked without waiting for the device.

        Raises:
            ValueError: a state of another specification, indices beyond a cache, or more of one kind than of the other.
        """
        self._require_alike(source)
        from_index = source._index(from_slots, source.max_batch_size, "from_slots")
        to_index = self._index(to_slots, self.max_batch_size, "to_slots")
        if from_index.shape != to_index.shape:
            raise ValueError(f"{from_index.numel()} from_slots but {to_index.numel()} to_slots; give as many of each")
        given = source.tensors()
        for key, stacked in self.tensors().items():
            stacked[:, to_index] = given[key][:, from_index].to(self.device, stacked.dtype)
        self._seen_tokens = max(self._seen_tokens, source._seen_tokens)
        return self

    def load_(self, source: StateCache) -> Self:
        """Take over the values and the number of tokens seen of ``source``, which has as many slots, in place: the tensors stay
        where they are, for a captured graph or a native step that holds on to their memory. No gradient flows through it.

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

    def fill_(self, tensors: Mapping[str, Tensor], seen_tokens: int) -> Self:
        """Take over tensors of the names, shapes and kinds of this cache's own (`tensors`), in place.

        Raises:
            ValueError: one is missing, has another shape, or is floating where this cache's is not.
        """
        own = self.tensors()
        wrong = [
            f"{key} is {'missing' if t is None else f'{tuple(t.shape)} {t.dtype}'}, not {tuple(own[key].shape)} {own[key].dtype}"
            for key in own for t in [tensors.get(key)]
            if t is None or t.shape != own[key].shape or t.is_floating_point() != own[key].dtype.is_floating_point
        ]  # fmt: skip
        if wrong:
            raise ValueError(f"the state does not fit: {'; '.join(wrong)}")
        self._fill(tensors, seen_tokens)
        return self

    def _fill(self, tensors: Mapping[str, Any], seen_tokens: int) -> None:
        for key, stacked in self.tensors().items():
            stacked.copy_(tensors[key].detach())
        self._seen_tokens, self._tail = seen_tokens, None

    def to(self, device: torch.device | str | int | None) -> Self:
        """This cache, all of it on one device: itself where it lies there already."""
        if device is None or all(
            isinstance(t, Tensor) and t.device == exact_device(device) for t in self._stacks.values()
        ):
            return self
        return self._with(lambda t: t.to(device))

    # -- names that transformers' generate() calls -----------------------------------------------------------------

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder slots in place (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        chosen = self.select(indices)
        self._stacks, self._slots = chosen._stacks, chosen._slots

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every slot ``repeats`` times in place: n continuations of one prompt."""
        self._stacks = {key: t.repeat_interleave(repeats, 1) for key, t in self.tensors().items()}
        self._slots *= repeats

    def crop(self, max_length: int) -> None:
        raise NotImplementedError(
            f"a recurrent state cannot be cut back to {max_length} tokens: it has no per-token entries; take a snapshot with "
            "clone() before the tokens that may be taken back, and continue from it"
        )

    # -- files -----------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Write the state to a safetensors file (to a temporary name first, then renamed)."""
        write_state(path, self.tensors(), self.spec, self._seen_tokens)

    @classmethod
    def load(cls, path: str | os.PathLike, config: Any, device: torch.device | str | None = None) -> Self:
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

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _with(self, function: Callable[[Any], Any]) -> Self:
        """A cache of the same class and specification, its tensors made from this one's by ``function``."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._stacks = {key: function(t) for key, t in self.tensors().items()}
        other._replaced, other._tail = {}, None
        return other

    def _require_alike(self, source: StateCache) -> None:
        if (difference := self.spec.difference(source.spec)) is not None:
            raise ValueError(f"source is of another model: it has {difference}; {source!r} does not fit {self!r}")

    def _index(self, indices: Tensor | list[int], limit: int, name: str) -> Tensor:
        home = indices.device if isinstance(indices, Tensor) else "cpu"
        index = torch.as_tensor(indices, dtype=torch.long, device=home)
        if index.dim() != 1:
            raise ValueError(f"{name} has shape {tuple(index.shape)}, expected one dimension")
        if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < limit):
            raise ValueError(f"{name} {index.tolist()} reach outside the {limit} rows of the cache")
        return index.to(self.device)


def _put(old: Tensor, at: Tensor, new: Tensor) -> Tensor:
    """``old`` (b, ...) with slots ``at`` replaced, b for none."""
    return torch.cat([old, torch.zeros_like(new[:1])]).index_put((at,), new)[: old.shape[0]]
