"""Checkpoints without a tokenizer, and the configurations of public models."""

from __future__ import annotations

import json
import logging

import pytest

import mambakit
from mambakit import CheckpointError, cli
from mambakit.models import vocabularies
from mambakit.models.auto import read_any_configuration
from mambakit.models.checkpoints.table import format_of
from mambakit.models.vocabularies import NEOX, STAND_INS, StandIn, stand_in
from tests.models.tiny import save_tiny

# config.json of public checkpoints, as far as it says what a model is, and what is made of it.
STATE_SPACES = {"ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}
HF = {"architectures": ["MambaForCausalLM"], "model_type": "mamba", "state_size": 16, "expand": 2, "conv_kernel": 4}
PUBLIC = {
    "state-spaces/mamba-130m": (
        {"d_model": 768, "n_layer": 24, "vocab_size": 50277, "pad_vocab_size_multiple": 8, **STATE_SPACES},
        ("mamba", "original", 50280),
    ),
    "state-spaces/mamba-2.8b-slimpj": (
        {"d_model": 2560, "n_layer": 64, "vocab_size": 50277, "pad_vocab_size_multiple": 8, **STATE_SPACES},
        ("mamba", "original", 50280),
    ),
    "havenhq/mamba-chat": (
        {"d_model": 2560, "n_layer": 64, "vocab_size": 50277, "pad_vocab_size_multiple": 8, **STATE_SPACES},
        ("mamba", "original", 50280),
    ),
    "xiuyul/mamba-2.8b-zephyr": (
        {"d_model": 2560, "n_layer": 64, "vocab_size": 50280, "pad_vocab_size_multiple": 8, **STATE_SPACES},
        ("mamba", "original", 50280),
    ),
    "JunxiongWang/MambaByte_PG19_972M": (
        {"d_model": 1792, "n_layer": 48, "vocab_size": 256, "pad_vocab_size_multiple": 8, **STATE_SPACES},
        ("mamba", "original", 256),
    ),
    "state-spaces/mamba-1.4b-hf": (
        {**HF, "hidden_size": 2048, "num_hidden_layers": 48, "vocab_size": 50280, "time_step_rank": 128,
         "intermediate_size": 4096, "use_bias": False, "use_conv_bias": True, "hidden_act": "silu",
         "layer_norm_epsilon": 1e-05, "residual_in_fp32": True, "rescale_prenorm_residual": False,
         "time_step_floor": 0.0001, "time_step_init_scheme": "random", "time_step_max": 0.1, "time_step_min": 0.001,
         "time_step_scale": 1.0, "torch_dtype": "float32", "use_cache": True, "eos_token_id": 0, "bos_token_id": 0,
         "pad_token_id": 0, "n_layer": 48, "d_model": 2048, "d_inner": 4096, "fused_add_norm": True,
         "initializer_range": 0.1, "pad_vocab_size_multiple": 8, "rms_norm": True, "ssm_cfg": {}},
        ("mamba", "transformers", 50280),
    ),
    "tiiuae/falcon-mamba-7b-instruct": (
        {"architectures": ["FalconMambaForCausalLM"], "model_type": "falcon_mamba", "hidden_size": 4096,
         "num_hidden_layers": 64, "vocab_size": 65024, "state_size": 16, "expand": 16, "conv_kernel": 4,
         "intermediate_size": 8192, "time_step_rank": 256, "mixer_rms_eps": 1e-06, "tie_word_embeddings": False,
         "bos_token_id": 0, "eos_token_id": 11, "pad_token_id": 11, "residual_in_fp32": True,
         "rescale_prenorm_residual": False, "torch_dtype": "bfloat16", "use_mambapy": False},
        ("falcon_mamba", "transformers", 65024),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_public_configurations_are_recognised(name, tmp_path):
    written, (model_type, format, size) = PUBLIC[name]
    (tmp_path / "config.json").write_text(json.dumps(written))
    config, _ = read_any_configuration(tmp_path)
    assert (config.model_type, format_of(tmp_path, written).name, config.vocab_size) == (model_type, format, size)
    assert config.hidden_size == written.get("hidden_size", written.get("d_model"))


@pytest.mark.parametrize(("written", "said"), [
    ({**PUBLIC["state-spaces/mamba-130m"][0], "ssm_cfg": {"layer": "Mamba2"}}, "ssm_cfg.layer is 'Mamba2'"),
    ({"model_type": "caduceus", "d_model": 256}, "model_type is 'caduceus'; mambakit loads"),
    ({"model_type": "mamba2", "hidden_size": 64}, "model_type is 'mamba2'; mambakit loads"),
    ({"model_type": "jamba"}, "model_type is 'jamba'; mambakit loads"),
])  # fmt: skip
def test_others_are_refused_by_name(written, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(CheckpointError, match=said):
        read_any_configuration(tmp_path)


# -- tokenizers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def original(tmp_path):
    """A checkpoint in state-spaces' format without a tokenizer, and a folder that plays GPT-NeoX's on the hub."""
    model = save_tiny(tmp_path / "whole", vocab_size=304)
    model.save_original(tmp_path / "original")
    return tmp_path


@pytest.fixture
def neox(original, monkeypatch):
    there = StandIn(str(original / "whole"), 300, 310, "the one of this test", True)
    monkeypatch.setattr(vocabularies, "STAND_INS", (there, *STAND_INS))
    return original


def test_the_one_that_the_vocabulary_asks_for(neox, caplog):
    with caplog.at_level(logging.WARNING, "mambakit"):
        tokenizer = mambakit.AutoTokenizer.from_pretrained(neox / "original")
    assert "original holds no tokenizer; with 304 tokens it takes the one of this test" in caplog.text
    whole = mambakit.AutoTokenizer.from_pretrained(neox / "whole")
    assert tokenizer("The cat sat").input_ids == whole("The cat sat").input_ids


def test_the_command_runs_at_once_and_says_so(neox, capsys, caplog):
    arguments = ["--greedy", "--max-new-tokens", "5", "The cat"]
    assert cli.main(["generate", "--model", str(neox / "original"), *arguments]) == 0
    first = capsys.readouterr().out
    assert "holds no tokenizer" in caplog.text
    caplog.clear()
    named = ["--tokenizer", str(neox / "whole")]
    assert cli.main(["generate", "--model", str(neox / "original"), *named, *arguments]) == 0
    assert capsys.readouterr().out == first
    assert "holds no tokenizer" not in caplog.text


def test_sizes():
    assert stand_in("x", 50277) == stand_in("x", 50280) == NEOX
    assert stand_in("x", 256) == "raw-bytes"
    with pytest.raises(CheckpointError, match="12 tokens are likely letters of DNA.*--tokenizer hyena-dna"):
        stand_in("x", 12)
    with pytest.raises(CheckpointError, match="32,000 tokens are no known one's; .*--tokenizer FOLDER"):
        stand_in("x", 32000)


def test_without_a_connection_the_error_says_what_to_do(original, monkeypatch):
    monkeypatch.setattr(vocabularies, "STAND_INS", (StandIn("nobody/nothing", 300, 310, "nobody's", True),))
    with pytest.raises(CheckpointError, match="cannot be had: .*offline.*--tokenizer FOLDER"):
        mambakit.AutoTokenizer.from_pretrained(original / "original")


def test_raw_bytes():
    tokenizer = mambakit.AutoTokenizer.from_pretrained("raw-bytes")
    text = "naïve 日本\n"
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.eos_token is None


def test_letters_of_dna():
    tokenizer = mambakit.AutoTokenizer.from_pretrained("hyena-dna")
    assert tokenizer("ACGTN acgt\nR").input_ids == [7, 8, 9, 10, 11, 7, 8, 9, 10, 6]
    assert tokenizer.decode([7, 8, 9]) == "ACG"
    assert (tokenizer.mask_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) == (3, 4, 1)
