"""BLiMP, LAMBADA and bits per byte: by hand on a tiny model, through the command line, and on wrong files."""

from __future__ import annotations

import json
import lzma
import math

import pytest
import torch

import mambakit
from mambakit.cli import main
from mambakit.evaluation.benchmarks import bits, blimp, encode_pair, lambada
from mambakit.generation.score import score_text
from tests.models.tiny import save_tiny

pytestmark = pytest.mark.filterwarnings("ignore")
SENTENCES = ["The cat sat on the mat.", "The dog slept by the fire.", "A naïve cat, and the tired dog.", "On the mat."]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder)
    load = mambakit.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return folder, load, mambakit.AutoTokenizer.from_pretrained(folder)


def log_prob(model, tokenizer, text: str) -> float:
    return -score_text(model, tokenizer, text).nats


def test_blimp(tiny, tmp_path):
    _, model, tokenizer = tiny
    records = []
    for uid, field, offset in (("one", "syntax", 1), ("two", "syntax/semantics", 2), ("three", "syntax", 3)):
        for i, good in enumerate(SENTENCES):
            bad = SENTENCES[(i + offset) % 4]
            records.append({"sentence_good": good, "sentence_bad": bad, "UID": uid, "field": field})
    records.append({"sentence_good": "Same.", "sentence_bad": "Same.", "UID": "tie", "field": "syntax"})
    path = tmp_path / "b.jsonl.xz"
    path.write_bytes(lzma.compress("\n".join(map(json.dumps, records)).encode()))
    found = blimp(model, tokenizer, [path])
    for uid in ("one", "two", "three", "tie"):
        members = [r for r in records if r["UID"] == uid]
        right = [
            log_prob(model, tokenizer, r["sentence_good"]) > log_prob(model, tokenizer, r["sentence_bad"])
            for r in members
        ]
        assert found.paradigms[uid] == sum(right) / len(members), uid
    assert found.paradigms["tie"] == 0.0
    assert found.pairs == 13
    assert found.accuracy == pytest.approx(sum(found.paradigms.values()) / 4)
    assert found.by_field()["syntax_semantics"] == found.paradigms["two"]
    assert blimp(model, tokenizer, [path], limit=2).pairs == 7


def test_lambada(tiny, tmp_path):
    _, model, tokenizer = tiny
    ids = tokenizer("The cat sat on", add_special_tokens=False, return_tensors="pt").input_ids
    texts = [*SENTENCES, "The cat sat on the mat, and the dog"]
    path = tmp_path / "l.jsonl"
    path.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    found = lambada(model, tokenizer, [path])
    nats, greedy = 0.0, 0
    for text in texts:
        context, _, word = text.rpartition(" ")
        before, after = encode_pair(tokenizer, context, " " + word)
        assert tokenizer.decode(after) == " " + word
        with torch.no_grad():
            scores = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1].log_softmax(-1)
        nats -= float(scores.gather(1, torch.tensor(after)[:, None]).sum())
        greedy += bool((scores.argmax(-1) == torch.tensor(after)).all())
    assert found.passages == len(texts)
    assert found.accuracy == greedy / len(texts)
    assert found.perplexity == pytest.approx(math.exp(nats / len(texts)), rel=1e-3)
    assert lambada(model, tokenizer, [path], limit=2).passages == 2
    assert ids.shape[1] > 1


def test_bits(tiny, tmp_path):
    _, model, tokenizer = tiny
    one, two = tmp_path / "1.txt", tmp_path / "2.txt.xz"
    one.write_text("|".join(SENTENCES), encoding="utf-8")
    two.write_bytes(lzma.compress(SENTENCES[2].encode()))
    found = bits(model, tokenizer, [one, two], separator="|", chunk_size=5)
    nats = [-log_prob(model, tokenizer, text) for text in SENTENCES]
    assert found.files[str(one)].nats == pytest.approx(sum(nats), rel=1e-4)
    total = found.total
    size = sum(len(t.encode()) for t in SENTENCES) + len(SENTENCES[2].encode())
    assert total.bytes == size
    assert total.bits_per_byte == pytest.approx((sum(nats) + nats[2]) / math.log(2) / size, rel=1e-4)
    whole = bits(model, tokenizer, [one])
    assert whole.total.bytes == len("|".join(SENTENCES).encode()), "without a separator a file is one document"
    assert whole.total.nats == pytest.approx(-log_prob(model, tokenizer, "|".join(SENTENCES)), rel=1e-4)


@pytest.mark.parametrize("kind", ["blimp", "lambada", "bpb"])
def test_commands(tiny, tmp_path, kind, capsys):
    record = {
        "sentence_good": SENTENCES[0],
        "sentence_bad": SENTENCES[1],
        "UID": "u",
        "field": "f",
        "text": SENTENCES[0],
    }
    path = tmp_path / "e.jsonl"
    path.write_text(json.dumps(record))
    arguments = ["evaluate", kind, str(path), "--model", str(tiny[0]), "--device", "cpu"]
    assert main([*arguments, "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["benchmark"] == kind
    key = {"blimp": "accuracy", "lambada": "perplexity", "bpb": "files"}[kind]
    assert key in measured
    assert main(arguments) == 0
    assert {"blimp": "accuracy", "lambada": "passages", "bpb": "bits/byte"}[kind] in capsys.readouterr().out


def test_mistakes(tiny, tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    for kind, content, message in (
        ("blimp", '{"text": "a b"}', "line 1: no 'sentence_good'"),
        ("lambada", '{"text": "word"}', "has no last word after a space"),
        ("lambada", "{", "line 1: not a JSON object"),
        ("lambada", "", "hold no passages"),
        ("blimp", "", "hold no pairs"),
        ("bpb", "", "holds no text"),
    ):
        path.write_text(content)
        assert main(["evaluate", kind, str(path), "--model", str(tiny[0])]) == 2
        assert message in capsys.readouterr().err
    assert main(["evaluate", "bpb", "nowhere.txt"]) == 2
    assert "there is no file nowhere.txt" in capsys.readouterr().err
    assert main(["evaluate", "bpb", str(path), "--batch-tokens", "0"]) == 2
    assert "--batch-tokens is 0" in capsys.readouterr().err
