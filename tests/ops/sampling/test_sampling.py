"""The sampling op against its float64 reference, transformers' filters, and the distribution it draws from."""

import math

import pytest
import torch
from transformers import generation

from mambakit.ops.sampling import cpu, reference
from mambakit.ops.sampling.api import COLUMNS, NO_TOKEN, OFF, sample


def parameters(b, **values):
    row = torch.tensor(OFF)
    for name, value in values.items():
        row[COLUMNS.index(name)] = value
    return row.repeat(b, 1)


def uniform(b, seed=0):
    return torch.rand(b, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def logits_of(b, v, seed=0, spread=3.0):
    return torch.randn(b, v, generator=torch.Generator().manual_seed(seed)) * spread


FILTERS = [
    {}, {"temperature": 0.3}, {"temperature": 1e-30}, {"temperature": 50.0}, {"top_k": 1}, {"top_k": 7},
    {"top_k": 10_000}, {"top_p": 0.9}, {"top_p": 1e-6}, {"top_p": 0.999}, {"min_p": 0.1}, {"min_p": 1.0},
    {"typical_p": 0.5}, {"typical_p": 0.95, "temperature": 1.5}, {"epsilon": 0.01}, {"epsilon": 0.9},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.9, "epsilon": 1e-3},
]  # fmt: skip


@pytest.mark.parametrize("values", FILTERS, ids=str)
@pytest.mark.parametrize("v", [1, 2, 60, 4096, 20_001])
def test_draws_what_the_reference_draws(values, v):
    b = 20
    logits, u, p = logits_of(b, v, v), uniform(b, v), parameters(b, **values)
    got, expected = sample(logits, u, p), reference.sample(logits, u, p)
    # A float32 sum puts a boundary at most about 1e-6 of the mass from float64's; no number of this seed is that close.
    assert torch.equal(got, expected)


HF = {
    "temperature": generation.TemperatureLogitsWarper, "top_k": generation.TopKLogitsWarper,
    "top_p": generation.TopPLogitsWarper, "min_p": generation.MinPLogitsWarper,
    "typical_p": generation.TypicalLogitsWarper, "epsilon": generation.EpsilonLogitsWarper,
}  # fmt: skip


@pytest.mark.parametrize("values", [f for f in FILTERS if f.get("temperature") != 1e-30], ids=str)
def test_keeps_the_tokens_that_transformers_keeps(values):
    """Every kept token is drawn by some number, and no other: the reference's w against transformers' scores."""
    b, v = 20, 300
    logits = logits_of(b, v, 5).double()
    scores = logits.clone()
    for name, warper in HF.items():
        if name in values:
            value = values[name]
            scores = warper(min(value, v) if name == "top_k" else value)(None, scores)
    named = {name: values.get(name, off) for name, off in zip(COLUMNS, OFF, strict=True)}
    columns = [torch.full((b, 1), float(named[name]), dtype=torch.float64) for name in COLUMNS[1:]]
    s = (logits - logits.amax(1, keepdim=True)) / named["temperature"]
    w = reference.kept(s, *columns)
    torch.testing.assert_close(w / w.sum(1, keepdim=True), scores.softmax(1), rtol=1e-9, atol=0)


def test_greedy_takes_the_first_of_the_largest():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, math.inf, math.inf, 0.0]])
    p = parameters(2, temperature=0, top_k=1, top_p=0.1)
    assert sample(logits, torch.zeros(2, dtype=torch.float64), p).tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_no_token_where_there_are_no_numbers(dtype):
    nan, inf = math.nan, math.inf
    logits = torch.tensor([[1.0, nan], [nan, nan], [-inf, -inf], [inf, 0.0], [-inf, 1.0]], dtype=dtype)
    u = torch.full((5,), 0.7, dtype=torch.float64)
    for op in (sample, reference.sample):
        assert op(logits, u, parameters(5)).tolist() == [NO_TOKEN] * 4 + [1]
        assert op(logits, u, parameters(5, temperature=0)).tolist() == [NO_TOKEN] * 3 + [0, 1]


