"""The ops have a first derivative by reverse mode. Others raise; they were 0 in silence."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from mambakit.modules import LayerConfig, MambaMixer
from mambakit.ops import (
    causal_conv1d,
    linear_cross_entropy,
    rms_norm,
    selective_scan,
    selective_scan_,
)
from mambakit.ops.causal_conv1d import chunked as conv_reference
from mambakit.ops.linear_cross_entropy import chunked as loss_reference
from mambakit.ops.rms_norm import chunked as norm_reference
from mambakit.ops.selective_scan import chunked as scan_reference

NAMES = ["scan", "final state", "convolution", "window", "norm", "stream", "loss"]
Case = tuple[str, Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]


def cases(dtype: torch.dtype) -> Iterator[Case]:
    """(name, an op, its reference, their inputs)."""
    torch.manual_seed(0)
    b, l, d, n, k = 2, 5, 3, 2, 4  # noqa: E741, the length
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    u, delta, z = (torch.randn(b, l, d, dtype=dtype) for _ in range(3))
    B, C = (torch.randn(b, l, n, dtype=dtype) for _ in range(2))
    A, D = -torch.rand(d, n, dtype=wide), torch.randn(d, dtype=wide)
    state, window = torch.randn(b, d, n, dtype=wide), torch.randn(b, d, k - 1, dtype=dtype)
    scan = (u, delta, A, B, C, D, z, D, state)
    for i, name in enumerate(("scan", "final state")):
        yield (
            name,
            lambda *t, i=i: selective_scan(*t[:8], True, initial_state=t[8])[i],
            lambda *t, i=i: scan_reference.forward(*t[:8], True, t[8], None, 0)[i],
            scan,
        )
    conv = (u, torch.randn(d, k, dtype=dtype), torch.randn(d, dtype=dtype), window)
    yield (
        "convolution",
        lambda *t: causal_conv1d(*t[:3], initial_state=t[3])[0],
        lambda *t: conv_reference.forward(*t[:3], "silu", t[3], None)[0],
        conv,
    )
    yield (
        "window",
        lambda x, s: causal_conv1d(x, conv[1], initial_state=s)[1],
        lambda x, s: conv_reference.forward(x, conv[1], None, "silu", s, None)[1],
        (u[:, :2].clone(), window),
    )
    norm = (u, D.to(dtype), z)
    for i, name in enumerate(("norm", "stream")):
        yield (
            name,
            lambda x, w, r, i=i: rms_norm(x, w, residual=r)[i] + 0 * w,
            lambda x, w, r, i=i: norm_reference.forward(x, w, r, 1e-5, x.dtype, x.dtype)[i] + 0 * w,
            norm,
        )
    hidden, head, targets = torch.randn(4, d, dtype=dtype), torch.randn(5, d, dtype=dtype), torch.tensor([0, 4, 2, 2])
    yield (
        "loss",
        lambda h, w: linear_cross_entropy(h, w, targets, num_items=1),
        lambda h, w: loss_reference.forward(h, w, targets, -100, False, False)[0],
        (hidden, head),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", NAMES)
def test_a_second_derivative_raises(name, dtype):
    op, inputs = next((op, inputs) for found, op, _, inputs in cases(dtype) if found == name)
    leaves = [t.requires_grad_() for t in inputs]
    total = op(*leaves).float().square().sum()
    once = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
    first = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
    for leaf, gradient, expected in zip(leaves, first, once, strict=True):
        if gradient is None:
            continue
        assert torch.equal(gradient.detach(), expected), "the first derivative is the same with create_graph=True"
        for take in (
            lambda leaf=leaf, g=gradient: torch.autograd.grad(g.float().sum(), leaf, retain_graph=True),
            lambda g=gradient: g.float().sum().backward(retain_graph=True),
            lambda leaf=leaf, g=gradient: (g.float().square().sum() + leaf.float().square().sum()).backward(
                retain_graph=True
            ),
        ):
            with pytest.raises(RuntimeError, match=r"no second derivative.*chunked\.forward"):
                take()


@pytest.mark.parametrize("name", NAMES)
def test_the_remedy_that_the_error_names(name):
    """The reference, called by itself, is PyTorch's own operations: any derivative."""
    op, reference, inputs = next(c[1:] for c in cases(torch.float64) if c[0] == name)
    assert torch.allclose(op(*inputs), reference(*inputs))
    leaves = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradgradcheck(reference, leaves, atol=1e-4)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("trained", ["everything", "A_log", "x_proj.weight", "dt_proj.bias", "in_proj.weight"])
def test_a_mixers_second_derivative_raises(trained, half):
    """Its ops run as one function, with a gradient of its own."""
    config = LayerConfig(hidden_size=20, state_size=5, time_step_rank=3)
    mixer = MambaMixer(config).train()
    if trained != "everything":
        for name, parameter in mixer.named_parameters():
            parameter.requires_grad_(name == trained)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        y = mixer(torch.randn(1, 4, 20))
    wanted = [
        p for p in mixer.parameters() if p.requires_grad and p is not mixer.out_proj.weight
    ]  # that one's is out_proj's alone
    plain = torch.autograd.grad(y.float().sum(), wanted, retain_graph=True)
    recorded = torch.autograd.grad(y.float().sum(), wanted, create_graph=True)
    for parameter, gradient, expected in zip(wanted, recorded, plain, strict=True):
        assert torch.equal(gradient.detach(), expected)
        with pytest.raises(RuntimeError, match="no second derivative"):
            (gradient.square().sum() + parameter.square().sum()).backward(retain_graph=True)


def test_a_gradient_penalty_on_a_model_raises_and_a_first_derivative_does_not():
    pytest.importorskip("transformers")
    from mambakit import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2))
    ids = torch.randint(1, 60, (2, 7))
    parameters = list(model.parameters())
    plain = torch.autograd.grad(model(ids, labels=ids).loss, parameters)
    loss = model(ids, labels=ids).loss
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(gradients, plain, strict=True))
    with pytest.raises(RuntimeError, match="no second derivative"):
        (loss + sum(g.square().sum() for g in gradients)).backward()


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_raises(name):
    op, inputs = next((op, inputs) for found, op, _, inputs in cases(torch.float32) if found == name)
    with pytest.raises(NotImplementedError, match=r"no forward-mode derivative"):
        torch.func.jvp(op, inputs, inputs)
    with forward_ad.dual_level():
        op(*inputs)  # nobody asks for a tangent
        duals = [forward_ad.make_dual(t, t) for t in inputs]
        with pytest.raises(NotImplementedError, match=r"no forward-mode derivative"):
            op(*duals)


def test_forward_mode_in_place_raises():
    u, B, A = torch.randn(1, 2, 3), torch.randn(1, 2, 2), -torch.rand(3, 2)
    with (
        forward_ad.dual_level(),
        torch.no_grad(),
        pytest.raises(NotImplementedError, match="selective_scan has no forward-mode"),
    ):
        selective_scan_(forward_ad.make_dual(u, u), u, A, B, B, state=torch.zeros(1, 3, 2))
