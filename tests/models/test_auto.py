"""AutoConfig, AutoModel*, AutoTokenizer: the class that the checkpoint asks for, and nothing unknown is swallowed."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

import mambakit
from mambakit import CheckpointError
from tests.models.configurations import pair
from tests.models.tiny import save_tiny

CLASSES = {
    "plain": (mambakit.MambaModel, mambakit.MambaForCausalLM, mambakit.MambaForSequenceClassification),
    "falcon": (
        mambakit.FalconMambaModel, mambakit.FalconMambaForCausalLM, mambakit.FalconMambaForSequenceClassification,
    ),
}  # fmt: skip
AUTO = (mambakit.AutoModel, mambakit.AutoModelForCausalLM, mambakit.AutoModelForSequenceClassification)


@pytest.mark.parametrize("name", CLASSES)
def test_the_class_the_checkpoint_asks_for(name, tmp_path):
    ours, theirs = pair(name)
    theirs.save_pretrained(tmp_path)
    config = mambakit.AutoConfig.from_pretrained(tmp_path)
    assert type(config) is type(ours.config)
    for auto, wanted in zip(AUTO, CLASSES[name], strict=True):
        assert type(auto.from_pretrained(tmp_path)) is wanted
        assert type(auto.from_config(config)) is wanted
        loaded = auto.from_pretrained(tmp_path, config=config, dtype=torch.bfloat16)
        assert type(loaded) is wanted
        assert loaded.dtype == torch.bfloat16
    assert type(mambakit.AutoModel.from_pretrained(tmp_path, config=str(tmp_path))) is CLASSES[name][0]


def test_fields_override_and_the_unknown_raises(tmp_path):
    pair("plain")[0].save_pretrained(tmp_path)
    assert mambakit.AutoConfig.from_pretrained(tmp_path, use_cache=False).use_cache is False
    assert mambakit.AutoModel.from_pretrained(tmp_path, use_cache=False).config.use_cache is False
    with pytest.raises(TypeError, match="use_cahce"):
        mambakit.AutoConfig.from_pretrained(tmp_path, use_cahce=False)
    with pytest.raises(TypeError, match="use_cahce"):
        mambakit.AutoModelForCausalLM.from_pretrained(tmp_path, use_cahce=False)


def test_other_architectures(tmp_path):
    transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1).save_pretrained(tmp_path)
    for auto in (mambakit.AutoConfig, *AUTO):
        with pytest.raises(CheckpointError, match="model_type is 'gpt2'; mambakit loads mamba and falcon_mamba"):
            auto.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type is 'gpt2'"):
        mambakit.AutoModel.from_config(transformers.GPT2Config())


def test_a_folder_without_a_tokenizer(tmp_path):
    pair("plain")[0].save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        mambakit.AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="cache does not hold it"):
        mambakit.AutoTokenizer.from_pretrained("someone/not-cached")


def test_device_map(monkeypatch, tmp_path):
    ours, _ = pair("plain")
    ours.save_pretrained(tmp_path)
    pytest.importorskip("accelerate")
    model = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
    assert all(torch.equal(a, b.to(a.device)) for a, b in zip(model.parameters(), ours.parameters(), strict=True))
    monkeypatch.setattr("transformers.integrations.accelerate.is_accelerate_available", lambda: False)
    with pytest.raises(ValueError, match="pip install accelerate"):
        mambakit.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")


def test_whole_numbers_are_real_ones_to_the_tokenizer_too(tmp_path):
    """Other languages write 1.0 as 1; transformers' own reading of the configuration takes no whole number there."""
    save_tiny(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(
        json.dumps({**fields, "time_step_scale": 1, "time_step_max": 1, "time_step_floor": 0, "initializer_range": 1})
    )
    assert mambakit.AutoConfig.from_pretrained(tmp_path).time_step_scale == 1.0
    assert mambakit.AutoTokenizer.from_pretrained(tmp_path)("the cat").input_ids
    assert mambakit.AutoModelForCausalLM.from_pretrained(tmp_path).config.time_step_floor == 0.0
