"""Packed weights made plain again: the same numbers, tied as they were, trained, saved, and read by transformers
itself."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import mambakit
from mambakit.models.checkpoints import convert, describe
from mambakit.modules.quantized_linear import QuantizedLinear
from tests.models.configurations import pair, tokens, worst
from tests.models.tiny import save_tiny, with_own_embeddings

pytestmark = pytest.mark.filterwarnings("ignore")
FORMATS = ["int8", "int4", "lossless"]


def theirs(model, folder):
    """Stock transformers' model of a saved folder, in float32."""
    falcon = model.config.model_type == "falcon_mamba"
    cls = transformers.FalconMambaForCausalLM if falcon else transformers.MambaForCausalLM
    loaded, info = cls.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return loaded.eval()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["plain", "use_bias", "untied", "odd_everything", "falcon"])
def test_the_same_numbers_that_train_and_that_transformers_reads(name, format, tmp_path):
    model = pair(name)[0].quantize(format, None if format == "lossless" else 32)
    ids = tokens(2, 9)
    with torch.no_grad():
        packed = model(ids).logits
    weights = {n: m.packed.dequantized() for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert model.dequantize() is model
    assert not model.training
    for n, weight in weights.items():
        layer = model.get_submodule(n)
        assert type(layer) is nn.Linear
        assert torch.equal(layer.weight, weight)
    tied = name != "untied"
    assert model.config.tie_word_embeddings == tied
    assert (model.lm_head.weight is model.backbone.embeddings.weight) == tied
    assert not hasattr(model.config, "quantization_config")
    with torch.no_grad():
        plain = model(ids).logits
    assert worst(plain, packed) < 1e-4  # the packed products round activations to 16 bits

    model.save_pretrained(tmp_path / "plain")
    assert worst(theirs(model, tmp_path / "plain")(ids).logits, plain) < 1e-5
    again = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, plain)

    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert model.eval().quantize(format).lm_head.format == ("lossless32" if format == "lossless" else format)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["plain", "use_bias", "untied", "odd_everything", "falcon"])
def test_lossless_comes_back_to_the_last_bit(name, dtype, tmp_path):
    model = pair(name)[0].to(dtype)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model.quantize("lossless").save_pretrained(tmp_path)
    for back in (model.dequantize(), mambakit.AutoModelForCausalLM.from_pretrained(tmp_path).dequantize()):
        after = back.state_dict()
        assert after.keys() == before.keys()
        for n, tensor in before.items():
            assert after[n].dtype == tensor.dtype
            assert torch.equal(after[n], tensor), n
        assert (back.lm_head.weight is back.backbone.embeddings.weight) == (name != "untied")


@pytest.mark.parametrize("format", ["int8", "int4"])
@torch.no_grad()
def test_a_dtype_of_its_own(format, tmp_path):
    model = pair("plain")[0].bfloat16().quantize(format)
    model.save_pretrained(tmp_path)
    half = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path).dequantize()
    assert half.dtype == half.lm_head.weight.dtype == torch.bfloat16
    assert half.backbone.layers[0].mixer.A_log.dtype == torch.float32
    wide = model.dequantize("float32").state_dict()
    assert {t.dtype for t in wide.values()} == {torch.float32}
    assert model.lm_head.weight is model.backbone.embeddings.weight
    # The embeddings too are the packed numbers, not bfloat16's roundings of them: as if loaded in float32.
    loaded = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32").dequantize().state_dict()
    assert all(torch.equal(wide[n], loaded[n]) for n in loaded)
    for n, tensor in half.state_dict().items():
        assert torch.equal(tensor, wide[n].to(tensor.dtype))


