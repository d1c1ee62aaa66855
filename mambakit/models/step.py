"""One token through a model: the fastest way there is for where the model lies and what it is made of."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mambakit.modules import MambaBlock, MambaCache, MambaMixer
from mambakit.modules.mixer import TimeStepProjection
from mambakit.modules.quantized_linear import QuantizedLinear
from mambakit.ops import native
from mambakit.ops.linear import pack
from mambakit.ops.linear.api import MOST_ROWS, PackedWeight
from mambakit.ops.native.decode import DecodeStep, LayerWeights

_LINEAR = (nn.Linear, QuantizedLinear)


def token_step(model: Any, cache: MambaCache) -> Callable[[Tensor], Tensor]:
    """``step(tokens (b,)) -> logits (b, v)``; the cache is brought up to date in place, and must not be replaced meanwhile.

    On a CPU a plain model's step is one call into the native library. Anything else (a GPU, adapters or replaced layers,
    other activations, FalconMamba, more than 16 rows, no native library) runs the model's own forward.
    """
    return _native_step(model, cache) if native_serves(model, cache) else _forward_step(model, cache)


def _forward_step(model: Any, cache: MambaCache) -> Callable[[Tensor], Tensor]:
    def step(tokens: Tensor) -> Tensor:
        return model(tokens[:, None], cache_params=cache).logits[:, -1]

    return step


def native_serves(model: Any, cache: MambaCache) -> bool:
    """Whether a token of this model, from this state, can be one call into the native library."""
    config = model.config
    if model.device.type != "cpu" or native.describe()["isa"] is None or torch.is_autocast_enabled("cpu"):
        return False
    if not 1 <= cache.max_batch_size <= MOST_ROWS or model.dtype not in (torch.float32, torch.bfloat16):
        return False
    if cache.dtype not in (torch.float32, torch.bfloat16) or config.num_hidden_layers == 0:
        return False
    if not 2 <= config.conv_kernel <= 8 or not config.residual_in_fp32:
        return False
    if type(model.lm_head) not in _LINEAR or type(model.backbone.embeddings) is not nn.Embedding:
        return False
    if _has_hooks(model):
        return False
    for block in model.backbone.layers:
        m = block.mixer
        if type(block) is not MambaBlock or type(m) is not MambaMixer:
            return False
        if m.act is not None or m.mixer_rms_eps is not None or type(m.dt_proj) is not TimeStepProjection:
            return False
        if any(type(linear) not in _LINEAR for linear in (m.in_proj, m.x_proj, m.out_proj)):
            return False
    return True


def gpu_layers(model: Any) -> list[Any]:
    """The layers' weights as `mambakit.ops.decode.gpu` reads them: the parameters themselves."""
    from mambakit.ops.decode.gpu import LayerWeights as GpuLayerWeights

    return [
        GpuLayerWeights(
            norm=block.norm.weight, in_proj=m.in_proj.weight, in_proj_bias=m.in_proj.bias,
            conv=m.conv1d.weight.squeeze(1), conv_bias=m.conv1d.bias, x_proj=m.x_proj.weight,
            dt_proj=m.dt_proj.weight, dt_bias=m.dt_proj.bias, A_log=m.A_log, D=m.D,
            out_proj=m.out_proj.weight, out_proj_bias=m.out_proj.bias,
        )
        for block in model.backbone.layers for m in [block.mixer]
    ]  # fmt: skip


def _has_hooks(model: nn.Module) -> bool:
    """Whether somebody listens to a module's calls, which one call into C would pass by."""
    if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
        return True
    return any(m._forward_hooks or m._forward_pre_hooks for m in model.modules() if m is not model)


def native_weights(model: Any) -> tuple[list[LayerWeights], PackedWeight]:
    """The layers and the head as the native library reads them: the weights themselves, nothing is copied but A."""
    format = str(model.dtype).removeprefix("torch.")

    def packed(linear: Any) -> PackedWeight:
        return linear.packed if isinstance(linear, QuantizedLinear) else pack(linear.weight, format)

    layers = [
        LayerWeights(
            norm=block.norm.weight, in_proj=packed(m.in_proj), in_proj_bias=m.in_proj.bias,
            conv=m.conv1d.weight.squeeze(1), conv_bias=m.conv1d.bias, x_proj=packed(m.x_proj),
            dt_proj=packed(m.dt_proj), dt_bias=m.dt_proj.bias, A=-torch.exp(m.A_log), D=m.D,
            out_proj=packed(m.out_proj), out_proj_bias=m.out_proj.bias,
        )
        for block in model.backbone.layers for m in [block.mixer]
    ]  # fmt: skip
    return layers, packed(model.lm_head)


def _native_step(model: Any, cache: MambaCache) -> Callable[[Tensor], Tensor]:
    layers, head = native_weights(model)
    backbone = model.backbone
    run = DecodeStep(
        layers, backbone.norm_f.weight, head, model.config.layer_norm_epsilon,
        cache.conv_states, cache.ssm_states,
    )  # fmt: skip

    def step(tokens: Tensor) -> Tensor:
        logits = run(backbone.embeddings(tokens))
        cache.advance(1)
        return logits.clone()

    return step


