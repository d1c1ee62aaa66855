"""compat's Mamba: weights, marks, directions, hooks, and step after step equal to the whole."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mambakit.compat.generation import InferenceParams
from mambakit.compat.mamba import Mamba
from mambakit.models.mamba import MambaConfig
from mambakit.modules import MambaMixer
from tests.compat.oracles import error, inner

NINE = [
    "A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight", "dt_proj.bias",
    "out_proj.weight",
]  # fmt: skip


def exact(layer: Mamba, x: torch.Tensor) -> torch.Tensor:
    """The layer in float64, from its state dict alone: every direction by the oracle's inner function."""
    w = {name: value.double() for name, value in layer.state_dict().items()}
    xz = torch.einsum("oh,blh->bol", w["in_proj.weight"], x.double())
    if "in_proj.bias" in w:
        xz = xz + w["in_proj.bias"][:, None]

    def direction(suffix: str, xz: torch.Tensor, log: str = "") -> torch.Tensor:
        selection = (w[f"conv1d{suffix}.weight"], w.get(f"conv1d{suffix}.bias"), w[f"x_proj{suffix}.weight"],
                     w[f"dt_proj{suffix}.weight"], -w[log or f"A{suffix}_log"].exp(), w[f"D{suffix}"],
                     w[f"dt_proj{suffix}.bias"])  # fmt: skip
        return inner(xz, *selection)

    kind = layer.bimamba_type
    y = direction("", xz)
    if kind in ("v2", "v3"):
        y = y + direction("_b", xz.flip(-1)).flip(-1)
    if kind == "v3":
        order = torch.arange(x.shape[1]).view(layer.nslices, -1).T.flatten()
        y = y + direction("_s", xz[..., order])[..., order.argsort()]
    y = y / 2 if layer.if_divide_out else y
    out = torch.einsum("hd,bdl->blh", w["out_proj.weight"], y)
    out = out + w["out_proj.bias"] if "out_proj.bias" in w else out
    return out * w["gamma"] if "gamma" in w else out


@pytest.mark.parametrize(
    "fields",
    [{}, {"d_state": 5, "d_conv": 3, "expand": 1.5, "dt_rank": 3, "bias": True, "conv_bias": False},
     {"bimamba_type": "v2", "if_divide_out": True, "init_layer_scale": 0.5}, {"bimamba": True},
     {"bimamba_type": "v2", "if_devide_out": True}, {"bimamba_type": "v3", "nslices": 3}],
)  # fmt: skip
def test_against_float64(fields):
    """Output and the gradient of every parameter, also where submodules are called instead of the fused op."""
    layer = Mamba(16, **fields)
    x, dy = torch.randn(2, 12, 16), torch.randn(2, 12, 16)
    wide = copy.deepcopy(layer).double()
    layer(x).backward(dy)
    expected = exact(layer, x)
    assert error(layer(x), expected) < 2e-6
    leaf = x.double().requires_grad_()
    wide(leaf).backward(dy.double())
    assert error(wide(x.double()), expected) < 1e-12
    for name, parameter in layer.named_parameters():
        assert error(parameter.grad, wide.get_parameter(name).grad) < 2e-5, name
    hooked = copy.deepcopy(layer)
    calls = []
    for name in ("conv1d", "x_proj", "dt_proj"):
        getattr(hooked, name).register_forward_hook(lambda *a, name=name: calls.append(name))
    assert error(hooked(x), expected) < 2e-6
    assert calls == ["conv1d", "x_proj", "dt_proj"]


def test_vim_v1():
    """One selection, two scans with an A each; the whole gradient of z against numerical differences in float64."""
    layer = Mamba(4, d_state=2, d_conv=2, bimamba_type="v1").double()
    x = torch.randn(1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert sorted(layer.state_dict()) == sorted([*NINE, "A_b_log"])
    twice = Mamba(4, d_state=2, d_conv=2, bimamba_type="v1")
    with torch.no_grad():  # of a palindrome without a convolution's reach both directions are alike
        twice.conv1d.weight[..., :-1] = 0
        y = twice(torch.cat([x, x.flip(1)], 1).float())
    assert error(y.flip(1), y) < 1e-5


def test_weights_start_as_upstream_s():
    """Names, dtypes, marks, and values: the same random numbers in the same order as the layers are made."""
    torch.manual_seed(3)
    layer = Mamba(32, layer_idx=1)
    assert [name for name, _ in layer.named_parameters()] == NINE
    torch.manual_seed(3)
    in_proj, conv = nn.Linear(32, 128, bias=False), nn.Conv1d(64, 64, 4, groups=64, padding=3)
    x_proj, dt_proj = nn.Linear(64, 34, bias=False), nn.Linear(2, 64)
    nn.init.uniform_(dt_proj.weight, -(2**-0.5), 2**-0.5)
    steps = (torch.rand(64) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)).exp().clamp(min=1e-4)
    out_proj = nn.Linear(64, 32, bias=False)
    for name, made in (("in_proj", in_proj), ("conv1d", conv), ("x_proj", x_proj), ("out_proj", out_proj)):
        assert torch.equal(getattr(layer, name).weight, made.weight), name
    assert torch.equal(layer.dt_proj.weight, dt_proj.weight)
    assert error(nn.functional.softplus(layer.dt_proj.bias), steps) < 1e-5
    assert torch.equal(layer.A_log, torch.arange(1.0, 17).log().repeat(64, 1))
    assert layer.dt_proj.bias._no_reinit
    assert layer.A_log._no_weight_decay
    assert layer.D._no_weight_decay
    assert Mamba(32, dtype=torch.bfloat16).A_log.dtype == torch.float32
    assert (Mamba(32, dt_init="constant", dt_scale=2.0).dt_proj.weight == 2 * 2**-0.5).all()


