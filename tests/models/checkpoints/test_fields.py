"""A checkpoint's JSON files: whatever they hold, they make a working configuration or one error that names file and
field."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import pytest

import mambakit
from mambakit import CheckpointError
from mambakit.models.auto import read_any_configuration
from tests.models.tiny import save_tiny

ORIGINAL = {
    "d_model": 32, "n_layer": 2, "vocab_size": 61, "ssm_cfg": {"d_state": 8, "layer": "Mamba1"}, "rms_norm": True,
    "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8, "tie_embeddings": True,
}  # fmt: skip
# What a hand, a program or an accident writes where a value was.
VALUES = [
    None, True, False, 0, -1, 1, 2, 7, 10**6, 2**31, 2**63, 10**30, 1.5, -0.5, 0.0, 24.0, float("nan"), float("inf"),
    float("-inf"), 1e308, "", " ", "24", "auto", "float32", "float99", "mamba", "silu", "softplus", "Blank", "\x00",
    "\ud800", [], [1],
    ["a"], [None], [[]], [""], {}, {"a": 1}, {"0": "a"}, {"": []}, [1, 2, 3], "__class__",
]  # fmt: skip
# Names that a field could be renamed to, or that could be added.
NAMES = [
    "model_type", "dtype", "torch_dtype", "architectures", "hidden_size", "id2label", "label2id", "num_labels",
    "problem_type",
    "quantization_config", "eos_token_id", "per_layer_config", "attn_implementation", "_attn_implementation",
    "output_attentions",
    "intermediate_size", "layer_types", "rope_parameters", "rope_scaling", "rope_theta", "to_dict", "validate",
    "__class__",
    "__init__", "attribute_map", "is_encoder_decoder", "name_or_path", "_name_or_path", "_commit_hash",
    "transformers_version",
    "use_return_dict", "sub_configs", "tie_word_embeddings", "max_length", "temperature", "", "a b", "ssm_cfg",
    "d_model", "expand",
    "num_hidden_layers", "time_step_rank", "_post_init_done", "_output_attentions", "head_dim", "num_heads",
    "embed_dim",
    "_attn_implementation_internal", "get_text_config", "text_config", "keys_to_ignore_at_inference",
    "task_specific_params",
    "pruned_heads", "auto_map", "chunk_size_feed_forward", "return_dict", "output_hidden_states", "base_config_key",
]  # fmt: skip


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("valid")
    save_tiny(folder)
    return json.loads((folder / "config.json").read_text())


def mutated(fields: dict, choice: random.Random) -> dict:
    fields = copy.deepcopy(fields)
    for _ in range(choice.choice([1, 1, 1, 2, 4])):
        names = [*fields, *fields, *NAMES]
        name = choice.choice(names)
        what = choice.random()
        if what < 0.6:
            fields[name] = copy.deepcopy(choice.choice(VALUES))
        elif what < 0.8:
            fields.pop(name, None)
        elif name in fields:
            fields[choice.choice(NAMES)] = fields.pop(name)
        if isinstance(fields.get("ssm_cfg"), dict) and choice.random() < 0.3:
            fields["ssm_cfg"][choice.choice(["d_state", "dt_rank", "dt_min", "bias", "layer", "x"])] = choice.choice(
                VALUES
            )
    return fields


def load_both(folder: Path) -> None:
    mambakit.AutoModelForCausalLM.from_pretrained(folder)
    mambakit.AutoTokenizer.from_pretrained(folder)


def read(folder: Path):
    """The configuration, working: a model of it can be described, and written and read again. Or the error."""
    try:
        config, unused = read_any_configuration(folder)
    except CheckpointError as error:
        return error
    assert unused == {}
    assert type(config) in (mambakit.MambaConfig, mambakit.FalconMambaConfig)
    repr(config)
    json.dumps(config.to_dict())
    if config.num_hidden_layers <= 4 and config.hidden_size * config.expand < 10**6:
        import torch

        with torch.device("meta"):
            mambakit.AutoModelForCausalLM.from_config(config)
    return config


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["transformers", "original"])
def test_random_mutations(layout, valid, tmp_path):
    choice, path = random.Random(1), tmp_path / "config.json"
    refused = 0
    for _ in range(400):
        fields = mutated(valid if layout == "transformers" else ORIGINAL, choice)
        path.write_text(json.dumps(fields))
        try:
            found = read(tmp_path)
        except Exception as error:
            raise AssertionError(f"{fields} gave {type(error).__name__}: {error}") from error
        if isinstance(found, CheckpointError):
            refused += 1
            assert str(path) in str(found)
            assert "\n" not in str(found)
            assert any(
                (repr(name) in str(found)) or (name and name in str(found))
                for name in [*fields, "model_type", "d_model", "n_layer", "time_step_min"]
            ), found
    assert 100 < refused < 390


@pytest.mark.filterwarnings("ignore")
def test_every_field_with_every_value(valid, tmp_path):
    """Each field of the tables, one at a time; all that is refused is refused by the field's own name."""
    from mambakit.models.checkpoints.fields import _CONFIG

    path = tmp_path / "config.json"
    for name in _CONFIG:
        for value in VALUES:
            path.write_text(json.dumps({**valid, name: value}))
            found = read(tmp_path)
            if isinstance(found, CheckpointError):
                assert f"{path}: {name}" in str(found), (name, value, found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": " "}, "dtype is ' '; it must be one of 'float32'"),
        ({"dtype": "floaty"}, "dtype is 'floaty'"),
        ({"torch_dtype": 32}, "torch_dtype is 32"),
        ({"architectures": []}, r"architectures is \[\]; it must be a list of class names that is not empty"),
        ({"architectures": "MambaForCausalLM"}, "architectures is 'MambaForCausalLM'"),
        ({"architectures": [3]}, r"architectures is \[3\]"),
        ({"hidden_size": [24]}, r"hidden_size is \[24\]; it must be a whole number from 1 to 1048576"),
        ({"hidden_size": "24"}, "hidden_size is '24'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 0}, "hidden_size is 0; it must be 1 or more"),
        ({"vocab_size": 10**30}, "vocab_size is 1000000000000000000000000000000; it must be a whole number"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; mambakit loads mamba and falcon_mamba"),
        ({"model_type": ["mamba"]}, r"model_type is \['mamba'\]"),
        ({"quantization_config": []}, r"quantization_config is \[\]; it must be an object"),
        (
            {"quantization_config": {"quant_method": "mambakit", "format": "int3"}},
            "quantization_config.format is 'int3'",
        ),
        ({"quantization_config": {"quant_method": "mambakit", "format": "int8", "group": True}}, "group is True"),
        ({"to_dict": 1}, "'to_dict' is not a field"),
        ({"hidden_act": "sillu"}, "hidden_act is 'sillu'; it must be an activation"),
        ({"use_bias": "false"}, "use_bias is 'false'; it must be true or false"),
        ({"eos_token_id": {"a": 1}}, "eos_token_id is"),
        ({"time_step_min": 0.5}, "time_step_min 0.5 and time_step_max"),
    ],
)  # fmt: skip
def test_the_error_names_file_field_value_and_what_is_expected(changes, message, valid, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**valid, **changes}))
    for load in (
        mambakit.AutoConfig.from_pretrained, mambakit.AutoModelForCausalLM.from_pretrained,
        mambakit.AutoModel.from_pretrained,
        mambakit.MambaForCausalLM.from_pretrained, mambakit.AutoTokenizer.from_pretrained,
        mambakit.MambaConfig.from_pretrained,
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=message) as caught:
            load(tmp_path)
        assert str(tmp_path / "config.json") in str(caught.value)