# -- on a GPU: the step as a CUDA graph --------------------------------------------------------------------------------


class GraphStep:
    """One token for each of ``rows`` texts, as one CUDA graph over a state of its own.

    A plain model in one floating dtype runs the kernels of `mambakit.ops.decode`; any other (quantised, FalconMamba, with
    adapters) is captured as its own forward. Captured when made; `load` and `store` move states in and out.

    Attributes:
        tokens: (rows,) int64, what the next step reads. With ``choose`` (the default) it is also what the step leaves: the
            most probable token of each row, kept in ``history[:, i]`` after step i.
        logits: (rows, v) float32 of the last step.
    """

    def __init__(self, model: Any, rows: int, choose: bool = True, capacity: int = 64):
        self.model, self.rows, self.capacity = model, rows, capacity
        self.cache = model.backbone.new_cache(rows)
        device = model.device
        if _fused_serves(model, self.cache):
            from mambakit.ops.decode.gpu import DecodeStep as GpuDecodeStep

            backbone = model.backbone
            run = GpuDecodeStep(
                gpu_layers(model), backbone.embeddings.weight, backbone.norm_f.weight, model.lm_head.weight,
                model.config.layer_norm_epsilon, self.cache.conv_states, self.cache.ssm_states, capacity,
            )  # fmt: skip
            self.tokens, self.history, self.position = run.tokens, run.history, run.position
            self.logits = run.logits

            def step() -> None:
                run(choose)
        else:
            self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
            self.history = torch.zeros(rows, capacity, dtype=torch.int64, device=device)
            self.position = torch.zeros(1, dtype=torch.int64, device=device)
            self.logits = torch.zeros(rows, model.config.vocab_size, device=device)

            def step() -> None:
                self.logits.copy_(model(self.tokens[:, None], cache_params=self.cache).logits[:, -1])
                if choose:
                    torch.argmax(self.logits, -1, out=self.tokens)
                    at = self.position.clamp(max=capacity - 1).expand(rows, 1)
                    self.history.scatter_(1, at, self.tokens[:, None])
                self.position += 1

        # Kernels are compiled before the capture, on a stream of their own as a capture asks.
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), torch.no_grad():
            step()
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self._graph):
            step()

    def load(self, cache: MambaCache) -> None:
        """Start from this state (rows as many)."""
        self.cache.conv_states.copy_(cache.conv_states)
        self.cache.ssm_states.copy_(cache.ssm_states)
        self.position.zero_()

    def store(self, cache: MambaCache, tokens: int) -> None:
        """Leave the state in ``cache``, ``tokens`` later than it was."""
        cache.conv_states.copy_(self.cache.conv_states)
        cache.ssm_states.copy_(self.cache.ssm_states)
        cache.advance(tokens)

    def __call__(self) -> Tensor:
        self._graph.replay()
        return self.logits


def _fused_serves(model: Any, cache: MambaCache) -> bool:
    try:
        from mambakit.ops.decode import gpu
    except ImportError:  # no Triton
        return False
    config = model.config
    dtype = model.lm_head.weight.dtype if type(model.lm_head) is nn.Linear else None
    if (
        dtype not in (torch.float32, torch.bfloat16, torch.float16)
        or cache.max_batch_size > gpu.MOST_ROWS
        or _has_hooks(model)
    ):
        return False
    if config.conv_kernel < 2 or not config.residual_in_fp32 or config.num_hidden_layers == 0:
        return False
    if type(model.backbone.embeddings) is not nn.Embedding or config.state_size > 256:
        return False
    for block in model.backbone.layers:
        m = block.mixer
        if type(block) is not MambaBlock or type(m) is not MambaMixer or type(m.dt_proj) is not TimeStepProjection:
            return False
        if m.act is not None or m.mixer_rms_eps is not None:
            return False
        if any(type(p) is not nn.Linear or p.weight.dtype != dtype for p in (m.in_proj, m.x_proj, m.out_proj)):
            return False
    return True


# Graphs of each model, by number of rows; they go with the model. Few: each holds states for its rows.
_graphs: weakref.WeakKeyDictionary[Any, OrderedDict[tuple, GraphStep]] = weakref.WeakKeyDictionary()
_MOST_GRAPHS = 4


def graph_step(model: Any, rows: int) -> GraphStep:
    """The model's graph for this many rows, captured at its first use and as long as the parameters stay where they are."""
    place = tuple(t.data_ptr() for t in (*model.parameters(), *model.buffers()))
    kept = _graphs.setdefault(model, OrderedDict())
    key = (rows, place)
    if key not in kept:
        for stale in [k for k in kept if k[1] != place]:
            del kept[stale]
        while len(kept) >= _MOST_GRAPHS:
            kept.popitem(last=False)
        kept[key] = GraphStep(model, rows)
    kept.move_to_end(key)
    return kept[key]


# -- inside generate() -------------------------------------------------------------------------------------------------