def test_state_dicts_both_ways():
    ours = MambaMixer(MambaConfig(hidden_size=16, state_size=8, num_hidden_layers=1), 0)
    theirs = Mamba(16, d_state=8)
    x = torch.randn(2, 9, 16)
    theirs.load_state_dict(ours.state_dict())
    assert error(theirs(x), ours(x)) < 1e-6
    theirs = Mamba(16, d_state=8)
    ours.load_state_dict(theirs.state_dict())
    assert error(ours(x), theirs(x)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hooked", [False, True])
def test_steps_are_the_whole(dtype, hooked):
    """A prompt, single tokens, and several at once, through inference_params and through step."""
    layer = Mamba(16, layer_idx=0, bias=True).to(dtype).eval()
    if hooked:
        layer.conv1d.register_forward_hook(lambda *a: None)
    x = torch.randn(2, 11, 16, dtype=dtype)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2  # halves are rounded between the layer's parts
    with torch.no_grad():
        whole = layer(x)
        params = InferenceParams(max_seqlen=11, max_batch_size=2)
        pieces = []
        for start, end in ((0, 2), (2, 3), (3, 4), (4, 11)):
            pieces.append(layer(x[:, start:end], inference_params=params))
            params.seqlen_offset = end
        assert error(torch.cat(pieces, 1), whole) < tolerance
        states = layer.allocate_inference_cache(2, 11)
        assert [tuple(s.shape) for s in states] == [(2, 32, 4), (2, 32, 16)]
        assert states[1].dtype == torch.float32
        pieces = [layer.step(x[:, t : t + 1], *states)[0] for t in range(11)]
        assert error(torch.cat(pieces, 1), whole) < tolerance
        assert error(states[1], params.key_value_memory_dict[0][1]) < tolerance


def test_gradients_flow_through_steps():
    layer = Mamba(8, d_state=4)
    x = torch.randn(2, 5, 8)
    states = layer.allocate_inference_cache(2, 5)
    torch.cat([layer.step(x[:, t : t + 1], *states)[0] for t in range(5)], 1).square().sum().backward()
    found = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert error(found[name], parameter.grad) < 2e-5, name


def test_an_adapter_in_a_submodule_s_place_is_called():
    """What upstream's fast path passes over: it reads weights, and not what wraps them."""

    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.extra = base, nn.Parameter(torch.randn(base.out_features, base.in_features) * 0.1)

        def forward(self, x):
            return self.base(x) + x @ self.extra.T

    layer = Mamba(16)
    x = torch.randn(2, 7, 16)
    merged = copy.deepcopy(layer)
    for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        setattr(layer, name, Adapter(getattr(layer, name)))
        with torch.no_grad():
            getattr(merged, name).weight += getattr(layer, name).extra
    assert error(layer(x), merged(x)) < 2e-6
    layer(x).sum().backward()
    assert all(getattr(layer, n).extra.grad is not None for n in ("in_proj", "x_proj", "dt_proj", "out_proj"))


def test_autocast_and_half_weights():
    layer = Mamba(16)
    x = torch.randn(2, 20, 16)
    expected = exact(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert error(y, expected) < 2e-2
    y.float().sum().backward()
    assert layer.in_proj.weight.grad.dtype == torch.float32
    half = copy.deepcopy(layer).bfloat16()
    assert error(half(x.bfloat16()), expected) < 3e-2
    half(x.bfloat16()).float().sum().backward()


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"bimamba_type": "v4"}, "bimamba_type 'v4' is not one of"), ({"dt_init": "zero"}, "dt_init 'zero'")],
)
def test_what_is_not_known_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Mamba(8, **fields)


def test_calls_that_cannot_be_right_are_refused():
    x, params = torch.randn(1, 7, 8), InferenceParams(8, 1)
    with pytest.raises(ValueError, match="nslices.*length of 7"):
        Mamba(8, bimamba_type="v3", nslices=5)(x)
    with pytest.raises(ValueError, match="reads the whole sequence, also backwards"):
        Mamba(8, bimamba_type="v2", layer_idx=0)(x, inference_params=params)
    with pytest.raises(ValueError, match="needs a layer_idx"):
        Mamba(8)(x, inference_params=params)
    with pytest.raises(ValueError, match=r"hidden_states has shape \(7, 8\), expected \(b, l, d_model\)"):
        Mamba(8)(x[0])


