"""The Triton decode step against the model's forward: on a GPU, and in Triton's interpreter."""

import copy
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mambakit import MambaConfig, MambaForCausalLM
from mambakit.models.graph_step import gpu_weights
from mambakit.modules.quantized_linear import QuantizedLinear
from mambakit.ops.decode import gpu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [
    pytest.param("cpu", id="interpreted", marks=pytest.mark.skipif(not INTERPRETED, reason="run by test_interpreter")),
    pytest.param(
        "cuda",
        marks=[pytest.mark.cuda, pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no GPU")],
    ),
]
SMALL = {name: gpu.Tile(16, 32, 4, 2) for name in ("in_proj", "x_proj", "out_proj", "head")}
SHAPES = {
    "plain": {},
    "biases": {"use_bias": True, "use_conv_bias": False, "state_size": 8, "conv_kernel": 3},
    "odd": {"hidden_size": 37, "state_size": 5, "conv_kernel": 2, "time_step_rank": 3, "expand": 3},
    "wide state": {"state_size": 64},
}


def made(shape: dict, dtype: torch.dtype, device: str) -> MambaForCausalLM:
    torch.manual_seed(0)
    config = MambaConfig(**({"hidden_size": 40, "num_hidden_layers": 2, "vocab_size": 97} | shape))
    return MambaForCausalLM(config).to(device, dtype).eval()


def step_of(model, cache, **options) -> gpu.DecodeStep:
    return gpu.DecodeStep(gpu_weights(model), cache.conv_states, cache.ssm_states, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("tiles", [SMALL, None], ids=["small tiles", "own tiles"])
@torch.no_grad()
def test_the_models_logits_and_states(device, shape, rows, tiles):
    plain = not shape and rows == (9 if tiles else 1)
    if INTERPRETED and not plain and not (tiles and rows == 3):
        pytest.skip("too slow in the interpreter")
    model = made(shape, torch.float32, device)
    ids = torch.randint(0, 97, (rows, 7), device=device)
    cache = model(ids[:, :3], use_cache=True).cache_params
    step = step_of(model, cache, capacity=4, tiles=tiles)
    whole = model(ids, use_cache=True)
    chosen = []
    for t in range(3, 7):
        step.tokens.copy_(ids[:, t])
        logits = step(choose=True)
        assert (logits - whole.logits[:, t]).abs().max() < 2e-5
        assert torch.equal(step.tokens, logits.argmax(-1))
        chosen.append(step.tokens.clone())
    assert torch.equal(step.history, torch.stack(chosen, 1))
    assert (cache.ssm_states - whole.cache_params.ssm_states).abs().max() < 1e-5
    assert (cache.conv_states - whole.cache_params.conv_states).abs().max() < 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("shape", [{}, {"hidden_size": 100, "use_bias": True}], ids=["plain", "odd"])
@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_packed_weights(device, format, group, shape, rows):
    if INTERPRETED and ((rows == 1) != (group == 64) or bool(shape) != (rows == 1)):
        pytest.skip("too slow in the interpreter")
    model = made({"num_hidden_layers": 1} | shape, torch.float32, device).quantize(format, group)
    widened = copy.deepcopy(model)  # a CPU's own products of packed weights round x
    for name, linear in model.named_modules():
        if isinstance(linear, QuantizedLinear):
            plain = torch.nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device)
            plain.weight.copy_(linear.packed.dequantized())
            if linear.bias is not None:
                plain.bias.copy_(linear.bias)
            widened.set_submodule(name, plain)
    ids = torch.randint(0, 97, (rows, 5), device=device)
    cache = widened(ids[:, :3], use_cache=True).cache_params
    step = step_of(model, cache, tiles={name: gpu.Tile(16, 128, 4, 2) for name in SMALL} if rows == 3 else None)
    whole = widened(ids, use_cache=True)
    for t in range(3, 5):
        step.tokens.copy_(ids[:, t])
        assert (step() - whole.logits[:, t]).abs().max() < 1e-5
    assert (cache.ssm_states - whole.cache_params.ssm_states).abs().max() < 1e-5


@pytest.mark.cuda
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16, 32])
@torch.no_grad()
def test_bfloat16_is_no_worse_than_the_forward_and_a_row_is_its_own(rows):
    model = made({"hidden_size": 768, "num_hidden_layers": 4, "vocab_size": 1000}, torch.bfloat16, "cuda")
    ids = torch.randint(0, 1000, (rows, 40), device="cuda")
    cache = model(ids[:, :39], use_cache=True).cache_params
    again = cache.clone()
    exact = made({"hidden_size": 768, "num_hidden_layers": 4, "vocab_size": 1000}, torch.bfloat16, "cpu").double()
    exact = exact(ids.cpu()).logits[:, -1]
    forward = model(ids).logits[:, -1].cpu()
    step = step_of(model, cache)
    step.tokens.copy_(ids[:, 39])
    logits = step().clone()
    error, their_error = ((t.double().cpu() - exact).norm() / exact.norm() for t in (logits, forward))
    assert error < max(1.5 * their_error, 1e-2)
    # Other rows' contents change nothing of a row.
    other = step_of(model, again)
    again.ssm_states[:, 1:] = 0
    other.tokens.copy_(ids[:, 39])
    other.tokens[1:] = 7
    assert torch.equal(other()[0], logits[0])


