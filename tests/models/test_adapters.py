"""PEFT's own wrapper on every layer, heads that are tied, and folders of adapters in from_pretrained."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch

import mambakit
from mambakit import CheckpointError
from mambakit.cli import main
from mambakit.models.adapters import get_peft_model, load_peft_model, merge_adapters
from mambakit.models.checkpoints import convert
from tests.models.configurations import pair, tokens, worst
from tests.models.tiny import save_tiny

pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS = {
    "all-linear": "all-linear", "out_proj": ["out_proj"], "head": ["lm_head"], "embeddings": ["embeddings"],
    "layers and head": ["in_proj", "out_proj", "lm_head"],
}  # fmt: skip


def lora(targets, **fields):
    return peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False, **fields)


@pytest.mark.parametrize("name", ["plain", "untied", "falcon"])
@pytest.mark.parametrize("case", TARGETS)
def test_get_peft_model(case, name, tmp_path):
    """Every adapter learns, is saved and loaded by PEFT's own files, and merges into what it computed."""
    base = pair(name)[0]
    ids = tokens(2, 9)
    with torch.no_grad():
        plain = base(ids).logits
    wrapped = get_peft_model(copy.deepcopy(base), lora(TARGETS[case]))
    assert isinstance(wrapped, peft.PeftModel)
    wrapped(ids, labels=ids).loss.backward()
    learning = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    assert learning
    assert all(p.grad is not None and p.grad.any() for p in learning.values()), "an adapter that learns nothing"
    if case == "all-linear":
        layers = {n.split(".mixer.")[1].split(".")[0] for n in learning}
        assert layers == {"in_proj", "x_proj", "dt_proj", "out_proj"}
    with torch.no_grad():
        adapted = wrapped.eval()(ids).logits
        assert worst(adapted, plain) > 1e-3
        wrapped.save_pretrained(tmp_path)
        loaded = load_peft_model(copy.deepcopy(base), tmp_path).eval()
        assert worst(loaded(ids).logits, adapted) < 1e-6
        merged = wrapped.merge_and_unload()
        assert worst(merged(ids).logits, adapted) < 1e-5
    assert type(merged).config_class.model_type == base.config.model_type
    merged.save_pretrained(tmp_path / "merged")
    again = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, merged(ids).logits)


def test_the_model_type_is_back_after_an_error():
    model = pair("plain")[0]
    with pytest.raises(ValueError, match="not found"):
        get_peft_model(model, lora(["no_such_layer"]))
    assert model.config.model_type == mambakit.MambaConfig.model_type == "mamba"


@pytest.fixture
def folder(tmp_path):
    """A base model and a folder of adapters for it."""
    base = save_tiny(tmp_path / "base", hidden_size=32)
    base.config.name_or_path = base.name_or_path = str(tmp_path / "base")
    base = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, lora("all-linear")).save_pretrained(tmp_path / "adapters")
    return tmp_path


def test_from_pretrained_of_adapters(folder):
    ids = tokens(1, 9)
    model = mambakit.AutoModelForCausalLM.from_pretrained(folder / "adapters").eval()
    base = mambakit.AutoModelForCausalLM.from_pretrained(folder / "base")
    expected = load_peft_model(base, folder / "adapters").eval()
    with torch.no_grad():
        assert worst(model(ids).logits, expected(ids).logits) < 1e-6
        direct = mambakit.MambaForCausalLM.from_pretrained(folder / "adapters", dtype=torch.float64).eval()
        assert direct.dtype == torch.float64
        assert worst(direct(ids).logits, expected(ids).logits) < 1e-5
        merge_adapters(model)
        assert worst(model(ids).logits, expected(ids).logits) < 1e-5
    assert mambakit.AutoConfig.from_pretrained(folder / "adapters").hidden_size == 32
    assert mambakit.AutoTokenizer.from_pretrained(folder / "adapters")("The cat").input_ids


def test_commands_with_adapters(folder, capsys):
    adapters = str(folder / "adapters")
    assert main(["generate", "The cat", "--model", adapters, "--max-new-tokens", "3", "--temperature", "0"]) == 0
    assert capsys.readouterr().out
    assert main(["info", adapters]) == 2
    assert "holds adapters, not a model" in capsys.readouterr().err
    for command in ("convert", "quantize"):
        target = folder / command
        assert main([command, adapters, str(target)]) == 0
        assert main(["generate", "The cat", "--model", str(target), "--max-new-tokens", "3"]) == 0


def test_adapters_without_a_base(folder):
    path = folder / "adapters" / "adapter_config.json"
    for value, message in ((None, "names no base model"), (str(folder / "none"), "none"), (3, "must be a string")):
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": value}))
        with pytest.raises(CheckpointError, match=message):
            mambakit.AutoModelForCausalLM.from_pretrained(folder / "adapters")


def test_what_is_loaded_from_adapters_is_saved_as_adapters(folder, tmp_path):
    model = mambakit.AutoModelForCausalLM.from_pretrained(folder / "adapters").eval()
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "adapter_config.json").is_file()
    again = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    ids = tokens(1, 5)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    model.save_pretrained(tmp_path / "gathered", state_dict=model.state_dict())  # as Trainer does
    gathered = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / "gathered").eval()
    with torch.no_grad():
        assert torch.equal(gathered(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="adapters are saved without options; drop max_shard_size"):
        model.save_pretrained(tmp_path / "third", max_shard_size="1MB")
    for save in (model.save_original, model.save_gguf):
        with pytest.raises(CheckpointError, match="has an adapter, which the format cannot hold; merge_adapters"):
            save(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name in ("third", "other")) == []


def test_a_whole_copy_of_the_head_is_trained(tmp_path):
    save_tiny(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["in_proj"], modules_to_save=["lm_head"], r=2)
    model = get_peft_model(mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    ids = tokens(1, 5)
    model(ids, labels=ids).loss.backward()
    trained = [name for name, weight in model.named_parameters() if weight.grad is not None]
    assert any("lm_head" in name for name in trained)


@pytest.mark.parametrize("format", ["transformers", "gguf"])
def test_convert_merges_adapters(folder, format):
    ids = tokens(1, 9)
    adapted = mambakit.AutoModelForCausalLM.from_pretrained(folder / "adapters").eval()
    target = convert(folder / "adapters", folder / ("merged" if format == "transformers" else "merged.gguf"), format)
    merged = mambakit.AutoModelForCausalLM.from_pretrained(target).eval()
    assert not hasattr(merged, "peft_config")
    with torch.no_grad():
        assert worst(merged(ids).logits, adapted(ids).logits) < 1e-5


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_adapters_of_another_depth_are_refused(tmp_path, layers):
    sizes = {"vocab_size": 32, "hidden_size": 16}
    two = mambakit.MambaForCausalLM(mambakit.MambaConfig(**sizes, num_hidden_layers=2))
    get_peft_model(two, lora(["in_proj"])).save_pretrained(tmp_path)
    other = mambakit.MambaForCausalLM(mambakit.MambaConfig(**sizes, num_hidden_layers=layers))
    if layers == 2:
        load_peft_model(other, tmp_path)
        return
    with pytest.raises(ValueError, match="do not fit the model"):
        load_peft_model(other, tmp_path)


def test_a_language_models_adapters_on_a_backbone(folder):
    with pytest.raises(ValueError, match=r"a language model's: load it with AutoModelForCausalLM"):
        mambakit.AutoModel.from_pretrained(folder / "adapters")
