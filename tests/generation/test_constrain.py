"""Constrained output: what ends is a sentence of the grammar, in batches, beams and streams; what is wrong is told."""

from __future__ import annotations

import json
import re

import pytest
import torch

import mambakit
from mambakit.assets import default_model_path
from mambakit.generation.stream import Sampling, Stream

pytest.importorskip("llguidance")
from mambakit.generation.constrain import Constraint, mask_logits_

pytestmark = pytest.mark.filterwarnings("ignore")
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["ship", "sea", "storm"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
DATE = r"(0[1-9]|[12][0-9]|3[01])\.(0[1-9]|1[0-2])\.1[89][0-9]{2}"
SUM = """
start: term (" + " term)+
term: NUMBER | "(" start ")"
NUMBER: /[1-9][0-9]{0,2}/
"""


@pytest.fixture(scope="module")
def both():
    """A small random model with the embedded model's tokenizer: what makes its texts valid is the constraint alone."""
    torch.manual_seed(0)
    config = mambakit.MambaConfig(
        vocab_size=4096, hidden_size=32, num_hidden_layers=2, initializer_range=0.3, eos_token_id=0, pad_token_id=0
    )
    return mambakit.MambaForCausalLM(config).eval(), mambakit.AutoTokenizer.from_pretrained(default_model_path())


def conforms(text: str) -> bool:
    record = json.loads(text)
    return (
        list(record) == ["name", "age", "tags"]
        and len(record["name"]) <= 12
        and 1 <= record["age"] <= 99
        and 1 <= len(record["tags"]) <= 2
        and set(record["tags"]) <= {"ship", "sea", "storm"}
    )


def generate(both, prompts, constraint, **options):
    """The new text of every row, and whether it ended by itself."""
    model, tokenizer = both
    tokenizer.padding_side = "left"
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    options = {"max_new_tokens": 80, "do_sample": True, "seed": 0, **options}
    out = model.generate(**inputs, logits_processor=[constraint.processor()], **options)[:, inputs.input_ids.shape[1] :]
    ends = [(row == 0).any().item() for row in out]
    return [tokenizer.decode(row, skip_special_tokens=True) for row in out], ends


@pytest.mark.parametrize(
    ("kind", "value", "check"),
    [
        ("json_schema", SCHEMA, conforms),
        ("json_schema", json.dumps(SCHEMA), conforms),
        ("regex", DATE, lambda text: re.fullmatch(DATE, text)),
        ("grammar", SUM, lambda text: re.fullmatch(r"[0-9+() ]+", text) and eval(text) > 1),
    ],
    ids=["schema", "schema_as_text", "regex", "grammar"],
)
def test_a_batch_of_ragged_prompts(both, kind, value, check):
    constraint = Constraint(*both, **{kind: value})
    prompts = ["The captain was born on", "He", "A list of things that the old man kept in his room:", "1 +"]
    texts, ends = generate(both, prompts, constraint)
    for text, ended in zip(texts, ends, strict=True):
        if ended:
            assert check(text), text
    assert any(ends)
    assert len(set(texts)) > 1


def test_return_sequences_and_beams(both):
    constraint = Constraint(*both, regex=DATE)
    for options in ({"num_return_sequences": 4}, {"num_beams": 3, "do_sample": False, "num_return_sequences": 3}):
        texts, ends = generate(both, ["It happened on", "He was born"], constraint, **options)
        assert all(ends)
        assert all(re.fullmatch(DATE, text) for text in texts), texts


def test_one_processor_serves_call_after_call(both):
    model, tokenizer = both
    processor = Constraint(model, tokenizer, regex=DATE).processor()
    for prompt in ("It happened on", "It happened on", "He was born on the"):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, logits_processor=[processor], max_new_tokens=20, do_sample=False)
        assert re.fullmatch(DATE, tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def test_a_stream_is_what_generate_gives(both):
    model, tokenizer = both
    constraint = Constraint(model, tokenizer, json_schema=SCHEMA)
    ids = tokenizer("The captain", return_tensors="pt").input_ids[0]
    stream = Stream(model, tokenizer, ids, constraint.sampling(Sampling(temperature=0)), 80)
    pieces = "".join(stream)
    (expected,), _ = generate(both, ["The captain"], constraint, do_sample=False)
    assert pieces == stream.text == expected
    sampling = constraint.sampling(Sampling(seed=1, top_k=20))
    assert (sampling.seed, sampling.top_k) == (1, 20)
    for _ in range(2):  # the same object again: from the beginning
        again = Stream(model, tokenizer, ids, sampling, 80)
        assert conforms("".join(again))
        assert again.finish_reason == "stop"


def test_nothing_likelier_was_allowed(both):
    """Greedy: each token is the likeliest of those that the grammar allows, by its own words."""
    model, tokenizer = both
    constraint = Constraint(model, tokenizer, regex=DATE)
    ids = tokenizer("It happened on", return_tensors="pt").input_ids
    out = model.generate(ids, logits_processor=[constraint.processor()], max_new_tokens=20, do_sample=False)
    with torch.no_grad():
        logits = model(out).logits[0, ids.shape[1] - 1 : -1]
    matcher = constraint.matcher()
    for row, token in zip(logits, out[0, ids.shape[1] :].tolist(), strict=True):
        allowed = [t for t in range(4096) if matcher.allows(t)]
        assert token == max(allowed, key=lambda t: float(row[t]))
        matcher.accept(token)
    assert matcher.ended


def test_rows_are_independent_and_masks_are_whole(both):
    model, tokenizer = both
    digits = Constraint(model, tokenizer, regex="[0-9]{4}")
    word = Constraint(model, tokenizer, regex="ship|sea")
    matchers = [digits.matcher(), word.matcher(), digits.matcher()]
    ended = tokenizer("1234").input_ids
    for token in [*ended, 0, 77, 3]:  # the end, then padding of any kind
        matchers[2].accept(token)
    masked = mask_logits_(torch.zeros(3, 4096), matchers)
    for row, matcher in zip(masked, matchers, strict=True):
        single = mask_logits_(torch.zeros(1, 4096), [matcher])[0]
        assert torch.equal(row, single)
    assert (masked[2] == 0).nonzero().flatten().tolist() == [0]
    for row, pattern in ((0, r"[0-9]{1,4}"), (1, r"s|se|sea|sh|shi|ship")):
        texts = [tokenizer.decode([t]) for t in (masked[row] == 0).nonzero().flatten().tolist()]
        assert texts
        assert all(re.fullmatch(pattern, text) for text in texts), texts
    assert mask_logits_(torch.zeros(0, 4096), []).shape == (0, 4096)


def test_tokens_taken_back(both):
    model, tokenizer = both
    matcher = Constraint(model, tokenizer, regex="[0-9]{2}(abc)?").matcher()
    ids = tokenizer("12").input_ids
    before = mask_logits_(torch.zeros(1, 4096), [matcher])
    for token in ids:
        matcher.accept(token)
    assert matcher.complete
    assert not matcher.ended
    copy = matcher.copy()
    copy.accept(0)
    assert copy.ended
    assert not matcher.ended
    copy.rollback(1 + len(ids))
    for token in [*ids, *tokenizer("abc").input_ids, 0]:  # the grammar has nothing after this
        copy.accept(token)
    copy.rollback(copy.length)
    assert torch.equal(mask_logits_(torch.zeros(1, 4096), [copy]), before)
    with pytest.raises(ValueError, match="rollback of 9"):
        copy.rollback(9)
    with pytest.raises(ValueError, match="not allowed by the constraint at position 0"):
        copy.accept(tokenizer("z").input_ids[0])
    assert copy.allows(ids[0]), "a refusal leaves it usable"


def test_a_processor_follows_tokens_taken_back(both):
    """What speculative decoding does: longer and shorter texts after one prompt, in any order."""
    model, tokenizer = both
    processor = Constraint(model, tokenizer, regex="[0-9]+-(ship|sea)").processor()
    prompt = tokenizer("On").input_ids
    fresh = {}
    texts = [tokenizer(t).input_ids for t in ("", "1", "12-", "12-s", "1", "13", "13-sea", "")]
    for text in texts:
        ids = torch.tensor([prompt + text])
        masked = processor(ids, torch.zeros(1, 4096))
        if not text:
            fresh.setdefault("start", masked)
            assert torch.equal(masked, fresh["start"])
        matcher = processor.constraint.matcher()
        for token in text:
            matcher.accept(token)
        assert torch.equal(masked, mask_logits_(torch.zeros(1, 4096), [matcher]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "got none"),
        ({"regex": "a", "grammar": "start: /a/"}, "got regex and grammar"),
        ({"regex": "(["}, "the regex cannot be used: .*unclosed character class"),
        ({"regex": "(?=a)b"}, "the regex cannot be used"),
        ({"grammar": "start: foo"}, 'unknown name: "foo"'),
        ({"json_schema": '{"type"'}, "the json_schema cannot be used"),
        ({"json_schema": {"type": "nonsense"}}, "the json_schema cannot be used"),
        ({"json_schema": {"not": {"type": "string"}}}, 'Unimplemented keys: \\["not"\\]'),
    ],
)
def test_constraints_that_cannot_be_used(both, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        Constraint(*both, **arguments)
    assert "\n" not in str(error.value)


def test_bad_values(both, monkeypatch):
    model, tokenizer = both
    constraint = Constraint(model, tokenizer, regex="a")
    with pytest.raises(ValueError, match="there are 1 matchers"):
        mask_logits_(torch.zeros(2, 4096), [constraint.matcher()])
    with pytest.raises(ValueError, match="logits are of 4095 tokens"):
        mask_logits_(torch.zeros(1, 4095), [constraint.matcher()])
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    with pytest.raises(ValueError, match="has none that its tokenizer knows"):
        Constraint(model, tokenizer, regex="a")


def test_without_llguidance(both, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ImportError, match=r"pip install 'mambakit\[constrain\]'"):
        Constraint(*both, regex="a")


@pytest.mark.cuda
def test_masks_on_a_gpu(both):
    matchers = [Constraint(*both, regex=regex).matcher() for regex in ("[0-9]{4}", "ship|sea")]
    logits = torch.randn(2, 4096)
    assert torch.equal(mask_logits_(logits.cuda(), matchers).cpu(), mask_logits_(logits.clone(), matchers))
