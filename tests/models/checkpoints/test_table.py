"""The table of formats: which one a folder has, names both ways, and a format that is only a line more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import mambakit
from mambakit.models.checkpoints import convert, describe, table
from mambakit.models.checkpoints.plain import common_dtype, dtype_and_count, load_plain
from mambakit.models.checkpoints.storage import read_config
from tests.models.configurations import pair, tokens

FORMATS = {format.name: format for format in table.FORMATS}


def write(name: str, folder: Path):
    model = pair("plain")[0]
    if FORMATS[name].packed:
        model.quantize("int8")
    FORMATS[name].write(model, folder)
    return model


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_format_writes_it_detects_and_reads(name, tmp_path):
    place = tmp_path / ("model.gguf" if name == "gguf" else "model")
    written = write(name, place)
    config_json, _ = read_config(place)
    assert table.format_of(place, config_json) is FORMATS[name]
    assert describe(place).format == name
    assert describe(place).parameters == written.num_parameters()
    loaded = mambakit.AutoModelForCausalLM.from_pretrained(place)
    ids = tokens(1, 7)
    with torch.no_grad():
        logits, expected = loaded(ids).logits, written.eval()(ids).logits
    if name == "gguf":  # it holds A, not its logarithm, which is not the same float32 again
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    else:
        assert torch.equal(logits, expected)


@pytest.mark.parametrize("name", FORMATS)
def test_names_both_ways(name):
    format = FORMATS[name]
    for parameter in pair("plain")[0].state_dict():
        assert format.name_in_model(format.name_in_file(parameter)) == parameter


def test_plain_formats_alone_are_converted_to(tmp_path):
    assert table.PLAIN == ("transformers", "original", "gguf")
    with pytest.raises(ValueError, match="format is 'packed'; choose 'transformers' or 'original' or 'gguf'"):
        convert(tmp_path, tmp_path / "out", "packed")


class ToyFormat:
    """config.json under the key ``toy``; tensors' names with a prefix."""

    name = "toy"
    packed = False
    holds_tokenizers = True

    def detect(self, folder, config_json):
        return "toy" in config_json

    def read_configuration(self, config_json, path):
        return config_json["toy"]

    def name_in_model(self, stored):
        return stored.removeprefix("toy.")

    def name_in_file(self, name):
        return f"toy.{name}"

    def load(self, loading):
        return load_plain(loading, self)

    def write(self, model, folder, *args, **options):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"toy": model.config.to_dict()}))
        state = {self.name_in_file(n): t for n, t in model.state_dict().items() if n != "lm_head.weight"}
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    def count(self, stored, tensor, config):
        return dtype_and_count(tensor)

    def dtype(self, found):
        return common_dtype(found)


def test_a_format_is_a_line_in_the_table(monkeypatch, tmp_path):
    written = pair("plain")[0]
    toy = ToyFormat()
    toy.write(written, tmp_path / "toy")
    with pytest.raises(mambakit.CheckpointError, match="model_type is None"):
        describe(tmp_path / "toy")
    monkeypatch.setattr(table, "FORMATS", (toy, *table.FORMATS))
    assert describe(tmp_path / "toy").format == "toy"
    loaded = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / "toy")
    for name, tensor in written.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    with pytest.raises(mambakit.CheckpointError, match="holds no tokenizer .tokenizer.json."):
        mambakit.AutoTokenizer.from_pretrained(tmp_path / "toy")
    convert(tmp_path / "toy", tmp_path / "original", "original")
    assert describe(tmp_path / "original").format == "original"
