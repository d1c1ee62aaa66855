"""Every layout of weights on disk gives stock transformers' numbers; a hub cache, dtypes, heads, saving."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import transformers

import mambakit
from mambakit import CheckpointError
from mambakit.cli import main
from mambakit.models.checkpoints import convert
from tests.models.configurations import pair, tokens, worst
from tests.models.tiny import save_tiny


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.fixture
def reports():
    """What transformers logs while the test runs, as one list of messages."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


# -- .bin --------------------------------------------------------------------------------------------------------------


def bin_folder(folder: Path, model, layout: str) -> None:
    """``model``'s configuration and its weights as transformers wrote them before safetensors."""
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    state = dict(model.state_dict())
    if layout != "sharded":
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=layout == "single")
        return
    weight_map = {name: f"pytorch_model-0000{i % 3 + 1}-of-00003.bin" for i, name in enumerate(state)}
    for file in set(weight_map.values()):
        torch.save({name: state[name].clone() for name in state if weight_map[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("layout", ["single", "before torch 1.6", "sharded"])
@pytest.mark.parametrize("name", ["use_bias", "untied", "falcon"])
def test_bin(layout, name, tmp_path):
    _, theirs = pair(name)
    theirs.generation_config.eos_token_id = 7  # not the configuration's
    bin_folder(tmp_path, theirs, layout)
    loaded = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tokens(2, 9)
    assert worst(logits(loaded, ids), logits(theirs, ids)) < 1e-5
    assert loaded.generation_config.eos_token_id == 7
    assert loaded.config.name_or_path == str(tmp_path)
    missing = min(tmp_path.glob("pytorch_model*.bin"))
    missing.unlink()
    with pytest.raises(CheckpointError, match=f"names {missing.name}|there are no weights"):
        mambakit.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_published_configuration(tmp_path):
    """config.json of state-spaces/mamba-130m-hf carries both formats' fields; transformers' are the ones that count."""
    _, theirs = pair("plain")
    theirs.save_pretrained(tmp_path)
    fields = {
        "architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "d_inner": 64, "d_model": 32,
        "eos_token_id": 0, "expand": 2, "fused_add_norm": True, "hidden_act": "silu", "hidden_size": 32,
        "initializer_range": 0.1, "intermediate_size": 64, "layer_norm_epsilon": 1e-05, "model_type": "mamba",
        "n_layer": 2,
        "num_hidden_layers": 2, "pad_token_id": 0, "pad_vocab_size_multiple": 8, "residual_in_fp32": True,
        "rescale_prenorm_residual": False, "rms_norm": True, "ssm_cfg": {}, "state_size": 16, "time_step_floor": 0.0001,
        "time_step_init_scheme": "random", "time_step_max": 0.1, "time_step_min": 0.001, "time_step_rank": 2,
        "time_step_scale": 1.0, "torch_dtype": "float32", "transformers_version": "4.39.0.dev0", "use_bias": False,
        "use_cache": True, "use_conv_bias": True, "vocab_size": 61,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ids = tokens(2, 9)
    stock = transformers.MambaForCausalLM.from_pretrained(tmp_path)
    ours = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert worst(logits(ours, ids), logits(stock, ids)) < 1e-5
    assert ours.config.vocab_size == 61


# -- dtype -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["safetensors", "single"])
@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, torch.float32])
def test_dtype_is_honoured(layout, argument, dtype, tmp_path):
    ours, _ = pair("plain")
    if layout == "safetensors":
        ours.save_pretrained(tmp_path)
    else:
        bin_folder(tmp_path, ours, layout)
    loaded = mambakit.MambaForCausalLM.from_pretrained(tmp_path, **{argument: dtype})
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    mixer = loaded.backbone.layers[0].mixer
    assert loaded.lm_head.weight.dtype == mixer.in_proj.weight.dtype == wanted
    assert {p.dtype for p in (mixer.A_log, mixer.D, mixer.dt_proj.bias)} == {torch.float32}


@pytest.mark.parametrize("layout", ["safetensors", "single"])
def test_auto_is_the_dtype_of_most_weights_where_the_configuration_names_none(layout, tmp_path):
    ours, _ = pair("plain")
    ours.to(torch.bfloat16)
    if layout == "safetensors":
        ours.save_pretrained(tmp_path)
    else:
        bin_folder(tmp_path, ours, layout)
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert mambakit.MambaForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16


# -- heads -------------------------------------------------------------------------------------------------------------


def test_a_new_head_is_told_once_and_nothing_else_is_new(reports, tmp_path):
    _, theirs = pair("plain")
    theirs.save_pretrained(tmp_path)
    _, info = mambakit.MambaForSequenceClassification.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert set(info["missing_keys"]) == {"score.weight"}
    told = [message for message in reports if "score.weight" in message]
    assert len(told) == 1
    assert "MISSING" in told[0]
    reports.clear()
    mambakit.MambaForCausalLM.from_pretrained(tmp_path)
    mambakit.MambaModel.from_pretrained(tmp_path)
    assert not reports


# -- a hub cache -------------------------------------------------------------------------------------------------------

NAME = "someone/tiny-mamba"


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """A cache with one repository: "main" has a model in its root, "v2" another in the folder "inner"."""
    root = tmp_path_factory.mktemp("hub")
    repository = root / "models--someone--tiny-mamba"
    save_tiny(repository / "snapshots" / "a")
    save_tiny(repository / "snapshots" / "b" / "inner", state_size=8)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a")
    (repository / "refs" / "v2").write_text("b")
    original = root / "models--someone--original" / "snapshots" / "c"
    mambakit.MambaForCausalLM(mambakit.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1)).save_original(
        original
    )
    (root / "models--someone--original" / "refs").mkdir()
    (root / "models--someone--original" / "refs" / "main").write_text("c")
    return root


def test_a_hub_id_in_a_cache(hub):
    model = mambakit.AutoModelForCausalLM.from_pretrained(NAME, cache_dir=hub, local_files_only=True)
    assert (model.config.state_size, model.config.name_or_path) == (16, NAME)
    inner = mambakit.MambaForCausalLM.from_pretrained(NAME, cache_dir=hub, revision="v2", subfolder="inner")
    assert inner.config.state_size == 8
    assert mambakit.AutoConfig.from_pretrained(NAME, cache_dir=hub, revision="v2", subfolder="inner").state_size == 8
    assert mambakit.AutoTokenizer.from_pretrained(NAME, cache_dir=hub)("the cat").input_ids
    with pytest.raises(CheckpointError, match="revision 'v3'.* while offline"):
        mambakit.AutoModelForCausalLM.from_pretrained(NAME, cache_dir=hub, revision="v3")
    with pytest.raises(CheckpointError, match="there is no config.json in"):
        mambakit.AutoModelForCausalLM.from_pretrained(NAME, cache_dir=hub, subfolder="absent")


def test_an_original_hub_id_is_told_where_its_tokenizer_is(hub):
    assert mambakit.AutoModelForCausalLM.from_pretrained("someone/original", cache_dir=hub).config.hidden_size == 16
    with pytest.raises(CheckpointError, match="someone/original holds no tokenizer.*--tokenizer FOLDER"):
        mambakit.AutoTokenizer.from_pretrained("someone/original", cache_dir=hub)


# -- out ---------------------------------------------------------------------------------------------------------------


def test_special_tokens_survive_the_original_format(tmp_path):
    model, _ = pair("plain")
    model.generation_config.eos_token_id = [3, 5]
    model.save_original(tmp_path)
    assert mambakit.AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == [3, 5]


@pytest.mark.parametrize("name", ["use_bias", "odd_everything", "untied", "no_conv_bias"])
def test_the_original_format_is_what_state_spaces_reads(name, tmp_path):
    """Keys, shapes and fields as mamba_ssm's MambaLMHeadModel(MambaConfig(**json)) has them, and the same numbers."""
    model, theirs = pair(name)
    model.save_original(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields.keys() == {
        "d_model", "d_intermediate", "n_layer", "vocab_size", "ssm_cfg", "attn_layer_idx", "attn_cfg", "rms_norm",
        "residual_in_fp32", "fused_add_norm", "pad_vocab_size_multiple", "tie_embeddings",
    }  # fmt: skip
    assert fields["vocab_size"] % fields["pad_vocab_size_multiple"] == 0
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert "backbone.embedding.weight" in state
    assert "lm_head.weight" in state
    theirs.load_state_dict({k.replace("embedding.", "embeddings."): v for k, v in state.items()}, strict=True)
    ids = tokens(2, 9)
    assert worst(logits(mambakit.MambaForCausalLM.from_pretrained(tmp_path), ids), logits(theirs, ids)) < 1e-5


def test_an_interrupted_save_leaves_the_old_weights(monkeypatch, tmp_path):
    model, _ = pair("plain")
    model.save_original(tmp_path)
    before = (tmp_path / "pytorch_model.bin").read_bytes()

    def full_disk(state, path):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        model.save_original(tmp_path)
    assert (tmp_path / "pytorch_model.bin").read_bytes() == before


def test_convert_loses_nothing_in_silence(tmp_path):
    save_tiny(tmp_path / "a")
    mambakit.MambaForSequenceClassification.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"holds a classifier \(score.weight\)"):
        convert(tmp_path / "b", tmp_path / "c", "transformers")
    pair("falcon")[0].save_pretrained(tmp_path / "f")
    with pytest.raises(CheckpointError, match="Mamba models only, not 'falcon_mamba'"):
        convert(tmp_path / "f", tmp_path / "c", "original")
    with pytest.raises(ValueError, match="format is 'ggml'; choose"):
        convert(tmp_path / "a", tmp_path / "c", "ggml")
    assert not (tmp_path / "c").exists()
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    with pytest.raises(ValueError, match="is not empty; name a new folder"):
        convert(tmp_path / "a", tmp_path / "c", "original")


@pytest.mark.parametrize("command", ["quantize", "export"])
def test_commands_refuse_a_classifier_whose_head_they_would_lose(command, tmp_path, capsys):
    model = mambakit.MambaForTokenClassification(
        mambakit.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64)
    )
    model.save_pretrained(tmp_path / "tags")
    more = ["--to", "onnx"] if command == "export" else []
    assert main([command, str(tmp_path / "tags"), str(tmp_path / "out"), *more]) == 2
    assert f"holds a classifier (score.weight), which {command} would lose" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_width_that_other_formats_do_not_hold_is_refused(tmp_path):
    config = mambakit.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64, intermediate_size=50)
    model = mambakit.MambaForCausalLM(config)
    for save in (model.save_gguf, model.save_original):
        with pytest.raises(CheckpointError, match="intermediate_size is 50; .* holds expand . hidden_size alone"):
            save(tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())
