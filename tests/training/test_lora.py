"""Adapters: they train alone, merge exactly, are saved as PEFT's files, and a run with them ends as a plain model."""

from __future__ import annotations

import io
import json

import pytest
import torch
import transformers
from rich.console import Console

import mambakit
from mambakit.training.config import TrainConfig
from mambakit.training.loop import train
from mambakit.training.lora import add_adapters, load_adapters, merge_adapters, save_adapters
from mambakit.training.model import recompute_selection
from tests.models.configurations import pair, tokens, worst
from tests.models.tiny import TEXT, save_tiny

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
EVERY = ["in_proj", "x_proj", "dt_proj", "out_proj"]


def adapted(variant="plain"):
    model = pair(variant)[0]
    ids = tokens(2, 9)
    base = model(ids).logits.detach()
    add_adapters(model, 3, 0.0, EVERY)
    assert torch.equal(model(ids).logits, base), "new adapters change nothing"
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model, ids, base


@pytest.mark.parametrize("variant", ["plain", "use_bias"])
def test_merged_logits_are_equal(variant):
    model, ids, base = adapted(variant)
    out = model(ids).logits.detach()
    assert worst(out, base) > 1e-2
    layers, per_layer = (
        len(model.backbone.layers),
        sum("lora_A" in n for n, _ in model.backbone.layers[0].named_parameters()),
    )
    assert per_layer == len(EVERY)
    assert sum(p.requires_grad for p in model.parameters()) == 2 * per_layer * layers
    cache = model(ids[:, :4], use_cache=True).cache_params
    assert worst(model(ids[:, 4:], cache_params=cache).logits, out[:, 4:]) < 1e-4
    merge_adapters(model)
    assert worst(model(ids).logits, out) < 1e-5  # one rounding of the weights' sum in float32
    plain = pair(variant)[0]
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_adapters_are_saved_alone_and_loaded(tmp_path):
    model, ids, _ = adapted()
    out = model(ids).logits.detach()
    save_adapters(model, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    again = pair("plain")[0]
    merged = {n: p for n, p in model.state_dict().items() if "lora_" not in n}
    again.load_state_dict({n.replace(".base_layer", ""): p for n, p in merged.items()})
    load_adapters(again, tmp_path)
    assert torch.equal(again(ids).logits, out)
    other = mambakit.MambaForCausalLM(mambakit.MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(ValueError, match="do not fit the model"):
        load_adapters(other, tmp_path)
    with pytest.raises(ValueError, match="there are no adapters"):
        load_adapters(other, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapters(pair("plain")[0], tmp_path)


def test_what_peft_itself_reads(tmp_path):
    """Without out_proj, which PEFT refuses for this model type, the files are PEFT's to load."""
    import peft

    model = pair("plain")[0]
    state = {n: p.clone() for n, p in model.state_dict().items()}
    add_adapters(model, 2, 8.0, EVERY[:3])
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    save_adapters(model, tmp_path)
    base = pair("plain")[0]
    base.load_state_dict(state)
    ids = tokens(2, 9)
    assert worst(peft.PeftModel.from_pretrained(base, tmp_path)(ids).logits, model(ids).logits) < 1e-6


def test_recomputing_the_selection_takes_adapters_elsewhere_only():
    model = pair("plain")[0]
    add_adapters(model, 2, 0.0, ["in_proj", "out_proj"])
    recompute_selection(model)
    model = pair("plain")[0]
    add_adapters(model, 2, 0.0, ["x_proj"])
    with pytest.raises(ValueError, match="without adapters on x_proj and dt_proj"):
        recompute_selection(model)


def test_wrong_targets():
    with pytest.raises(
        ValueError, match="'conv1d' is no linear layer; choose among dt_proj, in_proj, out_proj, x_proj"
    ):
        add_adapters(pair("plain")[0], 2, 0.0, ["conv1d"])
    with pytest.raises(ValueError, match="lora_targets is empty"):
        add_adapters(pair("plain")[0], 2, 0.0, [])


@pytest.mark.parametrize("rank", [0, 4])
def test_fine_tuning_a_quantised_checkpoint(tmp_path, rank):
    """The run says in one line that it unpacks the weights, and ends as a plain model that transformers reads."""
    base = save_tiny(tmp_path / "base").quantize("int8", 32)
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    config = TrainConfig(
        train_files=[str(tmp_path / "text.txt")], init_from=str(tmp_path / "base"), lora_rank=rank, sequence_length=32,
        batch_size=4, steps=3, learning_rate=1e-2, log_every=1, eval_every=100, checkpoint_every=0, autocast="float32",
        export_dtype="float32", out=str(tmp_path / "run"),
    )  # fmt: skip
    output = io.StringIO()
    train(config, Console(file=output, width=1000))
    told = [line for line in output.getvalue().splitlines() if "is quantised" in line]
    assert told == [f"{tmp_path / 'base'} is quantised (int8): dequantised to float32, which learns"]
    ids = tokens(1, 9)
    tuned = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert not hasattr(tuned.config, "quantization_config")
    assert tuned.config.tie_word_embeddings
    theirs = transformers.MambaForCausalLM.from_pretrained(tmp_path / "run").eval()
    with torch.no_grad():
        assert worst(theirs(ids).logits, tuned(ids).logits) < 1e-5
        assert worst(tuned(ids).logits, base(ids).logits) > 1e-3
        if rank:
            with pytest.raises(ValueError, match=r"packed weights take no adapters; call model.dequantize\(\) first"):
                load_adapters(base, tmp_path / "run" / "adapter")
            load_adapters(base.dequantize(), tmp_path / "run" / "adapter")
            assert worst(base(ids).logits, tuned(ids).logits) < 1e-5


@pytest.mark.parametrize("rank", [0, 4])
def test_fine_tuning_a_checkpoint(tmp_path, rank):
    """With the checkpoint's own tokenizer; whole, or through adapters that end merged."""
    base = save_tiny(tmp_path / "base")
    (tmp_path / "text.txt").write_text(TEXT * 4, encoding="utf-8")
    config = TrainConfig(
        train_files=[str(tmp_path / "text.txt")], init_from=str(tmp_path / "base"), lora_rank=rank, sequence_length=32,
        batch_size=4, steps=30, learning_rate=2e-2, log_every=5, eval_every=100, checkpoint_every=0, autocast="float32",
        export_dtype="float32", out=str(tmp_path / "run"),
    )  # fmt: skip
    train(config, Console(quiet=True))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.7 * losses[0]
    tuned = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype=torch.float32)
    assert tuned.state_dict().keys() == base.state_dict().keys()
    changed = {n for n, p in tuned.state_dict().items() if not torch.equal(p, base.state_dict()[n])}
    if rank:
        assert {n.split(".")[-2] for n in changed} == set(EVERY)
        load_adapters(base, tmp_path / "run" / "adapter")
        ids = tokens(1, 9)
        assert worst(base(ids).logits, tuned(ids).logits) < 1e-5
    else:
        assert "backbone.layers.0.mixer.A_log" in changed
    same = [mambakit.AutoTokenizer.from_pretrained(tmp_path / f)("The cat — naïve").input_ids for f in ("base", "run")]
    assert same[0] == same[1]
