"""The persistent decode step against the model's forward: on a GPU, and its kernel compiled for a CPU."""

import copy

import pytest
import torch

from mambakit import MambaForCausalLM
from mambakit.decoding.graph_step import gpu_weights
from mambakit.modules.quantized_linear import QuantizedLinear
from mambakit.ops.decode import cuda_persistent as persistent
from tests.ops.decode import persistent_on_cpu
from tests.ops.decode.with_norms import with_norms

CUDA = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
CPU = pytest.mark.skipif(persistent_on_cpu.COMPILER is None, reason="no g++")
DEVICES = [pytest.param("cpu", marks=CPU), pytest.param("cuda", marks=CUDA)]


@pytest.fixture
def on(tmp_path_factory, monkeypatch):
    """Makes a device serve."""

    def serve(device: str, blocks: int = 3) -> str:
        if device == "cpu":
            folder = tmp_path_factory.getbasetemp() / "persistent"
            folder.mkdir(exist_ok=True)
            persistent_on_cpu.install(monkeypatch, folder, blocks)
        return device

    return serve


def made(dtype: torch.dtype, device: str, **shape) -> MambaForCausalLM:
    torch.manual_seed(0)
    wanted = {"hidden_size": 256, "num_hidden_layers": 3, "vocab_size": 999, "time_step_rank": 16} | shape
    if device == "cpu":
        wanted |= {"hidden_size": wanted.pop("on_a_cpu", 128), "vocab_size": min(601, wanted["vocab_size"])}
    wanted.pop("on_a_cpu", None)
    return with_norms(wanted).to(device, dtype).eval()


def step_of(model, cache, **options) -> persistent.PersistentStep:
    return persistent.PersistentStep(gpu_weights(model), cache.conv_states, cache.ssm_states, **options)


def exact(model: MambaForCausalLM) -> MambaForCausalLM:
    """The same numbers in float64 on the CPU, packed weights widened."""
    wide = copy.deepcopy(model)
    for name, linear in model.named_modules():
        if isinstance(linear, QuantizedLinear):
            plain = torch.nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
            with torch.no_grad():
                plain.weight.copy_(linear.packed.dequantized())
                if linear.bias is not None:
                    plain.bias.copy_(linear.bias)
            wide.set_submodule(name, plain)
    return wide.cpu().double()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double().cpu() - b.double().cpu()).norm() / b.double().norm())


FALCON = {"mixer_rms_eps": 1e-3}
JAMBA = {**FALCON, "mixer_norm_weights": True}
CASES = {
    "plain": ({}, None),
    "biases": ({"use_bias": True, "use_conv_bias": False, "conv_kernel": 3}, None),
    "all of one dtype": ({}, None),
    "one layer": ({"num_hidden_layers": 1}, None),
    "wide": ({"hidden_size": 1024, "time_step_rank": 64}, None),
    "int8": ({}, ("int8", 64)),
    "int8 groups of 32": ({}, ("int8", 32)),
    "int8 groups of 128": ({}, ("int8", 128)),
    "fp8": ({"use_bias": True}, ("fp8",)),
    "int4": ({"on_a_cpu": 256}, ("int4", 64)),
    "int4 groups of 32": ({"on_a_cpu": 256}, ("int4", 32)),
    "int4 groups of 128": ({"use_bias": True, "on_a_cpu": 256}, ("int4", 128)),
    "falcon": ({**FALCON, "time_step_rank": 48}, None),
    "jamba": ({**JAMBA, "use_bias": True}, None),
    "falcon int4": ({**FALCON, "on_a_cpu": 256}, ("int4", 64)),
    "jamba int8": (JAMBA, ("int8", 64)),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@torch.no_grad()
def test_the_models_logits_and_states(on, device, case, rows, dtype):
    on_cpu = {1: list(CASES), 3: ["plain", "int8 groups of 32", "int4", "fp8", "jamba"],
              8: ["plain", "biases", "int4", "falcon"]}[rows]  # fmt: skip
    if device == "cpu" and ((dtype == torch.float16) != (rows == 3) or case not in on_cpu):
        pytest.skip("slow on a CPU")
    shape, packing = CASES[case]
    shape = dict(shape)
    if case == "wide" and device == "cpu":
        pytest.skip("slow on a CPU")
    on(device, 6 if case == "int4" else 5)
    model = made(dtype, device, **shape)
    if case == "all of one dtype":  # else A_log, D and dt_proj's bias are float32
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    if packing:
        model.quantize(*packing)
    steps = 4 if device == "cuda" else 2
    ids = torch.randint(0, model.config.vocab_size, (rows, 4 + steps))
    wide = exact(model)
    whole = wide(ids, use_cache=True)
    cache = model.backbone.new_cache(rows)
    before = wide(ids[:, :4], use_cache=True).cache_params
    cache.conv_states.copy_(before.conv_states)
    cache.ssm_states.copy_(before.ssm_states)
    step = step_of(model, cache, capacity=steps - 1)
    chosen = []
    # A forward of this dtype, with unpacked weights: how far rounding takes it.
    rounding = {torch.bfloat16: 1.2e-2, torch.float16: 2e-3}[dtype]
    for t in range(4, 4 + steps):
        step.tokens.copy_(ids[:, t])
        step.logits.fill_(torch.nan)
        logits = step(choose=True)
        assert distance(logits, whole.logits[:, t]) < rounding
        assert torch.equal(step.tokens, logits.argmax(-1))
        chosen.append(step.tokens.clone())
    assert torch.equal(step.history, torch.stack(chosen[: steps - 1], 1))
    assert step.position.item() == steps
    assert distance(cache.ssm_states, whole.cache_params.ssm_states) < rounding
    assert distance(cache.conv_states, whole.cache_params.conv_states) < rounding
    # Without choosing, tokens stay.
    step.tokens.fill_(5)
    step()
    assert (step.tokens == 5).all()
    assert step.position.item() == steps + 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("packing", "norms"), [(None, {}), (("int4", 64), {}), (None, JAMBA)], ids=["plain", "int4", "jamba"]
)
@torch.no_grad()
def test_a_rows_bits_are_its_own(on, device, packing, norms):
    """Whatever the others hold, and however many there are."""
    on(device, 6)
    model = made(torch.bfloat16, device, num_hidden_layers=2, on_a_cpu=256, **norms)
    if packing:
        model.quantize(*packing)
    found = {}
    for rows, at in ((1, 0), (2, 1), (5, 2), (5, 2)) if device == "cpu" else ((1, 0), (2, 1), (4, 3), (8, 5), (8, 5)):
        cache = model.backbone.new_cache(rows)
        torch.manual_seed(7 * rows + len(found))
        cache.ssm_states.normal_()
        cache.conv_states.normal_()
        generator = torch.Generator().manual_seed(1)
        cache.ssm_states[:, at] = torch.randn(cache.ssm_states[:, at].shape, generator=generator).to(device)
        cache.conv_states[:, at] = torch.randn(cache.conv_states[:, at].shape, generator=generator).to(device)
        step = step_of(model, cache)
        step.tokens.copy_(torch.randint(0, 600, (rows,)))
        step.tokens[at] = 3
        found[len(found)] = step()[at].clone(), cache.ssm_states[:, at].clone()
    for logits, states in found.values():
        assert torch.equal(logits, found[0][0])
        assert torch.equal(states, found[0][1])


