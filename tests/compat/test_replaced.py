"""Functions set by name on the modules of mamba_ssm that mambakit gives: the layers and models call them."""

from __future__ import annotations

import importlib.util
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mambakit.compat.convolution import causal_conv1d_fn
from mambakit.compat.finder import MissingFinder
from mambakit.compat.generation import InferenceParams
from mambakit.compat.inner import mamba_inner_fn
from mambakit.compat.mamba import Mamba
from mambakit.compat.mixer_model import MambaConfig, MambaLMHeadModel
from mambakit.compat.replaced import forget
from mambakit.compat.selective_scan import selective_scan_fn, selective_scan_ref
from tests.compat.oracles import error

LAYER, MODEL = "mamba_ssm.modules.mamba_simple", "mamba_ssm.models.mixer_seq_simple"


@pytest.fixture
def modules():
    """The modules as they are given, without a finder that other tests would meet; nothing is in place after."""
    found = {}
    for name in (LAYER, MODEL, "mamba_ssm.utils.generation"):
        spec = MissingFinder().find_spec(name, None)
        found[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found[name])
    yield found
    for module in found.values():
        forget(module)


class Recorded:
    def __init__(self, function):
        self.function, self.calls = function, []

    def __call__(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return self.function(*args, **kwargs)


@pytest.mark.parametrize("fields", [{}, {"bimamba_type": "v1"}, {"bimamba_type": "v2"}, {"bimamba_type": "v3"}])
@pytest.mark.parametrize("fast", [True, False])
def test_a_scan_is_recorded(modules, fields, fast):
    """By the operands that it is called with, the scan's output can be computed again."""
    layer = Mamba(16, use_fast_path=fast, **fields)
    x = torch.randn(2, 10, 16)
    expected = layer(x)
    scan = Recorded(selective_scan_fn)
    modules[LAYER].selective_scan_fn = scan
    assert error(layer(x), expected) < 2e-6
    assert len(scan.calls) == {"v1": 2, "v2": 2, "v3": 3}.get(layer.bimamba_type, 1)
    (u, dt, A, B, C, D), options = scan.calls[0]
    assert [tuple(t.shape) for t in (u, dt, A, B, C, D)] == [(2, 32, 10)] * 2 + [(32, 16)] + [(2, 16, 10)] * 2 + [(32,)]
    assert all(t.is_contiguous() for t in (u, dt, B, C))
    assert sorted(options) == ["delta_bias", "delta_softplus", "return_last_state", "z"]
    assert torch.equal(options["delta_bias"], layer.dt_proj.bias)


def test_a_scan_is_changed_and_put_back(modules):
    """Also its gradient; and with `unittest.mock`, and with an instance's hooks beside it."""
    layer, x = Mamba(16), torch.randn(2, 7, 16)
    expected = layer(x)
    with mock.patch.object(modules[LAYER], "selective_scan_fn", lambda u, *args, **kwargs: u * 0 + 1):
        layer.conv1d.register_forward_hook(lambda *args: None)
        assert error(layer(x), layer.out_proj.weight.sum(1).expand(2, 7, 16)) < 1e-6
    assert error(layer(x), expected) < 1e-6
    modules[LAYER].selective_scan_fn = lambda u, *args, **kwargs: u.detach()
    layer(x).sum().backward()
    assert layer.A_log.grad is None
    modules[LAYER].selective_scan_fn = selective_scan_fn
    layer(x).sum().backward()
    assert layer.A_log.grad is not None


def test_functions_taken_away(modules):
    """As code does to reach the layers, and to run upstream without its extensions."""
    layer, x = Mamba(16, layer_idx=0, bias=True), torch.randn(2, 7, 16)
    expected, seen = layer(x), []
    layer.act.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    for name in ("causal_conv1d_fn", "causal_conv1d_update", "selective_state_update", "mamba_inner_fn"):
        setattr(modules[LAYER], name, None)
    modules[LAYER].selective_scan_fn = selective_scan_ref
    assert error(layer(x), expected) < 2e-6
    assert seen == [(2, 32, 7)]
    params, pieces = InferenceParams(7, 2), []
    for start, end in ((0, 3), (3, 4), (4, 7)):
        with torch.no_grad():
            pieces.append(layer(x[:, start:end], inference_params=params))
        params.seqlen_offset = end
    assert error(torch.cat(pieces, 1), expected) < 2e-6


def test_the_inner_function_is_called_where_upstream_calls_it(modules):
    layer, x = Mamba(16, layer_idx=0), torch.randn(2, 7, 16)
    expected = layer(x)
    inner = modules[LAYER].mamba_inner_fn = Recorded(mamba_inner_fn)
    assert error(layer(x), expected) < 2e-6
    assert len(inner.calls) == 1
    layer.use_fast_path = False
    assert error(layer(x), expected) < 2e-6
    layer.use_fast_path = True
    layer(x, inference_params=InferenceParams(7, 2))
    modules[LAYER].causal_conv1d_fn = None
    assert error(layer(x), expected) < 2e-6
    assert len(inner.calls) == 1


def test_steps_by_name(modules):
    """A token at a time, also where several are given."""
    layer, x = Mamba(16, layer_idx=0), torch.randn(2, 7, 16)
    expected = layer(x)
    module = modules[LAYER]
    names = ("causal_conv1d_fn", "selective_scan_fn", "causal_conv1d_update", "selective_state_update")
    recorded = {name: Recorded(getattr(module, name)) for name in names}
    for name, function in recorded.items():
        setattr(module, name, function)
    params, pieces = InferenceParams(7, 2), []
    with torch.no_grad():
        for start, end in ((0, 3), (3, 4), (4, 7)):
            pieces.append(layer(x[:, start:end], inference_params=params))
            params.seqlen_offset = end
    assert error(torch.cat(pieces, 1), expected) < 2e-6
    assert [len(recorded[name].calls) for name in names] == [1, 1, 4, 4]
    assert [len(args) for args, _ in recorded["selective_state_update"].calls] == [7] * 4
    assert recorded["causal_conv1d_update"].calls[0][0][0].shape == (2, 32)


def test_compiled_before_and_after(modules):
    layer, x = Mamba(16), torch.randn(2, 7, 16)
    compiled = torch.compile(layer, backend="aot_eager")
    assert error(compiled(x), layer(x)) < 1e-6
    modules[LAYER].selective_scan_fn = lambda u, *args, **kwargs: u * 0 + 1
    assert error(compiled(x), layer.out_proj.weight.sum(1).expand(2, 7, 16)) < 1e-6


def test_a_model_of_other_layers(modules):
    """``mixer_seq_simple.Mamba = Other``: the language model is built of it."""

    class Other(nn.Module):
        def __init__(self, d_model, layer_idx=None, device=None, dtype=None, **fields):
            super().__init__()
            self.linear, self.fields = nn.Linear(d_model, d_model), fields

        def forward(self, x, inference_params=None):
            return F.silu(self.linear(x))

    config = MambaConfig(d_model=16, n_layer=2, vocab_size=11, ssm_cfg={"rank": 3})
    modules[MODEL].Mamba = Other
    model = MambaLMHeadModel(config)
    assert [type(layer.mixer) for layer in model.backbone.layers] == [Other] * 2
    assert model.backbone.layers[0].mixer.fields == {"rank": 3}
    assert model.generate(torch.zeros(1, 2, dtype=torch.long), 5).shape == (1, 5)
    given = Recorded(lambda d_model, **fields: nn.Identity())
    modules[MODEL].create_block = given
    MambaLMHeadModel(config)
    assert [fields["layer_idx"] for _, fields in given.calls] == [0, 1]
    modules[MODEL].__spec__.loader.exec_module(modules[MODEL])  # as importlib.reload
    config.ssm_cfg = {}
    assert [type(layer.mixer) for layer in MambaLMHeadModel(config).backbone.layers] == [Mamba] * 2


def test_a_sampler_of_one_s_own(modules):
    model = MambaLMHeadModel(MambaConfig(d_model=16, n_layer=1, vocab_size=11))
    drawn = Recorded(lambda logits, **options: torch.full(logits.shape[:1], 7))
    modules["mamba_ssm.utils.generation"].sample = drawn
    assert model.generate(torch.zeros(2, 2, dtype=torch.long), 5, top_k=4)[:, 2:].eq(7).all()
    assert drawn.calls[0][1] == {"top_k": 4, "top_p": 0.0, "min_p": 0.0, "temperature": 1.0}


def test_an_activation_of_a_layer_s_own():
    layer, x = Mamba(16), torch.randn(2, 7, 16)
    silu = layer(x)
    layer.act = nn.ReLU()
    expected = layer(x)
    assert error(expected, silu) > 0.01
    states = layer.allocate_inference_cache(2, 7)
    with torch.no_grad():
        assert error(torch.cat([layer.step(token, *states)[0] for token in x.split(1, 1)], 1), expected) < 2e-6


def test_names_are_the_same_functions(modules):
    assert modules[LAYER].causal_conv1d_fn is causal_conv1d_fn
    assert modules[LAYER].selective_scan_fn is selective_scan_fn
