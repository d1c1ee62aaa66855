"""pipeline(): arguments are honoured, not swallowed, and nothing false is logged."""

from __future__ import annotations

import logging

import pytest
import torch

import mambakit
from tests.models.tiny import save_tiny

GREEDY = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}


@pytest.fixture
def reports():
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16])
def test_both_names_of_dtype(argument, dtype, tmp_path):
    save_tiny(tmp_path)
    pipe = mambakit.pipeline(model=tmp_path, **{argument: dtype})
    assert pipe.model.lm_head.weight.dtype == (getattr(torch, dtype) if isinstance(dtype, str) else dtype)


def test_nothing_false_is_logged(reports, tmp_path):
    save_tiny(tmp_path / "a")
    mambakit.pipeline("text-generation", model=tmp_path / "a")("The cat", **GREEDY)
    assert not [message for message in reports if "not supported" in message or len(message) > 500], reports
    mambakit.MambaForSequenceClassification.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    mambakit.AutoTokenizer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    reports.clear()
    mambakit.pipeline("text-classification", model=tmp_path / "b")("The cat")
    assert not [message for message in reports if "not supported" in message or len(message) > 500], reports


def test_a_lora_model_is_a_model(tmp_path):
    peft = pytest.importorskip("peft")
    save_tiny(tmp_path)
    tokenizer = mambakit.AutoTokenizer.from_pretrained(tmp_path)
    model = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path)
    plain = mambakit.pipeline(model=model, tokenizer=tokenizer)("The cat", **GREEDY)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["in_proj", "x_proj"], r=2)).eval()
    assert mambakit.pipeline(model=adapted, tokenizer=tokenizer)("The cat", **GREEDY) == plain  # LoRA starts at zero


def test_the_default_model_is_the_folder_that_ships(monkeypatch, tmp_path):
    from mambakit import assets

    assert (assets.default_model_path() / "model.safetensors").is_file()
    monkeypatch.setattr(assets, "_NAME", "absent")
    with pytest.raises(FileNotFoundError, match="install mambakit again, or name a model"):
        mambakit.pipeline()