@CPU
@pytest.mark.parametrize("blocks", [2, 5])
@torch.no_grad()
def test_uneven_shares(on, blocks):
    """Channels, rows and words that the blocks do not divide."""
    on("cpu", blocks)
    model = made(torch.bfloat16, "cpu", on_a_cpu=64, num_hidden_layers=2, vocab_size=321)
    ids = torch.randint(0, 321, (2, 2))
    whole = exact(model)(ids)
    cache = model.backbone.new_cache(2)
    step = step_of(model, cache)
    for t in range(2):
        step.tokens.copy_(ids[:, t])
        assert distance(step(), whole.logits[:, t]) < 1.2e-2


@CPU
def test_what_it_cannot_serve(on):
    on("cpu")
    model = made(torch.bfloat16, "cpu")
    with pytest.raises(ValueError, match="9 rows; it serves 1 to 8"):
        step_of(model, model.backbone.new_cache(9))
    wide = made(torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"torch.float32 weights; it serves torch.bfloat16, torch.float16"):
        step_of(wide, wide.backbone.new_cache(1))
    other = made(torch.bfloat16, "cpu", state_size=8)
    with pytest.raises(ValueError, match="shape h=128, d=256, n=8"):
        step_of(other, other.backbone.new_cache(1))
    cache = model.backbone.new_cache(2)
    cache._memory._stacks["ssm_states"] = cache.ssm_states.transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.raises(ValueError, match="contiguous"):
        step_of(model, cache)
    assert persistent.why_not(gpu_weights(model), 1, torch.float32) == "the weights are on cpu"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("packing", "norms"),
    [(None, {}), (("int4", 64), {}), (("fp8",), {}), (None, FALCON), (("int4", 64), JAMBA)],
    ids=["plain", "int4", "fp8", "falcon", "jamba int4"],
)
@pytest.mark.parametrize("tokens", [2, 5])
@torch.no_grad()
def test_draft_verification(on, device, tokens, packing, norms):
    """Logits and states to the last bit those of one token after the other, from any slot, whatever is kept."""
    if device == "cpu" and norms and tokens == 2:
        pytest.skip("slow on a CPU")
    on(device, 6)
    model = made(torch.bfloat16, device, num_hidden_layers=2, on_a_cpu=256, **norms)
    if packing:
        model.quantize(*packing)
    cache, pool = model.backbone.new_cache(1), model.backbone.new_cache(tokens + 1)
    for state in (cache.ssm_states, cache.conv_states):
        state.normal_()
    pool.ssm_states.fill_(torch.nan)
    pool.conv_states.fill_(torch.nan)
    pool.ssm_states[:, :1], pool.conv_states[:, :1] = cache.ssm_states, cache.conv_states
    step, verify = step_of(model, cache), step_of(model, pool, verify=True)
    ids = torch.randint(0, 600, (2, tokens), device=device)
    slot = 0
    for round_, kept in enumerate((tokens - 1, tokens)):
        assert verify.slot.item() == slot
        verify.tokens.copy_(ids[round_])
        logits = verify().clone()
        for i in range(kept):
            step.tokens.copy_(ids[round_, i : i + 1])
            assert torch.equal(step()[0], logits[i])
            at = (slot + 1 + i) % (tokens + 1)
            assert torch.equal(pool.ssm_states[:, at], cache.ssm_states[:, 0])
            assert torch.equal(pool.conv_states[:, at], cache.conv_states[:, 0])
        slot = (slot + kept) % (tokens + 1)
        verify.slot.fill_(slot)