def test_traced():
    """Also where parameters are trained: torch compares a second trace, made without gradients, with the first."""
    layer = Mamba(16)
    traced = torch.jit.trace(layer, (torch.randn(2, 6, 16),))
    x = torch.randn(3, 9, 16)
    assert error(traced(x), layer(x)) < 1e-6
    gradients = [torch.autograd.grad(call(x).square().sum(), layer.A_log)[0] for call in (traced, layer)]
    assert error(*gradients) < 1e-6


def test_compile_and_export():
    layer = Mamba(16).eval()
    x = torch.randn(2, 6, 16)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert error(compiled(x), layer(x)) < 1e-6
    assert error(torch.export.export(layer, (x,)).module()(x), layer(x)) < 1e-6


def test_pickled_by_forks():
    """Vim's and VideoMamba's layers, pickled whole, have their settings under other names."""

    def again(layer: Mamba, **settings) -> Mamba:
        state = {k: v for k, v in layer.__dict__.items() if k not in ("bimamba_type", "if_divide_out")} | settings
        other = Mamba.__new__(Mamba)
        other.__setstate__(copy.deepcopy(state))
        return other

    x = torch.randn(2, 7, 16)
    vim, video = Mamba(16, bimamba_type="v2", if_devide_out=True), Mamba(16, bimamba=True)
    assert vim.if_devide_out
    assert torch.equal(again(vim, bimamba_type="v2", if_devide_out=True)(x), vim(x))
    assert not again(vim, bimamba_type="v2", if_devide_out=False).if_devide_out
    assert torch.equal(again(video, bimamba=True)(x), video(x))
    assert again(Mamba(16), bimamba=False).bimamba_type == "none"


def test_states_of_another_batch():
    """Refused by name; dropped where the parameters are reset for another batch; one row starts many."""
    layer, x = Mamba(8, layer_idx=3), torch.randn(3, 5, 8)
    with torch.no_grad():
        params = InferenceParams(8, 2)
        layer(x[:2], inference_params=params)
        with pytest.raises(ValueError, match="states of 2 rows for layer 3, and hidden_states has 3"):
            layer(x, inference_params=params)
        params.seqlen_offset = 5
        with pytest.raises(ValueError, match="states of 2 rows for layer 3, and hidden_states has 1"):
            layer(x[:1, :1], inference_params=params)
        for rows in (2, 3, 1):
            held = params.key_value_memory_dict.get(3)
            params.reset(8, rows)
            assert (params.key_value_memory_dict.get(3) is held) == (rows == held[0].shape[0])
            parts = [layer(x[:rows, :4], inference_params=params)]
            params.seqlen_offset = 4
            parts.append(layer(x[:rows, 4:], inference_params=params))
            assert error(torch.cat(parts, 1), layer(x[:rows])) < 2e-6
        params = InferenceParams(8, 3, key_value_memory_dict={3: layer.allocate_inference_cache(3, 8)})
        layer(x[:1, :4], inference_params=params)
        params.seqlen_offset = 4
        last = layer(x[:, 4:], inference_params=params)
        assert error(last, layer(torch.cat([x[:1, :4].expand(3, 4, 8), x[:, 4:]], 1))[:, 4:]) < 2e-6


@pytest.mark.parametrize(
    "fields",
    [{"kernel_size": 4, "padding": 6, "dilation": 2, "groups": 32}, {"kernel_size": 3, "padding": 1, "groups": 32},
     {"kernel_size": 4, "padding": 3, "groups": 32, "padding_mode": "circular"}, {"kernel_size": 4, "padding": 3},
     {"kernel_size": 6, "padding": 5, "groups": 32}],
)  # fmt: skip
def test_a_convolution_put_in_its_place(fields):
    """Dilated, of later inputs, around the end, of all channels, wider: it is called, as no filter is equal to it."""
    layer, x = Mamba(16, layer_idx=0), torch.randn(2, 9, 16)
    conv = layer.conv1d = nn.Conv1d(32, 32, **fields)
    seen = []
    expected = F.linear(x, layer.in_proj.weight).transpose(1, 2)
    expected = F.silu(conv(expected[:, :32])[..., :9])
    layer.x_proj.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    y = layer(x)
    assert error(seen[0].transpose(1, 2), expected) < 2e-6
    states = layer.allocate_inference_cache(2, 9)
    if "groups" in fields:
        layer.conv1d.register_forward_hook(lambda *args: None)
        with pytest.raises(ValueError, match="which needs more than the 4 inputs that a state holds, or later ones"):
            layer.step(x[:, :1], *states)
    else:
        with torch.no_grad():
            assert error(torch.cat([layer.step(token, *states)[0] for token in x.split(1, 1)], 1), y) < 2e-6
