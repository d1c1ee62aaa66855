"""Scoring at a replica: the numbers of `token_log_probs` and `score_continuations`, and tasks that take turns."""

from __future__ import annotations

from array import array

import pytest
import torch

from mambakit.decoding.prefill import prefill_states
from mambakit.generation.logprobs import token_log_probs
from mambakit.generation.prefix_cache import PrefixCache
from mambakit.generation.score import score_continuations
from mambakit.serving.messages import Task, TextOptions
from mambakit.serving.replicas.scoring import ContinuationScores, PromptScores, Scorer
from tests.models.configurations import pair

NONE = torch.zeros(0, dtype=torch.int64)


@pytest.fixture(scope="module")
def model():
    return pair("untied")[0]


def ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 61, (count,), generator=torch.Generator().manual_seed(seed))


def task(id: int, prompt: torch.Tensor, continuations=None, top: int = 0) -> Task:
    scored = None if continuations is None else tuple(array("q", one.tolist()).tobytes() for one in continuations)
    options = TextOptions(log_probs=top, prompt_log_probs=scored is None, continuations=scored)
    return Task(id, array("q", prompt.tolist()).tobytes(), {}, 0, options=options)


def layers(state) -> list[torch.Tensor]:
    return [tensor for index in range(2) for tensor in state.layer(index)]


def run(scorer: Scorer) -> tuple[dict, dict]:
    """(results, errors) by owner, in the order in which they came."""
    done, failed = {}, {}
    while len(scorer):
        scorer.step(done.__setitem__, failed.__setitem__)
    return done, failed


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 30])
@pytest.mark.parametrize("top", [0, 3])
def test_prompts(model, length, top):
    prompt = ids(length)
    scorer = Scorer(model, chunk_size=8)
    scorer.add(1, task(1, prompt, top=top), None, NONE)
    (found,) = run(scorer)[0].values()
    assert isinstance(found, PromptScores)
    expected = token_log_probs(model, prompt, top=top)
    assert [one.token for one in found.scored] == prompt.tolist()
    assert found.scored[0].log_prob is None
    own = torch.tensor([one.log_prob for one in found.scored[1:]])
    torch.testing.assert_close(own, expected.log_probs[1:], atol=1e-5, rtol=1e-5)
    for one, tokens in zip(found.scored[1:], expected.top_ids[1:].tolist(), strict=True):
        assert [token for token, _ in one.top] == tokens
    assert found.state.get_seq_length() == length - 1
    whole = model.backbone.new_cache(1)
    prefill_states(model, prompt[None, :-1], whole)
    for mine, theirs in zip(layers(found.state), layers(whole), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("unread", [0, 1, 2, 11])
def test_prompts_after_a_state(model, unread):
    """As if all had been one text, of which the end is scored."""
    before, prompt = ids(13, 1), ids(9, 2)
    state = model.backbone.new_cache(1)
    prefill_states(model, before[None, : 13 - unread], state)
    kept = state.clone()
    scorer = Scorer(model, chunk_size=4)
    scorer.add(1, task(1, prompt), state, before[13 - unread :])
    (found,) = run(scorer)[0].values()
    expected = token_log_probs(model, torch.cat([before, prompt])).log_probs[13:]
    skipped = 1 - min(unread, 1)  # what a state without an unread token predicts is not known
    assert [one.log_prob is None for one in found.scored] == [True] * skipped + [False] * (9 - skipped)
    own = torch.tensor([one.log_prob for one in found.scored[skipped:]])
    torch.testing.assert_close(own, expected[skipped:], atol=1e-5, rtol=1e-5)
    assert state.get_seq_length() == kept.get_seq_length()
    assert all(torch.equal(a, b) for a, b in zip(layers(state), layers(kept), strict=True))


def test_continuations(model):
    prompt = ids(20)
    texts = [ids(n, n) for n in (1, 2, 5, 30, 1)]
    cache = PrefixCache(model, memory_bytes=1 << 24)
    for known in (0, None):
        scorer = Scorer(model, chunk_size=8, prefix_cache=cache)
        scorer.add(1, task(1, prompt, texts), None, NONE)
        (found,) = run(scorer)[0].values()
        assert isinstance(found, ContinuationScores)
        assert (found.cached_tokens == 0) == (known == 0)
        for one, wanted in zip(found.scores, score_continuations(model, prompt, texts), strict=True):
            own = torch.tensor(array("f", one.log_probs).tolist())
            torch.testing.assert_close(own, wanted.log_probs, atol=1e-5, rtol=1e-5)
            assert one.greedy == wanted.greedy


def test_tasks_take_turns_and_one_failure_is_its_own(model):
    scorer = Scorer(model, chunk_size=8, seconds=0)  # one part a step
    scorer.add("long", task(1, ids(400)), None, NONE)
    scorer.add("short", task(2, ids(5)), None, NONE)
    scorer.add("cancelled", task(3, ids(5)), None, NONE)
    scorer.cancel("cancelled")
    with pytest.raises(ValueError, match="prompt has token 1000000"):
        scorer.add("wrong", task(4, torch.tensor([10**6])), None, NONE)
    scorer.add("wrong", task(5, ids(4), [torch.tensor([10**6])]), None, NONE)
    done, failed = run(scorer)
    assert list(done) == ["short", "long"]
    assert list(failed) == ["wrong"]
    assert isinstance(failed["wrong"], ValueError)
