"""MambaStack: Mamba layers behind the interface of `torch.nn.LSTM`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from mambakit.modules.mixers import state_spec
from mambakit.modules.mixers.mamba import MambaMixer
from mambakit.modules.norm import RMSNorm
from mambakit.modules.state_cache import StateCache
from mambakit.nn.checks import check_sizes, checked_starts, checked_state, require_count, require_input
from mambakit.nn.segments import Segments, row_order, segments_of
from mambakit.nn.settings import StackSettings
from mambakit.ops._releases import is_exporting

State = tuple[Tensor, Tensor]


_NOT_EXPORTED = (
    "an exported stack takes neither starts nor a PackedSequence: how many segments they have is a matter of values; "
    "export step, which takes starts, or sequences of one episode each"
)


class _Layer(nn.Module):
    """A norm and one mixer for each direction, which read the same input."""

    def __init__(self, settings: StackSettings, index: int, directions: int):
        super().__init__()
        self.norm = RMSNorm(settings.hidden_size, settings.layer_norm_epsilon)
        self.mixers = nn.ModuleList(
            MambaMixer(settings, index * directions + direction) for direction in range(directions)
        )

    def forward(
        self, x: Tensor, residual: Tensor | None, cache: StateCache, segments: Segments | None
    ) -> tuple[list[Tensor], Tensor]:
        """(b, l, h) -> the mixers' outputs (b, l, h), one for each direction, and the residual stream before them."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        x, residual = self.norm(x, residual, wide)
        forward, *backward = self.mixers
        outputs = [forward(x, cache, None if segments is None else segments.forward)]
        for mixer in backward:
            packing = None if segments is None else segments.backward
            outputs.append(_reversed(mixer(_reversed(x, segments), cache, packing), segments))
        return outputs, residual


