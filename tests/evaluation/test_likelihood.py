"""Likelihoods of many continuations: packed, shared, chunked, and all equal to one forward for each."""

from __future__ import annotations

import pytest
import torch

from mambakit.evaluation.likelihood import log_likelihoods
from tests.models.configurations import pair

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return pair("plain")[0].eval()


@pytest.fixture(scope="module")
def expected(model):
    return one_by_one(model, make_pairs())


@torch.no_grad()
def one_by_one(model, pairs):
    expected = []
    for context, continuation in pairs:
        scores = model(torch.tensor([[*context, *continuation]])).logits[0].log_softmax(-1)
        at = scores[len(context) - 1 : -1]
        picked = at.gather(1, torch.tensor(continuation)[:, None])
        expected.append((float(picked.sum()), bool((at.argmax(-1) == torch.tensor(continuation)).all())))
    return expected


def make_pairs(seed=0, count=18):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(1, 60, (n,), generator=generator).tolist()  # noqa: E731
    shared, long = draw(50), draw(200)
    pairs = [(draw(1 + i % 7), draw(1 + i % 5)) for i in range(count)]
    pairs += [(shared, draw(n)) for n in (1, 4, 1, 9)] + [(long, draw(3)), (draw(2), draw(150)), (shared[:5], draw(2))]
    return pairs[::2] + pairs[1::2]


@pytest.mark.parametrize(("batch_tokens", "batch_size"), [(4096, 0), (64, 0), (7, 0), (4096, 3), (1, 1)])
def test_however_batched_the_likelihoods_are_those_of_each_alone(model, expected, batch_tokens, batch_size):
    pairs, done = make_pairs(), []
    found = log_likelihoods(model, pairs, batch_tokens=batch_tokens, batch_size=batch_size, progress=done.append)
    assert sum(done) == len(pairs)
    for likelihood, (log_prob, greedy), (_, continuation) in zip(found, expected, pairs, strict=True):
        assert likelihood.log_prob == pytest.approx(log_prob, rel=1e-4, abs=1e-4)
        assert likelihood.greedy == greedy
        assert likelihood.tokens == len(continuation)


def test_greedy_continuations_are_known(model):
    context = [5, 9, 3]
    written = model.generate(torch.tensor([context]), max_new_tokens=6, do_sample=False, eos_token_id=None)[
        0, 3:
    ].tolist()
    other = [*written[:-1], (written[-1] + 1) % 60]
    found = log_likelihoods(model, [(context, written), (context, other), (context, written[:2])])
    assert [f.greedy for f in found] == [True, False, True]
    assert found[0].log_prob > found[1].log_prob


def test_a_shared_context_is_read_once(model, monkeypatch):
    read = []
    original = type(model.backbone).forward

    def count(self, input_ids, *args, **kwargs):
        read.append(input_ids.numel())
        return original(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(type(model.backbone), "forward", count)
    context = list(range(1, 50)) * 4
    log_likelihoods(model, [(context, [i, i + 1, i + 2]) for i in range(1, 5)])
    assert sum(read) == len(context) + 4 * 2


def test_what_cannot_be_scored(model):
    for pairs in ([([], [1])], [([1], [2]), ([1], [])]):
        with pytest.raises(ValueError, match=f"pair {len(pairs) - 1} has"):
            log_likelihoods(model, pairs)
    with pytest.raises(ValueError, match="batch_tokens is 0"):
        log_likelihoods(model, [([1], [2])], batch_tokens=0)
    assert log_likelihoods(model, []) == []
