"""linear_cross_entropy as a user calls it, against the head and `torch.nn.functional.cross_entropy`."""

import pytest
import torch
import torch.nn.functional as F

from mambakit.ops.linear_cross_entropy import chunked, reference
from mambakit.ops.linear_cross_entropy.api import linear_cross_entropy


@pytest.fixture
def data():
    torch.manual_seed(0)
    hidden = torch.randn(23, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(31, 12, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(31, (23,))
    targets[::4] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("chunk_logits", [2**24, 100])
def test_equals_cross_entropy(data, chunk_logits, monkeypatch):
    monkeypatch.setattr(chunked, "_CHUNK_LOGITS", chunk_logits)  # 100: three tokens a chunk
    hidden, weight, targets = data
    expected = F.cross_entropy(hidden @ weight.T, targets)
    loss = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(loss, expected)
    for got, want in zip(
        torch.autograd.grad(3 * loss, (hidden, weight)),
        torch.autograd.grad(3 * expected, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_equals_the_reference(data):
    hidden, weight, targets = data
    expected = reference.linear_cross_entropy(hidden, weight, targets) / (targets != -100).sum()
    loss = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(loss, expected)
    for got, want in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("num_items", [50, 50.0, torch.tensor(50), torch.tensor([50])])
def test_num_items_divides_the_sum(data, num_items):
    hidden, weight, targets = data
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum") / 50
    loss = linear_cross_entropy(hidden, weight, targets, num_items=num_items)
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected)


def test_all_ignored_is_nan_alone_and_zero_in_a_step(data):
    hidden, weight, targets = data
    ignored = torch.full_like(targets, 7)
    assert linear_cross_entropy(hidden, weight, ignored, ignore_index=7).isnan()
    assert linear_cross_entropy(hidden, weight, ignored, ignore_index=7, num_items=10) == 0


def test_gradient_only_where_asked(data):
    hidden, weight, targets = data
    linear_cross_entropy(hidden.detach(), weight, targets).backward()
    assert hidden.grad is None
    assert weight.grad.shape == weight.shape
    assert not linear_cross_entropy(hidden.detach(), weight.detach(), targets).requires_grad


def test_backward_twice(data):
    hidden, weight, targets = data
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * once)


def test_autocast_keeps_a_float32_loss_and_weight_gradient():
    hidden = torch.randn(9, 16, requires_grad=True)
    weight = torch.randn(20, 16, requires_grad=True)
    targets = torch.randint(20, (9,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert (loss.dtype, weight.grad.dtype, hidden.grad.dtype) == (torch.float32,) * 3
    expected = F.cross_entropy(hidden.bfloat16().float() @ weight.T, targets)
    torch.testing.assert_close(loss, expected)  # hidden is rounded, nothing after it is


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    hidden = torch.randn(6, 4, requires_grad=requires_grad)
    weight = torch.randn(5, 4, requires_grad=requires_grad)
    arguments = (hidden, weight, torch.tensor([0, 4, -100, 2, 2, 1]), -100, requires_grad, requires_grad)
    torch.library.opcheck(torch.ops.mambakit.linear_cross_entropy.default, arguments)


def test_compiles_in_one_graph(data):
    hidden, weight, targets = data
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden, weight, targets), linear_cross_entropy(hidden, weight, targets))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden": torch.randn(2, 3, 4)}, "flatten"),
        ({"weight": torch.randn(5, 3)}, r"expected \(v, h\)"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets has shape \(3,\)"),
        ({"num_items": torch.ones(2)}, "one element"),
    ],
)
def test_refuses(change, message):
    arguments = {"hidden": torch.randn(6, 4), "weight": torch.randn(5, 4), "targets": torch.zeros(6, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**arguments, **change})


def test_refuses_integer_targets_of_another_width():
    with pytest.raises(TypeError, match="int64"):
        linear_cross_entropy(torch.randn(6, 4), torch.randn(5, 4), torch.zeros(6, dtype=torch.int32))
