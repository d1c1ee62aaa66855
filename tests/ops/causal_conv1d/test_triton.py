"""The Triton causal convolution against the float64 reference: on a GPU, and in Triton's interpreter."""

import itertools

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mambakit.ops._layout import is_transposed  # noqa: E402
from mambakit.ops.causal_conv1d import chunked  # noqa: E402
from mambakit.ops.causal_conv1d import triton as conv  # noqa: E402
from mambakit.ops.causal_conv1d import triton_kernels as kernels  # noqa: E402
from mambakit.ops.causal_conv1d import triton_tokens_kernels as tokens_kernels  # noqa: E402
from mambakit.ops.causal_conv1d import triton_vectors_kernels as vectors_kernels  # noqa: E402
from tests.ops.interpreter import DEVICES, INTERPRETED, run_interpreted  # noqa: E402

# Rounding y to bfloat16 costs 1.7e-3 at most in this norm. Triton's interpreter truncates instead: twice that.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3 if INTERPRETED else 3e-3}

# b, l, d, k, packed, initial state, dfinal, bias, activation, strided
CASES = [
    (1, 1, 40, 4, False, False, False, True, "silu", False),
    (1, 1, 40, 4, True, True, True, False, "", True),
    (2, 2, 33, 4, False, True, True, True, "silu", False),
    (3, 7, 65, 4, False, False, True, True, "silu", True),
    (2, 37, 70, 2, False, True, False, False, "silu", False),
    (2, 130, 24, 3, False, True, True, True, "", True),
    (1, 33, 96, 5, True, False, False, True, "silu", True),
    (1, 50, 48, 6, True, True, False, False, "", False),
    (1, 61, 40, 7, True, False, True, True, "silu", False),
    (1, 75, 34, 8, True, True, True, True, "silu", True),
    (2, 3, 32, 8, False, True, True, False, "silu", False),
    (5, 9, 64, 4, False, False, False, False, "", True),
    (0, 5, 8, 4, False, True, True, True, "silu", False),
    (3, 0, 8, 4, False, True, True, True, "silu", False),
    (1, 0, 8, 4, True, True, True, True, "silu", False),
]
LARGE = [
    (16, 2049, 1536, 4, False, True, True, True, "silu", True),
    (1, 4099, 1000, 4, True, True, True, True, "silu", True),
    (1, 8192, 520, 3, True, False, False, True, "silu", False),
    (64, 511, 257, 4, False, False, False, True, "", False),
]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Uninitialised memory is NaN, so an element that no kernel wrote cannot pass."""
    empty = torch.empty

    def poisoned(*shape, **options):
        memory = empty(*shape, **options)
        return memory.fill_(torch.nan) if memory.is_floating_point() else memory

    of_tensor = torch.Tensor.new_empty

    def poisoned_like(tensor, *shape, **options):
        memory = of_tensor(tensor, *shape, **options)
        return memory.fill_(torch.nan) if memory.is_floating_point() else memory

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned_like)


def boundaries(length):
    """Sequences of 0, 1, 2 tokens and more, an empty one first and last."""
    inner = [n for n in (0, 0, 1, 3, 3, length // 2, length - 1) if 0 <= n <= length]
    return torch.tensor(sorted([0, *inner, length, length]), dtype=torch.int32)


def inputs(case, dtype, device):
    b, length, d, k, packed, has_initial, has_dfinal, has_bias, activation, strided = case
    random = torch.Generator().manual_seed(length * 1009 + d)
    normal = lambda *shape: torch.randn(*shape, generator=random).to(dtype).to(device)  # noqa: E731
    x = normal(b, length, 2 * d + 8)[..., d : 2 * d] if strided else normal(b, length, d)
    dy = normal(b, length, d + 8)[..., :d] if strided else normal(b, length, d)
    cu = boundaries(length).to(device) if packed else None
    rows = b if cu is None else cu.shape[0] - 1
    return {
        "dy": dy,
        "dfinal": normal(rows, d, k - 1) if has_dfinal else None,
        "x": x,
        "weight": normal(d, k).float(),
        "bias": normal(d).float() if has_bias else None,
        "activation": activation,
        "initial_state": normal(rows, d, k - 1) if has_initial else None,
        "cu_seqlens": cu,
    }


def exact(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def assert_close(got, expected, dtype, name):
    assert got.shape == expected.shape, name
    assert got.is_contiguous() or got.transpose(1, 2).is_contiguous(), name
    error = (got.double() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert expected.numel() == 0 or error <= TOLERANCE[dtype], f"{name}: relative error {error:.1e}"


def check(case, dtype, device):
    arguments = inputs(case, dtype, device)
    dy, dfinal, *rest = arguments.values()
    expected = chunked.forward(*map(exact, rest))
    for name, got, want in zip(("y", "final_state"), conv.forward(*rest), expected, strict=True):
        assert got.dtype == dtype
        assert_close(got, want, dtype, name)
    expected = chunked.backward(*map(exact, (dy, dfinal, *rest)))
    names = ("dx", "dweight", "dbias", "dinitial_state")
    for name, got, want in zip(names, conv.backward(dy, dfinal, *rest), expected, strict=True):
        assert_close(got, want, dtype, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_matches_reference(device, case, dtype):
    check(case, dtype, device)


def check_tokens(case, dtype, device, gradient_too=True):
    """Where the tokens of x, and of the gradient, are adjacent."""
    dy, dfinal, x, *rest = inputs(case, dtype, device).values()
    x = x.transpose(1, 2).contiguous().transpose(1, 2)
    dy = dy.transpose(1, 2).contiguous().transpose(1, 2) if gradient_too else dy
    y, final = conv.forward(x, *rest)
    for name, got, want in zip(("y", "final"), (y, final), chunked.forward(*map(exact, (x, *rest))), strict=True):
        assert_close(got, want, dtype, name)
    found = conv.backward(dy, dfinal, x, *rest)
    expected = chunked.backward(*map(exact, (dy, dfinal, x, *rest)))
    for name, got, want in zip(("dx", "dweight", "dbias", "dinitial"), found, expected, strict=True):
        assert_close(got, want, dtype, name)
    assert is_transposed(y) == is_transposed(x) == is_transposed(found[0])


@pytest.mark.parametrize("case", [CASES[i] for i in (2, 5, 6, 9, 10)], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_tokens_that_are_adjacent(device, case):
    check_tokens(case, torch.float32, device)
    if case == CASES[2]:
        check_tokens(case, torch.bfloat16, device, gradient_too=False)


# b, l, d, k, bias, activation: rows that begin and end with a vector, rows that do not, and two of which there is no
# whole number of vectors
VECTORS = [
    (2, 8, 3, 4, True, "silu"),
    (1, 264, 5, 2, False, ""),
    (3, 40, 2, 5, True, ""),
    (2, 24, 3, 8, False, "silu"),
    (1, 1032, 2, 4, True, "silu"),
    (1, 2, 8, 4, True, "silu"),
    (2, 5, 12, 3, True, "silu"),  # of bfloat16, the second sequence begins within a vector
    (2, 7, 8, 2, False, "silu"),
    (1, 9, 8, 4, True, ""),
    (1, 15, 8, 3, True, "silu"),
    (3, 17, 8, 8, True, "silu"),
    (1, 196, 2, 5, False, ""),
    (2, 197, 24, 4, True, "silu"),
    (1, 198, 4, 3, True, "silu"),
    (1, 539, 8, 2, True, "silu"),
    (3, 23, 3, 4, True, "silu"),
    (1, 7, 3, 8, True, ""),
]


def takes_vectors(case, dtype, part=False):
    b, length, d = case[:3]
    vector = 16 // dtype.itemsize
    return b * d * length % vector == 0 and (not part or b == 1 or d * length % vector == 0)


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", VECTORS, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_vectors_of_tokens(device, case, dtype, part, monkeypatch):
    """Sixteen bytes of tokens at a time, where memory has them whole; ``part``: x and dy are parts of larger memory."""
    if device == "cpu" and dtype == torch.float16 and not part:
        pytest.skip("slow in the interpreter")
    b, length, d, k, has_bias, activation = case
    monkeypatch.setattr(conv, "_processors", lambda device: 1 if part else 1000)  # several steps of a program, or one
    arguments = inputs((b, length, d, k, False, False, False, has_bias, activation, False), dtype, device)
    dy, _, x, *rest = arguments.values()
    for_tokens = lambda t: torch.cat([t, t] if part else [t], 2).transpose(1, 2).contiguous().transpose(1, 2)[..., :d]  # noqa: E731
    dy, x = for_tokens(dy), for_tokens(x)
    assert conv._vector(x, dy) == (16 // x.element_size() if takes_vectors(case, dtype, part) else 0)
    for name, got, want in zip(
        ("y", "final"), conv.forward(x, *rest), chunked.forward(*map(exact, (x, *rest))), strict=True
    ):
        assert_close(got, want, dtype, name)
    expected = chunked.backward(*map(exact, (dy, None, x, *rest)))
    for name, got, want in zip(
        ("dx", "dweight", "dbias"), conv.backward(dy, None, x, *rest)[:3], expected[:3], strict=True
    ):
        assert_close(got, want, dtype, name)


@pytest.mark.parametrize("length", [12, 13])
@pytest.mark.parametrize("device", DEVICES)
def test_memory_that_begins_between_vectors(device, length):
    x = torch.randn(2, 4, length + 4, device=device)[..., 1 : length + 1].transpose(1, 2)
    weight = torch.randn(4, 4, device=device)
    assert x.data_ptr() % 16 == 4
    assert conv._vector(x) == 0
    y, _ = conv.forward(x, weight, None, "silu", None, None)
    assert_close(y, chunked.forward(*map(exact, (x, weight)), None, "silu", None, None)[0], torch.float32, "y")


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_begin_elsewhere_than_dense_ones(device):
    """A vector of x would hold other tokens than one of y."""
    x = torch.randn(2, 4, 16, device=device)[..., :13].transpose(1, 2)
    weight = torch.randn(4, 4, device=device)
    assert conv._vector(x) == 0
    assert conv._vector(x.transpose(1, 2).contiguous().transpose(1, 2)) == 4
    y, _ = conv.forward(x, weight, None, "silu", None, None)
    assert_close(y, chunked.forward(*map(exact, (x, weight)), None, "silu", None, None)[0], torch.float32, "y")


@pytest.mark.parametrize("length", [3, 21])
@pytest.mark.parametrize("device", DEVICES)
def test_a_vector_of_two_rows_leaves_each_its_own(device, length):
    """NaN of a channel, and what is next to the operands in memory, reach no other channel."""
    b, d, k = 2, 8, 4
    memory = torch.full((2, b, 2 * d, length), torch.nan, device=device)
    x, dy = memory[:, :, :d].transpose(2, 3)
    x.copy_(torch.randn(b, length, d)), dy.copy_(torch.randn(b, length, d))
    x[..., 2], dy[..., 5] = torch.nan, torch.inf
    weight, bias = torch.randn(d, k, device=device), torch.randn(d, device=device)
    assert conv._vector(x, dy) == 4
    y, final = conv.forward(x, weight, bias, "silu", None, None)
    expected = chunked.forward(*map(exact, (x, weight, bias)), "silu", None, None)
    fine = [c for c in range(d) if c != 2]
    assert_close(y[..., fine].transpose(1, 2).contiguous().transpose(1, 2), expected[0][..., fine], torch.float32, "y")
    assert torch.equal(final[:, fine].double(), expected[1][:, fine])
    found = conv.backward(dy, None, x, weight, bias, "silu", None, None)[:3]
    expected = chunked.backward(*map(exact, (dy, None, x, weight, bias)), "silu", None, None)[:3]
    fine.remove(5)
    for got, want, axis in zip(found, expected, (2, 0, 0), strict=True):
        got, want = (t.index_select(axis, torch.tensor(fine, device=device)).contiguous() for t in (got, want))
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vector", [4, 8])
def test_tiles_of_uneven_rows(vector, monkeypatch):
    """They hold a row wherever in a vector it begins; no program has only empty ones."""
    for processors, length in itertools.product((1, 132, 100_000), (*range(2, 300), 2001, 5003)):
        monkeypatch.setattr(conv, "_processors", lambda device, n=processors: n)
        rows, lanes, vectors = conv._lanes(length, vector)
        assert vectors == max(-(-(row * length % vector + length) // vector) for row in range(vector))
        steps, chunks = conv._steps(torch.device("cpu"), 3 * 1024 // rows, lanes, vectors, uneven=True)
        assert (chunks - 1) * steps * lanes < vectors <= chunks * steps * lanes < vectors + chunks * lanes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("length", "chunks"), [(21, 1), (45, 2)])
def test_programs_do_not_write_into_vectors_of_others(device, length, chunks):
    """The first program alone, of 3 channels and 32 tokens, writes what is its own, where it shares vectors, too."""
    rows, d, k = 3, 8, 4
    x, dy = torch.randn(2, 1, d, length, device=device)
    weight = torch.randn(d, k, device=device)
    y, dx = torch.full((2, 1, d, length), torch.nan, device=device)
    final, partials = torch.empty(1, d, k - 1, device=device), torch.empty(chunks, k + 1, d, device=device)
    common = {"K": k, "ROWS": 4, "LANES": 8, "VECTOR": 4, "EVEN": False, "STEPS": 1, "SILU": True, "HAS_BIAS": False}
    vectors_kernels.forward_kernel[(1,)](
        x, weight, None, y, final, length, d, chunks, rows, 2, d * length, length, k, 1, KP=4, BLOCK_D=8, **common
    )  # fmt: skip
    vectors_kernels.backward_kernel[(1,)](
        dy, x, weight, None, dx, partials, length, d, chunks, rows, *(d * length, length) * 2, k, 1, **common
    )  # fmt: skip
    own = torch.zeros(d, length, dtype=torch.bool, device=device)
    for row in range(rows):
        own[row, : 32 - row * length % 4] = True
    for written in (y, dx):
        assert torch.equal(~written[0].isnan(), own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("device", DEVICES[1:])
def test_tokens_that_are_adjacent_on_large_shapes(device, case, dtype):
    check_tokens(case, dtype, device)


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_of_several_programs(device, monkeypatch):
    monkeypatch.setattr(conv, "_PROGRAM", 64)
    monkeypatch.setattr(conv, "_processors", lambda device: 1000)  # as many programs as there are tiles
    for case in (
        (2, 150, 3, 4, False, True, True, True, "silu", False),
        (1, 150, 3, 8, True, True, True, True, "", False),
    ):
        check_tokens(case, torch.float32, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("device", DEVICES[1:])
def test_matches_reference_on_large_shapes(device, case, dtype):
    check(case, dtype, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [1, 4, 150])  # one token, the serial kernel, the walks and their second launch
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_slots", [False, True])
def test_in_place(device, packed, length, state_dtype, has_slots):
    check_in_place(device, packed, length, state_dtype, has_slots, False)


def check_in_place(device, packed, length, state_dtype, has_slots, tokens):
    d, k = 40, 4
    b = 1 if packed else 3
    x = torch.randn(b, length, d).to(torch.bfloat16)
    if tokens:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    weight, bias = torch.randn(d, k), torch.randn(d)
    cu = torch.tensor([0, 0, length - length // 3, length], dtype=torch.int32) if packed else None
    slots = torch.tensor([5, -1, 0], dtype=torch.int32) if has_slots else None
    # With slots, the pool is also a strided view.
    pool = torch.randn(6, k - 1, d).transpose(1, 2) if has_slots else torch.randn(6, d, k - 1)
    pool = pool.to(state_dtype)
    before = pool.clone()
    expected_pool = pool.double()
    expected = chunked.forward_(expected_pool, slots, x.double(), weight.double(), bias.double(), "silu", cu)

    move = lambda t: None if t is None else t.to(device)  # noqa: E731
    pool = move(pool)
    y = conv.forward_(pool, move(slots), *map(move, (x, weight, bias)), "silu", move(cu))
    assert_close(y.cpu(), expected, torch.bfloat16, "y")
    assert torch.equal(pool.cpu().double(), expected_pool)  # states are copies of inputs: no rounding
    if has_slots:
        assert torch.equal(pool.cpu()[[1, 2, 3, 4]], before[[1, 2, 3, 4]])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("packed", [False, True])
def test_in_place_where_tokens_are_adjacent(device, packed):
    check_in_place(device, packed, 4, torch.float32, True, True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [CASES[5], CASES[9]], ids=str)
def test_dx_into_given_memory(device, case):
    """Beside other values, in rows and over time."""
    dy, dfinal, *rest = inputs(case, torch.float32, device).values()
    wide = torch.full((*dy.shape[:2], 2 * dy.shape[2]), 7.0, device=device)
    dx, kept = wide.chunk(2, -1)
    found = conv.backward(dy, dfinal, *rest, dx)
    assert found[0] is dx
    assert (kept == 7).all()
    for ours, theirs in zip(found, conv.backward(dy, dfinal, *rest), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("device", DEVICES)
def test_segments_equal_the_whole(device):
    x, weight = torch.randn(2, 45, 36, device=device), torch.randn(36, 4, device=device)
    whole, last = conv.forward(x, weight, None, "silu", None, None)
    state, parts = None, []
    for part in x.split([1, 2, 17, 25], 1):
        y, state = conv.forward(part, weight, None, "silu", state, None)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-6, atol=1e-6)  # sums of 4 terms in one order
    assert torch.equal(state, last)


@pytest.mark.parametrize("device", DEVICES[1:])
def test_same_inputs_same_bits(device):
    arguments = inputs(LARGE[0], torch.bfloat16, device).values()
    for first, second in zip(conv.backward(*arguments), conv.backward(*arguments), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("device", DEVICES[1:])
def test_capturable_in_a_cuda_graph(device):
    dy, dfinal, *rest = inputs(LARGE[1], torch.bfloat16, device).values()
    pool = torch.zeros(rest[-1].shape[0] - 1, rest[0].shape[2], 3, device=device)

    def run():
        y = conv.forward_(pool, None, *rest[:4], rest[-1])
        return *conv.forward(*rest), *conv.backward(dy, dfinal, *rest), y

    expected = run()
    pool.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    for got, want in zip(captured, expected, strict=True):
        assert torch.equal(got, want)


def compile_for_hopper(kernel, constants, aligned=(), **types):
    """What the interpreter cannot tell: that the compiler takes the kernel. Needs no GPU.

    Args:
        aligned: names of pointers to multiples of 16 bytes.

    Returns:
        PTX.
    """
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    values = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(kernel, signature, constexprs=values, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]
    return compiled.asm["ptx"]


POINTERS = dict.fromkeys(("x", "y", "dy", "dx", "final", "dfinal", "initial", "dinitial", "state"), "*bf16")
POINTERS |= dict.fromkeys(("weight", "bias", "dweight", "dbias", "partials"), "*fp32")
POINTERS |= dict.fromkeys(("slots", "starts", "ids", "cu_seqlens"), "*i32")


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize(
    ("k", "packed", "states"),
    [(4, False, False), (4, False, True), (4, True, False), (4, True, True), (6, False, True)],
)
def test_kernels_compile(k, packed, states):
    flags = {"K": k, "BLOCK_D": 64, "UNROLL": 2, "SILU": True, "HAS_BIAS": states, "PACKED": packed}
    absent = {} if packed else {"starts": None, "ids": None, "cu_seqlens": None}
    absent |= {} if states else {"initial": None, "slots": None, "dfinal": None, "bias": None}
    walks = {"ROWS": 8, "STEPS": 16, "HAS_INITIAL": states, **flags}
    for kernel, constants in (
        (kernels.forward_kernel, {"KP": triton.next_power_of_2(k - 1), "HAS_SLOTS": states, **walks}),
        (kernels.backward_kernel, {"HAS_DFINAL": states, **walks}),
        (kernels.decode_kernel, {"HAS_SLOTS": states, **flags}),
        (kernels.sum_partials_kernel, {"K": k, "HAS_BIAS": states, "ROWS": 32, "BLOCK_D": 32}),
        (kernels.scatter_kernel, {"K": k, "BLOCK": 1024, "HAS_SLOTS": states}),
    ):
        constants |= {name: value for name, value in absent.items() if name in kernel.arg_names}
        compile_for_hopper(kernel, constants, **POINTERS)
    tokens = {
        "K": k,
        "ROWS": 8,
        "TOKENS": 64,
        "STEPS": 4,
        "BLOCK_D": 64,
        "HAS_INITIAL": states,
        "SILU": True,
        "HAS_BIAS": states,
    }
    tokens |= {"PACKED": packed, "KP": triton.next_power_of_2(k - 1), "HAS_SLOTS": states, "HAS_DFINAL": states}
    for kernel in (tokens_kernels.forward_kernel, tokens_kernels.backward_kernel):
        constants = {name: value for name, value in {**tokens, **absent}.items() if name in kernel.arg_names}
        compile_for_hopper(kernel, constants, **POINTERS)
    compile_for_hopper(kernels.sequences_kernel, {"BLOCK": 256}, **POINTERS)


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize(("dtype", "vector"), [("*bf16", 8), ("*fp16", 8), ("*fp32", 4)])
@pytest.mark.parametrize(("k", "even"), [(2, True), (4, True), (4, False), (8, True), (8, False)])
def test_vectors_compile(k, even, dtype, vector):
    """Each vector of tokens is one load or store of 16 bytes, also where it has those of two rows."""
    near = triton.cdiv(k - 1, vector)
    constants = {"K": k, "LANES": 8, "VECTOR": vector, "EVEN": even, "SILU": True, "HAS_BIAS": True, "ROWS": 16}
    constants["STEPS"] = 4
    types = POINTERS | dict.fromkeys(("x", "y", "dy", "dx", "final"), dtype)
    for kernel, own, loads in (
        (vectors_kernels.forward_kernel, {"KP": triton.next_power_of_2(k - 1), "BLOCK_D": 64}, near + 1),
        (vectors_kernels.backward_kernel, {}, 3 * near + 2),
    ):
        aligned = [name for name in ("x", "y", "dy", "dx") if name in kernel.arg_names]
        ptx = compile_for_hopper(kernel, constants | own, aligned, **types)
        assert ptx.count("ld.global.v4") == loads
        assert ptx.count("st.global.v4") == 1


@pytest.mark.skipif(INTERPRETED, reason="compiles")
def test_an_empty_packed_row_compiles(monkeypatch):
    """Its launches only write states, but the compiler reads the rest of the kernel, too: no pointer may be missing."""
    launched = []

    class Kernel:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *arguments, **constants: launched.append((self.kernel, arguments, constants))

    for name in ("forward_kernel", "backward_kernel"):
        monkeypatch.setattr(kernels, name, Kernel(getattr(kernels, name)))
    monkeypatch.setattr(kernels, "sum_partials_kernel", Kernel(None))
    dy, dfinal, *rest = inputs(CASES[-1], torch.bfloat16, "cpu").values()
    conv.forward(*rest)
    conv.backward(dy, dfinal, *rest)
    compiled = [launch for launch in launched if launch[0] is not None]
    assert len(compiled) == 2
    for kernel, arguments, constants in compiled:
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        given.pop("num_warps")
        constants = {
            n: v for n, v in given.items() if v is None or kernel.params[kernel.arg_names.index(n)].is_constexpr
        }
        compile_for_hopper(kernel, constants, **POINTERS)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's own run")
def test_interpreter():
    run_interpreted(__file__)
