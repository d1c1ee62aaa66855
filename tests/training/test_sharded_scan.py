"""The scan in two parts: `sharded_scan.py` against the recurrence, the GPU's kernels against it."""

from __future__ import annotations

import contextlib
from itertools import accumulate

import pytest
import torch
import torch.distributed as dist

from mambakit.ops.selective_scan import cuda_split_scan
from mambakit.training.distributed import context_parallel, sequence_shard, sharded_scan
from mambakit.training.distributed.sharded_scan import shard_carry, shard_carry_gradient
from tests.models.configurations import worst
from tests.ops.closeness import relative_error
from tests.ops.selective_scan import cuda_on_cpu
from tests.training.launch import launch

# b, l, d, n, lengths of packed sequences, with bias, softplus, gate and D, size of A (large: what is far is forgotten)
CASES = [
    (2, 1, 3, 4, None, True, 1.0),
    (1, 700, 40, 16, None, True, 0.01),
    (2, 330, 5, 5, None, False, 0.1),
    (1, 700, 8, 16, [700], True, 0.02),
    (1, 700, 8, 16, [0, 200, 1, 0, 99, 400], True, 0.02),
    (1, 700, 8, 16, [650, 50], True, 0.02),
    (1, 700, 8, 16, [352, 348, 0], True, 0.02),
]


def check(device: str, dtype: torch.dtype, case: tuple) -> None:
    """The kernels' halves against this module's own in float64, what they hand over and what they finish with."""
    torch.manual_seed(0)
    b, length, d, n, lengths, whole, size = case
    wide = torch.randn(b, length, 4 * d + 2 * n, device=device).to(dtype)
    u, delta, z, dy, B, C = wide.split([d, d, d, d, n, n], -1)
    A, bias, D = -torch.rand(d, n, device=device) * size, torch.randn(d, device=device), torch.randn(d, device=device)
    if not whole:
        bias, z, D, delta = None, None, None, delta.abs()
    cu = None if lengths is None else torch.tensor([0, *accumulate(lengths)], device=device, dtype=torch.int32)
    sequences = b if lengths is None else len(lengths)
    initial, dfinal = torch.zeros(2, sequences, d, n, device=device)
    alone = slice(None) if lengths is None else slice(1)  # only the first sequence goes on from before
    initial[alone].normal_()
    dfinal[slice(None) if lengths is None else slice(-1, None)].normal_()
    given = (u, delta, A, B, C, D, z, bias, whole)
    exact = [t.double().cpu() if torch.is_tensor(t) else t for t in given]
    exact_cu = None if cu is None else cu.cpu()

    ours, theirs = cuda_split_scan.Forward(*given, cu, 64), sharded_scan.Forward(*exact, exact_cu, 64)
    found, expected = ours.finish(initial), theirs.finish(initial.double().cpu())
    pairs = [("decay", ours.decay, theirs.decay), ("state", ours.state, theirs.state)]
    pairs += zip(("y", "final", "checkpoints"), found, expected, strict=True)

    ours = cuda_split_scan.Backward(dy, *given, initial, cu, found[2], 64)
    theirs = sharded_scan.Backward(dy.double().cpu(), *exact, initial.double().cpu(), exact_cu, expected[2], 64)
    pairs.append(("gradient", ours.gradient, theirs.gradient))
    pairs += zip(
        ("du", "ddelta", "dA", "dB", "dC", "dD", "dz", "dbias", "dinitial"),
        ours.finish(dfinal), theirs.finish(dfinal.double().cpu()), strict=True,
    )  # fmt: skip
    for name, actual, wanted in pairs:
        # Inputs are the same numbers on both sides: what is left of a float32 result is float32's rounding.
        limit = 1e-5 if actual.dtype == torch.float32 else 4e-3
        assert relative_error(actual.cpu(), wanted) < limit, name


@pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="needs g++")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_on_a_cpu(case, monkeypatch, tmp_path_factory):
    cuda_on_cpu.forget()
    cuda_on_cpu.install(monkeypatch, tmp_path_factory.getbasetemp())
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: contextlib.nullcontext())
    check("cpu", torch.float32, case)
    cuda_on_cpu.forget()


def test_the_sums_stop_only_where_nothing_is_left():
    """Against the recurrence itself, on shards far longer than the model's memory."""
    torch.manual_seed(0)
    length, d, n = 3000, 4, 3
    u, delta = torch.randn(2, 1, length, d, dtype=torch.float64)
    B, C = torch.randn(2, 1, length, n, dtype=torch.float64)
    A = -torch.rand(d, n, dtype=torch.float64) - 0.3
    h, steps = torch.zeros(1, d, n, dtype=torch.float64), torch.nn.functional.softplus(delta)
    for t in range(length):
        h = torch.exp(steps[:, t, :, None] * A) * h + (steps[:, t] * u[:, t])[..., None] * B[:, t, None]
    decay, state = shard_carry(u, delta, A, B, None, True)
    assert worst(state, h) < 1e-13
    assert decay.max() == 0
    g = torch.zeros_like(h)
    for t in reversed(range(length)):
        g = torch.exp(steps[:, t, :, None] * A) * (g + u[:, t, :, None] * C[:, t, None])
    assert worst(shard_carry_gradient(u, delta, A, C, None, None, True), g) < 1e-13


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_a_gpu(case, dtype):
    check("cuda", dtype, case)


def spread_on_a_gpu(length: int):
    """A float32 model over two processes that share one GPU."""
    import mambakit

    torch.manual_seed(0)
    model = mambakit.MambaForCausalLM(mambakit.MambaConfig(vocab_size=97, hidden_size=64, num_hidden_layers=2)).cuda()
    ids = torch.randint(0, 97, (1, length + 1), device="cuda")
    if dist.is_initialized():
        context_parallel(model, dist.group.WORLD)
        part = sequence_shard(length, dist.get_rank(), dist.get_world_size())
    else:
        part = slice(0, length)
    logits = model(ids[:, :-1][:, part], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:][part], reduction="sum") / length
    loss.backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters()}
    if dist.is_initialized():
        for gradient in gradients.values():
            dist.all_reduce(gradient)
    return {name: gradient.numpy() for name, gradient in gradients.items()}


@pytest.mark.cuda
def test_context_parallel_on_a_gpu():
    expected = spread_on_a_gpu(1001)
    found = launch(spread_on_a_gpu, 2, 1001, cuda=True)[0]
    for name, wanted in expected.items():
        assert worst(torch.from_numpy(found[name]), torch.from_numpy(wanted)) < 1e-3, name
