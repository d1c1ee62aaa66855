"""Fields that start weights, in folders whose weights exist: transformers reads the numbers that were written.

Three layers and more: transformers divides by sqrt(layers), which one layer hides.
"""

from __future__ import annotations

import json

import pytest
import torch
import transformers

import mambakit
from mambakit.models.checkpoints import convert
from tests.models.configurations import tokens, worst

pytestmark = pytest.mark.filterwarnings("ignore")
FIELDS = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "initializer_range": 0.1}
# Every field that only starts weights, away from its default.
START = {
    "rescale_prenorm_residual": True, "initializer_range": 0.3, "time_step_min": 0.01, "time_step_max": 0.5,
    "time_step_scale": 2.0, "time_step_floor": 0.02, "time_step_init_scheme": "constant",
}  # fmt: skip


def started(kind: str = "mamba", **fields):
    config = (mambakit.FalconMambaConfig if kind == "falcon" else mambakit.MambaConfig)(**{**FIELDS, **fields})
    model = mambakit.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def assert_read_as_written(folder, model) -> None:
    """transformers' own classes and ours read ``model``'s logits and weights from ``folder``."""
    ids, model = tokens(2, 9), model.float()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(theirs).__module__.startswith("transformers.")
    ours = mambakit.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(ids).logits
        # Sums in another order, of large weights; out_proj divided by sqrt(layers) would be off by more than 1e-2.
        assert worst(theirs(ids).logits, expected) < 1e-4
        assert worst(ours(ids).logits, expected) < 1e-5
    stored = dict(theirs.named_parameters())
    assert stored.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(stored[name], parameter), name


@pytest.mark.parametrize("kind", ["mamba", "falcon"])
@pytest.mark.parametrize("changed", [{}, START, {"tie_word_embeddings": False, **START}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_saved_model_is_read_by_transformers_as_it_is(kind, changed, dtype, tmp_path):
    model = started(kind, **changed).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert model.config.rescale_prenorm_residual == changed.get("rescale_prenorm_residual", False)  # as it was given
    assert_read_as_written(tmp_path, model)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_original_to_transformers_and_round_again(tied, dtype, tmp_path):
    started(tie_word_embeddings=tied).save_original(tmp_path / "original")
    model = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / "original", dtype=dtype or "auto")
    convert(tmp_path / "original", tmp_path / "converted", "transformers", dtype)
    assert_read_as_written(tmp_path / "converted", model)
    convert(tmp_path / "converted", tmp_path / "back", "original")
    convert(tmp_path / "back", tmp_path / "again", "transformers")
    assert_read_as_written(tmp_path / "again", model)
    loaded = mambakit.MambaForCausalLM.from_pretrained(tmp_path / "original", dtype=dtype or "auto")
    loaded.save_pretrained(tmp_path / "saved")
    assert_read_as_written(tmp_path / "saved", model)


@pytest.mark.parametrize("kind", ["mamba", "falcon"])
def test_a_folder_that_says_rescale_is_mended_by_writing_it_again(kind, tmp_path):
    """As transformers saves a model with the field, and as mambakit wrote originals: ours reads the stored numbers, and
    writes a folder that transformers reads as such."""
    model = started(kind)
    model.save_pretrained(tmp_path / "said")
    path = tmp_path / "said/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **START}))
    loaded = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / "said").eval()
    ids = tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    loaded.save_pretrained(tmp_path / "saved")
    assert_read_as_written(tmp_path / "saved", model)
    convert(tmp_path / "said", tmp_path / "converted", "transformers")
    assert_read_as_written(tmp_path / "converted", model)
    loaded.quantize("lossless").save_pretrained(tmp_path / "packed")
    convert(tmp_path / "packed", tmp_path / "unpacked", "transformers")
    assert_read_as_written(tmp_path / "unpacked", model)


def test_a_model_that_transformers_saved_with_the_field(tmp_path):
    torch.manual_seed(0)
    theirs = transformers.MambaForCausalLM(transformers.MambaConfig(**{**FIELDS, **START})).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = mambakit.MambaForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    ids = tokens(2, 9)
    with torch.no_grad():
        assert worst(ours(ids).logits, theirs(ids).logits) < 1e-5
    ours.save_pretrained(tmp_path / "ours")
    assert_read_as_written(tmp_path / "ours", ours)


def test_the_classifier_and_the_base_model_are_saved_so_too(tmp_path):
    config = mambakit.MambaConfig(**{**FIELDS, **START})
    for cls in (mambakit.MambaModel, mambakit.MambaForSequenceClassification):
        cls(config).save_pretrained(tmp_path / cls.__name__)
        assert (
            json.loads((tmp_path / cls.__name__ / "config.json").read_text()).get("rescale_prenorm_residual")
            is not True
        )
    assert config.rescale_prenorm_residual is True


def test_a_configuration_alone_keeps_the_field(tmp_path):
    """It is the recipe of a new model, and nothing is read with it."""
    mambakit.MambaConfig(**{**FIELDS, **START}).save_pretrained(tmp_path)
    again = mambakit.MambaConfig.from_pretrained(tmp_path)
    assert {name: getattr(again, name) for name in START} == START
