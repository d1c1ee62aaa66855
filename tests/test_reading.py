"""One reader for every format: what is cut short, overwritten, a pointer, or something else is an error that names the
file."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import mambakit
from mambakit.errors import CheckpointError, MambakitError
from mambakit.generation.prefix_cache import PrefixCache
from mambakit.generation.state import State
from mambakit.training.checkpoint import load_checkpoint, save_checkpoint
from mambakit.training.tokenizer import make_vocabulary
from tests.models.tiny import save_tiny

pytestmark = pytest.mark.filterwarnings("ignore")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 99\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def sharded(folder: Path, model) -> Path:
    model.save_pretrained(folder, max_shard_size="20KB")
    return sorted(folder.glob("model-*.safetensors"))[0]


def index(folder: Path, model) -> Path:
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder / "model.safetensors.index.json"


def single(folder: Path, model) -> Path:
    model.save_pretrained(folder)
    return folder / "model.safetensors"


def packed(folder: Path, model) -> Path:
    save_tiny(folder).quantize("int8").save_pretrained(folder)
    return folder / "model.safetensors"


def pickled(folder: Path, model) -> Path:
    single(folder, model).unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def configuration(folder: Path, model) -> Path:
    single(folder, model)
    return folder / "config.json"


def load(path: Path, model) -> None:
    mambakit.AutoModelForCausalLM.from_pretrained(path.parent)


def state(folder: Path, model) -> Path:
    State.read(model, torch.arange(1, 9)).save(folder / "state", model)
    return folder / "state"


def load_state(path: Path, model) -> None:
    State.load(path, model)


def cache(folder: Path, model) -> Path:
    State.read(model, torch.arange(1, 9)).cache.save(folder / "cache")
    return folder / "cache"


def load_cache(path: Path, model) -> None:
    mambakit.MambaCache.load(path, model.config)


def training(folder: Path, model) -> Path:
    optimizer = torch.optim.AdamW(model.parameters())
    return save_checkpoint(folder, model, optimizer, 3, {"a": 1}) / "state.pt"


def load_training(path: Path, model) -> None:
    load_checkpoint(path.parent, model, torch.optim.AdamW(model.parameters()))


def tokenizer(folder: Path, model) -> Path:
    save_tiny(folder)
    return folder / "tokenizer.json"


def load_tokenizer(path: Path, model) -> None:
    mambakit.AutoTokenizer.from_pretrained(path.parent)


def load_vocabulary(path: Path, model) -> None:
    make_vocabulary(str(path))


def adapters(folder: Path, model) -> Path:
    from mambakit.training.lora import add_adapters, save_adapters

    base = save_tiny(folder / "base")
    add_adapters(base, 2, 4.0, ["in_proj"])
    save_adapters(base, folder)
    return folder / "adapter_model.safetensors"


def adapters_configuration(folder: Path, model) -> Path:
    return adapters(folder, model).with_name("adapter_config.json")


def load_adapters_of(path: Path, model) -> None:
    from mambakit.training.lora import load_adapters

    load_adapters(mambakit.AutoModelForCausalLM.from_pretrained(path.parent / "base"), path.parent)


FORMATS = {
    "safetensors": (single, load), "a shard": (sharded, load), "an index": (index, load), "packed": (packed, load),
    "a pickle": (pickled, load), "config.json": (configuration, load), "a state": (state, load_state),
    "a cache": (cache, load_cache),
    "a training checkpoint": (training, load_training), "a tokenizer": (tokenizer, load_tokenizer),
    "a vocabulary": (tokenizer, load_vocabulary), "adapters": (adapters, load_adapters_of),
    "adapter_config.json": (adapters_configuration, load_adapters_of),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(name, model, tmp_path):
    write, read = FORMATS[name]
    path = write(tmp_path, model)
    read(path, model)
    whole = path.read_bytes()
    damaged = {
        "empty": b"", "pointer": POINTER, "half": whole[: len(whole) // 2],
        "one byte short": whole.rstrip()[:-1] if path.suffix == ".json" else whole[:-1], "first byte": whole[:1],
        "ten bytes": whole[:10], "text": b"not at all " * 50, "zeros": bytes(len(whole)), "ones": b"\xff" * 300,
    }  # fmt: skip
    for kind, content in damaged.items():
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            read(path, model)
        assert path.name in str(caught.value), kind
        assert "\n" not in str(caught.value), kind
        assert (kind == "pointer") == ("git lfs pull" in str(caught.value)), kind
    path.unlink()
    path.mkdir()
    with pytest.raises((MambakitError, ValueError, FileNotFoundError)):
        read(path, model)


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_overwritten(name, model, tmp_path):
    """The beginning is where the structure is: whatever stands there, the file is read or refused by name."""
    write, read = FORMATS[name]
    path = write(tmp_path, model)
    whole, choice, refused = path.read_bytes(), random.Random(0), []
    for _ in range(12):
        content = bytearray(whole)
        for _ in range(choice.choice([1, 3, 20])):
            content[choice.randrange(min(len(content), 1500))] = choice.randrange(256)
        path.write_bytes(content)
        try:
            read(path, model)
        except CheckpointError as error:
            refused.append(str(error))
        except RuntimeError as error:  # a whole training checkpoint of another model's names
            refused.append(f"{path.name}: {error}" if "state_dict" in str(error) else "")
    assert all(path.name in message for message in refused)


def test_a_state_that_says_nonsense(model, tmp_path):
    from safetensors import safe_open

    path = state(tmp_path, model)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for changes, message in (
        ({"seen_tokens": "many"}, "seen_tokens is 'many'"),
        ({"seen_tokens": ""}, "seen_tokens is ''"),
        ({"fingerprint": "x"}, "other weights"),
        ({"format": "x"}, "is not a saved mambakit state"),
    ):
        save_file(tensors, path, {**metadata, **changes})
        with pytest.raises(CheckpointError, match=message):
            State.load(path, model)
    for name, tensor in (
        ("pending", torch.tensor([[999_999]])), ("pending", torch.tensor([[-1]])),
        ("pending", torch.zeros(2, 1).long()),
        ("pending", torch.zeros(1, 1)), ("conv_states", torch.zeros(2)), ("ssm_states", torch.zeros(1, 1, 1, 1)),
    ):  # fmt: skip
        save_file({**tensors, name: tensor}, path, metadata)
        with pytest.raises(CheckpointError, match=str(path)):
            State.load(path, model)


def test_foreign_and_damaged_files_of_a_prefix_cache(model, tmp_path):
    ids = torch.arange(1, 9)
    expected = PrefixCache(model, folder=tmp_path).read(ids)
    (folder,) = [p for p in tmp_path.iterdir() if p.is_dir()]
    (file,) = folder.glob("*.safetensors")
    for content in (b"", POINTER, file.read_bytes()[:50]):
        file.write_bytes(content)
        (folder / "foo.safetensors").write_bytes(b"another's")
        found = PrefixCache(model, folder=tmp_path, memory_bytes=0).read(ids)
        assert torch.equal(found.cache.ssm_states, expected.cache.ssm_states)


@pytest.mark.parametrize(
    "weight_map",
    [{"a": 1}, {"a": "../model.safetensors"}, {"a": "/etc/passwd"}, {"a": ""}, {"a": None}, {"a": ["x"]}, ["x"], {}],
)
def test_an_index_that_points_elsewhere(weight_map, model, tmp_path):
    path = index(tmp_path, model)
    path.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"model.safetensors.index.json"):
        load(path, model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": "8"}, "r is '8'"), ({"r": 0}, "r is 0; it must be 1 or more"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"target_modules": [3]}, r"target_modules is \[3\]"), ({"peft_type": "IA4"}, "peft_type is 'IA4'"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'"), ({"rank_pattern": [1]}, r"rank_pattern is \[1\]"),
    ],
)  # fmt: skip
def test_fields_of_an_adapter(changes, message, model, tmp_path):
    path = adapters_configuration(tmp_path, model)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=rf"adapter_config.json: {message}"):
        load_adapters_of(path, model)
