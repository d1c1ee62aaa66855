"""One token through a model on a GPU: the whole step as a CUDA graph, captured at its first use and kept with the model."""

from __future__ import annotations

import importlib.util
import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from mambakit.models.step import has_hooks
from mambakit.modules import MambaBlock, MambaCache, MambaMixer
from mambakit.modules.mixer import TimeStepProjection
from mambakit.modules.quantized_linear import QuantizedLinear
from mambakit.ops.decode import persistent
from mambakit.ops.decode.weights import LayerWeights, ModelWeights


def graphs_serve(model: Any) -> bool:
    """Whether a step of this model can be a graph: all on one CUDA device, nobody listening, outside autocast and capture."""
    return (
        model.device.type == "cuda" and {t.device for t in model.parameters()} == {model.device}
        and model.dtype != torch.float64 and not has_hooks(model)
        and not torch.is_autocast_enabled("cuda") and not torch.cuda.is_current_stream_capturing()
    )  # fmt: skip


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
    to 8 rows, else Triton's (int8, int4: up to 4 rows). Any other (FalconMamba, with adapters) is captured as its own forward. Captured when made; `load` and `store` move states in and out.

    Attributes:
        tokens: (rows,) int64, what the next step reads. With ``choose`` (the default) it is also what the step leaves: the
            most probable token of each row, kept in ``history[:, i]`` after step i.
        logits: (rows, v) float32 of the last step.
    """

    def __init__(self, model: Any, rows: int, choose: bool = True, capacity: int = 64):
        self.model, self.rows, self.capacity = model, rows, capacity
        self.cache = model.backbone.new_cache(rows)
        device = model.device
        run = _fused(model, self.cache, capacity)
        if run is not None:
            self._run = run  # the graph reads and writes its buffers: they must live as long
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
        with torch.cuda.device(device), torch.no_grad():  # whichever device is current
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
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


def _fused(model: Any, cache: MambaCache, capacity: int) -> Any:
    """The step's own kernels over this cache: one that stays on the card, or Triton's; None where the forward must do."""
    if not _plain(model, cache):
        return None
    weights = gpu_weights(model)
    if persistent.why_not(weights, cache.max_batch_size, cache.conv_states.dtype) is None:
        return persistent.PersistentStep(weights, cache.conv_states, cache.ssm_states, capacity)
    if importlib.util.find_spec("triton") is None:  # `mambakit env` says so
        return None
    from mambakit.ops.decode import gpu

    most = gpu.FEW if isinstance(model.lm_head, QuantizedLinear) else gpu.MOST_ROWS
    if cache.max_batch_size > most:
        return None
    return gpu.DecodeStep(weights, cache.conv_states, cache.ssm_states, capacity)


def _plain(model: Any, cache: MambaCache) -> bool:
    """Whether the model is made of what the kernels know, all in one dtype or packed alike."""
    config, backbone = model.config, model.backbone
    if has_hooks(model) or cache.ssm_states.dtype != torch.float32:
        return False
    if config.conv_kernel < 2 or not config.residual_in_fp32 or config.num_hidden_layers == 0:
        return False
    if type(backbone.embeddings) is not nn.Embedding or config.state_size > 256:
        return False
    dtype = backbone.embeddings.weight.dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or backbone.norm_f.weight.dtype != dtype:
        return False
    kinds = {_kind(model.lm_head)}
    for block in backbone.layers:
        m = block.mixer
        if type(block) is not MambaBlock or type(m) is not MambaMixer or type(m.dt_proj) is not TimeStepProjection:
            return False
        if m.act is not None or m.mixer_rms_eps is not None or m.dt_proj.weight.dtype != dtype:
            return False
        kinds |= {_kind(linear) for linear in (m.in_proj, m.x_proj, m.out_proj)}
    packed = {(format, group) for format in ("int8", "int4") for group in (32, 64, 128)}
    return len(kinds) == 1 and kinds <= {dtype, *packed}


def _kind(linear: nn.Module) -> Any:
    if type(linear) is QuantizedLinear:
        return linear.format, linear.group
    return linear.weight.dtype if type(linear) is nn.Linear else type(linear)


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
