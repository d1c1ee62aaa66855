"""transformers' options: followed, or said or refused by name, and none ignored in silence."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers

import mambakit
from mambakit.cli import main
from mambakit.generation.pipeline import pipeline
from mambakit.models.options import _GENERATING, _LOADING, _ONLY
from tests.models.configurations import pair, tokens
from tests.models.tiny import save_tiny

REFUSED = {name: {name: True} for name in _LOADING} | {
    "quantization_config": {"quantization_config": {"quant_method": "bitsandbytes"}}, "variant": {"variant": "fp16"},
    **{name: {name: not only} for name, (only, _) in _ONLY.items()},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    save_tiny(path)
    return path


@pytest.mark.parametrize("name", REFUSED)
def test_loading_options_that_cannot_be_followed(name, folder, tmp_path):
    loaders = [
        lambda **o: mambakit.AutoModelForCausalLM.from_pretrained(folder, **o),
        lambda **o: mambakit.MambaModel.from_pretrained(folder, **o),
        lambda **o: pipeline(model=folder, model_kwargs=o),
        lambda **o: mambakit.AutoModelForCausalLM.from_config(mambakit.AutoConfig.from_pretrained(folder), **o),
    ]
    for load in loaders:
        with pytest.raises(ValueError, match=f"{name}=.* cannot be followed"):
            load(**REFUSED[name])
    assert loaders[0](**{name: None}) is not None


@pytest.mark.parametrize("quantized", [False, True])
def test_what_they_name(folder, tmp_path, quantized):
    source = folder
    if quantized:
        mambakit.MambaForCausalLM.from_pretrained(folder).quantize("int8").save_pretrained(source := tmp_path)
    load = mambakit.AutoModelForCausalLM.from_pretrained
    for options, remedy in (
        ({"load_in_8bit": True}, 'quantization="int8"'), ({"load_in_4bit": True}, 'quantization="int4"'),
        ({"quantization_config": transformers.BitsAndBytesConfig(load_in_8bit=True)}, 'quantization="int8"'),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=remedy):
            load(source, **options)
    for options in (
        {"attn_implementation": "sdpa"},
        {"attn_implementation": "flash_attention_2"},
        {"trust_remote_code": True},
    ):
        with pytest.warns(UserWarning, match=next(iter(options))):
            load(source, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load(source, trust_remote_code=False, attn_implementation=None, low_cpu_mem_usage=True, weights_only=True)
    settings = transformers.GenerationConfig(max_new_tokens=3, eos_token_id=None)
    model = load(source, generation_config=settings)
    assert model.generate(torch.tensor([[5, 6]])).shape == (1, 5)
    with pytest.raises((TypeError, ValueError), match="tirm"):
        load(source, tirm=True)


def test_safetensors_or_not(folder, tmp_path):
    assert mambakit.MambaForCausalLM.from_pretrained(folder, use_safetensors=True) is not None
    with pytest.raises(
        mambakit.CheckpointError, match="use_safetensors=False, but the weights .* are model.safetensors"
    ):
        mambakit.MambaForCausalLM.from_pretrained(folder, use_safetensors=False)
    mambakit.MambaForCausalLM.from_pretrained(folder).save_original(tmp_path)
    assert mambakit.MambaForCausalLM.from_pretrained(tmp_path, use_safetensors=False) is not None
    with pytest.raises(
        mambakit.CheckpointError, match=r"use_safetensors=True, but the weights .* are pytorch_model.bin"
    ):
        mambakit.MambaForCausalLM.from_pretrained(tmp_path, use_safetensors=True)


def test_pipeline_options_beside_a_model(folder):
    model = mambakit.MambaForCausalLM.from_pretrained(folder)
    for options in ({"dtype": "float32"}, {"model_kwargs": {"quantization": "int8"}}, {"device_map": "cpu"}):
        with pytest.raises(ValueError, match="model is one already"):
            pipeline(model=model, tokenizer=folder, **options)
    with pytest.raises(ValueError, match="use_fast=False"):
        pipeline(model=folder, use_fast=False)
    with pytest.warns(UserWarning, match="trust_remote_code"):
        pipeline(model=folder, trust_remote_code=True)


@pytest.mark.parametrize("name", _GENERATING)
def test_arguments_of_generate_that_cannot_be_followed(name):
    model, ids = pair("plain")[0], tokens(1, 5)
    value = {"cache_implementation": "static"}.get(name, True)
    with pytest.raises(ValueError, match=f"{name}="):
        model.generate(ids, max_new_tokens=2, **{name: value})
    assert model.generate(ids, max_new_tokens=2, eos_token_id=None, **{name: None}).shape == (1, 7)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["plain", "falcon"])
@pytest.mark.parametrize("options", [
    {"guidance_scale": 1.5}, {"guidance_scale": 0.5}, {"guidance_scale": 3.0, "negative": True},
    {"guidance_scale": 1.5, "do_sample": True}, {"guidance_scale": 2.0, "repetition_penalty": 1.3},
    {"guidance_scale": 1.0},
])  # fmt: skip
@pytest.mark.parametrize("b", [1, 2])
def test_guidance_gives_the_tokens_of_transformers(name, options, b):
    """Of transformers without a cache: up to 5.23 its processor loses Mamba's state, and goes on from the last token
    alone."""
    ours, theirs = pair(name)
    options = dict(options)
    if options.pop("negative", False):
        options["negative_prompt_ids"] = tokens(b, 4)
    ids = tokens(b, 6)
    common = {"max_new_tokens": 8, "eos_token_id": None, "attention_mask": torch.ones_like(ids), **options}
    torch.manual_seed(0)
    expected = theirs.generate(ids, use_cache=False, **common)
    for use_cache in (True, False):
        torch.manual_seed(0)
        assert torch.equal(ours.generate(ids, use_cache=use_cache, **common), expected)


def test_guidance_that_cannot_be():
    model, ids = pair("plain")[0], tokens(1, 6)
    with pytest.raises(ValueError, match="guidance_scale=1.5 with num_beams"):
        model.generate(ids, guidance_scale=1.5, num_beams=2)
    with pytest.raises(ValueError, match="negative_prompt_ids are read with a guidance_scale"):
        model.generate(ids, negative_prompt_ids=ids)


def test_a_group_for_lossless_packing(folder, tmp_path, capsys):
    model = mambakit.MambaForCausalLM.from_pretrained(folder)
    for group in (32, 64, 128):
        for format, why in (("lossless", "lossless packing has no scales"), ("fp8", "fp8 has one scale for each row")):
            with pytest.raises(ValueError, match=f"group is {group}: {why}"):
                model.quantize(format, group)
            assert main(["quantize", str(folder), str(tmp_path / "x"), "--to", format, "--group", str(group)]) != 0
            assert f"--group {group}: {why}" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert model.quantize("int8", 32).config.quantization_config["group"] == 32
    assert model.quantize("int8").config.quantization_config["group"] == 64
    model.quantize("lossless")
