"""What compat does on a GPU: the functions beside float64, layers in half, generation as a CUDA graph."""

from __future__ import annotations

import pytest
import torch

from mambakit.compat import convolution_extension, scan_extensions
from mambakit.compat.convolution import causal_conv1d_fn, causal_conv1d_update
from mambakit.compat.mamba import Mamba
from mambakit.compat.mixer_model import MambaConfig, MambaLMHeadModel
from mambakit.compat.selective_scan import selective_scan_fn
from mambakit.compat.state_update import selective_state_update
from tests.compat.oracles import convolution, error, gradients, leaves, scan, wide

pytestmark = pytest.mark.cuda


def on_gpu(*tensors):
    return [None if t is None else t.cuda() for t in tensors]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1.2e-2)])
@pytest.mark.parametrize("form", ["shared", "groups", "constant"])
def test_the_scan(form, dtype, tolerance):
    """(b, d, l) memory, every gradient; and the extension's two calls."""
    u, delta, z = (torch.randn(2, 24, 100).to(dtype) for _ in range(3))
    shape = {"shared": (2, 8, 100), "groups": (2, 3, 8, 100), "constant": (24, 8)}[form]
    B, C = (torch.randn(shape).to(torch.float32 if form == "constant" else dtype) for _ in range(2))
    arguments = [u, delta, -torch.rand(24, 8), B, C, torch.randn(24), z, torch.randn(24) - 2]
    mine, exact = leaves(*on_gpu(*arguments)), leaves(*map(wide, arguments))
    y, state = selective_scan_fn(*mine, True, True)
    expected, last = scan(*exact, True)
    dy = torch.randn(y.shape).to(dtype)
    assert error(y.cpu(), expected) < tolerance
    assert error(state.cpu(), last) < tolerance
    right = gradients(expected, exact, dy)
    for found, value in zip(gradients(y, mine, dy.cuda()), right, strict=True):
        assert error(found.cpu(), value) < 4 * tolerance
    *first, z, bias = (t.detach() for t in mine)
    out, x, gated = scan_extensions.scan_fwd(*first, z, bias, True)
    assert error(gated.cpu(), expected) < tolerance
    found = scan_extensions.scan_bwd(*first, z, bias, dy.cuda(), x, out, None, True, False)
    for i, value in zip([*range(6), 7, 6], found, strict=True):
        assert error(value.cpu(), right[i]) < 4 * tolerance


def test_the_convolution_and_the_updates():
    x, weight, bias = torch.randn(2, 24, 50), torch.randn(24, 4), torch.randn(24)
    expected = convolution(x, weight, bias, "silu")
    gx, gw, gb = on_gpu(x, weight, bias)
    assert error(causal_conv1d_fn(gx, gw, gb, activation="silu").cpu(), expected) < 1e-5
    assert error(convolution_extension.conv_fwd(gx, gw, gb, True).cpu(), expected) < 1e-5
    state = torch.zeros(2, 24, 4, device="cuda")
    found = torch.stack([causal_conv1d_update(gx[..., t], state, gw, gb, "silu") for t in range(50)], -1)
    assert error(found.cpu(), expected) < 1e-5
    dt, A, B, C = torch.randn(2, 24, 50), -torch.rand(24, 8), torch.randn(2, 8, 50), torch.randn(2, 8, 50)
    expected, last = scan(x, dt, A, B, C, delta_softplus=True)
    dt, A, B, C = on_gpu(dt, A, B, C)
    state = torch.zeros(2, 24, 8, device="cuda")
    found = [
        selective_state_update(state, gx[..., t], dt[..., t], A, B[..., t], C[..., t], dt_softplus=True)
        for t in range(50)
    ]
    assert error(torch.stack(found, -1).cpu(), expected) < 1e-5
    assert error(state.cpu(), last) < 1e-5


@pytest.mark.parametrize("fields", [{}, {"bimamba_type": "v1"}, {"bimamba_type": "v2"}, {"bimamba_type": "v3"}])
def test_layers_under_autocast(fields):
    layer = Mamba(32, **fields)
    x = torch.randn(2, 40, 32)
    expected = layer(x)
    expected.sum().backward()
    right = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    layer.cuda()
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(x.cuda())
    y.float().sum().backward()
    assert error(y.cpu(), expected) < 3e-2
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert error(parameter.grad.cpu(), right[name]) < 6e-2, name


def test_generation_as_a_graph():
    """The same tokens and logits with the step recorded, for prompts one after another."""
    model = MambaLMHeadModel(MambaConfig(d_model=64, n_layer=2, vocab_size=50)).cuda().eval()
    for _ in range(2):
        ids = torch.randint(0, 50, (3, 7), device="cuda")
        plain = model.generate(ids, 20, return_dict_in_generate=True, output_scores=True)
        graph = model.generate(ids, 20, return_dict_in_generate=True, output_scores=True, cg=True)
        assert torch.equal(plain.sequences, graph.sequences)
        assert error(torch.stack(graph.scores).cpu(), torch.stack(plain.scores).cpu()) < 1e-5
