"""Decoding on a GPU: one token for each of several rows, with the whole step as one CUDA graph.

The graph holds the persistent kernel (one launch for all layers), Triton kernels, or the model's own forward.
"""

from __future__ import annotations

import importlib.util
import weakref
from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.cuda_graph import CapturedGraph, kept_with, why_not_captured
from mambakit.decoding.eligibility import dtype_names, dtype_of_states, mixer_eps, weight_kinds, why_not_by_weights
from mambakit.modules import MambaCache
from mambakit.modules.quantized_linear import QuantizedLinear
from mambakit.ops.decode import cuda_persistent
from mambakit.ops.decode.weights import LayerWeights, ModelWeights
from mambakit.ops.sampling.api import NO_TOKEN

# Above this rows * hidden_size, Triton's kernels are faster than the persistent one (docs/kernels/decode.md).
_MOST_PERSISTENT = 12800
_LARGEST_STATE = 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PACKED = {(format, group) for format in ("int8", "int4", "fp8") for group in (32, 64, 128)}


def gpu_weights(model: Any) -> ModelWeights:
    """A model's weights in the form that `mambakit.ops.decode` reads: its parameters and buffers, not copies."""

    def weight(linear: Any) -> Any:
        return linear.packed if isinstance(linear, QuantizedLinear) else linear.weight

    layers = [
        LayerWeights(
            norm=block.norm.weight, in_proj=weight(m.in_proj), in_proj_bias=m.in_proj.bias,
            conv=m.conv1d.weight.squeeze(1), conv_bias=m.conv1d.bias, x_proj=weight(m.x_proj),
            dt_proj=m.dt_proj.weight, dt_bias=m.dt_proj.bias, A_log=m.A_log, D=m.D,
            out_proj=weight(m.out_proj), out_proj_bias=m.out_proj.bias,
            dt_norm=norms[0], B_norm=norms[1], C_norm=norms[2],
        )
        for block in model.backbone.layers for m in [block.mixer] for norms in [m.norm_weights()]
    ]  # fmt: skip
    backbone = model.backbone
    eps = model.config.layer_norm_epsilon
    embeddings, norm, head = backbone.embeddings.weight, backbone.norm_f.weight, weight(model.lm_head)
    return ModelWeights(layers, embeddings, norm, head, eps, mixer_eps(model))


# -- which kernels can serve -------------------------------------------------------------------------------------------


def _why_not_kernels(model: Any) -> str | None:
    """Why no kernel of `mambakit.ops.decode` can read this model's weights, or None where one may."""
    if (reason := why_not_by_weights(model, called=True)) is not None:
        return reason
    if model.config.state_size > _LARGEST_STATE:
        return f"state_size is {model.config.state_size}; the kernels hold up to {_LARGEST_STATE}"
    backbone = model.backbone
    dtype = backbone.embeddings.weight.dtype
    if dtype not in _DTYPES:
        return f"weights of {dtype_names([dtype])}; the kernels read {dtype_names(_DTYPES)}"
    others = {backbone.norm_f.weight.dtype, *(block.mixer.dt_proj.weight.dtype for block in backbone.layers)}
    if others != {dtype}:
        return f"weights of several dtypes: {dtype_names({dtype, *others})}"
    if len({bool(block.mixer.norms()) for block in backbone.layers}) > 1:
        return "the norms of dt, B and C have weights in some layers only"
    kinds = weight_kinds(model)
    if len(kinds) != 1 or not kinds <= {dtype, *_PACKED}:
        return (
            f"projections of {dtype_names(kinds)}; "
            f"the kernels read one of {dtype_names([dtype])}, int8, int4 and fp8 in all of them"
        )
    return None


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def why_not_persistent(model: Any, rows: int, *, states: Any = None, called: bool = False) -> str | None:
    """Why the persistent kernel does not decode ``rows`` rows of this model, or None where it does."""
    if (reason := why_not_captured(model, called) or _why_not_kernels(model)) is not None:
        return reason
    if (kind := dtype_of_states(model)) is not None:
        return f"states of {kind} (ssm_state_dtype); it keeps float32 ones in registers and memory"
    weights, width = gpu_weights(model), model.config.hidden_size
    if (reason := cuda_persistent.why_not(weights, rows, model.backbone.norm_f.weight.dtype)) is not None:
        return reason
    if rows * width > _MOST_PERSISTENT and weights.kind is None and _has_triton():
        return f"{rows} rows of {width} values; above {_MOST_PERSISTENT:,} in all Triton's kernels are faster"
    return None


def _why_not_triton(model: Any, called: bool) -> str | None:
    if (reason := why_not_captured(model, called) or _why_not_kernels(model)) is not None:
        return reason
    return None if _has_triton() else "Triton is not installed"