@torch.no_grad()
def test_embeddings_of_their_own_untie_the_head(tmp_path):
    model, embeddings = with_own_embeddings("int8")
    model.save_pretrained(tmp_path / "old")
    ids = tokens(2, 9)
    packed = model(ids).logits
    rows = model.lm_head.packed.dequantized()
    model.dequantize()
    assert not model.config.tie_word_embeddings
    model.tie_weights()
    assert torch.equal(model.backbone.embeddings.weight, embeddings)
    assert torch.equal(model.lm_head.weight, rows)
    assert worst(model(ids).logits, packed) < 1e-4
    model.save_pretrained(tmp_path / "plain")
    assert worst(theirs(model, tmp_path / "plain")(ids).logits, packed) < 1e-4
    for format in ("transformers", "original"):
        convert(tmp_path / "old", tmp_path / format, format)
        back = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / format)
        assert torch.equal(back(ids).logits, model(ids).logits)


def test_old_lossless_checkpoints_tie_again(tmp_path):
    """They hold the embeddings beside the head, which are its rows."""
    model = pair("plain")[0]
    embeddings = model.backbone.embeddings.weight.detach().clone()
    model.quantize("lossless").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"backbone.embeddings.weight": embeddings}, path, {"format": "pt"})
    back = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path).dequantize()
    assert back.config.tie_word_embeddings
    assert back.lm_head.weight is back.backbone.embeddings.weight
    assert torch.equal(back.lm_head.weight, embeddings)


@pytest.mark.parametrize("format", ["int8", "lossless"])
@torch.no_grad()
def test_base_models_and_classifiers(format):
    ids = tokens(2, 9)
    base = mambakit.MambaModel(pair("plain")[0].config).eval()
    classifier = mambakit.MambaForSequenceClassification(pair("plain")[0].config).eval()
    for model in (base, classifier):
        embeddings = model.get_input_embeddings().weight.clone()
        packed = model.quantize(format)(ids)[0]
        assert worst(model.dequantize()(ids)[0], packed) < 1e-4
        assert torch.equal(model.get_input_embeddings().weight, embeddings)  # there is no head to share them with
        assert not any(isinstance(m, QuantizedLinear) for m in model.modules())


@pytest.mark.parametrize("name", ["plain", "untied"])
@torch.no_grad()
def test_packed_again_from_what_the_packed_weights_stand_for(name):
    model = pair(name)[0].quantize("int8")
    ids = tokens(2, 9)
    eight = model(ids).logits
    assert worst(model.quantize("lossless")(ids).logits, eight) < 1e-4
    four = model.quantize("int4", 128)(ids).logits
    assert model.config.quantization_config["format"] == "int4"
    assert model.config.tie_word_embeddings == (name == "plain")
    assert worst(four, eight) > 1e-3
    assert torch.equal(model.dequantize().quantize("int4", 128)(ids).logits, four)


def test_a_plain_model_is_refused():
    model = pair("plain")[0]
    with pytest.raises(ValueError, match="the model is not quantised"):
        model.dequantize()
    model.quantize("int8").dequantize()
    with pytest.raises(ValueError, match="the model is not quantised"):
        model.dequantize()


@pytest.mark.parametrize("to", ["transformers", "original"])
@pytest.mark.parametrize("format", FORMATS)
@torch.no_grad()
def test_converted(format, to, tmp_path):
    model = save_tiny(tmp_path / "a").bfloat16()
    parameters = sum(p.numel() for p in model.parameters())
    model.quantize(format, None if format == "lossless" else 32).save_pretrained(tmp_path / "packed")
    convert(tmp_path / "packed", tmp_path / to, to)
    info = describe(tmp_path / to)
    assert (info.format, info.parameters) == (to, parameters)
    assert info.dtypes.keys() == {"bfloat16", "float32"}
    back = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / to)
    ids = tokens(1, 9)
    want = model.dequantize()(ids).logits
    assert torch.equal(back(ids).logits, want)
    if to == "transformers":
        assert worst(theirs(back, tmp_path / to)(ids).logits, model.float()(ids).logits) < 1e-5
    convert(tmp_path / "packed", tmp_path / "wide", to, torch.float32)
    assert describe(tmp_path / "wide").dtypes.keys() == {"float32"}
