"""`mambakit::whole_layer`, the op that torch.compile's graphs call for whole layers."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from mambakit import FalconMambaConfig, FalconMambaModel, MambaConfig, MambaForCausalLM, MambaModel
from mambakit.modules import LayerConfig
from mambakit.modules.block import MambaBlock
from mambakit.modules.mixers import fused_layer
from mambakit.ops.fused_mixer import by_parts, layer, layer_op, layer_schema, signature
from mambakit.ops.fused_mixer.plan import Plan
from mambakit.ops.fused_mixer.signature import LayerWeights
from tests.ops.closeness import relative_error
from tests.ops.fused_mixer import plans_on_cpu
from tests.ops.interpreter import DEVICES, INTERPRETED, run_interpreted

BF16, F32 = torch.bfloat16, torch.float32


def weights_of(block: MambaBlock, norm: bool = True) -> LayerWeights:
    m = block.mixer
    return LayerWeights(
        block.norm.weight if norm else None, m.in_proj.weight, m.in_proj.bias, m.conv1d.weight, m.conv1d.bias,
        m.x_proj.weight, m.dt_proj.weight, m.dt_proj.bias, m.A_log, m.D, m.out_proj.weight, m.out_proj.bias,
        *(norm.weight for norm in m.norms()),
    )  # fmt: skip


NORMS = [{}, {"mixer_rms_eps": 1e-3}, {"mixer_rms_eps": 1e-3, "mixer_norm_weights": True}]
"""Of dt, B and C: none, without weights, with weights."""
IDS = ["plain", "falcon", "jamba"]
LAST = 2 + layer_schema.COUNT  # arguments before the numbers


def arguments(norm, residual, gradient=True, device="cpu", dtype=F32, fields=NORMS[0]) -> tuple:
    torch.manual_seed(0)
    block = MambaBlock(LayerConfig(hidden_size=16, time_step_rank=3, num_hidden_layers=1, **fields), 0).to(device)
    with torch.no_grad():
        for inner in block.mixer.norms():
            inner.weight.add_(torch.randn_like(inner.weight) * 0.3)
    x, before = (torch.randn(2, 37, 16, device=device, requires_grad=True) for _ in range(2))
    eps = block.mixer.mixer_rms_eps
    return x, before if residual else None, *weights_of(block, norm), 1e-5, F32, dtype, gradient, eps


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.mark.skipif(INTERPRETED, reason="plain")
@pytest.mark.parametrize(("norm", "residual"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("fields", NORMS, ids=IDS)
def test_opcheck(norm, residual, fields):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    forward = torch.ops.mambakit.whole_layer
    torch.library.opcheck(forward, arguments(norm, residual, fields=fields), test_utils=checks)
    given = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments(norm, residual, fields=fields)]
    x, before, *weights = given[:LAST]
    y, *kept = forward(*given)
    backward = (
        torch.randn_like(y), torch.randn_like(kept[0]) if norm else None, None if norm else x, residual, *weights,
        *kept, 1e-5, F32, F32, F32, [True, before is not None, *(t is not None for t in weights)],
        given[-1],
    )  # fmt: skip
    torch.library.opcheck(torch.ops.mambakit.whole_layer_backward, backward, test_utils=checks)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("norm", "residual"), [(True, True), (False, False)], ids=["block", "mixer"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("fields", NORMS, ids=IDS)
def test_plans_return_what_the_schema_says(device, norm, residual, half, fields, monkeypatch, folder):
    """The GPU's implementation beside the parts: values, and sizes of what is kept."""
    given = [
        t.detach() if isinstance(t, torch.Tensor) else t
        for t in arguments(norm, residual, device=device, dtype=BF16 if half else F32, fields=fields)
    ]
    wanted = by_parts.forward(*given)
    weights = given[2:LAST]
    dy = torch.randn(2, 37, 16, device=device).to(wanted[0].dtype)
    dtotal = torch.randn(2, 37, 16, device=device) if norm else None
    needs = [True, residual, *(t is not None for t in weights)]

    def rest(kept):
        tail = (*given[LAST : LAST + 3], F32, needs, given[-1])
        return dy, dtotal, None if norm else given[0], residual, *weights, *kept, *tail

    expected = by_parts.backward(*rest(wanted[1:]))
    if device == "cpu":
        plans_on_cpu.install(monkeypatch, folder)
    monkeypatch.setattr(layer, "_plans", {})
    found = layer_op.forward(*given)
    assert [type(plan) for plan in layer._plans.values()] == [Plan]
    fake = layer_schema._fake(*given)
    for mine, theirs in zip(found, fake, strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
    # Of bfloat16: a norm's weight has three numbers, whose gradients are sums of what the interpreter rounds down.
    tolerance = 0.05 if half else 1e-5
    assert relative_error(found[0], wanted[0]) < tolerance
    gradients = layer_op.backward(*rest(found[1:]))
    for mine, theirs in zip(gradients, expected, strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
        assert relative_error(mine, theirs) < tolerance
    inference = layer_op.forward(*given[:-2], False, given[-1])
    assert torch.equal(inference[0], found[0])
    assert [t.numel() for t in inference[2:]] == [0]
    assert [type(plan) for plan in layer._plans.values()] == [Plan] * 2
    plans_on_cpu.forget()


@pytest.fixture
def served(monkeypatch):
    """Traces on a CPU take layers for whole ones, as on a GPU."""
    monkeypatch.setattr(fused_layer, "on_gpu", lambda x: torch.compiler.is_compiling())
    monkeypatch.setattr(signature, "unavailable", lambda: None)
    monkeypatch.setattr(signature, "_too_large", lambda *a: None)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graph_of(graphs: list):
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend


def ops_in(graphs: list) -> list[str]:
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    return [t for t in targets if t.startswith("mambakit.")]


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("falcon", [False, True], ids=["plain", "falcon"])
def test_a_compiled_model_calls_one_op_for_each_layer(served, half, falcon):
    torch.manual_seed(0)
    config, kind = (FalconMambaConfig, FalconMambaModel) if falcon else (MambaConfig, MambaModel)
    model = kind(config(vocab_size=32, hidden_size=16, num_hidden_layers=2)).train()
    ids = torch.randint(0, 32, (2, 9))
    dy = torch.randn(2, 9, 16)

    def run(call):
        model.zero_grad()
        with torch.autocast("cpu", BF16, enabled=half):
            y = call(ids).last_hidden_state
        (y * dy).sum().backward()
        return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    y, expected = run(model)
    graphs: list = []
    found, gradients = run(torch.compile(model, backend=graph_of(graphs), fullgraph=True))
    assert ops_in(graphs) == ["mambakit.whole_layer"] * 2 + ["mambakit.rms_norm"]
    tolerance = 0.03 if half else 1e-5
    assert relative_error(found, y) < tolerance
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) < tolerance, name
    # Another length is another graph or a symbol; a frozen weight, a hook and evaluation are guarded.
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for length in (9, 12):
        ids = torch.randint(0, 32, (2, length))
        assert relative_error(compiled(ids).last_hidden_state, model(ids).last_hidden_state) < 1e-5


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("train", [True, False])
def test_compiled_code_calls_ops_without_gradients_of_their_own(served, train):
    """One with a gradient written in Python is two calls of Python's."""
    model = MambaModel(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2)).train(train)
    for p in model.parameters():
        p.requires_grad_(train)
    forward, backward = [], []
    compilers = {"fw_compiler": graph_of(forward), "bw_compiler": graph_of(backward)}
    compiled = torch.compile(model, backend=aot_autograd(**compilers))
    y = compiled(torch.randint(0, 32, (2, 9)), use_cache=False).last_hidden_state
    assert [op for op in ops_in(forward) if "layer" in op] == ["mambakit.whole_layer_forward.default"] * 2
    if train:
        y.sum().backward()
        assert [op for op in ops_in(backward) if "layer" in op] == ["mambakit.whole_layer_backward.default"] * 2


@pytest.mark.skipif(INTERPRETED, reason="compiles")
def test_a_hook_adapter_or_cache_is_not_passed_over(served):
    config = MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1)
    model = MambaForCausalLM(config).train()
    ids = torch.randint(0, 32, (2, 9))
    graphs: list = []
    torch.compile(model, backend=graph_of(graphs))(ids)
    assert ops_in(graphs)[0] == "mambakit.whole_layer"
    seen = []
    model.backbone.layers[0].mixer.x_proj.register_forward_hook(lambda *a: seen.append(1))
    graphs.clear()
    torch._dynamo.reset()
    torch.compile(model, backend=graph_of(graphs))(ids)
    assert seen
    assert "mambakit.whole_layer" not in ops_in(graphs)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's own run")
def test_interpreter():
    run_interpreted(__file__)
