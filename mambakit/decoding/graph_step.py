"""One token through a model on a GPU: the whole step as a CUDA graph, captured at its first use and kept with the model."""

from __future__ import annotations

import importlib.util
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.step import forward_step, made_of_known, tensors_of
from mambakit.modules import MambaCache
from mambakit.modules.interception import Watch, any_intercepted, modules_of
from mambakit.modules.quantized_linear import QuantizedLinear
from mambakit.ops._backends.memory import PLAIN_TYPES, all_plain, observed, transformed
from mambakit.ops.decode import cuda_persistent as persistent
from mambakit.ops.decode.weights import LayerWeights, ModelWeights


def graphs_serve(model: Any, called: bool = False) -> bool:
    """Whether a step of this model can be a graph: plain tensors on one CUDA device, nobody listening, outside autocast and capture.

    Args:
        called: the model is in its own forward: its hooks have been called.
    """
    device = model.device
    if device.type != "cuda" or model.dtype == torch.float64:
        return False
    if torch.is_autocast_enabled("cuda") or torch.cuda.is_current_stream_capturing() or transformed() or observed():
        return False
    if not called and any_intercepted([model]):
        return False
    watch = _watches.get(model)
    if watch is None or not watch.holds():
        modules = modules_of(model)[1:]
        if any_intercepted(modules):
            return False
        watch = _watches[model] = Watch(modules)
    own = (*model._parameters.values(), *model._buffers.values())
    return all(
        type(t) in PLAIN_TYPES and t.device == device for t in (*own, *tensors_of(watch.modules)) if t is not None
    )


# The modules within each model that a graph may pass by, as they were found; looking again takes a tenth of the time. The model itself
# is not among them: it would keep itself alive.
_watches: weakref.WeakKeyDictionary[Any, Watch] = weakref.WeakKeyDictionary()


def gpu_weights(model: Any) -> ModelWeights:
    """A model's weights as the steps of `mambakit.ops.decode` read them: the parameters and buffers themselves."""

    def weight(linear: Any) -> Any:
        return linear.packed if isinstance(linear, QuantizedLinear) else linear.weight

    layers = [
        LayerWeights(
            norm=block.norm.weight, in_proj=weight(m.in_proj), in_proj_bias=m.in_proj.bias,
            conv=m.conv1d.weight.squeeze(1), conv_bias=m.conv1d.bias, x_proj=weight(m.x_proj),
            dt_proj=m.dt_proj.weight, dt_bias=m.dt_proj.bias, A_log=m.A_log, D=m.D,
            out_proj=weight(m.out_proj), out_proj_bias=m.out_proj.bias,
        )
        for block in model.backbone.layers for m in [block.mixer]
    ]  # fmt: skip
    backbone = model.backbone
    eps = model.config.layer_norm_epsilon
    return ModelWeights(layers, backbone.embeddings.weight, backbone.norm_f.weight, weight(model.lm_head), eps)


