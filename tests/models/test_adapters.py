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
    for command in (["info", adapters], ["convert", adapters, str(folder / "out")]):
        assert main(command) == 2
        assert "holds adapters, not a model" in capsys.readouterr().err


def test_adapters_without_a_base(folder):
    path = folder / "adapters" / "adapter_config.json"
    for value, message in ((None, "names no base model"), (str(folder / "none"), "none"), (3, "must be a string")):
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": value}))
        with pytest.raises(CheckpointError, match=message):
            mambakit.AutoModelForCausalLM.from_pretrained(folder / "adapters")
