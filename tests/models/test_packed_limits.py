"""What a model with packed weights cannot do is refused, with `dequantize()` as the remedy; and its numbers are
counted, not its tensors."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers

import mambakit
from mambakit.cli import main
from mambakit.models.checkpoints import describe
from tests.models.configurations import pair, tokens, worst

pytestmark = pytest.mark.filterwarnings("ignore")
FORMATS = ["int8", "int4", "fp8", "lossless"]


@pytest.mark.parametrize("name", ["plain", "untied", "use_bias", "odd_everything", "falcon_odd"])
@pytest.mark.parametrize("format", FORMATS)
def test_counts_are_of_numbers(name, format, tmp_path, capsys):
    plain = pair(name)[0]
    packed = copy.deepcopy(plain).quantize(format)
    for options in ({}, {"exclude_embeddings": True}):
        assert packed.num_parameters(**options) == plain.num_parameters(**options)
    assert packed.backbone.num_parameters() == plain.backbone.num_parameters()
    assert packed.num_parameters(only_trainable=True) == sum(p.numel() for p in packed.parameters() if p.requires_grad)
    assert copy.deepcopy(packed).dequantize().num_parameters() == plain.num_parameters()
    stored = sum(t.nbytes for t in (*packed.parameters(), *packed.buffers()))
    assert packed.get_memory_footprint() == stored
    packed.save_pretrained(tmp_path)
    assert describe(tmp_path).parameters == plain.num_parameters()
    assert main(["info", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == plain.num_parameters()


@pytest.mark.parametrize("format", FORMATS)
def test_training_is_refused(format, tmp_path):
    model, ids = pair("plain")[0].quantize(format), tokens(2, 9)
    with pytest.raises(
        ValueError, match=r"do not learn, only embeddings.weight .* would; call model.dequantize\(\) first"
    ):
        model.train()(ids, labels=ids)
    for part in (model.backbone, mambakit.MambaForSequenceClassification(pair("plain")[0].config).quantize(format)):
        with pytest.raises(ValueError, match=r"dequantize\(\)"):
            part.train()(ids)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no"
    )
    with pytest.raises(ValueError, match=r"dequantize\(\)"):
        transformers.Trainer(model, arguments, train_dataset=rows).train()
    for freeze in (lambda p: "embeddings" in p, lambda p: "norm" not in p):  # a part of what is left
        some = pair("plain")[0].quantize(format).train()
        for name, parameter in some.named_parameters():
            parameter.requires_grad_(not freeze(name))
        with pytest.raises(ValueError, match=r"dequantize\(\)"):
            some(ids, labels=ids)
    model.eval()
    before = model(ids).logits  # gradients or not, it is no training
    model.train()
    with torch.no_grad():
        assert worst(model(ids).logits, before) < 1e-5
    assert torch.equal(model.generate(ids, max_new_tokens=3), model.eval().generate(ids, max_new_tokens=3))
    model.dequantize().train()(ids, labels=ids).loss.backward()
    assert model.backbone.layers[0].mixer.in_proj.weight.grad is not None


def test_adapters_on_what_is_not_packed_learn():
    peft = pytest.importorskip("peft")
    for options in ({}, {"modules_to_save": ["norm_f"]}, {"bias": "lora_only"}):
        model, ids = pair("plain")[0].quantize("int8"), tokens(2, 9)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["dt_proj"], **options)).train()
        wrapped(ids, labels=ids).loss.backward()
        learning = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
        assert any("lora_B" in name for name in learning)
        assert all(p.grad is not None for p in learning.values())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["plain", "untied"])
def test_what_is_refused(name, format, tmp_path):
    model = pair(name)[0].quantize(format)
    plain = pair(name)[0].state_dict()
    for refused in (
        lambda: model.resize_token_embeddings(70), lambda: model.load_state_dict(plain),
        lambda: model.save_original(tmp_path / "o"),
        lambda: model.save_pretrained(tmp_path / "p", state_dict=plain),
        lambda: model.backbone.layers[0].mixer.in_proj.weight, lambda: model.lm_head.weight,
    ):  # fmt: skip
        with pytest.raises((ValueError, AttributeError), match=r"dequantize\(\)"):
            refused()
    assert not hasattr(model.lm_head, "weight")
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    model.tie_weights()
    model.dequantize().resize_token_embeddings(70)
    assert model(tokens(1, 4, 70)).logits.shape[-1] == 70


@pytest.mark.parametrize("format", FORMATS)
@torch.no_grad()
def test_casts_move_packed_numbers_and_never_change_them(format):
    model, ids = pair("untied")[0].quantize(format), tokens(2, 9)
    expected = model(ids).logits
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    for cast in ("half", "double", "bfloat16", "double", "half", "float"):
        getattr(model, cast)()
        assert {name: b.dtype for name, b in model.named_buffers()} == {name: b.dtype for name, b in buffers.items()}
        assert model(ids).logits.isfinite().all()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    assert worst(model(ids).logits, expected) < 0.1  # norms and embeddings were rounded
    for parameter in ("A_log", "D", "dt_proj.bias"):
        assert model.backbone.layers[0].mixer.get_parameter(parameter).dtype == torch.float32