class GraphStep:
    """One token for each of ``rows`` texts, as one CUDA graph over a state of its own.

    A plain model in one floating dtype, int8 or int4 runs the kernels of `mambakit.ops.decode`: one that stays on the card up
    to 8 rows (wide models fewer), else Triton's (up to 128 rows, in float32 32; int8 and int4 up to 4). Any other (FalconMamba, with adapters, more rows) is captured
    as its own forward. Captured when made; `load` and `store` move states in and out.

    Attributes:
        tokens: (rows,) int64, what the next step reads, and what a step leaves: the most probable token of each row, kept in
            ``history[:, i]`` after step i.
        logits: (rows, v) float32 of the last step.
        holder: whose states are in it; None, or dead, where it is free.
    """

    @torch.inference_mode(
        False
    )  # its tensors outlive the call; one of an inference mode could not be written to after it
    @torch.no_grad()
    def __init__(self, model: Any, rows: int, capacity: int = 64):
        self.model, self.rows, self.capacity = model, rows, capacity
        self.holder: weakref.ref[Any] | None = None
        self._place = _place(model)
        self.cache = model.backbone.new_cache(rows)
        device = model.device
        run = _fused(model, self.cache, capacity)
        if run is not None:
            self._run = run  # the graph reads and writes its buffers: they must live as long
            self.tokens, self.history, self.position = run.tokens, run.history, run.position
            self.logits = run.logits

            def step() -> None:
                run(True)
        else:
            self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
            self.history = torch.zeros(rows, capacity, dtype=torch.int64, device=device)
            self.position = torch.zeros(1, dtype=torch.int64, device=device)
            self.logits = torch.zeros(rows, model.config.vocab_size, dtype=torch.float32, device=device)

            def step() -> None:
                self.logits.copy_(model(self.tokens[:, None], cache_params=self.cache).logits[:, -1])
                torch.argmax(self.logits, -1, out=self.tokens)
                at = self.position.clamp(max=capacity - 1).expand(rows, 1)
                self.history.scatter_(1, at, self.tokens[:, None])
                self.position += 1

        # Kernels are compiled before the capture, on a stream of their own as a capture asks.
        with torch.cuda.device(device):  # whichever device is current
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                step()

    @property
    def current(self) -> bool:
        """Whether the model's parameters still lie where the graph reads them."""
        return self._place == _place(self.model)

    def load(self, cache: Any) -> None:
        """Start from this state (rows as many)."""
        self.cache.conv_states.copy_(cache.conv_states)
        self.cache.ssm_states.copy_(cache.ssm_states)
        self.position.zero_()

    def store(self, cache: Any, tokens: int) -> None:
        """Leave the state in ``cache``, ``tokens`` later than it was."""
        cache.conv_states.copy_(self.cache.conv_states)
        cache.ssm_states.copy_(self.cache.ssm_states)
        cache.advance(tokens)

    def __call__(self) -> Tensor:
        self._graph.replay()
        return self.logits


def _fused(model: Any, cache: MambaCache, capacity: int) -> Any:
    """The step's own kernels over this cache: one that stays on the card, or Triton's; None where the forward must do."""
    if not _plain(model, cache):
        return None
    weights, rows, width = gpu_weights(model), cache.max_batch_size, model.config.hidden_size
    states = cache.conv_states, cache.ssm_states
    triton = importlib.util.find_spec("triton") is not None  # `mambakit env` says so
    # Measured on an H100 (docs/kernels.md): more rows of a wide model are faster by Triton's kernels.
    stays = rows * width <= 12800 or weights.kind is not None or not triton
    if stays and persistent.why_not(weights, rows, cache.conv_states.dtype) is None:
        return persistent.PersistentStep(weights, *states, capacity)
    if not triton:
        return None
    from mambakit.ops.decode import triton_few_rows, triton_many_rows

    if rows <= triton_few_rows.MOST_ROWS:
        return triton_few_rows.FewRowsStep(weights, *states, capacity)
    if weights.kind is None and rows <= triton_many_rows.most_rows(width, model.dtype):
        return triton_many_rows.ManyRowsStep(weights, *states, capacity)
    return None


class VerificationStep:
    """Reads a draft of up to ``tokens`` next tokens of one text: their logits, and the state after any number of them.

    One launch of the persistent kernel, which writes the state after every token into a slot of its own; keeping some of the tokens
    is naming a slot.

    Attributes:
        tokens: how many there are at most.
        holder: whose text the state is of; whoever finds another one there loads its own.
    """

    def __init__(self, step: persistent.PersistentStep, cache: MambaCache):
        self.tokens, self._step, self._cache = step.tokens.numel(), step, cache
        self.holder: Any = None
        self._slot = 0

    def load(self, cache: MambaCache, holder: Any) -> None:
        """Start from this state of one row."""
        self.holder, self._slot = holder, 0
        self._step.slot.zero_()
        self._cache.conv_states[:, :1].copy_(cache.conv_states)
        self._cache.ssm_states[:, :1].copy_(cache.ssm_states)

    def __call__(self, tokens: list[int]) -> Tensor:
        """(t, v) float32, the logits after each token, valid until the next call; what fills the draft up comes after them."""
        filled = tokens + tokens[-1:] * (self.tokens - len(tokens))
        self._step.tokens.copy_(torch.tensor(filled, dtype=torch.int64, device="cpu"), non_blocking=True)
        return self._step()[: len(tokens)]

    def keep(self, m: int, cache: MambaCache) -> None:
        """Go on from after the first ``m`` tokens, and bring ``cache`` there."""
        self._slot = (self._slot + m) % (self.tokens + 1)
        self._step.slot.fill_(self._slot)
        at = slice(self._slot, self._slot + 1)
        cache.conv_states.copy_(self._cache.conv_states[:, at])
        cache.ssm_states.copy_(self._cache.ssm_states[:, at])
        cache.advance(m)