def test_the_ends_of_the_numbers():
    logits = torch.tensor([[0.0, -math.inf, 0.0, -200.0]])  # the last has probability 0 in float32
    largest = math.nextafter(1.0, 0.0)
    for u, token in ((0.0, 0), (0.499, 0), (0.5, 2), (largest, 2)):
        assert sample(logits, torch.tensor([u], dtype=torch.float64), parameters(1)).tolist() == [token]


def test_draws_from_the_distribution():
    v, draws = 50, 40_000
    logits = logits_of(1, v, 3, spread=1.5)
    p = parameters(draws, temperature=0.7, top_k=20)
    tokens = sample(logits.expand(draws, v), uniform(draws, 8), p)
    top = (logits / 0.7).topk(20)
    expected = torch.zeros(v).scatter(0, top.indices[0], top.values[0].softmax(-1)) * draws
    counts = tokens.bincount(minlength=v)
    inside = expected > 0
    assert counts[~inside].sum() == 0
    chi = ((counts - expected)[inside] ** 2 / expected[inside]).sum()
    assert chi < 45  # 19 degrees of freedom: above 45 once in 1,400 seeds


def test_a_row_depends_on_itself_alone():
    v = 1003  # odd: rows begin at every alignment
    logits, u = logits_of(13, v), uniform(13)
    p = torch.cat([parameters(1, **FILTERS[i % len(FILTERS)]) for i in range(13)])
    together = sample(logits, u, p)
    for i in range(13):
        assert torch.equal(sample(logits[i : i + 1].clone(), u[i : i + 1], p[i : i + 1])[0], together[i])
    order = torch.randperm(13, generator=torch.Generator().manual_seed(1))
    assert torch.equal(sample(logits[order], u[order], p[order]), together[order])


def test_layouts_and_nothing():
    logits, u, p = logits_of(6, 40), uniform(6), parameters(6, top_p=0.9)
    expected = sample(logits, u, p)
    assert torch.equal(sample(logits.T.contiguous().T, u, p), expected)
    assert torch.equal(sample(torch.cat([logits, logits], 1)[:, :40], u, p), expected)
    assert sample(logits[:0], u[:0], p[:0]).shape == (0,)
    assert torch.equal(logits, logits_of(6, 40)), "the logits stay"


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (lambda x, u, p: (x[0], u, p), ValueError, "expected .b, v."),
        (lambda x, u, p: (x[:, :0], u, p), ValueError, "v must be 1 or more"),
        (lambda x, u, p: (x.int(), u, p), TypeError, "logits is torch.int32"),
        (lambda x, u, p: (x, u.float(), p), TypeError, "uniform is torch.float32"),
        (lambda x, u, p: (x, u[:1], p), ValueError, "uniform has shape"),
        (lambda x, u, p: (x, u, p[:, :3]), ValueError, "parameters has shape"),
        (lambda x, u, p: (x, u, p.double()), TypeError, "parameters is torch.float64"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        sample(*arguments(logits_of(2, 5), uniform(2), parameters(2)))


def test_under_other_defaults():
    logits, u, p = logits_of(4, 100), uniform(4), parameters(4, top_p=0.8)
    expected = sample(logits, u, p)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        torch.set_default_device("meta")
        got = sample(logits, u, p)
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    assert torch.equal(got, expected)


def test_registered():
    torch.library.opcheck(torch.ops.mambakit.sample.default, (logits_of(2, 9), uniform(2), parameters(2)))


def test_the_cpu_sorts_only_what_may_be_kept():
    """A nucleus of a peaked distribution, whatever the size of the vocabulary."""
    logits = torch.full((1, 50_000), -30.0)
    logits[0, 7] = 0.0
    assert cpu.sample(logits, torch.tensor([0.5], dtype=torch.float64), parameters(1, top_p=0.99)).tolist() == [7]
