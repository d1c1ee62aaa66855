"""Many continuations of one prefix: the numbers of one plain forward each, from one reading of the prefix."""

from __future__ import annotations

import pytest
import torch

import mambakit
from mambakit.assets import default_model_path
from mambakit.generation import score as module
from mambakit.generation import token_scores
from mambakit.generation.score import score_choices, score_continuations
from mambakit.generation.state import State
from tests.models.configurations import pair, tokens
from tests.models.tiny import save_tiny

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder)
    model = mambakit.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    return model, mambakit.AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def plain(model, prefix, continuation):
    """(ln p of each token, whether it is the likeliest) from one forward over everything."""
    log_probs = model(torch.cat([prefix, continuation])[None]).logits[0].log_softmax(-1)
    rows = log_probs[len(prefix) - 1 : len(prefix) - 1 + len(continuation)]
    return rows.gather(1, continuation[:, None])[:, 0], bool((rows.argmax(-1) == continuation).all())


@pytest.mark.parametrize("name", ["plain", "odd_everything", "falcon"])
def test_equals_one_forward_each(name):
    model = pair(name)[0].eval()
    prefix = tokens(1, 30)[0]
    continuations = [tokens(1, length)[0] for length in (1, 7, 2, 19, 1)] + [torch.empty(0, dtype=torch.long)]
    done = []
    scores = score_continuations(model, prefix, continuations, chunk_size=8, progress=done.append)
    assert done[-1] == 6
    for score, continuation in zip(scores, continuations, strict=True):
        log_probs, greedy = plain(model, prefix, continuation)
        assert torch.allclose(score.log_probs, log_probs, rtol=1e-5, atol=1e-5)
        assert score.greedy == greedy
        assert score.log_prob == pytest.approx(float(log_probs.double().sum()), rel=1e-5, abs=1e-6)


def test_the_prefix_is_read_once_and_no_token_for_nothing():
    model = pair("plain")[0].eval()
    prefix, continuations = tokens(1, 40)[0], list(tokens(12, 5))
    read = []
    hook = model.backbone.register_forward_pre_hook(lambda m, args, kw: read.append(args[0].numel()), with_kwargs=True)
    score_continuations(model, prefix, continuations)
    hook.remove()
    assert sum(read) == 40 + 12 * 4


def test_groups_do_not_change_the_numbers(monkeypatch):
    model = pair("plain")[0].eval()
    prefix, continuations = tokens(1, 9)[0], [tokens(1, 1 + i % 6)[0] for i in range(20)]
    whole = score_continuations(model, prefix, continuations)
    for name, value in (
        ("_PACKED_TOKENS", 7),
        ("_PACKED_BYTES", 3 * model.backbone.new_cache(1).nbytes),
        ("LOGIT_ROWS", 2),
    ):
        monkeypatch.setattr(token_scores if name == "LOGIT_ROWS" else module, name, value)
        parts = score_continuations(model, prefix, continuations)
        for a, b in zip(whole, parts, strict=True):
            assert torch.allclose(a.log_probs, b.log_probs, rtol=1e-5, atol=1e-5)
            assert a.greedy == b.greedy


def test_what_greedy_decoding_writes_is_greedy():
    model = pair("plain")[0].eval()
    prefix = tokens(1, 6)[0]
    written = model.generate(prefix[None], max_new_tokens=8, do_sample=False)[0, 6:]
    changed = written.clone()
    changed[5] = (changed[5] + 1) % 61
    state = State.read(model, prefix)
    for _ in range(2):  # the state stays as it is
        right, wrong = score_continuations(model, state, [written, changed])
        assert right.greedy
        assert not wrong.greedy
        assert right.log_prob_per_token == pytest.approx(right.log_prob / 8)


def test_choices_are_tokenised_with_their_prefix(both):
    model, tokenizer = both
    choices = [" mat", " fire", "s the", ""]
    for prefix in ("The cat sat on the", "The cat sat on the  "):
        scores = score_choices(model, tokenizer, prefix, choices[:3])
        for score, choice in zip(scores, choices, strict=False):
            whole = tokenizer(prefix + choice, return_tensors="pt").input_ids[0]
            split = len(tokenizer(prefix.rstrip()).input_ids)
            log_probs, greedy = plain(model, whole[:split], whole[split:])
            assert torch.allclose(score.log_probs, log_probs, rtol=1e-5, atol=1e-5)
            assert score.greedy == greedy
    (alone,) = score_choices(model, tokenizer, "", ["The cat"])
    start = torch.tensor([tokenizer.eos_token_id])
    assert torch.allclose(
        alone.log_probs, plain(model, start, tokenizer("The cat", return_tensors="pt").input_ids[0])[0], atol=1e-5
    )
    with pytest.raises(ValueError, match="choice 1 .* adds no token"):
        score_choices(model, tokenizer, "The cat", [" sat", ""])


def test_the_embedded_model_prefers_english():
    model = mambakit.AutoModelForCausalLM.from_pretrained(default_model_path(), dtype="float32").eval()
    tokenizer = mambakit.AutoTokenizer.from_pretrained(default_model_path())
    choices = [" to the door", " door the to", " to the if"]
    scores = [score.log_prob for score in score_choices(model, tokenizer, "He stood up and walked", choices)]
    assert max(scores) == scores[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: score_continuations(m, tokens(1, 3)[0], [tokens(2, 3)]), r"expected \(l,\)"),
        (lambda m: score_continuations(m, State.read(m, tokens(2, 3)), []), "holds 2"),
        (lambda m: score_continuations(m, torch.empty(0, dtype=torch.long), []), "l >= 1"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make(pair("plain")[0])
