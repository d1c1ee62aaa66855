"""The models that the command line loads are those of transformers' interface: weights, results, errors."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
import torch

import mambakit
from mambakit.errors import CheckpointError
from mambakit.generation.fingerprint import fingerprint
from mambakit.generation.state import State
from mambakit.generation.stream import Sampling, Stream
from mambakit.models.checkpoints import convert
from mambakit.models.mamba.inference import InferenceCausalLM
from mambakit.models.mamba.inference_config import InferenceConfig
from mambakit.modules.mixers import computation_fields
from tests.models.configurations import BASE, tokens
from tests.models.tiny import save_tiny


def save(folder, family="Mamba", **fields):
    torch.manual_seed(0)
    config = getattr(mambakit, f"{family}Config")(**{**BASE, **fields})
    model = getattr(mambakit, f"{family}ForCausalLM")(config).eval()
    model.generation_config.eos_token_id = 3
    model.save_pretrained(folder)
    return model


def both(folder, dtype=None, by_transformers=False):
    """The command line's model, and transformers'; where asked for, the first with transformers' configuration."""
    config = mambakit.AutoConfig.from_pretrained(folder)
    assert InferenceCausalLM.loads(config)
    if not by_transformers:
        config = require_same_configuration(InferenceConfig.of(folder), config)
    ours = InferenceCausalLM.from_pretrained(folder, config=config, dtype=dtype)
    return ours, mambakit.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def require_same_configuration(ours, theirs) -> InferenceConfig:
    for field in fields(ours):
        if field.name != "generation" and (field.name, ours.model_type) != ("mixer_rms_eps", "mamba"):
            expected = getattr(theirs, field.name, None)
            assert getattr(ours, field.name) == expected, field.name
    a, b = ours.state_spec(torch.float32), theirs.state_spec(torch.float32)
    assert (a.layers, a.model) == (b.layers, b.model)
    assert computation_fields(ours) == computation_fields(theirs)
    return ours


def require_same(ours, theirs) -> None:
    assert not ours.training
    assert ours.dtype == theirs.dtype == ours.config.dtype
    assert ours.device == theirs.device
    assert ours.generation_config.eos_token_id == theirs.generation_config.eos_token_id
    expected = theirs.state_dict()
    assert list(ours.state_dict()) == list(expected)
    for name, value in ours.state_dict().items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name
    tied = theirs.config.tie_word_embeddings and hasattr(theirs.lm_head, "weight")
    assert (getattr(ours.lm_head, "weight", None) is ours.backbone.embeddings.weight) == tied
    ids = tokens(2, 9)
    with torch.inference_mode():
        a, b = ours(ids, use_cache=True), theirs(ids, use_cache=True)
        assert torch.equal(a.logits, b.logits)
        assert torch.equal(
            ours(ids[:, :1], cache_params=a.cache).logits, theirs(ids[:, :1], cache_params=b.cache).logits
        )
        assert torch.equal(ours(ids, logits_to_keep=1).logits, theirs(ids, logits_to_keep=1).logits)
        told = [model(ids, use_cache=False, return_dict=False, output_hidden_states=True) for model in (ours, theirs)]
        assert [type(part) for part in told[0]] == [type(part) for part in told[1]]
        assert torch.equal(told[0][0], told[1][0])
        assert all(map(torch.equal, told[0][1], told[1][1]))
    assert fingerprint(ours) == fingerprint(theirs)


@pytest.mark.parametrize("dtype", [None, "auto", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family, fields", [
    ("Mamba", {}), ("Mamba", {"tie_word_embeddings": False, "use_bias": True}), ("FalconMamba", {}),
])  # fmt: skip
def test_transformers_format(tmp_path, family, fields, dtype):
    save(tmp_path, family, **fields)
    require_same(*both(tmp_path, dtype))
    require_same(*both(tmp_path, dtype, by_transformers=True))


@pytest.mark.parametrize("kind", ["original", "gguf", "int8", "int4", "lossless"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_formats(tmp_path, kind, dtype):
    folder = tmp_path / ("b.gguf" if kind == "gguf" else "b")
    if kind in ("original", "gguf"):
        save_tiny(tmp_path / "a")
        convert(tmp_path / "a", folder, kind)
    else:
        model = save(tmp_path / "a", vocab_size=64)
        model.quantize(kind).save_pretrained(folder)
    require_same(*both(folder, dtype))


def test_a_text_and_its_state(tmp_path):
    save_tiny(tmp_path / "model")
    tokenizer = mambakit.AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer("The cat sat on", return_tensors="pt").input_ids[0]
    texts, states = [], []
    models = both(tmp_path / "model", "float32")
    for model in models:
        texts.append("".join(Stream(model, tokenizer, ids, Sampling(temperature=0.8, seed=3), 12)))
        states.append(State.read(model, ids))
    assert texts[0] == texts[1] != ""
    states[0].save(tmp_path / "state.safetensors", models[0])
    again = State.load(tmp_path / "state.safetensors", models[1])
    assert all(torch.equal(again.tensors()[name], value) for name, value in states[1].tensors().items())


@pytest.mark.parametrize("damage", ["missing", "shape", "unknown"])
def test_damaged_files_are_refused_with_the_same_words(tmp_path, damage):
    from safetensors.torch import load_file, save_file

    save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "backbone.layers.0.mixer.out_proj.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "shape":
        tensors[name] = tensors[name][:, :-1].contiguous()
    else:
        tensors["backbone.other"] = torch.zeros(1)
    save_file(tensors, tmp_path / "model.safetensors")
    config = mambakit.AutoConfig.from_pretrained(tmp_path)
    told = []
    for load in (
        lambda: InferenceCausalLM.from_pretrained(tmp_path, config=config),
        lambda: mambakit.AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        with pytest.raises(CheckpointError) as error:
            load()
        told.append(str(error.value).replace("InferenceCausalLM", "MambaForCausalLM"))
    assert told[0] == told[1]


def test_weights_that_another_library_packed_are_left_to_transformers():
    config = mambakit.MambaConfig(**BASE, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert not InferenceCausalLM.loads(config)


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba"])
def test_a_field_that_a_file_leaves_out_has_transformers_default(tmp_path, family):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    require_same_configuration(InferenceConfig.of(tmp_path), mambakit.AutoConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize("changed", [
    {"hidden_act": "gelu"}, {"a_field_of_nobody": 1}, {"intermediate_size": 7}, {"return_dict": None},
    {"time_step_min": 0.5}, {"mixer_rms_eps": 1e-6}, {"quantization_config": {"quant_method": "bitsandbytes"}},
    {"model_type": "bimamba"},
])  # fmt: skip
def test_what_is_left_to_transformers(tmp_path, changed):
    save_tiny(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    assert InferenceConfig.of(tmp_path) is None


def test_settings_of_generation_are_left_to_transformers(tmp_path):
    save_tiny(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [3, 5], "transformers_version": "5.17.0"}))
    assert InferenceConfig.of(tmp_path).generation.eos_token_id == [3, 5]
    path.write_text(json.dumps({"eos_token_id": 3, "temperature": 0.7}))
    assert InferenceConfig.of(tmp_path) is None
    path.write_text(json.dumps({"eos_token_id": "3"}))
    with pytest.raises(CheckpointError, match="eos_token_id is '3'"):
        InferenceConfig.of(tmp_path)


def test_the_files_may_change_afterwards(tmp_path):
    """Weights are copied: a file's own memory would change, or end the process, with the file."""
    save(tmp_path)
    ours, _ = both(tmp_path, "float32")
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
