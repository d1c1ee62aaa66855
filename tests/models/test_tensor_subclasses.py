"""Weights that are no plain tensors: a model made of them writes, verifies and trains as its own forward does, and
nobody reads an address."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from mambakit.decoding.registry import verifier
from mambakit.generation.engine import Engine, Request
from mambakit.generation.stream import Sampling
from tests.decoding.eager_graph import native_serves
from tests.models.configurations import pair, tokens, worst
from tests.tensor_subclasses import Named, doubled

pytestmark = pytest.mark.filterwarnings("ignore")
PLACES = [
    "lm_head.weight", "backbone.norm_f.weight", "backbone.layers.1.norm.weight",
    "backbone.layers.1.mixer.in_proj.weight",
    "backbone.layers.1.mixer.x_proj.weight", "backbone.layers.1.mixer.dt_proj.weight",
    "backbone.layers.1.mixer.dt_proj.bias",
    "backbone.layers.1.mixer.conv1d.weight", "backbone.layers.1.mixer.A_log", "backbone.layers.1.mixer.D",
    "backbone.layers.1.mixer.out_proj.weight",
]  # fmt: skip
MAKERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "wrapper": doubled,
    "subclass": lambda t: t.as_subclass(Named),
    "negated": lambda t: torch.view_as_complex(torch.stack([t * 0, -t], -1)).conj().imag,
}


def model_of() -> Any:
    torch.manual_seed(0)
    model = pair("untied")[0].requires_grad_(False)
    model.generation_config.eos_token_id = None
    return model


def put(model: Any, place: str, tensor: torch.Tensor) -> None:
    module, _, name = place.rpartition(".")
    setattr(model.get_submodule(module), name, nn.Parameter(tensor, requires_grad=False))


def ways(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """What is written, verified and computed, in every way."""
    with torch.no_grad():
        out = model.generate(
            ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0
        )  # fmt: skip
        cache = model.backbone.new_cache(1)
        verify = verifier(model, cache, 4)
        logits = verify(torch.tensor([[3, 4, 5]]))[0].clone()
        verify.commit([2])
        request = Request(ids[0], Sampling(temperature=0), max_new_tokens=4)
        Engine(model, 2).write([request])
        return [
            torch.stack(out.logits),
            logits,
            cache.ssm_states.clone(),
            model(ids).logits,
            torch.tensor(request.tokens),
        ]


@pytest.mark.parametrize("kind", sorted(MAKERS))
@pytest.mark.parametrize("place", PLACES)
def test_a_weight_that_is_no_plain_tensor(kind, place):
    model, ids = model_of(), tokens(2, 6)
    expected = ways(model, ids)
    put(model, place, MAKERS[kind](model.get_parameter(place).detach().clone()))
    assert not native_serves(model, model.backbone.new_cache(1))
    found = ways(model, ids)
    for ours, theirs in zip(found, expected, strict=True):
        assert worst(torch.as_tensor(ours).as_subclass(torch.Tensor), theirs) < 1e-4


@pytest.mark.parametrize("kind", ["wrapper", "subclass"])
@pytest.mark.parametrize("place", [p for p in PLACES if "mixer" in p])
def test_training_around_a_frozen_weight_that_is_no_plain_tensor(kind, place):
    """As adapters on quantised weights are trained."""
    model, ids = model_of(), tokens(2, 6)
    model.backbone.embeddings.weight.requires_grad_(True)
    model.train()(ids, labels=ids).loss.backward()
    expected = model.backbone.embeddings.weight.grad.clone()
    model.zero_grad()
    put(model, place, MAKERS[kind](model.get_parameter(place).detach().clone()))
    model(ids, labels=ids).loss.backward()
    assert worst(model.backbone.embeddings.weight.grad.as_subclass(torch.Tensor), expected) < 1e-4


def test_weights_that_lie_elsewhere_or_are_freed():
    model = model_of()
    cache = model.backbone.new_cache(1)
    weight = model.backbone.layers[0].mixer.x_proj.weight
    size = weight.untyped_storage().nbytes()
    served = native_serves(model, cache)
    weight.untyped_storage().resize_(0)
    assert not native_serves(model, cache), "sharded training frees what is not in use"
    weight.untyped_storage().resize_(size)
    assert native_serves(model, cache) == served
    put(model, "backbone.layers.0.mixer.D", model.backbone.layers[0].mixer.D.to("meta"))
    assert not native_serves(model, cache)


def test_a_layer_of_another_dtype_is_not_read_as_one_of_the_models():
    model = model_of()
    model.backbone.layers[0].mixer.x_proj.double()
    assert not native_serves(model, model.backbone.new_cache(1))


def test_fake_tensors():
    with FakeTensorMode():
        model = pair("untied")[0]
        cache = model.backbone.new_cache(1)
        assert not native_serves(model, cache)
        assert model(torch.ones(1, 5, dtype=torch.int64), cache_params=cache).logits.shape == (1, 5, 61)


@pytest.mark.parametrize("format", ["int8", "int4", "lossless"])
def test_what_others_have_quantised_is_not_quantised_again(format):
    model = model_of()
    put(model, "backbone.layers.1.mixer.in_proj.weight", doubled(model.backbone.layers[1].mixer.in_proj.weight))
    with pytest.raises(ValueError, match=r"in_proj.weight is a Doubled, not a plain tensor"):
        model.quantize(format)


@pytest.mark.parametrize(
    "name", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "IntxWeightOnlyConfig"]
)
def test_torchao(name):
    quantization = pytest.importorskip("torchao.quantization")
    model, ids = model_of(), tokens(2, 6)
    quantization.quantize_(model, getattr(quantization, name)())
    out = model.generate(
        ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0
    )  # fmt: skip
    assert worst(torch.stack(out.logits, 1), model(out.sequences[:, :-1]).logits[:, 5:]) < 1e-4
    found = ways(model, ids)
    assert worst(found[0].transpose(0, 1), torch.stack(out.logits, 1)) < 1e-4