class MambaStack(nn.Module):
    """A stack of Mamba layers (arXiv 2312.00752) in the place of a `torch.nn.LSTM`.

    ``y, state = stack(x, state)``: shapes of ``x`` and ``y``, unbatched input, `PackedSequence` and the order of
    sequences and states are those of `torch.nn.LSTM`. The state is two tensors, as the LSTM's is:

        conv  (num_layers * directions, b, d, k - 1)  the last inputs of each convolution, in the parameters' dtype
        ssm   (num_layers * directions, b, d, n)      float32 (float64 in a float64 stack)

    with d = expand * hidden_size. It is differentiable, and a sequence read in chunks equals the whole. Training reads
    all steps of a sequence in parallel. The input is projected to ``hidden_size``; each layer adds its output to a
    residual stream; the output is normalised. With ``bidirectional`` a layer adds both directions' outputs, and the
    last one's are normalised apart and concatenated, the forward direction first.

    Args:
        input_size: features of x.
        hidden_size: features of y, for each direction.
        num_layers: layers, 1 or more.
        bidirectional: read each sequence from both ends.
        dropout: probability with which an output of a layer other than the last is zeroed in training.
        batch_first: x and y are (b, l, features) rather than (l, b, features). States are not affected.
        state_size, conv_kernel, expand: n, k and d / hidden_size of the layers.
        device, dtype: of the parameters; A_log, D and dt_proj.bias stay float32 in a half dtype.

    Raises:
        ValueError: a size below 1, or a dropout outside of 0 to 1.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
        *,
        batch_first: bool = False,
        state_size: int = 16,
        conv_kernel: int = 4,
        expand: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_sizes(
            dropout, input_size=input_size, hidden_size=hidden_size, num_layers=num_layers, state_size=state_size,
            conv_kernel=conv_kernel, expand=expand,
        )  # fmt: skip
        if dropout and num_layers == 1:
            warnings.warn(f"dropout={dropout} is between layers, and num_layers is 1: it has no effect", stacklevel=2)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bidirectional, self.dropout, self.batch_first = bidirectional, float(dropout), batch_first
        self.directions = 2 if bidirectional else 1
        self.settings = StackSettings(hidden_size, num_layers * self.directions, state_size, conv_kernel, expand)
        place = torch.device(device) if device is not None else torch.get_default_device()
        with place:
            self.in_proj = nn.Linear(input_size, hidden_size)
            self.layers = nn.ModuleList(_Layer(self.settings, i, self.directions) for i in range(num_layers))
            self.norms = nn.ModuleList(
                RMSNorm(hidden_size, self.settings.layer_norm_epsilon) for _ in range(self.directions)
            )
        self._scale_ends()
        if dtype is not None:
            self.to(dtype)

    @torch.no_grad()
    def _scale_ends(self) -> None:
        """Each residual branch starts smaller, so that the stream's variance does not grow with the layers."""
        for module in self.modules():
            if isinstance(module, MambaMixer):
                module.out_proj.weight /= math.sqrt(self.settings.num_hidden_layers)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        self.in_proj.reset_parameters()
        for module in self.modules():
            if isinstance(module, (RMSNorm, MambaMixer)):
                module.reset_parameters()
        self._scale_ends()

    def zero_state(self, batch_size: int) -> State:
        """The state before the first token: zeros, on the parameters' device."""
        require_count("batch_size", batch_size)
        weight = self.in_proj.weight
        conv, ssm = StateCache(state_spec(self.settings, weight.dtype), batch_size, weight.device).tensors().values()
        return conv, ssm

    def forward(
        self, x: Tensor | PackedSequence, state: State | None = None, starts: Any = None
    ) -> tuple[Tensor | PackedSequence, State]:
        """Read sequences.

        Args:
            x: (l, b, input_size), or (b, l, input_size) with ``batch_first``, or (l, input_size) without a batch; l >=
                1. Or a `PackedSequence`, whose sequences may have different lengths.
            state: before the first token, with a b of its own order for a `PackedSequence`; zeros when None. It is not
                written to. The backward direction's is the state behind the last token.
            starts: bool, like x without features (a `PackedSequence` of the same sizes for one): True at a token before
                which the state becomes zero (an episode begins). Nothing passes from the tokens before it into those
                from it on, in either direction.

        Returns:
            y, shaped as x with hidden_size * directions features, and the state after the last token of each sequence
            (for the backward direction, after its first).

        Raises:
            ValueError: shapes, dtypes or devices that do not fit. `torch.compile` runs ``starts`` outside of its graph,
                and `torch.export` refuses it: how many segments there are is a matter of values.
        """
        require_input(self, x)
        if is_exporting() and (starts is not None or isinstance(x, PackedSequence)):
            raise ValueError(_NOT_EXPORTED)
        if isinstance(x, PackedSequence):
            return self._packed(x, state, starts)
        if x.dim() == 2:
            y, after = self.forward(x.unsqueeze(0 if self.batch_first else 1), _each(state, 1), _batched(self, starts))
            assert isinstance(y, Tensor)
            return y.squeeze(0 if self.batch_first else 1), (after[0].squeeze(1), after[1].squeeze(1))
        rows = x if self.batch_first else x.transpose(0, 1)  # (b, l, f)
        b, length = rows.shape[:2]
        state = checked_state(self, state, b)
        mask = checked_starts(starts, x.shape[:-1], x.device)
        segments = None
        if mask is not None:
            mask = mask if self.batch_first else mask.transpose(0, 1)
            read: Callable[..., Any] = segments_of
            if torch.compiler.is_compiling():
                from mambakit.nn.untraced import segments_between_graphs as read
            segments = read(torch.full((b,), length, dtype=torch.int64, device=x.device), mask.reshape(-1))
            rows = rows.reshape(1, b * length, -1)
        y, after = self._run(rows, state, segments)
        y = y.reshape(b, length, -1)
        return y if self.batch_first else y.transpose(0, 1), after

    def step(self, x: Tensor, state: State | None = None, starts: Tensor | None = None) -> tuple[Tensor, State]:
        """Read one token of each sequence: `forward` over them one by one equals `forward` over the whole.

        Args:
            x: (b, input_size), or (input_size,) without a batch.
            state: before it; zeros when None.
            starts: (b,) bool (() without a batch): True where an episode begins with this token, and the state before
                it becomes zero.

        Returns:
            y (b, hidden_size) and the state after it.

        Raises:
            ValueError: a bidirectional stack, which needs whole sequences.
        """
        if self.bidirectional:
            raise ValueError("a bidirectional stack reads whole sequences; step is for bidirectional=False")
        if x.dim() == 1:
            y, after = self.step(x[None], _each(state, 1), None if starts is None else starts[None])
            return y[0], (after[0].squeeze(1), after[1].squeeze(1))
        require_input(self, x[:, None] if self.batch_first else x[None], one=tuple(x.shape))
        state = checked_state(self, state, x.shape[0])
        mask = checked_starts(starts, x.shape[:1], x.device)
        if mask is not None:
            conv, ssm = (torch.where(mask[None, :, None, None], 0, t) for t in state)
            state = conv, ssm
        y, after = self._run(x[:, None], state, None)
        return y[:, 0], after

    def _packed(self, x: PackedSequence, state: State | None, starts: Any) -> tuple[PackedSequence, State]:
        order, lengths = row_order(x)
        state = checked_state(self, state, len(lengths))
        if x.sorted_indices is not None:
            state = state[0][:, x.sorted_indices], state[1][:, x.sorted_indices]
        mask = None
        if starts is not None:
            if not isinstance(starts, PackedSequence) or not torch.equal(starts.batch_sizes, x.batch_sizes):
                raise ValueError("starts of a PackedSequence must be a PackedSequence of the same batch_sizes, bool")
            mask = checked_starts(starts.data, x.data.shape[:1], x.data.device)
            assert mask is not None
            mask = mask[order]
        y, after = self._run(x.data[order][None], state, segments_of(lengths, mask))
        data = torch.empty_like(y[0]).index_copy(0, order, y[0])
        if x.unsorted_indices is not None:
            after = after[0][:, x.unsorted_indices], after[1][:, x.unsorted_indices]
        return PackedSequence(data, x.batch_sizes, x.sorted_indices, x.unsorted_indices), after

    def _run(self, rows: Tensor, state: State, segments: Segments | None) -> tuple[Tensor, State]:
        """(b, l, input_size), or the row (1, total, input_size) of ``segments`` -> y and the state after it."""
        spec = state_spec(self.settings, self.in_proj.weight.dtype)
        if not torch.is_grad_enabled():
            # Inference writes into the cache's memory, which must be dense whatever slices the caller made.
            conv, ssm = (t.clone(memory_format=torch.contiguous_format) for t in state)
            state = conv, ssm
        cache = StateCache.over(spec, dict(zip([stack.key for stack in spec.stacks], state, strict=True)))
        x, residual = self.in_proj(rows), None
        outputs = [x]
        for index, layer in enumerate(self.layers):
            outputs, residual = layer(x, residual, cache, segments)
            if index < self.num_layers - 1:
                x = outputs[0] if self.directions == 1 else outputs[0] + outputs[1]
                x = nn.functional.dropout(x, self.dropout, self.training)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        found = [norm(output, residual, wide)[0] for norm, output in zip(self.norms, outputs, strict=True)]
        conv, ssm = cache.tensors().values()
        y = found[0] if self.directions == 1 else torch.cat(found, -1)
        return y, (conv, ssm)

    def extra_repr(self) -> str:
        options = {"bidirectional": self.bidirectional, "dropout": self.dropout, "batch_first": self.batch_first}
        shown = ", ".join(f"{name}={value}" for name, value in options.items() if value)
        return f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}{', ' * bool(shown)}{shown}"


def _reversed(x: Tensor, segments: Segments | None) -> Tensor:
    return x.flip(1) if segments is None else x[:, segments.reversal]


def _each(state: Any, dim: int) -> Any:
    """An unbatched state as one of a batch of one; anything else as it is, to be refused."""
    fits = isinstance(state, (tuple, list)) and len(state) == 2 and all(isinstance(t, Tensor) for t in state)
    return tuple(t.unsqueeze(dim) if t.dim() == 3 else t for t in state) if fits else state


def _batched(stack: MambaStack, starts: Any) -> Any:
    return (
        starts.unsqueeze(0 if stack.batch_first else 1) if isinstance(starts, Tensor) and starts.dim() == 1 else starts
    )
