"""Whole layers as plans, beside float64 and beside the modules' own calls: on a GPU, and with the kernels on a CPU."""

from __future__ import annotations

import copy
import functools
import threading
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from mambakit import MambaConfig
from mambakit.compat.block import Block as CompatBlock
from mambakit.compat.early_block import Block as EarlyBlock
from mambakit.compat.inner import mamba_inner_fn, mamba_inner_fn_no_out_proj
from mambakit.compat.mamba import Mamba
from mambakit.compat.norm import RMSNorm as CompatNorm
from mambakit.modules import Packing, StateCache
from mambakit.modules.block import MambaBlock
from mambakit.modules.left_padding import LeftPadding
from mambakit.modules.mixers import fused_layer
from mambakit.modules.mixers.fused_layer import FusedLayer
from mambakit.ops._backends import launch_list
from mambakit.ops._backends.prepared_triton import NotPreparedError
from mambakit.ops.fused_mixer import LayerWeights, MixerWeights, fused_mixer, layer, mix_rows
from tests.ops.closeness import relative_error
from tests.ops.fused_mixer import plans_on_cpu
from tests.ops.fused_mixer.blocks import block_of
from tests.ops.interpreter import DEVICES, INTERPRETED, run_interpreted
from tests.ops.selective_scan import cuda_on_cpu

pytestmark = pytest.mark.skipif(INTERPRETED and cuda_on_cpu.COMPILER is None, reason="needs g++")
BF16, F32 = torch.bfloat16, torch.float32

# (b, l), fields of the configuration
CASES = [
    ((2, 37), {"hidden_size": 32, "time_step_rank": 3}),  # B and C begin at odd elements
    ((1, 1), {"hidden_size": 16, "time_step_rank": 8}),
    ((3, 70), {"hidden_size": 24, "state_size": 5, "use_bias": True, "use_conv_bias": False, "conv_kernel": 3}),
    ((2, 37), {"hidden_size": 32, "time_step_rank": 3, "mixer_rms_eps": 1e-3}),
    (
        (2, 19),
        {"hidden_size": 32, "time_step_rank": 12, "state_size": 9, "mixer_rms_eps": 1e-3, "mixer_norm_weights": True},
    ),
]
NAMES = ["odd", "token", "bias", "falcon", "jamba"]
"""The last two have norms of dt, B and C, without weights and with."""


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Uninitialised memory is NaN, so an element that no kernel wrote cannot pass."""
    empty = torch.empty

    def poisoned(*shape, **options):
        memory = empty(*shape, **options)
        if memory.is_floating_point():
            memory.detach().fill_(torch.nan)
        return memory

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def planned(monkeypatch, folder):
    """Layers run as plans, on a CPU too; the names of the passes that did."""
    passes: list[str] = []

    def start(device: str) -> list[str]:
        if device == "cpu":
            plans_on_cpu.install(monkeypatch, folder)
        for name in ("forward", "backward"):
            kept = getattr(layer.Plan, name)
            monkeypatch.setattr(layer.Plan, name, lambda *a, n=name, k=kept: passes.append(n) or k(*a))
        return passes

    yield start
    plans_on_cpu.forget()


def run(block, shape, half=False, residual=True, through=("y", "stream")) -> dict[str, torch.Tensor]:
    """Outputs of a block, or of a mixer, and gradients."""
    parameter = next(block.parameters())
    device, dtype = parameter.device, parameter.dtype
    h = (block.mixer if type(block) is MambaBlock else block).hidden_size
    generator = torch.Generator().manual_seed(1)
    x, before, dy, dstream = (torch.randn(*shape, h, generator=generator).to(device) for _ in range(4))
    x, before = (t.to(dtype).requires_grad_() for t in (x, before))
    with torch.autocast(device.type, BF16, enabled=half):
        if type(block) is MambaBlock:
            y, stream = block(x, before if residual else None)
        else:
            y, stream = block(x), None
    loss = 0.0
    if "y" in through:
        loss = loss + (y * dy).sum()
    if "stream" in through and stream is not None:
        loss = loss + (stream * dstream).sum()
    for p in block.parameters():
        p.grad = None
    loss.backward()
    found = {"y": y, "dx": x.grad} | {f"d {name}": p.grad for name, p in block.named_parameters()}
    if stream is not None:
        found["stream"] = stream
        if residual:
            found["dresidual"] = before.grad
    return {name: None if t is None else t.detach().clone() for name, t in found.items()}


def exact(fields, shape, alone=False, **how) -> dict[str, torch.Tensor]:
    block = block_of(fields).double()
    return run(block.mixer if alone else block, shape, **how)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("residual", [True, False], ids=["stream", "first"])
@pytest.mark.parametrize(("shape", "fields"), CASES, ids=NAMES)
def test_float32_beside_float64(device, shape, fields, residual, planned):
    expected = exact(fields, shape, residual=residual)
    passes = planned(device)
    found = run(block_of(fields, device), shape, residual=residual)
    assert passes == ["forward", "backward"]
    for name, value in found.items():
        assert value.dtype == F32
        assert relative_error(value, expected[name]) < 1e-5, name  # float32 sums of a few hundred terms


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [0, 4], ids=["plain", "jamba"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_item_by_item_it_is_the_same(device, case, dtype, planned, monkeypatch):
    """Without the native library or torch's cuBLAS the list's items are enqueued from Python."""
    shape, fields = CASES[case]
    planned(device)
    listed = run(block_of(fields, device, dtype), shape)
    monkeypatch.setattr(launch_list, "_functions", lambda: None)
    monkeypatch.setattr(layer, "_plans", {})
    found = run(block_of(fields, device, dtype), shape)
    for name, value in found.items():
        # The products' sums may be in another order, rounded to the dtype.
        assert relative_error(value, listed[name].double()) < (1e-5 if dtype == F32 else 0.02), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("alone", [False, True], ids=["block", "mixer"])
@pytest.mark.parametrize("case", [0, 4], ids=["plain", "jamba"])
def test_under_autocast_it_is_as_exact_as_the_modules(device, alone, case, planned):
    shape, fields = CASES[case]
    wanted = exact(fields, shape, alone)
    block = block_of(fields, device)
    block = block.mixer if alone else block
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_layer, "run", lambda *a, **k: None)
        theirs = run(block, shape, half=True)
    passes = planned(device)
    ours = run(block, shape, half=True)
    assert passes == ["forward", "backward"]
    assert ours["y"].dtype == BF16
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        # Triton's interpreter truncates where it rounds to bfloat16.
        limit = (4 if INTERPRETED else 1.3) * relative_error(theirs[name], wanted[name])
        assert relative_error(value, wanted[name]) < max(limit, 4e-3), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("log", [True, False], ids=["A_log", "A"])
@pytest.mark.parametrize("projected", [True, False], ids=["out_proj", "inner"])
@pytest.mark.parametrize("batched", [False, True], ids=["one", "vmap"])
def test_parts_of_a_layer(device, log, projected, batched, planned):
    """What `mamba_inner_fn` computes: from in_proj's output, with A itself, to out_proj's output or its input."""
    generator = torch.Generator().manual_seed(0)
    b, length, d, n, r, h = 2, 37, 64, 16, 3, 24
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weights = LayerWeights(
        None, None, None, draw(d, 4), draw(d), draw(r + 2 * n, d) / 8, draw(d, r), draw(d) - 3,
        draw(d, n) / 4 if log else -draw(d, n).exp(), draw(d), draw(h, d) / 8 if projected else None, None,
    )  # fmt: skip
    xz, dy = draw(b, length, 2 * d), draw(3, b, length, h if projected else d)
    given = [t for t in (xz, *weights) if t is not None]

    def prepared(dtype, place):
        leaves = iter(t.to(place, dtype).requires_grad_() for t in given)
        return next(leaves), LayerWeights(*(None if t is None else next(leaves) for t in weights))

    def gradients(y, x, w):
        wanted = [t for t in (x, *w) if t is not None]
        each = dy.to(y.device, y.dtype)
        if batched:
            return torch.autograd.grad(y, wanted, each, is_grads_batched=True)
        return torch.autograd.grad(y, wanted, each[0])

    x, w = prepared(torch.float64, "cpu")
    middle = MixerWeights(
        w.conv, w.conv_bias, w.x_proj, w.dt_proj, w.A_log if log else torch.log(-w.A_log), w.D, w.dt_bias
    )
    wanted = fused_mixer(x, middle)[0]
    wanted = wanted if w.out_proj is None else wanted @ w.out_proj.T
    expected = gradients(wanted, x, w)
    passes = planned(device)
    x, w = prepared(F32, device)
    y, stream = layer.fused_layer(x, None, w, log=log)
    assert stream is None
    assert relative_error(y, wanted) < 1e-5
    for found, each in zip(gradients(y, x, w), expected, strict=True):
        assert found.dtype == F32
        assert relative_error(found, each) < 2e-5
    assert passes == ["forward"] + ["backward"] * (not batched)
    if log and not projected:
        middle = MixerWeights(w.conv, w.conv_bias, w.x_proj, w.dt_proj, w.A_log, w.D, w.dt_bias)
        assert torch.equal(mix_rows(x, middle), y)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [0, 4], ids=["plain", "jamba"])
def test_a_model_in_bfloat16(device, case, planned):
    """Without autocast: weights in bfloat16 are read as they are, A_log, D and the steps' bias in float32."""
    shape, fields = CASES[case]
    block = block_of(fields, device, BF16)
    wanted = exact(fields, shape)
    passes = planned(device)
    found = run(block, shape)
    assert passes == ["forward", "backward"]
    for name, value in found.items():
        expected = {"d mixer.A_log": F32, "d mixer.D": F32, "d mixer.dt_proj.bias": F32, "stream": F32}
        assert value.dtype == expected.get(name, BF16), name
        assert relative_error(value, wanted[name]) < 0.06, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("through", [("y",), ("stream",)], ids=["output", "stream"])
