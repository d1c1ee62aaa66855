"""Prompt log-probabilities and echo: the numbers of one plain forward, in the shapes that clients expect."""

from __future__ import annotations

import pytest
import torch

import mambakit
from mambakit.generation import logprobs as module
from mambakit.generation.logprobs import echo, token_log_probs
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


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_prompt_log_probs(chunk, monkeypatch):
    monkeypatch.setattr(module, "LOGIT_ROWS", 3)
    model = pair("plain")[0].eval()
    ids = tokens(1, 17)[0]
    with torch.no_grad():
        expected = model(ids[None]).logits[0].log_softmax(-1)
    done = []
    scored = token_log_probs(model, ids, top=4, chunk_size=chunk, progress=done.append)
    assert done[-1] == 16
    assert scored.log_probs[0].isnan()
    assert scored.top_log_probs[0].isnan().all()
    assert torch.allclose(scored.log_probs[1:], expected[:-1].gather(1, ids[1:, None])[:, 0], atol=1e-5)
    assert torch.equal(scored.top_ids[1:], expected[:-1].topk(4).indices)
    assert torch.allclose(scored.top_log_probs[1:], expected[:-1].topk(4).values, atol=1e-5)
    started = token_log_probs(model, ids[1:], before=int(ids[0]), chunk_size=chunk)
    assert torch.allclose(started.log_probs, scored.log_probs[1:], atol=1e-5)
    assert started.top_ids.shape == (16, 0)
    state = State.read(model, ids[:10])
    rest = token_log_probs(model, ids[10:], state=state, chunk_size=chunk)
    assert torch.allclose(rest.log_probs, scored.log_probs[10:], atol=1e-5)
    only = token_log_probs(model, ids[:1], top=2)
    assert only.log_probs.isnan().tolist() == [True]


def test_echo_is_the_completions_logprobs(both):
    model, tokenizer = both
    text = "The cat — naïve 🙂 sat"
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    logprobs = echo(model, tokenizer, ids, top=3)
    assert {len(column) for column in logprobs.values()} == {len(ids)}
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert all(x <= 0 for x in logprobs["token_logprobs"][1:])
    assert all(len(alternatives) == 3 for alternatives in logprobs["top_logprobs"][1:])
    whole = b""
    for i, token in enumerate(logprobs["tokens"]):
        spelled = token.removeprefix("bytes:")
        whole += spelled.encode().decode("unicode_escape").encode("latin-1") if spelled != token else token.encode()
        if spelled == token:
            assert text[logprobs["text_offset"][i] :].startswith(token)
    assert whole.decode() == text
    assert any(token.startswith("bytes:\\x") for token in logprobs["tokens"]), "or this tests no split character"
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])


def test_no_number_is_infinite(both):
    model, tokenizer = both
    bias = torch.zeros(304)
    bias[7] = -float("inf")
    hook = model.lm_head.register_forward_hook(lambda module, args, out: out + bias)
    logprobs = echo(model, tokenizer, torch.tensor([5, 7, 9]), top=304)
    hook.remove()
    assert logprobs["token_logprobs"][1] == -9999.0
    assert min(logprobs["top_logprobs"][2].values()) == -9999.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: token_log_probs(m, tokens(2, 3)), r"expected \(l,\)"),
        (lambda m: token_log_probs(m, tokens(1, 3)[0], top=62), "vocabulary's 61"),
        (lambda m: token_log_probs(m, tokens(1, 3)[0], chunk_size=0), "chunk_size is 0"),
        (lambda m: token_log_probs(m, tokens(1, 3)[0], before=1, state=State.read(m, tokens(1, 3))), "give one"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make(pair("plain")[0])
