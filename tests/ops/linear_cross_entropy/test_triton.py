"""The GPU path of linear_cross_entropy against the float64 reference: on a GPU, and in Triton's interpreter."""

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mambakit.ops.linear_cross_entropy import chunked  # noqa: E402
from mambakit.ops.linear_cross_entropy import triton as head  # noqa: E402
from tests.ops.interpreter import DEVICES, INTERPRETED, run_interpreted  # noqa: E402

# Loss: float32 sums. Gradients: softmax - onehot and the result are each rounded once to the dtype of hidden
# (truncated by Triton's interpreter, hence the wider bound there). In bfloat16 that is 1.66e-3 for dhidden of the first
# large case, all of it the result's rounding; sums with rounded parts exceed the bound from four parts on.
LOSS = 2e-6
GRADIENT = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3 if INTERPRETED else 3e-3}

CASES = [(1, 40, 50), (7, 16, 33), (20, 24, 64), (13, 8, 4500), (0, 8, 9)]  # tokens, h, v
LARGE = [(3000, 768, 50277), (1029, 2048, 50280), (40000, 256, 16), (129, 64, 70001), (257, 64, 130001)]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Uninitialised memory is NaN, so an element that no kernel wrote cannot pass."""
    empty = torch.empty

    def poisoned(*shape, **options):
        memory = empty(*shape, **options)
        return memory.fill_(torch.nan) if memory.is_floating_point() else memory

    monkeypatch.setattr(torch, "empty", poisoned)


def inputs(case, dtype, device, weight_dtype=None):
    tokens, h, v = case
    random = torch.Generator().manual_seed(v)
    hidden = torch.randn(tokens, h, generator=random).to(dtype)
    weight = torch.randn(v, h, generator=random).mul(2 * h**-0.5).to(dtype).to(weight_dtype or dtype)
    targets = torch.randint(v, (tokens,), generator=random)
    targets[2::5] = -100
    return [t.to(device) for t in (hidden, weight, targets)]


def relative(got, expected):
    assert got.shape == expected.shape
    return ((got.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def check(hidden, weight, targets):
    # The reference runs where the inputs are: in float64 a vocabulary of 50,000 takes minutes on a CPU.
    want = chunked.forward(hidden.double(), weight.double(), targets, -100, True, True)
    loss, dhidden, dweight = head.forward(hidden, weight, targets, -100, True, True)
    assert (loss.dtype, dhidden.dtype, dweight.dtype) == (torch.float32, hidden.dtype, weight.dtype)
    if hidden.shape[0]:
        assert relative(loss, want[0]) <= LOSS
        assert relative(dhidden, want[1]) <= GRADIENT[hidden.dtype]
    assert relative(dweight, want[2]) <= GRADIENT[hidden.dtype]
    alone, *empty = head.forward(hidden, weight, targets, -100, False, False)
    assert torch.equal(alone, loss)
    assert [t.numel() for t in empty] == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("chunk_logits", [head.CHUNK_LOGITS, 400])
@pytest.mark.parametrize("device", DEVICES)
def test_matches_reference(device, case, dtype, chunk_logits, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_LOGITS", chunk_logits)  # 400: several chunks, the last of them shorter
    check(*inputs(case, dtype, device))


@pytest.mark.parametrize("held", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_rows_longer_than_what_registers_hold(device, dtype, held, monkeypatch):
    monkeypatch.setattr(head, "HELD_BLOCKS", held)
    check(*inputs((13, 8, 4500), dtype, device))  # three blocks


@pytest.mark.parametrize("device", DEVICES)
def test_master_weight_keeps_a_float32_gradient(device):
    check(*inputs(CASES[1], torch.bfloat16, device, weight_dtype=torch.float32))


@pytest.mark.parametrize("device", DEVICES)
def test_target_out_of_range_is_nan(device):
    hidden, weight, targets = inputs(CASES[1], torch.float32, device)
    targets[3] = weight.shape[0]
    assert head.forward(hidden, weight, targets, -100, False, False)[0].isnan()


@pytest.mark.parametrize("device", DEVICES)
def test_confident_logits_stay_finite(device):
    hidden, weight, targets = inputs(CASES[2], torch.float32, device)
    check(hidden * 300, weight, targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("device", DEVICES[1:])
def test_matches_reference_on_large_shapes(device, case, dtype):
    check(*inputs(case, dtype, device))


@pytest.mark.parametrize("device", DEVICES[1:])
def test_capturable_in_a_cuda_graph(device, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_LOGITS", 400)
    arguments = (*inputs(CASES[1], torch.bfloat16, device), -100, True, True)
    expected = head.forward(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = head.forward(*arguments)
    graph.replay()
    for got, want in zip(captured, expected, strict=True):
        assert torch.equal(got, want)


def compile_for_hopper(kernel, constants, **types):
    """What the interpreter cannot tell: that the compiler takes the kernel. Needs no GPU."""
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    values = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=values)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]
    return compiled


def constants(v, need_gradient):
    block, rest, _ = head.softmax_plan(v)
    return {"V": v, "BLOCK_V": block, "REST": rest, "NEED_GRADIENT": need_gradient}


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("need_gradient", [False, True])
@pytest.mark.parametrize("v", [50277, 130001])
def test_kernel_compiles(v, need_gradient):
    types = {"logits": "*fp32", "targets": "*i64", "losses": "*fp32", "dlogits": "*bf16"}
    compile_for_hopper(head._softmax_kernel, constants(v, need_gradient), **types)


@pytest.mark.skipif(INTERPRETED, reason="compiles")
def test_the_targets_logit_is_read_before_a_gradient_can_take_its_place():
    """In float32 they share memory: a warp past the reductions' barrier writes what a later one would still read."""
    types = {"logits": "*fp32", "targets": "*i64", "losses": "*fp32", "dlogits": "*fp32"}
    code = compile_for_hopper(
        head._softmax_kernel, constants(130001, True), **types
    ).asm["ttgir"].splitlines()  # fmt: skip
    reductions = [i for i, line in enumerate(code) if '"tt.reduce"' in line]
    one = [i for i, line in enumerate(code) if " tt.load " in line and "tensor<" not in line and "ptr<f32>" in line]
    assert len(one) == 1
    assert one[0] < reductions[0]


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("v", [50277, 130001])
def test_the_targets_gradient_is_written_after_what_others_write_there(v):
    types = {"logits": "*fp32", "targets": "*i64", "losses": "*fp32", "dlogits": "*bf16"}
    code = compile_for_hopper(head._softmax_kernel, constants(v, True), **types).asm["ptx"].splitlines()
    stores = [i for i, line in enumerate(code) if "st.global" in line]
    assert any("bar.sync" in line for line in code[stores[-2] : stores[-1]])


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's own run")
def test_interpreter():
    run_interpreted(__file__)