def test_a_gradient_of_one_result(device, through, planned):
    shape, fields = CASES[0]
    expected = exact(fields, shape, through=through)
    passes = planned(device)
    found = run(block_of(fields, device), shape, through=through)
    assert passes == ["forward", "backward"]
    for name, value in found.items():
        if expected[name] is None:  # autograd leaves out what does not depend on it; a layer's gradients come together
            assert value is None or not value.any(), name
        else:
            assert relative_error(value, expected[name]) < 1e-5, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["none", "v2", "inner", "inner without out_proj"])
def test_the_layer_and_the_functions_of_mamba_ssm(device, kind, planned):
    """`mambakit.compat` takes the same plans."""
    torch.manual_seed(0)
    mixer = Mamba(32, dt_rank=3, bimamba_type="v2" if kind == "v2" else "none")
    x, dy = torch.randn(2, 2, 37, 32), torch.randn(2, 2, 37, 64)

    def run(m, x, dy):
        x = x.clone().requires_grad_()
        if not kind.startswith("inner"):
            y = m(x)
        else:
            xz = (m.in_proj.weight @ x.permute(2, 0, 1).reshape(32, -1)).view(128, 2, 37).transpose(0, 1)
            given = (xz, m.conv1d.weight, m.conv1d.bias, m.x_proj.weight, m.dt_proj.weight)
            A, rest = -torch.exp(m.A_log), {"D": m.D, "delta_bias": m.dt_proj.bias}
            if kind == "inner":
                y = mamba_inner_fn(*given, m.out_proj.weight, m.out_proj.bias, A, **rest)
            else:
                y = mamba_inner_fn_no_out_proj(*given, A, **rest).transpose(1, 2)
        y.backward(dy[..., : y.shape[-1]])
        found = {"y": y.detach(), "dx": x.grad} | {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
        m.zero_grad()
        return found

    expected = run(copy.deepcopy(mixer).double(), x[0].double(), dy[0].double())
    passes = planned(device)
    found = run(mixer.to(device), x[0].to(device), dy[0].to(device))
    assert passes == ["forward"] * (1 + (kind == "v2")) + ["backward"] * (1 + (kind == "v2"))
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert relative_error(value, expected[name]) < 1e-5, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("early", "fused"), [(False, True), (True, True), (False, False)], ids=["block", "early block", "norm apart"]
)
def test_the_blocks_of_mamba_ssm(device, early, fused, planned):
    torch.manual_seed(0)
    mixer = functools.partial(Mamba, dt_rank=3)
    if early:
        block = EarlyBlock(32, mixer, CompatNorm, fused, True)
    else:
        block = CompatBlock(32, mixer, nn.Identity, CompatNorm, fused, True)
    x, residual, dy, dstream = torch.randn(4, 2, 37, 32)

    def run(b, dtype, place):
        leaves = [t.to(place, dtype).requires_grad_() for t in (x, residual)]
        y, stream = b(*leaves)
        torch.autograd.backward([y, stream], [dy.to(y), dstream.to(stream)])
        found = [y.detach(), stream.detach(), *(t.grad for t in leaves), *(p.grad for p in b.parameters())]
        b.zero_grad()
        return found

    expected = run(copy.deepcopy(block).double(), torch.float64, "cpu")
    passes = planned(device)
    for value, wanted in zip(run(block.to(device), F32, device), expected, strict=True):
        assert relative_error(value, wanted) < 1e-5
    assert passes == ["forward", "backward"]
    block.norm.drop = nn.Dropout(0.5)
    block(x.to(device))
    assert passes[2:] == ["forward"]  # the mixer's alone