def test_what_it_cannot_serve():
    model = made({}, torch.float32, "cpu")
    cache = model.backbone.new_cache(gpu.MOST_ROWS + 1)
    with pytest.raises(ValueError, match="it serves 1 to"):
        step_of(model, cache)
    cache = model.backbone.new_cache(2)
    cache._ssm = cache._ssm.transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.raises(ValueError, match="contiguous"):
        step_of(model, cache)
    packed = made({}, torch.float32, "cpu").quantize("int8")
    with pytest.raises(ValueError, match="5 rows with packed weights; it serves 1 to 4"):
        step_of(packed, packed.backbone.new_cache(5))
    packed.lm_head = model.lm_head
    with pytest.raises(ValueError, match="of different kinds"):
        step_of(packed, packed.backbone.new_cache(1))
    lossless = made({}, torch.float32, "cpu").quantize("lossless")
    with pytest.raises(ValueError, match="reads tensors, int8 or int4, not lossless32 weights"):
        step_of(lossless, lossless.backbone.new_cache(1))


def compiled_for_hopper(kernel, constants: dict, types: dict) -> bytes:
    """What the interpreter cannot tell: that the compiler takes the kernel. Needs no GPU."""
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    values = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=values)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["cubin"]


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("rows", [1, 4])
def test_products_compile(bits, rows):
    """At the 1.4b shape, tied to the tiles of few rows."""
    types = dict.fromkeys(("residual", "scales", "logits", "best", "parts", "conv_state"), "*fp32")
    types |= dict.fromkeys(("norm", "bias", "conv", "conv_bias", "u", "z", "y"), "*bf16")
    types |= {"weight": {0: "*bf16", 8: "*i8", 4: "*i16"}[bits], "best_token": "*i32", "eps": "fp32"}
    h, d, r, v = 2048, 4096, 160, 50280
    common = {"BITS": bits, "GROUP": 64 if bits else 0, "BB": rows, "DOT": False, "CHAINED": False}
    common |= {} if bits else {"scales": None}
    tiles = gpu._tiles(rows, h, d)
    for kernel, name, constants in (
        (gpu._in_proj, "in_proj", {"H": h, "D": d, "WIDTH": 4, "HAS_BIAS": False, "bias": None, "HAS_CONV_BIAS": True}),
        (gpu._x_proj, "x_proj", {"R": r, "D": d, "COLUMNS": d}),
        (gpu._out_proj, "out_proj", {"H": h, "D": d, "HAS_BIAS": False, "bias": None}),
        (gpu._head, "head", {"H": h, "V": v, "BLOCKS": 3143}),
    ):
        tile = tiles[name]
        constants |= common | {"BK": tile.BK, "BN": tile.BN, "STAGES": tile.stages}
        assert compiled_for_hopper(kernel, constants, types)


@pytest.mark.skipif(INTERPRETED, reason="this is the one that starts it")
def test_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "interpreted", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout
