"""Damaged and misfit files: every one is a CheckpointError that names the file and the remedy, before anything is
loaded."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mambakit
from mambakit import CheckpointError
from mambakit.models.checkpoints import describe
from mambakit.models.checkpoints.storage import read_bin
from tests.models.configurations import pair

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 99\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pair("plain")[0].save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path):
    return mambakit.AutoModelForCausalLM.from_pretrained(folder)


def as_bin(folder: Path, zipped: bool = True) -> Path:
    """The same weights in pytorch_model.bin alone."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    return folder / "pytorch_model.bin"


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("keep", [0, 30, 100, 200, 300, 1000, 2000, 5000, -100])
def test_a_bin_that_ends_early(keep, zipped, folder):
    path = as_bin(folder, zipped)
    load(folder)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin .*damaged"):
        load(folder)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_bin_with_bytes_overwritten(zipped, tmp_path):
    """Whatever the damage, it is read as tensors or refused by name: no other exception gets out."""
    path = tmp_path / "pytorch_model.bin"
    torch.save({f"a{i}": torch.ones(3) for i in range(6)}, path, _use_new_zipfile_serialization=zipped)
    content, choice, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(choice.choice([1, 1, 3, 20])):
            damaged[choice.randrange(len(damaged))] = choice.randrange(256)
        path.write_bytes(damaged)
        try:
            tensors, message = read_bin(path), ""
        except CheckpointError as error:
            tensors, message = {}, str(error)
        assert all(isinstance(t, torch.Tensor) for t in tensors.values())
        refused += bool(message)
        assert not message or str(path) in message
    assert refused > 100


@pytest.mark.parametrize("content", [b"hello world" * 20, b"\x80\x02junk", POINTER, b"\xff" * 64])
def test_a_bin_that_never_was_one(content, folder):
    as_bin(folder).write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"pytorch_model.bin (was not written by torch.save|is a Git LFS pointer)"
    ):
        load(folder)


@pytest.mark.parametrize("state", [[torch.zeros(2)], {"model": {"a": torch.zeros(2)}}, torch.zeros(2)])
def test_a_bin_that_is_no_state_dict(state, folder):
    torch.save(state, as_bin(folder))
    with pytest.raises(CheckpointError, match="is not a state dict of tensors"):
        load(folder)


def test_a_zip_whose_middle_is_overwritten(folder):
    path = as_bin(folder)
    content = bytearray(path.read_bytes())
    start = content.index(b"data.pkl")
    content[start + 20 : start + 400] = b"\xff" * 380
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin"):
        load(folder)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, POINTER])
def test_safetensors_that_never_were(content, folder):
    (folder / "model.safetensors").write_bytes(content)
    for read in (load, describe):
        with pytest.raises(CheckpointError, match=r"model.safetensors is (truncated or damaged|a Git LFS pointer)"):
            read(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "has no weight_map"),
        ("[]", "holds a list, not an object"),
        ("{", "not valid JSON"),
        ('{"weight_map": {}}', "no weight_map"),
    ],
)  # fmt: skip
def test_an_index_that_is_none(content, message, folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"model.safetensors.index.json .*{message}|index.json {message}"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"state_size": 0}, "state_size is 0; it must be 1 or more"),
        ({"hidden_size": 40}, r"has shape \(.*\), config.json asks for"),
        ({"num_hidden_layers": 3}, r"backbone.layers.2.mixer.A_log \(and 9 more\) is missing"),
        ({"num_hidden_layers": 1}, r"\(and 9 more\) is not part of MambaForCausalLM"),
        ({"tie_word_embeddings": False}, "lm_head.weight .* is missing"),
        ({"use_bias": True}, "in_proj.bias .* is missing"),
        ({"model_type": "mamba2"}, "model_type is 'mamba2'"),
    ],
)
def test_a_configuration_that_does_not_fit(changes, message, folder):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("content", ["[]", '"mamba"', "3"])
def test_a_configuration_that_is_no_object(content, folder):
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config.json holds a \w+, not an object"):
        load(folder)


@pytest.mark.parametrize("key", ["d_model", "n_layer"])
def test_an_original_configuration_without_its_size(key, folder):
    fields = {"d_model": 32, "n_layer": 2, "vocab_size": 61}
    del fields[key]
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="has no n_layer" if key == "n_layer" else "model_type is None"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.to(torch.int64), "is torch.int64, not floating point"),
        (lambda t: t.to(torch.float8_e4m3fn), "is F8_E4M3"),
    ],
)
def test_weights_that_are_no_weights(change, message, folder):
    path = folder / "model.safetensors"
    state = load_file(path)
    state["backbone.norm_f.weight"] = change(state["backbone.norm_f.weight"])
    save_file(state, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"backbone.norm_f.weight {message}"):
        load(folder)


def test_one_tensor_under_two_names(folder):
    path = folder / "model.safetensors"
    state = load_file(path)
    save_file({**state, "backbone.embedding.weight": state["backbone.embeddings.weight"] + 1}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="are two names of one tensor"):
        load(folder)


def test_one_tensor_in_two_shards(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for name in ("a.safetensors", "b.safetensors"):
        save_file(state, folder / name, {"format": "pt"})
    first, *rest = sorted(state)
    weight_map = {first: "a.safetensors", **dict.fromkeys(rest, "b.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"is in a.safetensors and in b.safetensors"):
        load(folder)


def test_a_head_of_another_size(folder):
    classifier = mambakit.MambaForSequenceClassification.from_pretrained(folder, num_labels=3)
    classifier.save_pretrained(folder / "c")
    with pytest.raises(CheckpointError, match=r"score.weight has shape \(3, 32\).*ignore_mismatched_sizes=True"):
        mambakit.MambaForSequenceClassification.from_pretrained(folder / "c", num_labels=5)
    again = mambakit.MambaForSequenceClassification.from_pretrained(
        folder / "c", num_labels=5, ignore_mismatched_sizes=True
    )
    assert again.score.weight.shape == (5, 32)
    assert torch.equal(again.backbone.embeddings.weight, classifier.backbone.embeddings.weight)