def why_not_few_rows(model: Any, rows: int, *, states: Any = None, called: bool = False) -> str | None:
    """Why Triton's kernels for few rows do not decode ``rows`` rows of this model, or None where they do."""
    if (reason := _why_not_triton(model, called)) is not None:
        return reason
    from mambakit.ops.decode import triton_few_rows

    if (kind := dtype_of_states(model)) is not None:
        return f"states of {kind} (ssm_state_dtype); they read float32 ones"
    most = triton_few_rows.MOST_ROWS
    return None if rows <= most else f"{rows} rows; they serve 1 to {most}"


def why_not_many_rows(model: Any, rows: int, *, states: Any = None, called: bool = False) -> str | None:
    """Why Triton's kernels for many rows do not decode ``rows`` rows of this model, or None where they do."""
    if (reason := _why_not_triton(model, called)) is not None:
        return reason
    from mambakit.ops.decode import triton_many_rows, triton_packed_rows

    width, dtype = model.config.hidden_size, model.dtype
    kind = gpu_weights(model).kind
    if kind is not None:
        if dtype == torch.float32:
            return "packed weights in a float32 model; they read them in one of a half dtype"
        most = triton_packed_rows.most_rows(width, kind)
        return None if rows <= most else f"{rows} rows; of these packed weights they are the faster ones up to {most}"
    most = triton_many_rows.most_rows(width, dtype)
    if rows <= most:
        return None
    return f"{rows} rows; in {dtype_names([dtype])} of {width} values they are the faster ones up to {most}"


def why_not_graph(model: Any, rows: int, *, states: Any = None, called: bool = False) -> str | None:
    """Why the model's forward is not captured, or None where it is."""
    return why_not_captured(model, called)


# -- decoding by a graph -----------------------------------------------------------------------------------------------


class GraphDecoder:
    """A `mambakit.decoding.registry.Decoder` whose step is one CUDA graph, captured in the constructor.

    Args:
        states: the cache that the graph reads and writes in place; its tensors must not be replaced.
        run: the kernels of a step over these states, from `mambakit.ops.decode`; None: the model's forward.
        capacity: the maximum number of tokens that `likeliest` chooses without the host.

    Attributes:
        tokens: (rows,) int64, the input of the next step. A step overwrites it with the most probable token of each
            row, and step i also stores that in ``history[:, i]``.
        logits: (rows, v) float32 of the last step.
        holder: weak reference to the pool whose states are in it; None, or dead, where it is free.
        verifiers: of drafts of its states, by their number of tokens.
        rounds: of speculation over its states, by draft model (`round_graphs`).
    """

    # Its tensors outlive the call, and inference tensors could not be written outside of inference mode.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, model: Any, states: Any, run: Any = None, capacity: int = 64):
        self.states, self.rows, self.capacity = states, states.max_batch_size, capacity
        self.holder: weakref.ref[Any] | None = None
        self.verifiers: dict[int, Any] = {}
        self.rounds: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        rows, device = self.rows, model.device
        self._run = run  # keeps the buffers alive that the graph reads and writes
        if run is not None:
            self.tokens, self.history, self.position = run.tokens, run.history, run.position
            self.logits = run.logits
        else:
            self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
            self.history = torch.zeros(rows, capacity, dtype=torch.int64, device=device)
            self.position = torch.zeros(1, dtype=torch.int64, device=device)
            self.logits = torch.zeros(rows, model.config.vocab_size, dtype=torch.float32, device=device)
        self._graph = CapturedGraph(lambda: self.launch(model), device, warm_ups=1)

    def launch(self, model: Any) -> None:
        """The kernels of a step with ``tokens`` as they are, one by one: for a graph of more than a step.

        ``model`` is the one that the decoder was made for; a decoder that is kept with a model must not refer to it.
        """
        if self._run is not None:
            self._run(True)
            return
        self.logits.copy_(model(self.tokens[:, None], cache_params=self.states).logits[:, -1])
        torch.argmax(self.logits, -1, out=self.tokens)
        at = self.position.clamp(max=self.capacity - 1).expand(self.rows, 1)
        self.history.scatter_(1, at, self.tokens[:, None])
        self.position += 1

    def load(self, states: Any) -> None:
        """Copy these states, of the same number of rows, into the decoder's."""
        self.states.load_(states)
        self.position.zero_()

    def store(self, states: Any, tokens: int) -> None:
        """Copy the decoder's states into ``states``, and count ``tokens`` more as seen there."""
        seen = states.get_seq_length()
        states.load_(self.states)
        states.advance(seen + tokens - states.get_seq_length())

    def step(self, tokens: Tensor) -> Tensor:
        self.tokens.copy_(tokens)
        self()
        return self.logits

    def likeliest(self, tokens: Tensor, count: int, check: bool = False) -> Tensor:
        """(rows, count) the most probable tokens after ``tokens`` (rows,), without a sync; count <= ``capacity``.

        With ``check``, `NO_TOKEN` stands where the logits were NaN: one launch more per token, as more would leave a
        small model waiting for the host.
        """
        assert count <= self.capacity
        self.tokens.copy_(tokens)
        self.position.zero_()
        chosen = self.logits.new_empty(count if check else 0, self.rows, 1)
        for i in range(count):
            self()
            if check:
                torch.gather(self.logits, 1, self.tokens[:, None], out=chosen[i])
        if check:
            return self.history[:, :count].masked_fill(chosen[..., 0].t().isnan(), NO_TOKEN)
        return self.history[:, :count].clone()

    def __call__(self) -> None:
        """One step with ``tokens`` as they are."""
        self._graph.replay()


