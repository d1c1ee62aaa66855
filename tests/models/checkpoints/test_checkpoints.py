"""Checkpoints in both formats: the same numbers back, and a clear refusal of whatever is not one."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import mambakit
from mambakit import CheckpointError
from mambakit.models.checkpoints import convert, describe
from tests.models.configurations import pair, tokens, worst
from tests.models.tiny import save_tiny

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = ["plain", "use_bias", "untied", "odd_everything", "falcon", "falcon_odd"]


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.mark.parametrize("name", NAMES)
def test_what_transformers_saves_loads_here(name, tmp_path):
    ours, theirs = pair(name)
    theirs.save_pretrained(tmp_path)
    loaded = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(ours)
    ids = tokens(2, 9)
    assert worst(logits(loaded, ids), logits(theirs, ids)) < 1e-5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_here_loads_in_transformers(name, dtype, tmp_path):
    ours, theirs = pair(name)
    ours.to(dtype).save_pretrained(tmp_path)
    loaded = type(theirs).from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = tokens(2, 9)
    again = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert again.dtype == dtype
    assert again.backbone.layers[0].mixer.A_log.dtype == torch.float32
    for parameter, stored in zip(again.parameters(), ours.parameters(), strict=True):
        assert torch.equal(parameter, stored)
    assert worst(logits(loaded, ids), logits(again.float(), ids)) < 1e-5


def test_shards_and_the_index(tmp_path):
    ours = pair("plain")[0]
    ours.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    ids = tokens(1, 7)
    assert torch.equal(logits(mambakit.MambaForCausalLM.from_pretrained(tmp_path), ids), logits(ours, ids))
    missing = sorted(tmp_path.glob("model-*.safetensors"))[0]
    missing.unlink()
    with pytest.raises(CheckpointError, match=f"names {missing.name}, which is not there"):
        mambakit.MambaForCausalLM.from_pretrained(tmp_path)


def original_folder(folder, model, **changes):
    """A folder as state-spaces publishes them: no model_type, vocabulary not padded, the head stored beside its
    twin."""
    state = {k.replace("embeddings.", "embedding."): v for k, v in model.state_dict().items()}
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "pytorch_model.bin")
    fields = {
        "d_model": 32, "n_layer": 2, "vocab_size": 61, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True,
        "fused_add_norm": True, "pad_vocab_size_multiple": 8, **changes,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))


def original_model():
    model = mambakit.MambaForCausalLM(mambakit.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2))
    return model.eval()


def test_the_original_format(tmp_path):
    model = original_model()
    original_folder(tmp_path / "a", model)
    loaded = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    ids = tokens(2, 9)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert loaded.config.vocab_size == 64
    assert loaded.config.name_or_path == str(tmp_path / "a")
    theirs = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2))
    theirs.load_state_dict(loaded.state_dict())
    assert worst(logits(loaded, ids), logits(theirs.eval(), ids)) < 1e-5
    half = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    assert half.backbone.layers[0].mixer.in_proj.weight.dtype == torch.bfloat16
    assert half.backbone.layers[0].mixer.A_log.dtype == torch.float32


def test_the_original_formats_ssm_fields(tmp_path):
    fields = {
        "state_size": 8,
        "conv_kernel": 3,
        "expand": 3,
        "time_step_rank": 5,
        "use_bias": True,
        "use_conv_bias": False,
    }
    config = mambakit.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, **fields)
    model = mambakit.MambaForCausalLM(config).eval()
    ssm = {"d_state": 8, "d_conv": 3, "expand": 3, "dt_rank": 5, "bias": True, "conv_bias": False}
    original_folder(tmp_path / "a", model, ssm_cfg=ssm)
    loaded = mambakit.MambaForCausalLM.from_pretrained(tmp_path / "a")
    ids = tokens(1, 8)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    for field, value in fields.items():
        assert getattr(loaded.config, field) == value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ssm_cfg": {"layer": "Mamba2"}}, "ssm_cfg.layer is 'Mamba2'"),
        ({"d_intermediate": 128}, "d_intermediate is 128"),
        ({"attn_layer_idx": [1]}, r"attn_layer_idx is \[1\]"),
        ({"rms_norm": False}, "rms_norm is False"),
        ({"surprise": 1}, "surprise = 1 is not a field"),
        ({"d_model": 40}, r"tensor .* has shape"),
        ({"n_layer": 3}, "is missing from pytorch_model.bin"),
        ({"n_layer": 1}, "is not part of MambaForCausalLM"),
    ],
)
def test_original_configurations_that_do_not_fit(changes, message, tmp_path):
    original_folder(tmp_path / "a", original_model(), **changes)
    with pytest.raises(CheckpointError, match=message):
        mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / "a")


def test_there_and_back(tmp_path):
    model = save_tiny(tmp_path / "a", state_size=8)
    convert(tmp_path / "a", tmp_path / "b", "original")
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [
        "config.json", "pytorch_model.bin", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    convert(tmp_path / "b", tmp_path / "c", "transformers", torch.float16)
    back = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / "c", dtype="auto")
    assert back.dtype == torch.float16
    ids = tokens(1, 9)
    assert torch.equal(logits(mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / "b"), ids), logits(model, ids))
    assert mambakit.AutoTokenizer.from_pretrained(tmp_path / "c")("the cat").input_ids
    with pytest.raises(ValueError, match="is not empty"):
        convert(tmp_path / "a", tmp_path / "b", "original")
    with pytest.raises(CheckpointError, match="no field for layer_norm_epsilon"):
        pair("epsilon")[0].save_original(tmp_path / "d")


def test_describe_reads_headers(tmp_path):
    model = save_tiny(tmp_path / "a")
    info = describe(tmp_path / "a")
    assert info.parameters == sum(p.numel() for p in model.parameters())
    assert (info.format, info.architecture, info.tokenizer) == ("transformers", "Mamba", True)
    assert info.state_bytes == model.backbone.new_cache(1).nbytes
    original_folder(tmp_path / "b", original_model())
    info = describe(tmp_path / "b")
    assert info.parameters == sum(p.numel() for p in original_model().parameters())
    assert info.format == "original"


def test_base_models_and_heads(tmp_path):
    model = save_tiny(tmp_path / "a")
    ids = tokens(1, 6)
    base = mambakit.MambaModel.from_pretrained(tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(base.eval()(ids).last_hidden_state, model.backbone(ids).last_hidden_state)
    base.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(mambakit.MambaForCausalLM.from_pretrained(tmp_path / "b"), ids), logits(model, ids))
    classifier = mambakit.AutoModelForSequenceClassification.from_pretrained(tmp_path / "a", num_labels=5)
    assert classifier.score.weight.shape == (5, 24)
    assert torch.equal(classifier.backbone.embeddings.weight, model.backbone.embeddings.weight)
    assert torch.isfinite(classifier.score.weight).all()


# -- what is not a checkpoint ------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    save_tiny(tmp_path / "a")
    return tmp_path / "a"


def load(folder):
    return mambakit.AutoModelForCausalLM.from_pretrained(folder)


def test_truncated_safetensors(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors is truncated or damaged .* fetch it again"):
        load(folder)


def test_missing_unexpected_and_wrong_shaped_tensors(folder):
    path = folder / "model.safetensors"
    good = load_file(path)
    name = "backbone.layers.1.mixer.D"
    save_file({k: v for k, v in good.items() if k != name}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"tensor {name} \(and 0 more\) is missing from model.safetensors"):
        load(folder)
    save_file({**good, "backbone.layers.7.mixer.D": good[name].clone()}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers.7.mixer.D \(and 0 more\) is not part of"):
        load(folder)
    save_file({**good, name: torch.zeros(3)}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name} has shape \(3,\), config.json asks for \(48,\)"):
        load(folder)


def test_a_head_that_is_said_to_be_tied_but_differs(folder):
    path = folder / "model.safetensors"
    good = load_file(path)
    save_file({**good, "lm_head.weight": good["backbone.embeddings.weight"] + 1}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="set tie_word_embeddings to false"):
        load(folder)


def test_pickled_code_is_never_run(tmp_path):
    original_folder(tmp_path / "a", original_model())
    witness = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (witness.write_text, ("ran",))

    torch.save({"backbone.embedding.weight": Evil()}, tmp_path / "a" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled code"):
        load(tmp_path / "a")
    (tmp_path / "a" / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError):
        load(tmp_path / "a")
    assert not witness.exists()


def test_truncated_bin(tmp_path):
    original_folder(tmp_path / "a", original_model())
    path = tmp_path / "a" / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin"):
        load(tmp_path / "a")


def test_no_config_no_weights_no_folder_another_architecture(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "elsewhere")
    with pytest.raises(CheckpointError, match="there are no weights"):
        load(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="model_type is 'llama'; mambakit loads mamba and falcon_mamba"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"there is no config.json"):
        load(folder)
    with pytest.raises(CheckpointError, match="hub's cache does not hold it"):
        load("state-spaces/no-such-model")
    with pytest.raises(CheckpointError, match="neither a folder here nor a hub id"):
        load("no/such/folder/here")


def test_the_wrong_class(tmp_path):
    pair("falcon")[0].save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="use AutoModelForCausalLM"):
        mambakit.MambaForCausalLM.from_pretrained(tmp_path)


def test_an_original_folder_without_a_tokenizer(tmp_path):
    original_folder(tmp_path / "a", original_model())
    with pytest.raises(CheckpointError, match="no tokenizer.*--tokenizer FOLDER"):
        mambakit.AutoTokenizer.from_pretrained(tmp_path / "a")


def test_the_neox_tokenizer(data_folder):
    tokenizer = mambakit.AutoTokenizer.from_pretrained(data_folder / "tokenizer" / "neox")
    assert tokenizer("Hey how are you doing?").input_ids == [8262, 849, 403, 368, 2509, 32]
    assert tokenizer.eos_token_id == 0


def test_saving_leaves_nothing_temporary(tmp_path):
    original_model().save_original(tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["config.json", "pytorch_model.bin"]
    shutil.rmtree(tmp_path / "a")