class GeneratingSteps:
    """The steps of one `generate` call: forward asks it for each token's logits.

    A step is made for a cache's own tensors. They stay in place while rows go on side by side, so the second token against
    the same tensors makes the step and later ones use it; a beam search, which moves rows at every token, never does.
    On a GPU the state moves into the graph's own memory meanwhile, and comes back in `close`.
    """

    def __init__(self, model: Any):
        self.model = model
        self._seen: tuple[int, int] | None = None
        self._step: Callable[[Tensor], Tensor] | None = None
        self._graph: GraphStep | None = None
        self._cache: MambaCache | None = None
        self._steps = 0

    def logits(self, tokens: Tensor, cache: MambaCache) -> Tensor | None:
        """(b, v) logits of (b,) tokens, the cache brought up to date; None: the model's forward must do it."""
        place = cache.conv_states.data_ptr(), cache.ssm_states.data_ptr()
        if place != self._seen:
            self.close()
            self._seen, self._step = place, None
            return None
        if self._step is None:
            self._step = self._made(cache)
        return None if self._step is None else self._step(tokens)

    def _made(self, cache: MambaCache) -> Callable[[Tensor], Tensor] | None:
        if self.model.device.type == "cuda":
            if not graphs_serve(self.model):
                return None
            self._graph, self._cache, self._steps = graph_step(self.model, cache.max_batch_size), cache, 0
            self._graph.load(cache)
            return self._replay
        return _native_step(self.model, cache) if native_serves(self.model, cache) else None

    def _replay(self, tokens: Tensor) -> Tensor:
        assert self._graph is not None
        self._graph.tokens.copy_(tokens)
        self._steps += 1
        return self._graph().clone()

    def close(self) -> None:
        """Bring the cache up to date."""
        if self._graph is not None and self._cache is not None and self._steps:
            self._graph.store(self._cache, self._steps)
        self._graph = self._cache = None


def graphs_serve(model: Any) -> bool:
    """Whether a step of this model can be a graph: all on one CUDA device, nobody listening, outside autocast and capture."""
    return (
        model.device.type == "cuda" and {t.device for t in model.parameters()} == {model.device}
        and model.dtype != torch.float64 and not _has_hooks(model)
        and not torch.is_autocast_enabled("cuda") and not torch.cuda.is_current_stream_capturing()
    )  # fmt: skip


# Tokens between two looks at whether the rows have ended: a look waits for the card.
_UNSEEN = 16


def greedy_tokens(
    model: Any, cache: MambaCache, first: Tensor, most: int, ends: Tensor | None, padding: int = 0
) -> Tensor:
    """(b, m) most probable tokens, m <= ``most``: (b,) ``first`` and those after it, until every row has had one of ``ends``.

    What follows a row's end is ``padding``. The cache, which holds what comes before ``first``, is left holding all tokens
    but the last.
    """
    if model.device.type != "cuda":
        return _greedy_by_steps(token_step(model, cache), first, most, ends, padding)
    tokens = _greedy_on_gpu(model, cache, first, most, ends)
    if ends is None:
        return tokens
    is_end = torch.isin(tokens, ends)
    return tokens.masked_fill(is_end.cumsum(1) > is_end.long(), padding)


def _greedy_by_steps(
    step: Callable[[Tensor], Tensor], first: Tensor, most: int, ends: Tensor | None, padding: int
) -> Tensor:
    tokens, token = [first], first
    ended = torch.zeros_like(first, dtype=torch.bool)
    for _ in range(most - 1):
        if ends is not None:
            ended = ended | torch.isin(token, ends)
            if bool(ended.all()):
                break
        token = step(token).argmax(-1)
        if ends is not None:
            token = token.masked_fill(ended, padding)
        tokens.append(token)
    return torch.stack(tokens, 1)


def _greedy_on_gpu(model: Any, cache: MambaCache, first: Tensor, most: int, ends: Tensor | None) -> Tensor:
    graph = graph_step(model, first.shape[0])
    graph.load(cache)
    graph.tokens.copy_(first)
    tokens = first[:, None]
    ended = None if ends is None else torch.isin(first, ends)
    while tokens.shape[1] < most and (ended is None or not bool(ended.all())):
        count = min(most - tokens.shape[1], graph.capacity if ended is None else _UNSEEN)
        before = None if ended is None or ends is None else (graph.cache.clone(), graph.tokens.clone())
        graph.position.zero_()
        for _ in range(count):
            graph()
        new = graph.history[:, :count].clone()
        if before is not None and ended is not None and ends is not None:
            so_far = torch.isin(new, ends).cummax(1).values | ended[:, None]  # (b, count)
            used = min(count, int((~so_far.all(0)).sum()) + 1)  # the first column at which all have ended
            if used < count:  # the state has gone too far: again from before
                graph.load(before[0])
                graph.tokens.copy_(before[1])
                for _ in range(used):
                    graph()
            new, ended = new[:, :used], so_far[:, used - 1]
        tokens = torch.cat([tokens, new], 1)
    graph.store(cache, tokens.shape[1] - 1)
    return tokens
