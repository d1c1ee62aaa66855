"""Triton's decode steps, of few rows and of many, against the model's forward, on a GPU or interpreted."""

import copy
import re
import subprocess
import tempfile

import pytest
import torch

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mambakit import MambaForCausalLM
from mambakit.decoding.graph_step import gpu_weights
from mambakit.modules.quantized_linear import QuantizedLinear
from mambakit.ops._sums import ALIKE
from mambakit.ops.decode import triton_few_rows as few
from mambakit.ops.decode import triton_few_rows_kernels as few_kernels
from mambakit.ops.decode import triton_many_rows as many
from mambakit.ops.decode import triton_many_rows_kernels as many_kernels
from mambakit.ops.decode import triton_packed_rows as packed_rows
from mambakit.ops.decode import triton_tokens
from mambakit.ops.linear.triton_plan import Product
from tests.ops.decode.with_norms import with_norms
from tests.ops.interpreter import DEVICES, INTERPRETED, run_interpreted

SMALL = {
    few.FewRowsStep: {name: few.Tile(16, 32, 4, 2) for name in ("in_proj", "x_proj", "out_proj", "head")},
    many.ManyRowsStep: {
        "in_proj": many.Product(16, 32, 4, 2, 2), "x_proj": many.Product(16, 16, 4, 2, 3),
        "out_proj": many.Product(16, 32, 4, 2, 2),
        "head": many.Product(16, 32, 4, 2), "conv": many.Tile(16, 4, 4), "scan": many.Tile(16, 2, 4),
    },
}  # fmt: skip
SHAPES = {
    "plain": {},
    "biases": {"use_bias": True, "use_conv_bias": False, "state_size": 8, "conv_kernel": 3},
    "odd": {"hidden_size": 37, "state_size": 5, "conv_kernel": 2, "time_step_rank": 3, "expand": 3},
    "wide state": {"state_size": 64},
    "falcon": {"mixer_rms_eps": 1e-3},
    "jamba": {"mixer_rms_eps": 1e-3, "mixer_norm_weights": True, "state_size": 5, "time_step_rank": 7},
}


def made(shape: dict, dtype: torch.dtype, device: str) -> MambaForCausalLM:
    torch.manual_seed(0)
    return with_norms({"hidden_size": 40, "num_hidden_layers": 2, "vocab_size": 97} | shape).to(device, dtype).eval()


def step_of(model, cache, kind=None, tiles=None, **options):
    kind = kind or (few.FewRowsStep if cache.max_batch_size <= few.MOST_ROWS else many.ManyRowsStep)
    options |= {"tiles" if kind is few.FewRowsStep else "chosen": tiles}
    return kind(gpu_weights(model), cache.conv_states, cache.ssm_states, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        (few.FewRowsStep, 1),
        (few.FewRowsStep, 3),
        (many.ManyRowsStep, 2),
        (many.ManyRowsStep, 17),
        (many.ManyRowsStep, 65),
    ],
)
@pytest.mark.parametrize("small", [True, False], ids=["small tiles", "own tiles"])
@torch.no_grad()
def test_the_models_logits_and_states(device, shape, kind, rows, small):
    some = not shape or shape == SHAPES["falcon"]
    if INTERPRETED and not (rows in (2, 3) if small else some and rows in (1, 17)):
        pytest.skip("too slow in the interpreter")
    tiles = SMALL[kind] if small else None
    model = made(shape, torch.float32, device)
    ids = torch.randint(0, 97, (rows, 7), device=device)
    cache = model(ids[:, :3], use_cache=True).cache_params
    step = step_of(model, cache, kind, tiles, capacity=4)
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
@torch.no_grad()
def test_several_blocks_of_rows(device, monkeypatch):
    """More rows than a product's tile has, as 256 and 512 are: the last block is not full."""
    monkeypatch.setattr(many, "_BLOCK", 16)
    model = made({"num_hidden_layers": 1}, torch.float32, device)
    ids = torch.randint(0, 97, (37, 4), device=device)
    cache = model(ids[:, :3], use_cache=True).cache_params
    step = step_of(model, cache, many.ManyRowsStep, SMALL[many.ManyRowsStep], capacity=1)
    step.tokens.copy_(ids[:, 3])
    logits = step(choose=True)
    whole = model(ids, use_cache=True)
    assert (logits - whole.logits[:, 3]).abs().max() < 2e-5
    assert torch.equal(step.tokens, logits.argmax(-1))
    assert (cache.ssm_states - whole.cache_params.ssm_states).abs().max() < 1e-5


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_states_in_bfloat16(device):
    """Read, and rounded after each token; `FewRowsStep` refuses them."""
    model = made({}, torch.float32, device)
    wide = copy.deepcopy(model)
    model.config.ssm_state_dtype = "bfloat16"
    ids = torch.randint(0, 97, (2, 5), device=device)
    cache, exact = (m(ids[:, :3], use_cache=True).cache_params for m in (model, wide))
    exact.ssm_states.copy_(cache.ssm_states)
    step = step_of(model, cache, many.ManyRowsStep, SMALL[many.ManyRowsStep])
    for t in range(3, 5):
        step.tokens.copy_(ids[:, t])
        logits = step()
        assert (logits - wide(ids[:, t : t + 1], cache_params=exact).logits[:, 0]).abs().max() < 2e-5
        exact.ssm_states.copy_(exact.ssm_states.bfloat16())
        # The interpreter truncates where a GPU rounds.
        assert (cache.ssm_states - exact.ssm_states).norm() < 2**-7 * exact.ssm_states.norm()
    with pytest.raises(ValueError, match="ssm_states float32"):
        step_of(model, cache, few.FewRowsStep)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kind", "rows"), [(few.FewRowsStep, 2), (many.ManyRowsStep, 2)])