def test_whole_numbers_stand_for_real_ones(valid, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**valid, "time_step_scale": 1, "initializer_range": 1}))
    config = mambakit.AutoConfig.from_pretrained(tmp_path)
    assert (config.time_step_scale, config.initializer_range) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is truncated or damaged .it is empty"),
        (b"{", "is not valid JSON"),
        (b'{"model_type": "mamba\xff"}', "is not valid JSON"),
        (b"\xef\xbb\xbf{}", "is not valid JSON"),
        ('{"model_type": "mamba"}'.encode("utf-16"), "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b"null", "holds a NoneType, not an object"),
        (b"[]", "holds a list, not an object"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 99\n", "is a Git LFS pointer"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_is_no_object(name, content, message, tmp_path):
    save_tiny(tmp_path, hidden_size=8)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_both(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"])
def test_a_folder_where_a_file_belongs(name, tmp_path):
    save_tiny(tmp_path, hidden_size=8)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match="is a folder, not a file|there are no weights"):
        load_both(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"eos_token_id": "end"}, "eos_token_id is 'end'"),
        ({"eos_token_id": []}, r"eos_token_id is \[\]"),
        ({"max_new_tokens": -5}, "max_new_tokens is -5; it must be 0 or more"),
        ({"top_p": 7}, "top_p is 7; it must be a number from 0 to 1"),
        ({"do_sample": 1}, "do_sample is 1; it must be true or false"),
        ({"to_dict": {}}, "'to_dict' is not a field"),
    ],
)
def test_generation_config(changes, message, tmp_path):
    save_tiny(tmp_path, hidden_size=8)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=rf"generation_config.json: {message}"):
        mambakit.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["{}", '{"model": {}}', '{"version": "1.0", "model": {"type": "Nonsense"}}'])
def test_a_tokenizer_that_is_none(content, tmp_path):
    save_tiny(tmp_path, hidden_size=8)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="tokenizer.json"):
        mambakit.AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["", " ", "\t\n"])
def test_an_empty_name_selects_nothing(name):
    for load in (
        mambakit.AutoModelForCausalLM.from_pretrained, mambakit.MambaForCausalLM.from_pretrained,
        mambakit.AutoConfig.from_pretrained,
        mambakit.AutoTokenizer.from_pretrained, lambda name: mambakit.pipeline(model=name),
        lambda name: mambakit.pipeline(tokenizer=name),
        mambakit.MambaConfig.from_pretrained,
    ):  # fmt: skip
        with pytest.raises(ValueError, match="the name of a checkpoint is empty"):
            load(name)
    with pytest.raises(ValueError, match="task is"):
        mambakit.pipeline(task=name)


def test_empty_places_on_the_hub_are_refused(tmp_path):
    save_tiny(tmp_path, hidden_size=8)
    for option in ("revision", "cache_dir", "token"):
        with pytest.raises(ValueError, match=f"{option} is empty"):
            mambakit.AutoConfig.from_pretrained(tmp_path, **{option: ""})
    with pytest.raises(ValueError, match="dtype"):
        mambakit.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="")
    with pytest.raises(ValueError, match="by a folder or a hub id"):
        mambakit.AutoModelForCausalLM.from_pretrained(None)