def persistent_decoder(model: Any, states: MambaCache) -> GraphDecoder:
    """One launch of the persistent kernel per step."""
    run = cuda_persistent.PersistentStep(gpu_weights(model), states.conv_states, states.ssm_states, _CAPACITY)
    return GraphDecoder(model, states, run, _CAPACITY)


def few_rows_decoder(model: Any, states: MambaCache) -> GraphDecoder:
    """Triton's kernels for few rows, four launches per layer."""
    from mambakit.ops.decode.triton_few_rows import FewRowsStep

    run = FewRowsStep(gpu_weights(model), states.conv_states, states.ssm_states, _CAPACITY)
    return GraphDecoder(model, states, run, _CAPACITY)


def many_rows_decoder(model: Any, states: MambaCache) -> GraphDecoder:
    """Triton's kernels for many rows, six launches per layer."""
    from mambakit.ops.decode.triton_many_rows import ManyRowsStep
    from mambakit.ops.decode.triton_packed_rows import PackedRowsStep

    weights = gpu_weights(model)
    kind = ManyRowsStep if weights.kind is None else PackedRowsStep
    run = kind(weights, states.conv_states, states.ssm_states, _CAPACITY)
    return GraphDecoder(model, states, run, _CAPACITY)


_CAPACITY = 64  # tokens that a graph chooses without the host


# -- verifying a draft -------------------------------------------------------------------------------------------------


class VerificationStep:
    """Verifies a draft of up to ``tokens`` tokens of one text: it gives their logits, and the state after any number of
    them.

    One launch of the persistent kernel writes the state after every token into a slot of its own. To keep some of the
    tokens is to select a slot.

    Attributes:
        most: the maximum number of tokens of a draft.
        tokens: (most,) int64, the draft.
        kept: (1,) int64, how many of its tokens `keep` keeps.
        holder: the verifier whose state is loaded. Another verifier must load its own first.
    """

    def __init__(self, step: cuda_persistent.PersistentStep, slots: MambaCache):
        self.tokens, self.most = step.tokens, step.tokens.numel()
        self._step, self._slots = step, slots
        self.kept = torch.zeros_like(step.slot)
        self.holder: Any = None

    def load(self, cache: Any, holder: Any) -> None:
        """Start from this state of one row."""
        self.holder = holder
        self._step.slot.zero_()
        self._slots.copy_(cache, [0], [0])

    def __call__(self) -> Tensor:
        """(most, v) float32 logits after each of ``tokens``, valid until the next call."""
        return self._step()

    def keep(self, cache: Any) -> None:
        """Keep the first ``kept`` tokens: continue from the state after them, and copy it into ``cache``."""
        self._step.slot.add_(self.kept).remainder_(self.most + 1)
        cache.gather_(self._slots, self._step.slot)


def why_not_verification(model: Any, rows: int, tokens: int, *, states: Any = None) -> str | None:
    """Why the persistent kernel cannot verify drafts of ``tokens`` tokens, or None where it can."""
    if rows != 1:
        return f"{rows} rows; it verifies drafts of one"
    if (reason := why_not_captured(model) or _why_not_kernels(model)) is not None:
        return reason
    if (kind := dtype_of_states(model)) is not None:
        return f"states of {kind} (ssm_state_dtype); it reads float32 ones"
    return cuda_persistent.why_not(gpu_weights(model), tokens, model.backbone.norm_f.weight.dtype)


def many_rows_verification(model: Any, cache: Any, tokens: int) -> Any:
    """Triton's kernels for drafts of up to ``tokens`` tokens of each of the cache's rows."""
    from mambakit.ops.decode.triton_verify import ManyRowsVerification

    return ManyRowsVerification(gpu_weights(model), cache.conv_states, cache.ssm_states, tokens)


def verification_step(model: Any, tokens: int) -> VerificationStep:
    """The model's step for drafts of ``tokens`` tokens, made at its first use. `why_not_verification` must be None."""

    def make() -> VerificationStep:
        slots = model.backbone.new_cache(tokens + 1)
        step = cuda_persistent.PersistentStep(gpu_weights(model), slots.conv_states, slots.ssm_states, verify=True)
        return VerificationStep(step, slots)

    with torch.cuda.device(model.device):
        return kept_with(model, ("verify", tokens), make)