@torch.no_grad()
def test_logits_that_are_no_numbers_choose_a_token_that_there_is(device, kind, rows):
    """The next step reads that token's embedding."""
    model = made({}, torch.float32, device)
    model.backbone.norm_f.weight[0] = float("nan")
    step = step_of(model, model.backbone.new_cache(rows), kind, SMALL[kind], capacity=4)
    for _ in range(2):
        assert step(choose=True).isnan().all()
        assert ((step.tokens >= 0) & (step.tokens < 97)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("shape", [{}, {"hidden_size": 100, "use_bias": True}], ids=["plain", "odd"])
@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_packed_weights(device, format, group, shape, rows):
    if INTERPRETED and ((rows == 1) != (group == 64) or bool(shape) != (rows == 1)):
        pytest.skip("too slow in the interpreter")
    if format == "fp8" and group != 64:
        pytest.skip("one scale of a row")
    model = made({"num_hidden_layers": 1} | shape, torch.float32, device)
    model.quantize(format, None if format == "fp8" else group)
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
    step = step_of(
        model,
        cache,
        few.FewRowsStep,
        {n: few.Tile(16, 128, 4, 2) for n in SMALL[few.FewRowsStep]} if rows == 3 else None,
    )
    whole = widened(ids, use_cache=True)
    for t in range(3, 5):
        step.tokens.copy_(ids[:, t])
        assert (step() - whole.logits[:, t]).abs().max() < 1e-5
    assert (cache.ssm_states - whole.cache_params.ssm_states).abs().max() < 1e-5


@pytest.mark.cuda
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16, 32, 64, 128, 256, 500])
@pytest.mark.parametrize("norms", ["plain", "falcon", "jamba"])
@torch.no_grad()
def test_bfloat16_is_no_worse_than_the_forward_and_a_row_is_its_own(rows, norms):
    shape = {"hidden_size": 768, "num_hidden_layers": 4, "vocab_size": 1000}
    shape |= {k: v for k, v in SHAPES[norms].items() if k.startswith("mixer")}
    model = made(shape, torch.bfloat16, "cuda")
    ids = torch.randint(0, 1000, (rows, 40), device="cuda")
    cache = model(ids[:, :39], use_cache=True).cache_params
    again = cache.clone()
    exact = made(shape, torch.bfloat16, "cpu").double()
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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("format", "rows"), [("int8", 5), ("int4", 17), ("fp8", 19)])
@torch.no_grad()
def test_packed_weights_of_many_rows(device, format, rows):
    """float16: the interpreter multiplies no bfloat16."""
    norms = {"mixer_rms_eps": 1e-3, "mixer_norm_weights": True} if rows == 17 else {}
    shape = {"num_hidden_layers": 1, "use_bias": True, "hidden_size": 72} | norms
    model = made(shape, torch.float16, device).quantize(format)
    exact = copy.deepcopy(model).cpu().dequantize("float64")
    ids = torch.randint(0, 97, (rows, 5))
    cache, wide = model.backbone.new_cache(rows), exact(ids[:, :3], use_cache=True).cache_params
    cache.conv_states.copy_(wide.conv_states)
    cache.ssm_states.copy_(wide.ssm_states)
    tile = Product(16, 16, 64, 4, 2, waves=1)
    tiles = dict.fromkeys(("in_proj", "x_proj", "out_proj", "head"), tile) if rows == 17 else None
    small = {name: plan for name, plan in SMALL[many.ManyRowsStep].items() if name in ("conv", "scan")}
    step = packed_rows.PackedRowsStep(
        gpu_weights(model), cache.conv_states, cache.ssm_states, 2, small if device == "cpu" else None, tiles=tiles
    )
    whole, chosen = exact(ids, use_cache=True), []
    for t in range(3, 5):
        step.tokens.copy_(ids[:, t])
        logits = step(choose=True).double().cpu()
        assert (logits - whole.logits[:, t]).norm() / whole.logits[:, t].norm() < 4e-3
        assert torch.equal(step.tokens.cpu(), logits.argmax(-1))
        chosen.append(step.tokens.clone())
    assert torch.equal(step.history, torch.stack(chosen, 1))
    states = cache.ssm_states.double().cpu()
    assert (states - whole.cache_params.ssm_states).norm() / whole.cache_params.ssm_states.norm() < 4e-3
    if format == "int8":
        plain, states = made({}, torch.float16, device), model.backbone.new_cache(2)
        with pytest.raises(ValueError, match="these are floating ones; ManyRowsStep serves them"):
            packed_rows.PackedRowsStep(gpu_weights(plain), states.conv_states, states.ssm_states)


