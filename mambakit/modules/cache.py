"""The state of a Mamba model: two tensors, whatever the number of tokens seen."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mambakit.errors import CheckpointError
from mambakit.modules.layered import exact_device, stack_layers, zeros_of_layers
from mambakit.reading import open_safetensors
from mambakit.writing import replacing

# What must agree between the model that wrote a state and the one that reads it.
_IDENTITY = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "state_size", "conv_kernel",
    "num_hidden_layers", "time_step_rank", "use_bias", "use_conv_bias", "hidden_act",
)  # fmt: skip
# Enough last tokens to tell "the whole sequence again" from "new tokens" with certainty for all practical purposes.
_TAIL = 32
_FORMAT = "mambakit.MambaCache/1"


class MambaCache:
    """The convolution windows and SSM states of every layer, for ``max_batch_size`` rows.

    Attributes:
        conv_states: (layers, b, d, k - 1), the last k - 1 inputs of each convolution, in the model's dtype.
        ssm_states: (layers, b, d, n), float32 whatever the weights are (float64 in a float64 model).

    Everything that a Transformer's cache makes hard is a copy of two tensors here: `clone` to take a snapshot,
    `select` to fork or reorder rows, `copy_` to move rows between pools, `save` and `load` to keep them in a file.

    Args:
        config: the model's configuration.
        max_batch_size: number of rows.
        device: where the tensors live; torch's default device when absent. A list of devices, one for each layer, for a model that
            lies on several: ``conv_states`` and ``ssm_states`` are then a `LayeredTensor`.
        dtype: dtype of ``conv_states``; the configuration's, else float32.
    """

    # What transformers' generate() asks of a cache: whether to wrap each step in torch.compile, and (since 5.24) whether a layer's
    # part is a state, so that a prompt is not cut to the tokens after it, and may be cut back.
    is_compileable = False
    is_linear = (True,)
    is_croppable = False

    def __init__(
        self,
        config: Any,
        max_batch_size: int,
        device: torch.device | str | Sequence[torch.device | str] | None = None,
        dtype: torch.dtype | str | None = None,
    ):
        if max_batch_size < 0:
            raise ValueError(f"max_batch_size is {max_batch_size}; it must be 0 or more")
        given: Any = dtype or getattr(config, "dtype", None) or torch.float32
        # A configuration has it as text after its model was saved.
        kind: torch.dtype = getattr(torch, given.removeprefix("torch.")) if isinstance(given, str) else given
        state_dtype = torch.float64 if kind == torch.float64 else torch.float32
        layers, d = config.num_hidden_layers, config.intermediate_size
        self.config = config
        if isinstance(device, (list, tuple)) and len(device) != layers:
            raise ValueError(
                f"device names {len(device)} devices for {layers} layers; give one of each layer, or one of all"
            )
        conv, ssm = (max_batch_size, d, config.conv_kernel - 1), (max_batch_size, d, config.state_size)
        self._conv: Any = zeros_of_layers(layers, conv, device, kind)
        self._ssm: Any = zeros_of_layers(layers, ssm, device, state_dtype)
        # Layers replaced out of place (where gradients flow) since the stacked tensors were last formed.
        self._replaced: dict[int, tuple[Tensor, Tensor]] = {}
        self._seen_tokens = 0
        self._tail: Tensor | None = None

    # -- what it holds ---------------------------------------------------------------------------------------------

    @property
    def conv_states(self) -> Any:
        self._stack()
        return self._conv

    @property
    def ssm_states(self) -> Any:
        self._stack()
        return self._ssm

    @property
    def max_batch_size(self) -> int:
        return self._ssm.shape[1]

    @property
    def device(self) -> torch.device:
        return self._ssm.device

    @property
    def dtype(self) -> torch.dtype:
        return self._conv.dtype

    @property
    def nbytes(self) -> int:
        return self._conv.nbytes + self._ssm.nbytes

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
        layers, b, d, n = self._ssm.shape
        return (
            f"MambaCache(layers={layers}, rows={b}, d={d}, n={n}, seen={self._seen_tokens}, "
            f"{self.nbytes / 2**20:.2f} MiB on {self.device})"
        )

    # -- one layer's states, as the mixer uses them ----------------------------------------------------------------

    def layer(self, index: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Layer ``index``'s (conv, ssm) states of ``rows`` (int64; -1 is a zero state), or of every row."""
        conv, ssm = self._replaced.get(index) or (self._conv[index], self._ssm[index])
        if rows is None:
            return conv, ssm
        owned = (rows >= 0)[:, None, None]
        at = rows.clamp(min=0)
        return torch.where(owned, conv[at], 0), torch.where(owned, ssm[at], 0)

    def update(self, index: int, conv: Tensor, ssm: Tensor, rows: Tensor | None = None) -> None:
        """Replace layer ``index``'s states of ``rows`` (int64; -1 drops the state), or of every row.

        Out of place, so that a gradient can flow from later tokens through the state into earlier ones. Inference
        writes into ``conv_states[index]`` and ``ssm_states[index]`` instead.
        """
        conv, ssm = conv.to(self._conv.dtype), ssm.to(self._ssm.dtype)
        if rows is not None:
            old_conv, old_ssm = self.layer(index)
            at = torch.where(rows >= 0, rows, old_conv.shape[0])  # a row beyond the last takes what is dropped
            conv, ssm = _put(old_conv, at, conv), _put(old_ssm, at, ssm)
        self._replaced[index] = (conv, ssm)

    def _stack(self) -> None:
        """Form the stacked tensors anew from the layers that were replaced."""
        if self._replaced:
            layers = [self.layer(i) for i in range(self._ssm.shape[0])]
            self._conv, self._ssm = stack_layers([c for c, _ in layers]), stack_layers([s for _, s in layers])
            self._replaced = {}

    def place(self, index: int, device: torch.device) -> None:
        """Have layer ``index``'s states on ``device``, where its layer computes; the other layers' stay where they are."""
        if self.layer(index)[0].device == device:
            return
        self._stack()
        self._conv, self._ssm = (
            stack_layers([(t.to(device) if i == index else t.clone()) for i, t in enumerate(states)])
            for states in (self._conv, self._ssm)
        )

    # -- operations on whole states --------------------------------------------------------------------------------

    def clone(self) -> MambaCache:
        """A snapshot that later tokens do not change."""
        other = self._with(self.conv_states.clone(), self.ssm_states.clone())
        other._tail = self._tail
        return other

    def detach(self) -> MambaCache:
        """The same values cut from the autograd graph: truncated backpropagation carries a detached state."""
        return self._with(self.conv_states.detach(), self.ssm_states.detach())

    def select(self, indices: Tensor | list[int]) -> MambaCache:
        """A new cache whose row i is this one's row ``indices[i]``: reorder, drop or fork rows."""
        index = self._index(indices, self.max_batch_size, "indices")
        return self._with(self.conv_states[:, index], self.ssm_states[:, index])

    def reset(self, rows: Tensor | list[int] | None = None) -> None:
        """Zero every state, or those of ``rows``."""
        if rows is None:
            self._replaced = {}
            self._conv, self._ssm = self._conv.detach().clone().zero_(), self._ssm.detach().clone().zero_()
            self._seen_tokens, self._tail = 0, None
            return
        index = self._index(rows, self.max_batch_size, "rows")
        self.conv_states[:, index] = 0
        self.ssm_states[:, index] = 0

    def copy_(self, source: MambaCache, from_slots: Tensor | list[int], to_slots: Tensor | list[int]) -> MambaCache:
        """Copy rows ``from_slots`` of ``source`` into rows ``to_slots`` of this cache; the other rows stay."""
        if source.ssm_states.shape[0::2] != self.ssm_states.shape[0::2]:
            raise ValueError(f"source is of another model: {source!r} does not fit {self!r}")
        from_index = source._index(from_slots, source.max_batch_size, "from_slots")
        to_index = self._index(to_slots, self.max_batch_size, "to_slots")
        if from_index.shape != to_index.shape:
            raise ValueError(f"{from_index.numel()} from_slots but {to_index.numel()} to_slots; give as many of each")
        self.conv_states[:, to_index] = source.conv_states[:, from_index].to(self.device, self.dtype)
        self.ssm_states[:, to_index] = source.ssm_states[:, from_index].to(self.device, self.ssm_states.dtype)
        self._seen_tokens = max(self._seen_tokens, source._seen_tokens)
        return self

    def load_(self, source: MambaCache) -> MambaCache:
        """Take over the states and the number of tokens seen of ``source``, which has as many rows, in place: the tensors stay where they
        are, for a captured graph or a native step that holds on to their memory."""
        if source.ssm_states.shape != self.ssm_states.shape or source.conv_states.shape != self.conv_states.shape:
            raise ValueError(f"source is of another model or has other rows: {source!r} does not fit {self!r}")
        self.conv_states.copy_(source.conv_states)
        self.ssm_states.copy_(source.ssm_states)
        self._seen_tokens, self._tail = source._seen_tokens, source._tail
        return self

    def to(self, device: torch.device | str | int | None) -> MambaCache:
        """This cache, all of it on one device: itself where it lies there already."""
        if device is None or (isinstance(self._conv, Tensor) and self._conv.device == exact_device(device)):
            return self
        return self._with(self.conv_states.to(device), self.ssm_states.to(device))

    # -- names that transformers' generate() calls -----------------------------------------------------------------

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder rows in place (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        chosen = self.select(indices)
        self._conv, self._ssm = chosen.conv_states, chosen.ssm_states

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times in place: n continuations of one prompt."""
        conv, ssm = self.conv_states, self.ssm_states
        self._conv, self._ssm = conv.repeat_interleave(repeats, 1), ssm.repeat_interleave(repeats, 1)

    def crop(self, max_length: int) -> None:
        raise NotImplementedError(
            f"a Mamba state cannot be cut back to {max_length} tokens: it has no per-token entries; take a snapshot with "
            "clone() before the tokens that may be taken back, and continue from it"
        )

    # -- files -----------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Write the state to a safetensors file (to a temporary name first, then renamed)."""
        from safetensors.torch import save_file

        metadata = {
            "format": _FORMAT,
            "config": json.dumps(_identity(self.config)),
            "seen_tokens": str(self._seen_tokens),
        }
        tensors = {"conv_states": self.conv_states, "ssm_states": self.ssm_states}
        with replacing(path) as temporary:
            save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, temporary, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike, config: Any, device: torch.device | str | None = None) -> MambaCache:
        """Read a state written by `save`, for a model of configuration ``config``.

        Raises:
            ValueError: the file is not a saved state, is damaged, or belongs to a model of another configuration.
        """
        with open_safetensors(path, "save the state again") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise CheckpointError(f"{path} is not a saved mambakit state (format {metadata.get('format')!r})")
            try:
                saved, seen = json.loads(metadata["config"]), int(metadata["seen_tokens"])
            except (KeyError, ValueError) as error:
                raise CheckpointError(
                    f"{path}: its description of the state is damaged; save the state again"
                ) from error
            _require_same_model(path, saved if isinstance(saved, dict) else {}, _identity(config))
            conv, ssm = file.get_tensor("conv_states"), file.get_tensor("ssm_states")
        if conv.dim() != 4 or not conv.dtype.is_floating_point:
            raise CheckpointError(f"{path}: states {tuple(conv.shape)} are not those of a model; save the state again")
        cache = cls(config, conv.shape[1], device, conv.dtype)
        if conv.shape != cache.conv_states.shape or ssm.shape != cache.ssm_states.shape:
            raise ValueError(f"{path}: states {tuple(conv.shape)}, {tuple(ssm.shape)} do not fit {cache!r}")
        cache.conv_states.copy_(conv)
        cache.ssm_states.copy_(ssm)
        cache._seen_tokens = seen
        return cache

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _with(self, conv_states: Tensor, ssm_states: Tensor) -> MambaCache:
        other = object.__new__(MambaCache)
        other.config, other._conv, other._ssm, other._replaced = self.config, conv_states, ssm_states, {}
        other._seen_tokens, other._tail = self._seen_tokens, None
        return other

    def _index(self, indices: Tensor | list[int], limit: int, name: str) -> Tensor:
        index = torch.as_tensor(indices, dtype=torch.long, device=self.device)
        if index.dim() != 1:
            raise ValueError(f"{name} has shape {tuple(index.shape)}, expected one dimension")
        if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < limit):
            raise ValueError(f"{name} {index.tolist()} reach outside the {limit} rows of the cache")
        return index


def _put(old: Tensor, at: Tensor, new: Tensor) -> Tensor:
    """``old`` (b, d, k) with rows ``at`` replaced, b for none."""
    return torch.cat([old, torch.zeros_like(new[:1])]).index_put((at,), new)[: old.shape[0]]


def _identity(config: Any) -> dict[str, Any]:
    return {field: getattr(config, field, None) for field in _IDENTITY}


def _require_same_model(path: Any, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    different = [f"{k}: file {theirs.get(k)!r}, model {v!r}" for k, v in ours.items() if theirs.get(k) != v]
    if different:
        raise ValueError(f"{path} was saved by a model of another configuration ({'; '.join(different)})")
