"""The fused mixer beside autograd's own way through the same ops."""

from __future__ import annotations

import pytest
import torch

from mambakit.modules import LayerConfig, MambaMixer, Packing
from mambakit.ops.fused_mixer import fused_mixer, reference
from tests.ops.closeness import worst

# The dynamic-shape check draws graphs for minutes; the other three are fast.
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
NORMS = {"falcon": {"mixer_rms_eps": 1e-3}, "jamba": {"mixer_rms_eps": 1e-3, "mixer_norm_weights": True}}
"""Norms of dt, B and C, without weights and with."""
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def layer(device: str, dtype: torch.dtype = torch.float64, **fields) -> MambaMixer:
    torch.manual_seed(0)
    mixer = MambaMixer(LayerConfig(hidden_size=20, state_size=5, time_step_rank=3, num_hidden_layers=1, **fields))
    with torch.no_grad():  # weights of norms start at 1, where a mistake could hide
        for norm in mixer.norms():
            norm.weight.add_(torch.randn_like(norm.weight) * 0.3)
    return mixer.to(device, dtype).train()


class States:
    """What a mixer asks of a cache, for one layer."""

    def __init__(self, *states: torch.Tensor):
        self.entered = self.left = states

    def layer(self, index, rows):
        return self.entered

    def update(self, index, conv, ssm, rows):
        self.left = conv, ssm


def gradients(
    mixer: MambaMixer, fused: bool, monkeypatch, packed: bool = False, half: bool = False, states: bool = False
) -> dict:
    """The output, and the gradients of the input and every parameter; with states, those too, in and out."""
    device, dtype = mixer.D.device, mixer.in_proj.weight.dtype
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(1 if packed else 2, 23, 20, generator=generator).to(device, dtype) for _ in range(2))
    x.requires_grad_()
    cu_seqlens = torch.tensor([0, 9, 10, 23], dtype=torch.int32, device=device) if packed else None
    packing = Packing.from_cu_seqlens(cu_seqlens, (1, 23)) if packed else None
    cache = None
    if states:
        rows, d, reach = (3 if packed else 2), mixer.intermediate_size, mixer.conv_kernel_size - 1
        sizes = [(rows, d, reach), (rows, d, mixer.ssm_state_size)]
        entered, weights = ([torch.randn(s, generator=generator).to(device, dtype) for s in sizes] for _ in range(2))
        cache = States(*(t.requires_grad_() for t in entered))
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr("mambakit.modules.mixers.fused_layer.run", lambda *a, **k: None)  # tests/ops/fused_mixer has it
        kept = MambaMixer._mix_fused
        patch.setattr(MambaMixer, "_mix_fused", lambda *a: calls.append(1) or kept(*a))
        if not fused:
            patch.setattr(MambaMixer, "can_fuse", lambda _: False)
            patch.setattr("mambakit.modules.mixers.mamba.project", lambda module, x: module(x))
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            y = mixer(x, cache, packing)
        loss = (y * dy.to(y.dtype)).sum()
        if cache is not None:
            loss = loss + sum((left * weight).sum() for left, weight in zip(cache.left, weights, strict=True))
        loss.backward()
    assert bool(calls) == fused
    found = {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in mixer.named_parameters()}
    if cache is not None:
        for name, entered, left in zip(("conv", "ssm"), cache.entered, cache.left, strict=True):
            found |= {f"{name} state": left.detach(), f"gradient of the {name} state": entered.grad}
    mixer.zero_grad()
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "fields",
    [{}, {"use_bias": True, "use_conv_bias": False, "conv_kernel": 3}, *NORMS.values()],
    ids=["plain", "bias", *NORMS],
)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("states", [False, True], ids=["zeros", "states"])
def test_it_is_what_autograd_finds(device, fields, packed, states, monkeypatch):
    mixer = layer(device, **fields)
    expected = gradients(mixer, False, monkeypatch, packed, states=states)
    for name, found in gradients(mixer, True, monkeypatch, packed, states=states).items():
        assert worst(found, expected[name]) < 1e-12, name