def test_what_it_cannot_serve():
    model = made({}, torch.float32, "cpu")
    cache = model.backbone.new_cache(many.MOST_ROWS + 1)
    with pytest.raises(ValueError, match="it serves 1 to"):
        step_of(model, cache)
    cache = model.backbone.new_cache(2)
    cache._memory._stacks["ssm_states"] = cache.ssm_states.transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.raises(ValueError, match="contiguous"):
        step_of(model, cache)
    packed = made({}, torch.float32, "cpu").quantize("int8")
    with pytest.raises(ValueError, match="these are packed; PackedRowsStep serves them"):
        step_of(packed, packed.backbone.new_cache(5))
    with pytest.raises(ValueError, match="5 rows; it serves 1 to 4"):
        step_of(packed, packed.backbone.new_cache(5), few.FewRowsStep)
    packed.lm_head = model.lm_head
    with pytest.raises(ValueError, match="of different kinds"):
        step_of(packed, packed.backbone.new_cache(1))
    lossless = made({}, torch.float32, "cpu").quantize("lossless")
    with pytest.raises(ValueError, match="reads tensors, int8, int4, fp8, not lossless32 weights"):
        step_of(lossless, lossless.backbone.new_cache(1))


def compiled_for_hopper(kernel, constants: dict, types: dict, **options) -> dict:
    """What the interpreter cannot tell: that the compiler takes the kernel. Needs no GPU. The text of every stage."""
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    values = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=values)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4} | options).asm


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("bits", [0, 8, 4, 1])
@pytest.mark.parametrize("rows", [1, 4])
def test_products_compile(bits, rows):
    """At the 1.4b shape, tied to the tiles of few rows."""
    types = dict.fromkeys(("residual", "scales", "logits", "best", "sums", "conv_state"), "*fp32")
    types |= dict.fromkeys(("norm", "bias", "conv", "conv_bias", "u", "z", "y"), "*bf16")
    types |= {"weight": {0: "*bf16", 8: "*i8", 4: "*i16", 1: "*u8"}[bits], "best_token": "*i32", "eps": "fp32"}
    h, d, r, v = 2048, 4096, 160, 50280
    common = {"BITS": bits, "GROUP": 64 if bits else 0, "BB": rows}
    common |= {} if bits else {"scales": None}
    tiles = few._tiles(rows, h)
    for kernel, name, constants in (
        (
            few_kernels.in_proj_kernel,
            "in_proj",
            {"H": h, "D": d, "WIDTH": 4, "HAS_BIAS": False, "bias": None, "HAS_CONV_BIAS": True},
        ),
        (few_kernels.x_proj_kernel, "x_proj", {"R": r, "D": d}),
        (few_kernels.out_proj_kernel, "out_proj", {"H": h, "D": d, "HAS_BIAS": False, "bias": None}),
        (few_kernels.head_kernel, "head", {"H": h, "V": v, "BLOCKS": 3143}),
    ):
        tile = tiles[name]
        constants |= common | {"BK": tile.BK, "BN": tile.BN, "STAGES": tile.stages}
        assert compiled_for_hopper(kernel, constants, types)


