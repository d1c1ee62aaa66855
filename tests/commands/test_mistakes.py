"""What users get wrong, through the commands themselves: one line that names the cause, before any text is made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mambakit import cli
from tests.models.tiny import save_tiny

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder)
    return folder


@pytest.fixture
def copy(model, tmp_path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "m"))


@pytest.fixture
def fails(capsys):
    """The one line of an error; nothing was written to standard output before it."""

    def call(*argv, code: int = 2) -> str:
        capsys.readouterr()  # what making the files has shown
        assert cli.main([str(a) for a in argv]) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        lines = captured.err.strip().splitlines()
        assert len(lines) == 1, captured.err
        assert lines[0].startswith(f"mambakit {argv[0]}")
        return lines[0]

    return call


@pytest.fixture
def unread(monkeypatch):
    """No model may be loaded."""
    from mambakit.models import pretrained  # these must not take the replaced name for their own
    from mambakit.models.checkpoints import loading as checkpoints
    from mambakit.models.mamba import inference

    def load(*args, **kwargs):
        raise AssertionError("weights were read before the mistake was told")

    for module in (checkpoints, pretrained, inference):
        monkeypatch.setattr(module, "load_pretrained", load)


def commands(folder: Path, text: Path):
    """Every command that reads a model."""
    return [
        ("generate", "x", "--model", folder), ("score", text, "--model", folder),
        ("score", "--echo", "x", "--model", folder), ("score", "--follow", text, "--model", folder),
        ("inspect", "x", "--out", text.parent / "out.html", "--model", folder),
        ("evaluate", "bpb", text, "--model", folder), ("info", folder), ("convert", folder, text.parent / "out"),
        ("quantize", folder, text.parent / "out"),
    ]  # fmt: skip


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "t.txt"
    path.write_text("The cat sat on the mat.\n" * 4)
    return path


@pytest.mark.parametrize("tokenizer", [None, "{}"])
def test_another_architecture_is_told_first(tokenizer, fails, unread, tmp_path, text):
    folder = tmp_path / "gpt2"
    folder.mkdir()
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(tokenizer)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "n_embd": 768, "architectures": ["GPT2LMHeadModel"]})
    )
    for command in commands(folder, text):
        message = fails(*command)
        assert f"{folder / 'config.json'}: model_type is 'gpt2'; mambakit loads mamba and falcon_mamba" in message


@pytest.mark.parametrize("changes", [{"dtype": " "}, {"architectures": []}, {"hidden_size": [24]}, {"state_size": -1}])
def test_a_field_of_the_configuration(changes, fails, unread, copy, text):
    path = copy / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    for command in commands(copy, text):
        assert f"{path}: {next(iter(changes))} is " in fails(*command)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{}", "tokenizer.json"),
        ("tokenizer.json", b"", "tokenizer.json is truncated or damaged"),
        ("tokenizer_config.json", b"[", "tokenizer_config.json is not valid JSON"),
        ("model.safetensors", b"\x00" * 40, "model.safetensors is truncated or damaged"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ("generation_config.json", b"{", "generation_config.json is not valid JSON"),
    ],
)
def test_damaged_files(name, content, message, fails, copy):
    (copy / name).write_bytes(content)
    assert message in fails("generate", "x", "--model", copy)


def test_a_truncated_packed_checkpoint(fails, copy, text):
    save_tiny(copy).quantize("int4").save_pretrained(copy)
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    for command in commands(copy, text):
        assert f"{path} is truncated or damaged" in fails(*command)


def test_weights_that_are_no_numbers(fails, copy, text, tmp_path):
    path = copy / "model.safetensors"
    tensors = load_file(path)
    tensors["backbone.norm_f.weight"] = torch.full_like(tensors["backbone.norm_f.weight"], float("nan"))
    save_file(tensors, path, {"format": "pt"})
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"sentence_good": "a cat", "sentence_bad": "cat a", "UID": "u", "field": "f"}) + "\n")
    passages = tmp_path / "passages.jsonl"
    passages.write_text(json.dumps({"text": "the cat sat"}) + "\n")
    for command in (
        ("score", text), ("score", "--echo", "The cat"), ("score", "--prefix", "The", "--choice", " cat"),
        ("score", text, "--json"),
        ("evaluate", "bpb", text), ("evaluate", "blimp", pairs), ("evaluate", "lambada", passages),
    ):  # fmt: skip
        assert "check its weights" in fails(*command, "--model", copy)
    assert cli.main(["generate", "x", "--json", "--model", str(copy)]) == 2
    for option in (("--greedy",), (), ("--prompt-lookup",)):
        assert "the model's logits are NaN" in fails("generate", "x", "--json", "--model", copy, *option)


def test_the_tokenizer_of_another_model(fails, tmp_path, text):
    save_tiny(tmp_path / "m", vocab_size=40)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"sentence_good": "a cat", "sentence_bad": "cat a", "UID": "u", "field": "f"}) + "\n")
    for command in (
        ("generate", "The cat"), ("generate", "The cat", "--prefix-cache", tmp_path / "c"), ("score", text),
        ("score", "--echo", "The cat"),
        ("score", "--prefix", "The", "--choice", " cat"), ("evaluate", "bpb", text), ("evaluate", "blimp", pairs),
    ):  # fmt: skip
        assert "the model's are 0 to 39" in fails(*command, "--model", tmp_path / "m")


def test_a_draft_model_that_does_not_fit_is_told_before_the_prompt_is_shown(fails, model, tmp_path):
    save_tiny(tmp_path / "m", vocab_size=40)
    assert "vocabulary of 40" in fails("generate", "x", "--model", model, "--draft-model", tmp_path / "m")


@pytest.mark.parametrize("device", ["meta", "cuda:99", "nonsense", "cpu:x", "cuda:-1", "CPU"])
def test_devices(device, fails, unread, model):
    assert f"--device {device}: " in fails("generate", "x", "--model", model, "--device", device)


def test_output_paths_are_looked_at_first(fails, unread, model, tmp_path):
    assert "there is no folder /nonexistent" in fails(
        "generate", "x", "--model", model, "--save-state", "/nonexistent/x"
    )
    assert "is a folder; give the name of a file" in fails("generate", "x", "--model", model, "--save-state", tmp_path)
    (tmp_path / "file").write_text("x")
    for command, option in (("generate", "--prefix-cache"),):
        assert "is not a folder" in fails(command, "x", "--model", model, option, tmp_path / "file" / "x")
    for command in ("convert", "quantize"):
        assert "is not a folder" in fails(command, model, tmp_path / "file")
        assert "is not empty; name a new folder" in fails(command, model, tmp_path)
    config = tmp_path / "c.toml"
    config.write_text(f'train_files = ["{tmp_path / "file"}"]\n')
    assert "is not a folder" in fails("train", config, f"out={tmp_path / 'file' / 'x'}")


def test_files_that_hold_no_text(fails, model, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    for command in (("score", empty), ("evaluate", "bpb", empty), ("score", empty, "--json")):
        assert f"{empty} holds no text" in fails(*command, "--model", model)
    assert "holds no choices" in fails("score", "--prefix", "x", "--choices", empty, "--model", model)
    binary = tmp_path / "b.bin"
    binary.write_bytes(b"\xff\xfe\x00")
    for command in (
        ("score", binary),
        ("evaluate", "bpb", binary),
        ("generate", "--file", binary),
        ("score", "--prefix", "x", "--choices", binary),
    ):
        assert "UTF-8 text" in fails(*command, "--model", model)
    for command in (
        ("score", tmp_path),
        ("generate", "--file", tmp_path),
        ("generate", "--load-state", tmp_path),
        ("evaluate", "bpb", tmp_path),
    ):
        assert f"{tmp_path} is a folder" in fails(*command)


@pytest.mark.parametrize("name", ["[a].txt", "[/v3].txt", "a\tb.txt"])
def test_names_that_look_like_markup(name, model, tmp_path, capsys, monkeypatch):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("The cat sat on the mat.\n")
    for command in (["score", str(path)], ["evaluate", "bpb", str(path)]):
        capsys.readouterr()
        assert cli.main([*command, "--model", str(model)]) == 0
        header, row = capsys.readouterr().out.splitlines()
        assert len(header.split("\t")) == len(row.split("\t"))
        assert row.split("\t")[0] == str(path).replace("\t", "\\t")
    assert cli.main(["score", str(path) + "x"]) == 2
    assert f"there is no text file {path}x".replace("\t", " ") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("out=", "out= is empty"), ("tokenizer= ", "tokenizer= is empty"), ("init_from=", "init_from= is empty"),
        ("train_files=", "train_files= is empty"), ("=1", "not of the form key=value"), ("out=' '", "out is empty"),
        ('train_files=[""]', "train_files holds an empty name"), ("text_field=''", "text_field is empty"),
        ("seed=-1", "seed is -1; it must be 0 or more"),
        ("seed=100000000000000000000000", "seed is 100000000000000000000000; it must be at most"),
        ("learning_rate=0", "learning_rate is 0.0; it must be above 0"),
        ("learning_rate=1e999", "learning_rate is inf"),
        ("learning_rate=nan", "learning_rate is 'nan', expected a float"),
        ("clip=-1", "clip is -1.0; it must be above 0"),
        ("beta1=1", "beta1 is 1.0"), ("eval_every=0", "eval_every is 0; it must be 1 or more"),
        ("steps=-1", "steps is -1"),
        ("hidden_size=0", "hidden_size is 0; it must be 1 or more"),
        ("num_hidden_layers=-2", "num_hidden_layers is -2"),
        ("max_shard_size=big", "max_shard_size is 'big'"), ("epochs=-1", "epochs is -1.0"),
        ("lora_rank=-1", "lora_rank is -1"),
        ("batch_size=true", "batch_size is True, expected a int"), ("steps=1.5", "steps is 1.5, expected a int"),
        ("checkpoint_every=-1", "checkpoint_every is -1"), ("weight_decay=-1", "weight_decay is -1.0"),
        ("out=" + "[" * 5000, "File name too long"),
    ],
)  # fmt: skip
def test_overrides_of_a_training_run(override, message, fails, tmp_path):
    (tmp_path / "t.txt").write_text("x")
    config = tmp_path / "c.toml"
    config.write_text(f'train_files = ["{tmp_path / "t.txt"}"]\n')
    assert message in fails("train", config, override)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"learning_rate = nan", "learning_rate is nan; it must be a finite number"),
        (b"clip = inf", "clip is inf; it must be a finite number"),
        (b"\xff", "is not valid TOML"),
        (b"a = ", "is not valid TOML"),
        (b"[model]\nhidden_size = 3", "unknown field 'model'"),
        (b'out = ""', "out is empty"),
        (b'train_files = [" "]', "train_files holds an empty name"),
    ],
)
def test_training_configurations(content, message, fails, tmp_path):
    config = tmp_path / "c.toml"
    config.write_bytes(content)
    assert message in fails("train", config)
    assert "cannot be read: Is a directory" in fails("train", tmp_path)


def test_what_belongs_to_another_option_is_not_ignored(fails, unread, model, text, tmp_path):
    for arguments, message in (
        (("generate", "x", "--prefix-cache-mb", "5"), "--prefix-cache-mb has no effect without --prefix-cache; add"),
        (
            ("generate", "x", "--draft-tokens", "3"),
            "--draft-tokens has no effect without --draft-model or --prompt-lookup",
        ),
        (("serve", "--prefix-cache-mb", "5"), "--prefix-cache-mb has no effect without --prefix-cache; add"),
        (("score", text, "--top", "3"), "--top has no effect without --echo"),
        (("score", "--prefix", "a", "--choice", "b", "--top", "0"), "--top has no effect without --echo"),
        (("score", text, "--choice", "b"), "--choice has no effect without --prefix"),
        (("score", "--echo", "a", "--choices", text), "--choices has no effect without --prefix"),
    ):
        assert message in fails(*arguments, "--model", model)


@pytest.mark.parametrize("option", ["--json-schema", "--grammar"])
def test_a_form_whose_file_is_not_there(option, fails, unread, model, tmp_path):
    for value in ("shema.json", str(tmp_path / "none"), str(tmp_path)):
        assert f"{option} '{value}': there is no such file" in fails("generate", "x", option, value, "--model", model)


@pytest.mark.parametrize("benchmark", ["lambada", "blimp"])
def test_half_a_surrogate_pair_in_a_benchmark(benchmark, fails, model, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(
        '{"text": "a \\ud800 b", "sentence_good": "\\udc00", "sentence_bad": "b", "UID": "u", "field": "f"}\n'
    )
    assert f"{path}, line 1: " in (line := fails("evaluate", benchmark, path, "--model", model))
    assert "has half of a surrogate pair" in line


def test_half_a_surrogate_pair_in_a_training_text(fails, tmp_path):
    path, config = tmp_path / "x.jsonl", tmp_path / "c.toml"
    path.write_text('{"text": "whole"}\n{"text": "a \\ud800 b"}\n')
    config.write_text(f'train_files = ["{path}"]\nout = "{tmp_path / "run"}"\n')
    for tokenizer in ("bytes", "nucleotides", ""):
        line = fails("train", config, *([f"tokenizer={tokenizer}"] if tokenizer else []))
        assert f"{path}, line 2: text has half of a surrogate pair at 2" in line


def test_a_server_without_a_model_does_not_listen(fails, tmp_path):
    """No address is shown, and nobody connects to a server that ends in a moment."""
    pytest.importorskip("starlette")
    for name in ("/nonexistent", "./nonexistent", tmp_path):
        said = fails("serve", "--model", str(name), "--port", "0")
        assert "give a folder that holds a model, or a hub id" in said
        assert "http://" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "learning_rate=1"), "give a configuration file before key=value"),
        (
            ("train", "{toml}", "train_files=[a.txt,b.txt]"),
            "a shell takes quotes away; quote the whole: 'train_files=[\"",
        ),
        (("generate", "x", "--greedy", "--temperature", "0.5"), "whatever --temperature 0.5 is; drop one"),
        (("export", "{folder}", "{toml}.pt2", "--to", "pt2"), ".pt2 exists; name a new file"),
        (("export", "{folder}", "{toml}/a.pt2", "--to", "pt2"), "t.toml is not a folder"),
        (("export", "{folder}", "{toml}.onnx", "--to", "pt2"), "whose name ends with .pt2"),
    ],
)
def test_arguments(arguments, message, fails, copy, tmp_path):
    toml = tmp_path / "t.toml"
    toml.write_text("epochs = 1.0")
    (tmp_path / "t.toml.pt2").write_bytes(b"")
    assert message in fails(*(argument.format(toml=toml, folder=copy) for argument in arguments))


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification"])
def test_a_classifier_writes_no_text(head, fails, unread, copy, text):
    path = copy / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": [f"MambaFor{head}"]}))
    for command in commands(copy, text):
        if command[0] in ("generate", "score", "evaluate", "inspect"):
            message = fails(*command)
            assert f"holds a MambaFor{head}, whose head gives classes" in message
            assert f"AutoModelFor{head}" in message
