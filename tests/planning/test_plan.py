"""`mambakit plan`: shapes are counted exactly, recorded runs are given back, and a recipe trains."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.tables import planning
from mambakit import FalconMambaConfig, FalconMambaForCausalLM, MambaConfig, MambaForCausalLM, cli
from mambakit.errors import UsageError
from mambakit.planning import devices
from mambakit.planning.estimate import FORMATS, generating, training
from mambakit.planning.recipe import recipe
from mambakit.planning.shape import PUBLISHED, Shape
from mambakit.training.config_file import load_config
from mambakit.training.throughput import flops_per_token

SHAPES = [
    Shape(48, 3, 96), Shape(40, 2, 104, state_size=4, conv_kernel=3, tie_word_embeddings=False),
    Shape(24, 1, 8, expand=3), Shape(24, 1, 8, time_step_rank=5), PUBLISHED["130m"],
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_shape_is_the_models(shape):
    fields = {name: value for name in Shape.__dataclass_fields__ if (value := getattr(shape, name)) is not None}
    config = MambaConfig(**fields)
    with torch.device("meta"):
        model = MambaForCausalLM(config)
    assert Shape.of(config) == shape
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.flops == flops_per_token(model)
    assert shape.state_bytes(2) == config.state_spec(torch.bfloat16).nbytes
    assert shape.state_bytes(4) == config.state_spec(torch.float32).nbytes


def test_falcon_mambas_expand_is_not_its_width():
    config = FalconMambaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, expand=16, intermediate_size=64, tie_word_embeddings=False
    )
    with torch.device("meta"):
        model = FalconMambaForCausalLM(config)
    assert Shape.of(config).parameters == sum(p.numel() for p in model.parameters())
    assert Shape.of(config).inner == 64


def test_what_is_shipped_is_what_the_records_say():
    assert planning.FILE.read_text(encoding="utf-8") == planning.content(), "run python benchmarks/render.py"


@pytest.mark.parametrize("name", ["h100", "h200"])
def test_recorded_training_steps_are_given_back(name):
    device = devices.device(name)
    for row in device.train:
        if row["batch"] == 1:
            continue  # the same shape at another length: one figure for both
        found = training(PUBLISHED[row["model"]], device, row["batch"], row["length"], row["how"])
        assert found.tokens_per_second == pytest.approx(row["tokens_per_second"], rel=1e-6)
        assert found.total == pytest.approx(row["gib"], rel=1e-6)
        assert found.fits(device)


def test_recorded_steps_are_given_back():
    device = devices.device("h100")
    for row in device.step:
        found = generating(PUBLISHED[row["shape"]], device, row["batch"], "bfloat16")
        assert found.tokens_per_second == pytest.approx(row["batch"] / row["seconds"], rel=1e-6)
    # Between them, and packed: int4's step was 0.577 of bfloat16's.
    between = generating(PUBLISHED["790m"], device, 6, "bfloat16").tokens_per_second
    assert generating(PUBLISHED["1.4b"], device, 6, "bfloat16").tokens_per_second < between
    assert between < generating(PUBLISHED["130m"], device, 6, "bfloat16").tokens_per_second
    ratio = [generating(PUBLISHED["1.4b"], device, 1, name).tokens_per_second for name in ("int4", "bfloat16")]
    assert ratio[0] / ratio[1] == pytest.approx(0.001097 / 0.000633, rel=1e-2)


def test_a_cpus_rates():
    """On the recorded machine: 130m, tokens a second by format."""
    device = devices._recorded("cpu")
    for name, rate in (("float32", 39.8), ("bfloat16", 74.3), ("int8", 127.6), ("int4", 206.6)):
        # The record's reads count the head's and the embeddings' rows as its benchmark does.
        assert generating(PUBLISHED["130m"], device, 1, name).tokens_per_second == pytest.approx(rate, rel=0.1)
    assert training(PUBLISHED["130m"], device, 1, 512).tokens_per_second == pytest.approx(512 / 3.38, rel=1e-3)


def test_this_machines_cpu():
    device = devices.device("cpu")
    assert 1e8 < device.bandwidth < 1e13
    assert "measured here" in device.scaled
    assert device.gib is None or device.gib > 0.5


def test_other_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("P", (), {"total_memory": 80 << 30}))
    device = devices.device("here")
    assert "nothing was measured on this GPU" in device.scaled
    same = training(PUBLISHED["130m"], devices.device("h100"), 16, 2048)
    assert training(PUBLISHED["130m"], device, 16, 2048).tokens_per_second < 0.4 * same.tokens_per_second
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Unheard of")
    with pytest.raises(UsageError, match="nothing is known of Unheard of's speed; --device h100"):
        devices.device("here")


def test_recipes_fit():
    h100 = devices.device("h100")
    easy = recipe(PUBLISHED["1.4b"], h100, 2048)
    assert easy.estimate.fits(h100)
    assert easy.fields["batch_size"] == 256
    assert not easy.fields.get("recompute_selection")
    # Longer rows are computed again; longer ones still are refused, with a remedy.
    long = recipe(PUBLISHED["1.4b"], h100, 2**15)
    assert long.fields.get("recompute_selection") or long.fields.get("activation_checkpointing")
    assert long.estimate.fits(h100)
    assert "parallel=fsdp" in recipe(PUBLISHED["2.8b"], h100, 2**20).remedy
    assert easy.fields["steps"] == round(20 * PUBLISHED["1.4b"].parameters / (256 * 2048))


def test_the_recipe_is_a_configuration(tmp_path, capsys):
    path = tmp_path / "plan.toml"
    sizes = ["--hidden-size", "32", "--num-hidden-layers", "2", "--vocab-size", "512", "--device", "cpu"]
    assert cli.main(["plan", *sizes, "--tokens", "100000", "--recipe", str(path)]) == 0
    said = capsys.readouterr().out
    assert f"mambakit train {path}" in said
    config = load_config(path, [])
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (32, 2, 512)
    assert config.keep_best
    # and a configuration is planned for
    assert cli.main(["plan", str(path), "--device", "h200", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == Shape(32, 2, 512).parameters
    assert set(found["generating"]) == set(FORMATS)
    assert any("smaller than the recorded models" in note for note in found["training"]["notes"])


def test_a_checkpoint_is_planned_for(capsys):
    from mambakit.assets import default_model_path

    assert cli.main(["plan", str(default_model_path()), "--device", "h100"]) == 0
    assert "17 layers of 384" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "said"), [
    (["--device", "tpu"], "no benchmarks are recorded on 'tpu'; choose among h100, h200, cpu, here"),
    (["--recipe", "x.json"], "a name that ends with .toml"),
    (["--batch-size", "0"], "--batch-size is 0; it must be 1 or more"),
    (["nowhere.toml"], "there is no configuration file nowhere.toml"),
    (["--device", "cuda"], "--device h100"),
])  # fmt: skip
def test_refused(arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["plan", *arguments]) == 2
    assert said in capsys.readouterr().err