def registers(kernel, constants: dict, types: dict, **options) -> tuple[int, int]:
    """(registers, bytes of spilled ones) of a thread, as ptxas says."""
    stages = compiled_for_hopper(kernel, constants, types, **options)
    tool = triton.knobs.nvidia.ptxas.path
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(stages["ptx"])
        source.flush()
        command = [tool, "-v", "--gpu-name=sm_90a", source.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    used, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    return int(used[1]), int(spilled[1])


# At FalconMamba-7B's shape, the scans of few and of many rows.
SEVEN = {"R": 288, "D": 8192, "RANK": 256, "N": 16, "BR": 256, "BS": 16}
NORM_WEIGHTS = ("dt_norm", "B_norm", "C_norm")


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("rows", [1, 8, 32, 64])
def test_norms_spill_no_registers(rows):
    """Of dt, B and C, at the 7B shape."""
    types = dict.fromkeys(("sums", "parts", "xz", "state", "A_log", "dt_bias", "D_skip"), "*fp32")
    types |= dict.fromkeys(("u", "z", "y", "dt_proj", *NORM_WEIGHTS), "*bf16") | {"mixer_eps": "fp32"}
    found = []
    for norms in (0, 1, 2):
        given = SEVEN | {"NORMS": norms} | ({} if norms == 2 else dict.fromkeys(NORM_WEIGHTS))
        if rows <= few.MOST_ROWS:
            kernel, given, warps = few_kernels.scan_kernel, given | {"BD": 16}, 2
        else:
            tile = many.plans(rows, 16)["scan"]
            kernel, warps = many_kernels.scan_kernel, tile.warps
            given |= {"SPLITS": 4, "XZ_SPLITS": 1, "BD": tile.channels, "ROWS": tile.rows} | PLAIN
        found.append(registers(kernel, given, types, num_warps=warps, **ALIKE))
    assert found[1][1] <= found[0][1], found
    assert found[2][1] <= found[0][1], found


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("rows", [16, 128])
def test_the_kernels_of_many_rows_compile(rows):
    """At the 1.4b shape, as `plans` cuts it."""
    types = dict.fromkeys(("residual", "parts", "xz", "logits", "best", "state", "A_log", "dt_bias", "D_skip"), "*fp32")
    types |= dict.fromkeys(("x", "norm", "conv_state", "conv", "conv_bias", "u", "y", "weight", "dt_proj"), "*bf16")
    types |= {"best_token": "*i32", "eps": "fp32", "mixer_eps": "fp32"}
    h, d, r, v = 2048, 4096, 160, 50280
    plan = many.plans(rows, 16)
    for name, n, k in (("in_proj", 2 * d, h), ("x_proj", r, d), ("out_proj", h, d)):
        p = plan[name]
        columns = k // p.splits
        constants = {"N": n, "K": k, "COLUMNS": columns, "BB": rows, "BK": p.BK, "BN": p.BN, "STAGES": p.stages}
        assert compiled_for_hopper(many_kernels.product_kernel, constants, types)
    p = plan["head"]
    constants = {"H": h, "V": v, "BLOCKS": 393, "BB": rows, "BK": p.BK, "BN": p.BN, "STAGES": p.stages}
    assert compiled_for_hopper(many_kernels.head_kernel, constants, types)
    plain = {"HAS_BIAS": False, "bias": None}
    tile = plan["conv"]
    constants = {
        "D": d,
        "WIDTH": 4,
        "TAPS": 4,
        "SPLITS": 1,
        "BD": tile.channels,
        "ROWS": tile.rows,
        "HAS_CONV_BIAS": True,
    }
    stages = compiled_for_hopper(many_kernels.conv_kernel, constants | plain, types, **ALIKE)
    assert "fma.rn" not in stages["ptx"]
    assert "fma.rn" in compiled_for_hopper(many_kernels.conv_kernel, constants | plain, types)["ptx"], (
        "the option does it"
    )
    tile = plan["scan"]
    constants = {
        "R": r,
        "D": d,
        "RANK": 128,
        "N": 16,
        "SPLITS": 8,
        "XZ_SPLITS": 1,
        "BD": tile.channels,
        "BR": 128,
        "BS": 16,
        **NO_NORMS,
    }
    assert compiled_for_hopper(many_kernels.scan_kernel, constants | plain | {"ROWS": tile.rows}, types)
    assert compiled_for_hopper(many_kernels.norm_kernel, {"H": h, "SIZE": h, "SPLITS": 4} | plain, types)


H, D, R = 2048, 4096, 160
PRODUCT = {"D": D, "BITS": 0, "GROUP": 0, "BB": 1, "BK": 256, "BN": 8, "STAGES": 3, "scales": None}
PLAIN = {"HAS_BIAS": False, "bias": None}
NO_NORMS = {"NORMS": 0, "dt_norm": None, "B_norm": None, "C_norm": None}
CHANNELS = {"R": R, "D": D, "RANK": 128, "N": 16, "BR": 128, "BS": 16, **NO_NORMS}
NARROW = {"R": 4, "D": 64, "RANK": 2, "N": 1, "BR": 2, "BS": 1, **NO_NORMS}  # whose sums need no barrier of their own
IN_PLACE = {
    few_kernels.in_proj_kernel: PRODUCT | PLAIN | {"H": H, "WIDTH": 4, "HAS_CONV_BIAS": True},
    few_kernels.scan_kernel: NARROW | {"BD": 16},
    few_kernels.out_proj_kernel: PRODUCT | PLAIN | {"H": H},
    many_kernels.conv_kernel: PLAIN
    | {"D": D, "WIDTH": 4, "TAPS": 4, "SPLITS": 1, "BD": 64, "ROWS": 1, "HAS_CONV_BIAS": True},
    many_kernels.scan_kernel: CHANNELS | PLAIN | {"SPLITS": 8, "XZ_SPLITS": 1, "BD": 16, "ROWS": 16},
    many_kernels.norm_kernel: PLAIN | {"H": H, "SIZE": H, "SPLITS": 4},
}


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("kernel", IN_PLACE, ids=lambda kernel: kernel.fn.__module__.split(".")[-1] + kernel.__name__)
def test_all_have_read_what_is_written_over(kernel):
    """A small tile is held by several threads each; one that is late would read what another has written."""
    names = ("residual", "sums", "conv_state", "state", "parts", "xz", "A_log", "dt_bias", "D_skip")
    types = dict.fromkeys(names, "*fp32") | {"eps": "fp32", "mixer_eps": "fp32"}
    types |= dict.fromkeys(("norm", "conv", "conv_bias", "u", "x", "y", "z", "weight", "dt_proj"), "*bf16")
    warps = 2 if kernel is few_kernels.scan_kernel else 4
    code = compiled_for_hopper(kernel, IN_PLACE[kernel], types, num_warps=warps, **ALIKE)["ptx"].splitlines()
    before = code[: next(i for i, line in enumerate(code) if "st.global" in line)]
    last = {what: max(i for i, line in enumerate(before) if what in line) for what in ("ld.global", "bar.sync")}
    assert last["ld.global"] < last["bar.sync"]


class Recorder:
    """In place of a kernel: notes how it is launched."""

    def __init__(self):
        self.launches: list[dict] = []

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append(options)


@pytest.mark.parametrize(
    ("module", "rows", "kernels"),
    [(few_kernels, 3, ("scan_kernel",)), (many_kernels, 9, ("conv_kernel", "scan_kernel"))],
    ids=["few", "many"],
)
def test_sums_over_lanes_are_alike_on_all(module, rows, kernels, monkeypatch):
    """Racecheck found lanes with sums of different last bits that wrote to one place."""
    model = made({}, torch.float32, "cpu")
    step = step_of(model, model.backbone.new_cache(rows))
    recorders = {}
    for place in (module, triton_tokens):
        for name, value in list(vars(place).items()):
            if isinstance(value, triton.runtime.jit.KernelInterface):
                recorders[name] = Recorder()
                monkeypatch.setattr(place, name, recorders[name])
    step(True)
    for name in kernels:
        assert len(recorders[name].launches) == 2, "two layers"
        assert all(options["enable_fp_fusion"] is False for options in recorders[name].launches)


def test_float32_leaves_many_rows_to_the_forward():
    """Its products are not the tensor cores'."""
    assert many.most_rows(768, torch.bfloat16) == many.MOST_ROWS
    assert many.MOST_ROWS > many.most_rows(2048, torch.bfloat16) > many.most_rows(2560, torch.float16)
    assert many.most_rows(2048, torch.float32) == 32 > many.most_rows(2560, torch.float32)


def test_plans_fit_the_shared_memory_there_is():
    wide = many.Product(64, 64, 4, 6).within(128, 2, 227 * 1024)
    assert wide == many.Product(64, 64, 4, 6)
    assert many.Product(64, 64, 4, 6).within(128, 2, 99 * 1024) == many.Product(64, 64, 4, 4)
    narrow = many.Product(64, 64, 4, 6).within(128, 4, 40 * 1024)
    assert narrow == many.Product(64, 16, 4, 2)
    for rows in (1, 16, 17, 64, 65, 128, 129, 512):
        for n in (1, 16, 64, 256):
            tile = many.plans(rows, n)["scan"]
            assert tile.channels * tile.rows * n <= 8192


@pytest.mark.skipif(INTERPRETED, reason="this is the one that starts it")
def test_interpreter():
    run_interpreted(__file__)