@pytest.mark.cuda
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("states", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize("fields", [{}, *NORMS.values()], ids=["plain", *NORMS])
def test_float32_on_a_gpu(packed, states, fields, monkeypatch):
    """float64 goes to the references; this goes through the kernels, which write into halves of one tensor."""
    expected = gradients(layer("cpu", **fields), True, monkeypatch, packed, states=states)
    ours = gradients(layer("cuda", torch.float32, **fields), True, monkeypatch, packed, states=states)
    for name, found in ours.items():
        assert worst(found.cpu(), expected[name].cpu()) < 2e-5, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fields", [{}, *NORMS.values()], ids=["plain", *NORMS])
def test_under_autocast_the_gradients_of_weights_are_not_rounded(device, fields, monkeypatch):
    exact = gradients(layer(device, **fields), True, monkeypatch)
    ours = gradients(layer(device, torch.float32, **fields), True, monkeypatch, half=True)
    theirs = gradients(layer(device, torch.float32, **fields), False, monkeypatch, half=True)
    assert ours["y"].dtype == torch.bfloat16
    for name in ("in_proj.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight"):
        gradient = ours[name]
        assert gradient.dtype == torch.float32
        assert not torch.equal(gradient, gradient.bfloat16().float()), name
        assert torch.equal(theirs[name], theirs[name].bfloat16().float()), name
    for name, gradient in ours.items():
        assert worst(gradient.double(), exact[name]) < max(0.03, 1.2 * worst(theirs[name].double(), exact[name])), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("fields", [{}, NORMS["falcon"]], ids=["plain", "falcon"])
def test_what_is_computed_again_is_not_kept(device, packed, fields, monkeypatch):
    mixer = layer(device, **fields)
    expected = gradients(mixer, True, monkeypatch, packed)
    mixer.recompute_selection = True
    for name, found in gradients(mixer, True, monkeypatch, packed).items():
        assert torch.equal(found, expected[name]), name
    kept: dict[bool, int] = {}
    for recompute in (False, True):
        mixer.recompute_selection = recompute
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            mixer(torch.randn(1, 16, 20, dtype=torch.float64, device=device))
        kept[recompute] = sum(sizes)
    assert kept[False] - kept[True] == 2 * 16 * mixer.intermediate_size  # the convolution's output and delta


@pytest.mark.parametrize("device", DEVICES)
def test_a_frozen_weight_has_no_gradient(device, monkeypatch):
    mixer = layer(device)
    expected = gradients(mixer, False, monkeypatch)
    for name in ("x_proj", "dt_proj", "in_proj"):
        getattr(mixer, name).weight.requires_grad_(False)
    found = gradients(mixer, True, monkeypatch)
    assert found["x_proj.weight"] is None
    assert found["dt_proj.weight"] is None
    assert found["in_proj.weight"] is None
    for name in ("x", "A_log", "conv1d.weight", "dt_proj.bias", "out_proj.weight"):
        assert worst(found[name], expected[name]) < 1e-12, name


def test_a_hook_on_a_projection_is_called():
    mixer = layer("cpu")
    seen = []
    for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        getattr(mixer, name).register_forward_hook(lambda *_, name=name: seen.append(name))
    mixer(torch.randn(1, 4, 20, dtype=torch.float64))
    assert sorted(seen) == ["dt_proj", "in_proj", "out_proj", "x_proj"]


def test_a_hook_on_all_modules_sees_every_projection():
    mixer = layer("cpu")
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        with torch.autocast("cpu", torch.bfloat16):
            mixer.float()(torch.randn(1, 4, 20))
    finally:
        handle.remove()
    assert {mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj} <= set(seen)


def test_without_a_gradient_no_states_are_kept_for_one(monkeypatch):
    mixer = layer("cpu").requires_grad_(False)
    intervals = []
    scan = torch.ops.mambakit.selective_scan
    monkeypatch.setattr(torch.ops.mambakit, "selective_scan", lambda *a: intervals.append(a[-1]) or scan(*a))
    mixer(torch.randn(1, 4, 20, dtype=torch.float64))
    mixer(torch.randn(1, 4, 20, dtype=torch.float64, requires_grad=True))
    assert intervals[0] == 0 < intervals[1]


def inputs_of(mixer: MambaMixer, packed: bool) -> tuple:
    """Arguments of the op: xz, the weights, both states and cu_seqlens."""
    d = mixer.intermediate_size
    xz = torch.randn(1 if packed else 2, 23, 2 * d, dtype=mixer.D.dtype, requires_grad=True)
    cu_seqlens = torch.tensor([0, 9, 10, 23], dtype=torch.int32) if packed else None
    rows = 3 if packed else 2
    conv = torch.randn(rows, d, mixer.conv_kernel_size - 1, dtype=xz.dtype, requires_grad=True)
    ssm = torch.randn(rows, d, mixer.ssm_state_size, dtype=xz.dtype, requires_grad=True)
    return xz, mixer._mixer_weights(), conv, ssm, cu_seqlens


@pytest.mark.parametrize("fields", [{}, *NORMS.values()], ids=["plain", *NORMS])
def test_it_is_the_reference(fields):
    mixer = layer("cpu", **fields)
    xz, weights, *states, _ = inputs_of(mixer, False)
    leaves = [t for t in (xz, *weights, *states) if t is not None]
    eps = mixer.mixer_rms_eps
    found, expected = (f(xz, weights, *states, mixer_eps=eps) for f in (fused_mixer, reference.fused_mixer))
    pushed = [torch.randn_like(t) for t in expected]
    for got, want in zip(found, expected, strict=True):
        assert worst(got, want) < 1e-12
    gradients = (torch.autograd.grad(results, leaves, pushed) for results in (found, expected))
    for got, want in zip(*gradients, strict=True):
        assert worst(got, want) < 1e-11


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("fields", [{}, *NORMS.values()], ids=["plain", *NORMS])
def test_opcheck(packed, recompute, bias, fields):
    mixer = layer("cpu", torch.float32, use_conv_bias=bias, **fields)
    eps = mixer.mixer_rms_eps
    xz, weights, conv, ssm, cu_seqlens = inputs_of(mixer, packed)
    states = (conv, ssm) if bias else (None, None)
    for interval in (0, 64):
        arguments = (*weights, *states, cu_seqlens, recompute, interval, eps)
        forward = torch.ops.mambakit.fused_mixer
        torch.library.opcheck(forward, (xz, *arguments) if interval else (xz.detach(), *arguments), test_utils=CHECKS)
    plain = [None if t is None else t.detach() for t in (xz, *weights, *states)]
    y, _, ssm_left, *kept = forward(*plain, cu_seqlens, recompute, 64, eps)
    gradients = (torch.randn_like(y), None, torch.randn_like(ssm_left))
    torch.library.opcheck(
        torch.ops.mambakit.fused_mixer_backward, (*gradients, *plain, cu_seqlens, *kept, 64, True, bias, eps)
    )


def test_its_checks():
    xz, weights, *_ = inputs_of(layer("cpu"), False)
    with pytest.raises(ValueError, match=r"fused_mixer: xz has shape .* expected \(b, l, 2 d\)"):
        fused_mixer(xz[..., 1:], weights)
    weights = layer("cpu", **NORMS["jamba"])._mixer_weights()
    with pytest.raises(ValueError, match="the norms of dt, B and C have weights, but no mixer_eps"):
        fused_mixer(xz, weights)
    with pytest.raises(ValueError, match="give all three or none"):
        fused_mixer(xz, weights._replace(B_norm=None), mixer_eps=1e-5)


def test_a_hook_on_a_norm_is_called(monkeypatch):
    mixer = layer("cpu", **NORMS["jamba"])
    expected = gradients(mixer, True, monkeypatch)
    seen = []
    for name in ("dt_layernorm", "b_layernorm", "c_layernorm"):
        getattr(mixer, name).register_forward_hook(lambda *_, name=name: seen.append(name))
    assert not mixer.can_fuse()
    for name, found in gradients(mixer, False, monkeypatch).items():
        assert worst(found, expected[name]) < 1e-12, name
    assert seen == ["dt_layernorm", "b_layernorm", "c_layernorm"]
