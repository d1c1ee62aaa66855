"""MambaForTokenClassification: scores of each token, what adds loss, Auto classes, packed weights and pipelines."""

from __future__ import annotations

import pytest
import torch
import transformers

import mambakit
from tests.models.configurations import BASE, pair, tokens, worst
from tests.models.tiny import save_tiny

CLASSES = {
    "mamba": (mambakit.MambaForTokenClassification, mambakit.MambaConfig),
    "falcon_mamba": (mambakit.FalconMambaForTokenClassification, mambakit.FalconMambaConfig),
}


def made(family="mamba", **fields):
    model_class, config_class = CLASSES[family]
    torch.manual_seed(0)
    return model_class(config_class(**{**BASE, "num_labels": 5, **fields})).eval()


@pytest.mark.parametrize("family", CLASSES)
def test_scores_are_the_heads_of_the_backbones_states(family):
    model, ids = made(family), tokens(2, 9)
    with torch.no_grad():
        output = model(ids)
        hidden = model.backbone(ids).last_hidden_state
    assert output.logits.shape == (2, 9, 5)
    assert torch.equal(output.logits, hidden @ model.score.weight.T)
    assert torch.equal(model(ids, return_dict=False)[0], output.logits)


def test_padding_and_ignored_labels_add_no_loss():
    model, ids = made(), tokens(2, 9)
    labels = torch.randint(0, 5, (2, 9))
    mask = torch.tensor([[0] * 3 + [1] * 6, [1] * 7 + [0] * 2])
    labels[1, 2] = -100
    output = model(ids, attention_mask=mask, labels=labels)
    alone = [model(ids[0:1, 3:]).logits[0], model(ids[1:2, :7]).logits[0]]
    wanted = [labels[0, 3:], labels[1, :7]]
    keep = [torch.ones(6, dtype=torch.bool), torch.arange(7) != 2]
    expected = torch.nn.functional.cross_entropy(
        torch.cat([a[k] for a, k in zip(alone, keep, strict=True)]),
        torch.cat([w[k] for w, k in zip(wanted, keep, strict=True)]),
    )
    assert abs(output.loss.item() - expected.item()) < 1e-5
    summed = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=24).loss
    assert abs(summed.item() - expected.item() * 12 / 24) < 1e-5
    with pytest.raises(ValueError, match=r"labels have shape \(2,\), expected \(2, 9\)"):
        model(ids, labels=torch.zeros(2, dtype=torch.int64))


def test_a_state_goes_on_and_documents_are_apart():
    model, ids = made(), tokens(1, 12)
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :5], use_cache=True)
        second = model(ids[:, 5:], cache_params=first.cache_params).logits
        assert worst(torch.cat([first.logits, second], 1), whole) < 1e-5
        packed = model(ids, cu_seqlens=torch.tensor([0, 5, 12], dtype=torch.int32)).logits
        assert worst(packed[:, 5:], model(ids[:, 5:]).logits) < 1e-5


def test_it_learns():
    """The class of a token is that of the one before it, which a causal state holds."""
    model = made(vocab_size=8, hidden_size=32).train()
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    torch.manual_seed(0)
    for _ in range(120):
        ids = torch.randint(0, 5, (16, 12))
        labels = ids.roll(1, 1)
        labels[:, 0] = -100
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1, "chance is ln 5 = 1.6"


@pytest.mark.parametrize("family", CLASSES)
def test_saved_loaded_and_from_a_language_model(family, tmp_path):
    model, ids = made(family), tokens(1, 6)
    model.save_pretrained(tmp_path / "m")
    again = mambakit.AutoModelForTokenClassification.from_pretrained(tmp_path / "m")
    assert type(again) is type(model)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    language = pair("plain")[0]
    language.save_pretrained(tmp_path / "lm")
    fresh = mambakit.AutoModelForTokenClassification.from_pretrained(tmp_path / "lm", num_labels=3)
    assert fresh(ids).logits.shape == (1, 6, 3)
    assert torch.equal(fresh.backbone.norm_f.weight, language.backbone.norm_f.weight)
    mambakit.register()
    assert type(transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "m")) is type(model)


def test_packed_weights(tmp_path):
    model, ids = made(), tokens(1, 6)
    with torch.no_grad():
        before = model(ids).logits
        packed = model.quantize("int8")(ids).logits
    assert worst(packed, before) < 0.05
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(mambakit.AutoModelForTokenClassification.from_pretrained(tmp_path)(ids).logits, packed)


def test_pipeline(tmp_path):
    save_tiny(tmp_path / "lm", hidden_size=32)
    labels = {"id2label": {0: "O", 1: "NAME"}, "label2id": {"O": 0, "NAME": 1}}
    model = mambakit.AutoModelForTokenClassification.from_pretrained(tmp_path / "lm", **labels)
    model.save_pretrained(tmp_path / "tokens")
    mambakit.AutoTokenizer.from_pretrained(tmp_path / "lm").save_pretrained(tmp_path / "tokens")
    found = mambakit.pipeline("token-classification", str(tmp_path / "tokens"), ignore_labels=[])("The cat sat")
    assert found
    assert {word["entity"] for word in found} <= {"O", "NAME"}
    assert found[0]["start"] == 0