@pytest.mark.parametrize("device", DEVICES)
def test_frozen_weights_have_no_gradient(device, planned):
    shape, fields = CASES[0]
    expected = exact(fields, shape)
    block = block_of(fields, device)
    frozen = ("norm.weight", "mixer.in_proj.weight", "mixer.A_log", "mixer.conv1d.weight", "mixer.dt_proj.weight")
    for name in frozen:
        block.get_parameter(name).requires_grad_(False)
    passes = planned(device)
    for name, value in run(block, shape).items():
        if name.removeprefix("d ") in frozen:
            assert value is None, name
        else:
            assert relative_error(value, expected[name]) < 1e-5, name
    assert passes == ["forward", "backward"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("norms", [{}, CASES[4][1]], ids=["plain", "jamba"])
def test_states_in_place(device, half, norms, planned):
    """A prefill longer than a decoding step's kernel takes, a shorter one, one token; rows beside the batch's stay."""
    fields = CASES[0][1] | {k: v for k, v in norms.items() if k.startswith("mixer")}
    config = MambaConfig(num_hidden_layers=1, **CASES[0][1])
    x = torch.randn(2, 37 + 9 + 1, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole, _ = block_of(fields).double()(x.double())
    passes, dtype = planned(device), BF16 if half else F32
    block = block_of(fields, device, dtype).eval()
    cache = StateCache(config.state_spec(dtype), 3, device=device)
    states = [t.clone() for t in cache.memory(0)]
    with torch.no_grad() if half else torch.inference_mode():
        for part, wanted in zip(x.split([37, 9, 1], 1), whole.split([37, 9, 1], 1), strict=True):
            y, _ = block(part.contiguous().to(device, dtype), None, cache)
            assert y.dtype == dtype
            assert relative_error(y, wanted) < (0.05 if half else 1e-5)
    assert passes == ["forward"] * 3
    for before, after in zip(states, cache.memory(0), strict=True):
        assert torch.equal(before[2], after[2])
        assert not torch.equal(before[0], after[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("length", "case", "alone"), [(40, 0, False), (7, 4, False), (40, 2, True), (1, 0, False)])
def test_padding_on_the_left(device, dtype, length, case, alone, planned):
    """Each row is as if it had no padding, states and outputs: none, less than the window, more, all of the row."""
    pads = [min(count, length) for count in (0, 1, 2, length // 2, length - 1, length)]
    fields = CASES[case][1]
    block = block_of(fields, device, dtype).eval()
    spec = MambaConfig(num_hidden_layers=1, **fields).state_spec
    generator = torch.Generator().manual_seed(3)
    cache, want = StateCache(spec(dtype), len(pads) + 1, device=device), StateCache(spec(torch.float64), 1)
    for memory in cache.memory(0):
        memory.copy_(torch.randn(memory.shape, generator=generator))
    before = [t.double().cpu() for t in cache.memory(0)]
    x = torch.randn(len(pads), length, block.mixer.hidden_size, generator=generator).to(device, dtype)
    passes = planned(device)
    padding = LeftPadding(torch.tensor(pads, device=device), length, block.mixer.conv_kernel_size - 1)
    with torch.no_grad():
        y = block.mixer(x, cache, padding) if alone else block(x, None, cache, padding)[0]
        assert passes == ["forward"]
        exact_block = block_of(fields).to(dtype).double().eval()
        for row, count in enumerate(pads):
            for memory, state in zip(want.memory(0), before, strict=True):
                memory.copy_(state[row : row + 1])
            part = x[row : row + 1, count:].double().cpu()
            bound = {F32: 1e-5, BF16: 0.05, torch.float16: 0.01}[dtype]
            if count < length:
                expected = exact_block.mixer(part, want) if alone else exact_block(part, None, want)[0]
                assert relative_error(y[row : row + 1, count:], expected) < bound
            for memory, state in zip(cache.memory(0), want.memory(0), strict=True):
                assert relative_error(memory[row], state[0]) < bound, count
    for memory, state in zip(cache.memory(0), before, strict=True):
        assert torch.equal(memory[-1].double().cpu(), state[-1])
        assert torch.equal(memory[len(pads) - 1].double().cpu(), state[len(pads) - 1])  # a row of padding alone


@pytest.mark.parametrize("device", DEVICES)
def test_weights_written_without_a_version_are_seen(device, planned):
    """Optimisers write through .data, EMA swaps tensors, functional_call passes others: a call reads what is there."""
    shape, fields = CASES[0]
    passes = planned(device)
    block = block_of(fields, device)
    first = run(block, shape, half=True)["y"]
    block.mixer.out_proj.weight.data.mul_(2)
    assert torch.equal(run(block, shape, half=True)["y"], 2 * first)
    block.mixer.out_proj.weight.data = block.mixer.out_proj.weight.data * 2
    assert torch.equal(run(block, shape, half=True)["y"], 4 * first)
    x = torch.randn(*shape, 32, generator=torch.Generator().manual_seed(1)).to(device)
    block(x)
    others = {"mixer.out_proj.weight": block.mixer.out_proj.weight.detach() / 4}
    assert len(passes) == 7
    y = torch.func.functional_call(block, others, (x,))[0]
    assert len(passes) == 8
    assert torch.equal(4 * y, block(x)[0])
    # Data in another dtype, and back.
    block.mixer.in_proj.weight.data = block.mixer.in_proj.weight.data.half()
    block.mixer.in_proj.weight.data = block.mixer.in_proj.weight.data.float()
    assert block(x)[0].shape == (*shape, 32)


@pytest.mark.parametrize("device", DEVICES)
def test_images_as_tokens_and_shapes_without_end(device, planned, monkeypatch):
    """(b, h, l) that is transposed is copied; plans of too many shapes are dropped and made again."""
    _, fields = CASES[0]
    passes = planned(device)
    monkeypatch.setattr(layer, "_plans", {})
    monkeypatch.setattr(layer, "_MOST", 2)
    block = block_of(fields, device)
    image = torch.randn(2, 32, 5, 7, device=device, requires_grad=True)
    y = block.mixer(image.flatten(2).transpose(1, 2))
    (found,) = torch.autograd.grad(y.sum(), image)
    row = image.detach().flatten(2).transpose(1, 2).contiguous().requires_grad_()
    (expected,) = torch.autograd.grad(block.mixer(row).sum(), row)
    assert torch.equal(found.flatten(2).transpose(1, 2), expected)
    assert passes == ["forward", "backward"] * 2
    for length in (35, 9, 1, 35):
        block.mixer(torch.randn(2, length, 32, device=device))
        assert 1 <= len(layer._plans) <= 2
    assert passes[4:] == ["forward"] * 4


@pytest.mark.parametrize("device", DEVICES)
def test_a_weight_changed_before_the_backward_pass_raises(device, planned):
    shape, fields = CASES[0]
    planned(device)
    block = block_of(fields, device)
    y, _ = block(torch.randn(*shape, 32, device=device))
    with torch.no_grad():
        block.mixer.dt_proj.weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("device", DEVICES)
def test_a_second_derivative_raises(device, planned):
    shape, fields = CASES[0]
    planned(device)
    block = block_of(fields, device)
    x = torch.randn(*shape, 32, device=device, requires_grad=True)
    y, stream = block(x)
    (dx,) = torch.autograd.grad(y.sum() + stream.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="fused_mixer has no second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("alone", [False, True], ids=["block", "mixer"])
@pytest.mark.parametrize("case", [0, 4], ids=["plain", "jamba"])
def test_gradients_of_several_outputs_at_once(device, alone, case, planned):
    """vmap in the backward pass: no kernel may read the address of its wrapped tensors."""
    shape, fields = CASES[case]
    passes = planned(device)
    block = block_of(fields, device)
    x = torch.randn(*shape, 32, device=device, requires_grad=True)
    y = block.mixer(x) if alone else block(x)[0]
    dy = torch.randn(3, *y.shape, device=device)
    wanted = (x, *(block.mixer if alone else block).parameters())
    found = torch.autograd.grad(y, wanted, dy, is_grads_batched=True, retain_graph=True)
    assert passes == ["forward"]
    for i, each in enumerate(dy):
        for t, expected in zip(found, torch.autograd.grad(y, wanted, each, retain_graph=True), strict=True):
            assert relative_error(t[i], expected) < 1e-5
    assert passes == ["forward", *["backward"] * 3]


@pytest.mark.parametrize("device", DEVICES)
def test_a_hook_sends_the_layer_to_its_modules(device, planned):
    shape, fields = CASES[0]
    passes = planned(device)
    block = block_of(fields, device)
    x = torch.randn(*shape, 32, device=device)
    expected = block(x)[0]
    seen = []
    inner = (block.mixer.conv1d, block.mixer.x_proj, block.mixer.dt_proj)
    for module in (block.norm, block.mixer, block.mixer.in_proj, block.mixer.out_proj, *inner):
        passes.clear()
        handle = module.register_forward_hook(lambda *a: seen.append(1))
        with pytest.MonkeyPatch.context() as patch:
            # The block asks, and then the mixer by itself, which may run as a plan where the hook is on the norm.
            answers = iter([True])
            patch.setattr(fused_layer, "fused_layer", None)
            patch.setattr(fused_layer, "on_gpu", lambda x, answers=answers: next(answers, False))
            assert relative_error(block(x)[0], expected) < 1e-5
        handle.remove()
        assert seen.pop()
        # What lies between the projections is still one function where nothing in it is hooked.
        assert passes == ([] if module in inner else ["forward"])
        passes.clear()
        block(x)
        assert passes == ["forward"]


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_no_plain_layer_is_called(device, planned):
    shape, fields = CASES[0]
    passes = planned(device)
    x = torch.randn(*shape, 32, device=device)

    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    plain = block_of(fields, device)
    expected = plain(x)[0]
    assert passes.pop() == "forward"
    block = copy.deepcopy(plain)
    block.mixer.out_proj = Doubled(64, 32, bias=False).to(device)
    block.mixer.out_proj.weight = plain.mixer.out_proj.weight
    with pytest.MonkeyPatch.context() as patch:
        if device == "cpu":  # its ops have no GPU to go to
            patch.setattr(layer, "on_gpu", lambda x: False)
        assert relative_error(block(x)[0], 2 * expected) < 1e-5
        assert passes == ([] if device == "cpu" else ["forward"])  # what lies between the projections
        passes.clear()
        # A copy of a layer that ran as a plan has hooks of its own.
        block = copy.deepcopy(plain)
        seen = []
        block.mixer.x_proj.register_forward_hook(lambda *a: seen.append(1))
        assert relative_error(block(x)[0], expected) < 1e-5
        assert seen
        packing = Packing.from_cu_seqlens(torch.tensor([0, 4, 74], dtype=torch.int32, device=device), (1, 74))
        plain(x.view(1, 74, 32), packing=packing)
        plain.mixer.recompute_selection = True
        plain(x)
    assert passes == []


@pytest.mark.parametrize("device", DEVICES)
def test_kernels_that_cannot_be_prepared_warn_once(device, planned, monkeypatch):
    passes = planned(device)
    monkeypatch.setattr(layer, "_plans", {})
    layer._warn.cache_clear()

    def refuse(signature):
        raise NotPreparedError("another release of Triton")

    monkeypatch.setattr(layer, "Plan", refuse)
    x = torch.randn(1, 3, 32, device=device)
    weights = FusedLayer(None, block_of(CASES[0][1], device).mixer).weights()
    with pytest.warns(UserWarning, match="layers run op by op, .*: another release of Triton"):
        assert layer.fused_layer(x, None, weights) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert layer.fused_layer(x, None, weights) is None
        assert layer.fused_layer(x[:, :2].contiguous(), None, weights) is None
    assert passes == []
    layer._warn.cache_clear()


@pytest.mark.parametrize("device", DEVICES)
def test_activation_checkpointing_and_saved_tensor_hooks(device, planned):
    shape, fields = CASES[0]
    expected = exact(fields, shape)
    passes = planned(device)
    block = block_of(fields, device)
    unpacked = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: unpacked.append(t) or t):
        found = run(block, shape)
    assert passes == ["forward", "backward"]
    assert unpacked
    for name, value in found.items():
        assert relative_error(value, expected[name]) < 1e-5, name
    x = torch.randn(*shape, 32, device=device, requires_grad=True)
    y, stream = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    (y.sum() + stream.sum()).backward()
    again, x.grad = x.grad, None
    y, stream = block(x)
    (y.sum() + stream.sum()).backward()
    assert torch.equal(again, x.grad)


@pytest.mark.parametrize("device", DEVICES[1:])
def test_threads_share_a_plan(device, planned):
    shape, fields = (4, 97), {"hidden_size": 64}
    planned(device)
    blocks = [block_of(fields, device) for _ in range(4)]
    for i, block in enumerate(blocks):
        block.mixer.out_proj.weight.data.mul_(i + 1)
    x = torch.randn(*shape, 64, device=device)
    with torch.no_grad():
        expected = [block(x)[0] for block in blocks]
        wrong: list[int] = []

        def work(i: int) -> None:
            with torch.no_grad():
                wrong.extend(i for _ in range(200) if not torch.equal(blocks[i](x)[0], expected[i]))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


@pytest.mark.parametrize("device", DEVICES[1:])
def test_in_a_captured_graph_replays_see_new_weights(device, planned):
    passes = planned(device)
    block, x = block_of({"hidden_size": 64}, device), torch.randn(2, 50, 64, device=device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad(), torch.autocast("cuda", BF16):
        block(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad(), torch.autocast("cuda", BF16):
        y, _ = block(x)
    graph.replay()
    first = y.clone()
    block.mixer.out_proj.weight.data.mul_(2)
    graph.replay()
    assert torch.equal(y, 2 * first)
    assert set(passes) == {"forward"}


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's own run")
def test_interpreter():
    run_interpreted(__file__)
