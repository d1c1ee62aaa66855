"""The ONNX graph of a causal language model, node by node. Weights are float32 tensors beside the graph.

The state-space recurrence is a `Scan` over time; in a graph of one token it is computed once, without one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

OPSET = 18  # Scan, ReduceSum with axes as an input, Split with num_outputs
INPUTS = ("input_ids", "conv_states", "ssm_states")
OUTPUTS = ("logits", "new_conv_states", "new_ssm_states")
_NORMS = ("dt_layernorm", "b_layernorm", "c_layernorm")  # of dt, B and C, where they have weights


class _Nodes:
    """A graph that grows by nodes. A call makes a node and returns its outputs' names."""

    def __init__(self, prefix: str = "") -> None:
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self._prefix, self._count = prefix, 0

    def __call__(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        self._count += 1
        names = [f"{self._prefix}{op}_{self._count}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    def rename(self, name: str, new: str) -> None:
        self.nodes.append(helper.make_node("Identity", [name], [new]))

    def integers(self, *values: int) -> str:
        name = f"{self._prefix}int_" + "_".join(map(str, values))
        self.constants[name] = helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
        return name

    def real(self, value: float) -> str:
        name = f"{self._prefix}real_{value!r}"
        self.constants[name] = helper.make_tensor(name, TensorProto.FLOAT, [], [value])
        return name


def build(config: Any, weights: dict[str, np.ndarray], one_token: bool) -> ModelProto:
    """The graph; its initializers hold the weights.

    Args:
        config: of the model; ``hidden_act`` silu.
        weights: what `tensors_of` gives.
        one_token: l is 1, and the recurrence one step.
    """
    g = _Nodes()
    count = config.num_hidden_layers
    x = g("Gather", "embeddings", "input_ids")  # (b, l, h)
    conv_states, ssm_states = [], []
    for i in range(count):
        conv, ssm = (g("Gather", name, _index(g, i), axis=0) for name in INPUTS[1:])
        normed = _norm(g, x, f"{i}.norm", config.layer_norm_epsilon)
        y, conv, ssm = _mixer(g, i, config, normed, conv, ssm, one_token)
        x = g("Add", x, y)
        conv_states.append(g("Unsqueeze", conv, g.integers(0)))
        ssm_states.append(g("Unsqueeze", ssm, g.integers(0)))
    head = g("Transpose", "embeddings", perm=[1, 0]) if config.tie_word_embeddings else "head"
    logits = g("MatMul", _norm(g, x, "norm_f", config.layer_norm_epsilon), head)
    g.rename(logits, OUTPUTS[0])
    g.rename(g("Concat", *conv_states, axis=0), OUTPUTS[1])
    g.rename(g("Concat", *ssm_states, axis=0), OUTPUTS[2])
    graph = helper.make_graph(
        g.nodes, "mamba", _inputs(config, one_token), _outputs(config, one_token),
        [*g.constants.values(), *(_tensor(name, value) for name, value in weights.items())],
    )  # fmt: skip
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="mambakit", ir_version=9
    )


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    """The weights of a causal language model under the graph's names: float32, matrices as (in, out)."""
    config, state = model.config, {k: v.detach().float().cpu() for k, v in model.state_dict().items()}
    weights = {"embeddings": state["backbone.embeddings.weight"], "norm_f": state["backbone.norm_f.weight"]}
    if not config.tie_word_embeddings:
        weights["head"] = state["lm_head.weight"].T
    for i in range(config.num_hidden_layers):
        at = f"backbone.layers.{i}."
        weights[f"{i}.norm"] = state[at + "norm.weight"]
        for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
            weights[f"{i}.{name}"] = state[f"{at}mixer.{name}.weight"].T
        for name in ("in_proj", "dt_proj", "out_proj", "conv1d"):
            if (bias := state.get(f"{at}mixer.{name}.bias")) is not None:
                weights[f"{i}.{name}.bias"] = bias
        for name in _NORMS:
            if (weight := state.get(f"{at}mixer.{name}.weight")) is not None:
                weights[f"{i}.{name}"] = weight
        weights[f"{i}.conv1d"] = state[at + "mixer.conv1d.weight"]
        weights[f"{i}.A"] = -torch.exp(state[at + "mixer.A_log"].double()).float()
        weights[f"{i}.D"] = state[at + "mixer.D"]
    return {name: np.ascontiguousarray(value.numpy()) for name, value in weights.items()}


def _tensor(name: str, value: np.ndarray) -> TensorProto:
    return helper.make_tensor(name, TensorProto.FLOAT, value.shape, value.tobytes(), raw=True)


def _index(g: _Nodes, i: int) -> str:
    name = f"index_{i}"
    g.constants[name] = helper.make_tensor(name, TensorProto.INT64, [], [i])
    return name


def _norm(g: _Nodes, x: str, weight: str | None, eps: float) -> str:
    square = g("ReduceMean", g("Mul", x, x), g.integers(-1), keepdims=1)
    y = g("Div", x, g("Sqrt", g("Add", square, g.real(float(eps)))))
    return y if weight is None else g("Mul", y, weight)


def _silu(g: _Nodes, x: str) -> str:
    return g("Mul", x, g("Sigmoid", x))


def _linear(g: _Nodes, x: str, name: str, bias: bool) -> str:
    y = g("MatMul", x, name)
    return g("Add", y, name + ".bias") if bias else y


def _mixer(
    g: _Nodes, i: int, config: Any, x: str, conv_state: str, ssm_state: str, one_token: bool
) -> tuple[str, str, str]:
    """(b, l, h) -> (b, l, h), and the layer's states after it. Names of `MambaMixer`."""
    r, n, k = int(config.time_step_rank), config.state_size, config.conv_kernel
    u, z = g("Split", _linear(g, x, f"{i}.in_proj", config.use_bias), outputs=2, axis=-1, num_outputs=2)
    window = g("Concat", conv_state, g("Transpose", u, perm=[0, 2, 1]), axis=2)  # (b, d, k - 1 + l)
    bias = [f"{i}.conv1d.bias"] if config.use_conv_bias else []
    u = g("Conv", window, f"{i}.conv1d", *bias, group=config.intermediate_size, kernel_shape=[k])
    u = _silu(g, g("Transpose", u, perm=[0, 2, 1]))  # (b, l, d)
    if k > 1:
        conv_state = g("Slice", window, g.integers(1 - k), g.integers(1 << 62), g.integers(2))
    steps, b, c = g("Split", g("MatMul", u, f"{i}.x_proj"), g.integers(r, n, n), outputs=3, axis=-1)
    if (eps := getattr(config, "mixer_rms_eps", None)) is not None:  # FalconMamba's, and with weights Jamba's
        weighted = getattr(config, "mixer_norm_weights", False)
        names = (f"{i}.{name}" if weighted else None for name in _NORMS)
        steps, b, c = (_norm(g, t, name, eps) for t, name in zip((steps, b, c), names, strict=True))
    delta = g("Softplus", _linear(g, steps, f"{i}.dt_proj", True))  # (b, l, d)
    if one_token:
        time = g.integers(1)
        operands = [g("Squeeze", t, time) for t in (u, delta, b, c)]
        ssm_state, y = _step(g, f"{i}.A", ssm_state, *operands)
        y = g("Unsqueeze", y, time)
    else:
        ssm_state, y = g(
            "Scan", ssm_state, u, delta, b, c, outputs=2, num_scan_inputs=4, scan_input_axes=[1] * 4,
            scan_output_axes=[1], body=_body(f"{i}.A"),
        )  # fmt: skip
    y = g("Mul", g("Add", y, g("Mul", u, f"{i}.D")), _silu(g, z))
    return _linear(g, y, f"{i}.out_proj", config.use_bias), conv_state, ssm_state


def _step(g: _Nodes, a: str, state: str, u: str, delta: str, b: str, c: str) -> tuple[str, str]:
    """h = exp(delta A) h + delta B u; y = C h. State (b, d, n); u, delta (b, d); B, C (b, n); y (b, d)."""
    last, middle = g.integers(-1), g.integers(1)
    decay = g("Exp", g("Mul", g("Unsqueeze", delta, last), a))
    entering = g("Mul", g("Unsqueeze", g("Mul", delta, u), last), g("Unsqueeze", b, middle))
    state = g("Add", g("Mul", decay, state), entering)
    y = g("MatMul", state, g("Unsqueeze", c, last))  # (b, d, 1)
    return state, g("Squeeze", y, last)


def _body(a: str) -> GraphProto:
    """One step of `Scan`; it reads ``a`` of the graph around it."""
    g = _Nodes("step_")
    names = ("state", "u_t", "delta_t", "b_t", "c_t")
    state, y = _step(g, a, *names)
    g.rename(state, "state_out")
    g.rename(y, "y_t")
    return helper.make_graph(
        g.nodes, "step", [_value(name) for name in names], [_value("state_out"), _value("y_t")],
        list(g.constants.values()),
    )  # fmt: skip


def _value(name: str, shape: list[Any] | None = None, kind: int = TensorProto.FLOAT) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _states(config: Any, names: tuple[str, str]) -> list[ValueInfoProto]:
    count, d = config.num_hidden_layers, config.intermediate_size
    return [
        _value(names[0], [count, "batch", d, config.conv_kernel - 1]),
        _value(names[1], [count, "batch", d, config.state_size]),
    ]


def _inputs(config: Any, one_token: bool) -> list[ValueInfoProto]:
    ids = _value(INPUTS[0], ["batch", 1 if one_token else "length"], TensorProto.INT64)
    return [ids, *_states(config, (INPUTS[1], INPUTS[2]))]


def _outputs(config: Any, one_token: bool) -> list[ValueInfoProto]:
    logits = _value(OUTPUTS[0], ["batch", 1 if one_token else "length", config.vocab_size])
    return [logits, *_states(config, (OUTPUTS[1], OUTPUTS[2]))]
