"""pipeline(): the embedded model by default, a folder, an object; batches; classification."""

from __future__ import annotations

import pytest
import torch

import mambakit
from tests.models.tiny import save_tiny

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_embedded_model_writes_english():
    pipe = mambakit.pipeline("text-generation")
    out = pipe("It was a dark and stormy night", max_new_tokens=40, do_sample=False)[0]["generated_text"]
    assert out.startswith("It was a dark and stormy night")
    words = out.split()
    common = {"the", "and", "of", "a", "to", "in", "was", "it", "that", "he", "his", "with"}
    assert sum(word.strip(".,;").lower() in common for word in words) >= len(words) / 5


def test_a_folder_and_objects(tmp_path):
    save_tiny(tmp_path)
    by_folder = mambakit.pipeline("text-generation", model=str(tmp_path))
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    expected = by_folder("The cat", **options)
    model = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = mambakit.AutoTokenizer.from_pretrained(tmp_path)
    assert mambakit.pipeline(model=model, tokenizer=tokenizer)("The cat", **options) == expected
    batched = by_folder(["The cat", "by the fire and the"], batch_size=2, **options)
    assert batched[0] == expected
    assert batched[1] == by_folder("by the fire and the", **options)


def test_stop_strings(tmp_path):
    save_tiny(tmp_path, eos_token_id=303)
    pipe = mambakit.pipeline(model=str(tmp_path))
    ids = pipe.tokenizer("The cat", return_tensors="pt").input_ids
    options = {"max_new_tokens": 20, "do_sample": False}
    free = pipe.tokenizer.decode(pipe.model.generate(ids, **options)[0, ids.shape[1] :])
    stop = free[8:11]
    out = pipe.model.generate(ids, stop_strings=[stop], tokenizer=pipe.tokenizer, **options)
    stopped = pipe.tokenizer.decode(out[0, ids.shape[1] :])
    assert stopped.startswith(free[: free.index(stop)])
    assert stop in stopped
    assert len(stopped) < len(free)


def test_dtype(tmp_path):
    save_tiny(tmp_path)
    assert mambakit.pipeline(model=str(tmp_path), dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_classification(tmp_path):
    save_tiny(tmp_path)
    classifier = mambakit.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    tokenizer = mambakit.AutoTokenizer.from_pretrained(tmp_path)
    result = mambakit.pipeline("text-classification", model=classifier, tokenizer=tokenizer)("The cat sat")
    assert 0 < result[0]["score"] <= 1


def test_masked_tokens():
    tokenizer = mambakit.AutoTokenizer.from_pretrained("hyena-dna")
    torch.manual_seed(0)
    model = mambakit.BiMambaForMaskedLM(
        mambakit.BiMambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1)
    ).eval()
    found = mambakit.pipeline("fill-mask", model=model, tokenizer=tokenizer)("AC[MASK]GT", top_k=16)
    ids = tokenizer("AC[MASK]GT", return_tensors="pt").input_ids
    assert ids[0].tolist() == [7, 8, 3, 9, 10]
    with torch.no_grad():
        expected = model(ids).logits[0, 2].softmax(-1)
    assert {f["token"]: f["score"] for f in found} == pytest.approx(dict(enumerate(expected.tolist())), rel=1e-5)


def test_what_is_refused():
    with pytest.raises(ValueError, match="'summarization'"):
        mambakit.pipeline("summarization")
    with pytest.raises(ValueError, match="no model ships"):
        mambakit.pipeline("text-classification")