def verification_step(model: Any, tokens: int) -> VerificationStep | None:
    """The model's step for drafts of so many tokens, made at its first use; None where the persistent kernel cannot serve."""
    if not graphs_serve(model):
        return None

    def make() -> VerificationStep | None:
        cache = model.backbone.new_cache(tokens + 1)
        if not _plain(model, cache):
            return None
        weights = gpu_weights(model)
        if persistent.why_not(weights, tokens, cache.conv_states.dtype) is not None:
            return None
        step = persistent.PersistentStep(weights, cache.conv_states, cache.ssm_states, trial=True)
        return VerificationStep(step, cache)

    with torch.cuda.device(model.device):
        return kept_with(model, ("verify", tokens), make)


def _plain(model: Any, cache: MambaCache) -> bool:
    """Whether the model is made of what the kernels know, all in one dtype or packed alike."""
    backbone = model.backbone
    if (
        not made_of_known(model)
        or any_intercepted(modules_of(model)[1:])
        or not all_plain(tensors_of(modules_of(model)))
    ):
        return False
    if cache.ssm_states.dtype != torch.float32 or model.config.state_size > 256:
        return False
    dtype = backbone.embeddings.weight.dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or backbone.norm_f.weight.dtype != dtype:
        return False
    kinds = {_kind(model.lm_head)}
    for block in backbone.layers:
        m = block.mixer
        if m.dt_proj.weight.dtype != dtype:
            return False
        kinds |= {_kind(linear) for linear in (m.in_proj, m.x_proj, m.out_proj)}
    packed = {(format, group) for format in ("int8", "int4") for group in (32, 64, 128)}
    return len(kinds) == 1 and kinds <= {dtype, *packed}


def _kind(linear: Any) -> Any:
    if type(linear) is QuantizedLinear:
        return linear.format, linear.group
    return linear.weight.dtype


# Steps and prompts' graphs of each model, by what they serve; they go with the model. Few: each holds states for its rows.
_steps: weakref.WeakKeyDictionary[Any, OrderedDict[tuple, Any]] = weakref.WeakKeyDictionary()
_MOST_STEPS = 5


def _place(model: Any) -> tuple[Any, ...]:
    """Where the parameters lie, and how the switches stand that a captured forward has passed: adapters on or off, training."""
    modules: list[Any] = modules_of(model)
    switches = [
        (m.disable_adapters, tuple(m.active_adapters), tuple(getattr(m, "merged_adapters", ())))
        for m in modules if isinstance(getattr(type(m), "disable_adapters", None), property)
    ]  # fmt: skip
    return (*(t.data_ptr() for t in tensors_of(modules)), model.training, *switches)


def kept_with(model: Any, key: tuple, make: Callable[[], Any]) -> Any:
    """What ``make`` made at the first use, for as long as parameters stay where they are and adapters as they are switched."""
    place = _place(model)
    kept = _steps.setdefault(model, OrderedDict())
    if (key, place) not in kept:
        for stale in [k for k in kept if k[1] != place]:
            del kept[stale]
        while len(kept) >= _MOST_STEPS:
            kept.popitem(last=False)
        with (
            torch.inference_mode(False),
            torch.no_grad(),
        ):  # tensors of an inference mode could not be written to after it
            kept[key, place] = make()
    kept.move_to_end((key, place))
    return kept[key, place]


def graph_step(model: Any, rows: int) -> GraphStep:
    """The model's graph for this many rows, captured at its first use and as long as the parameters stay where they are."""
    return kept_with(model, ("graph", rows), lambda: GraphStep(model, rows))


def graph_token_step(model: Any, cache: MambaCache) -> Callable[[Tensor], Tensor]:
    """`mambakit.decoding.step.token_step` by the model's graph. Others use it too: the state moves in and out at every token, which
    takes about a hundredth of the time of reading the weights."""
    graph = graph_step(model, cache.max_batch_size)
    watch, forward = Watch(modules_of(model)), forward_step(model, cache)

    def step(tokens: Tensor) -> Tensor:
        if not watch.holds():
            return forward(tokens)
        graph.load(cache)
        graph.tokens.copy_(tokens)
        logits = graph().clone()
        graph.store(cache, 1)
        return logits

    return step
