"""torch.func's transforms, backward passes of several gradients at once, and models on meta: as with plain PyTorch
layers."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacrev, vmap

from mambakit import MambaConfig, MambaForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's, that a loop stands in for a batching rule

PACKED = {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]])}
NAME = "backbone.layers.0.mixer.A_log"


def made(**fields) -> tuple[MambaForCausalLM, torch.Tensor]:
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=16, state_size=4, num_hidden_layers=2, **fields))
    return model, torch.randint(1, 60, (2, 7))


def loss_of(model: MambaForCausalLM, ids: torch.Tensor, **marks: torch.Tensor):
    return lambda parameters: functional_call(model, parameters, (ids,), {"labels": ids, **marks}).loss


@pytest.mark.parametrize("marks", [{}, PACKED], ids=["rows", "packed"])
@pytest.mark.parametrize("fields", [{}, {"hidden_act": "gelu"}], ids=["silu", "gelu"])
@pytest.mark.parametrize("training", [True, False])
def test_a_gradient_by_torch_func(training, fields, marks):
    model, ids = made(**fields)
    model.train(training)
    model(ids, labels=ids, **marks).loss.backward()
    found = grad(loss_of(model, ids, **marks))({n: p.detach() for n, p in model.named_parameters()})
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)  # sums in another order


@pytest.mark.parametrize("marks", [{}, PACKED], ids=["rows", "packed"])
def test_a_hessian(marks):
    """Forward over reverse is reverse over reverse, and both are the differences of the gradient."""
    model, ids = made()
    model = model.double()
    given = {n: p.detach() for n, p in model.named_parameters()}
    value = given[NAME]

    def loss(a_log):
        return loss_of(model, ids, **marks)({**given, NAME: a_log})

    found = hessian(loss)(value)
    torch.testing.assert_close(found, jacrev(jacrev(loss))(value))
    step = torch.zeros_like(value)
    step[0, 0] = 1e-6
    differences = (grad(loss)(value + step) - grad(loss)(value - step)) / 2e-6
    torch.testing.assert_close(found[..., 0, 0], differences, rtol=1e-3, atol=1e-9)


def test_gradients_of_each_text():
    model, ids = made()
    given = {n: p.detach() for n, p in model.named_parameters()}
    found = vmap(lambda row: grad(loss_of(model, row[None]))(given)[NAME])(ids)
    for i in range(2):
        expected = grad(loss_of(model, ids[i : i + 1]))(given)[NAME]
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_an_ensemble(training, gradients):
    """Of parameters, without and with gradients: nothing is written into memory that is not batched."""
    model, ids = made()
    model.train(training)
    given = {n: p.detach() for n, p in model.named_parameters()}
    several = torch.stack([given[NAME], given[NAME] + 1])
    with torch.set_grad_enabled(gradients):
        found = vmap(lambda a_log: functional_call(model, {**given, NAME: a_log}, (ids,)).logits)(several)
        for i in range(2):
            torch.testing.assert_close(found[i], functional_call(model, {**given, NAME: several[i]}, (ids,)).logits)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("fields", [{}, {"hidden_act": "gelu"}], ids=["fused", "by itself"])
def test_several_gradients_at_once(fields, autocast):
    model, ids = made(**fields)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = model(ids).logits[0, -1, :3]
    parameters = list(model.parameters())
    found = torch.autograd.grad(outputs, parameters, torch.eye(3), is_grads_batched=True, retain_graph=True)
    for i in range(3):
        expected = torch.autograd.grad(outputs[i], parameters, retain_graph=True)
        for a, b in zip(found, expected, strict=True):
            # In half the sums of a batch are rounded in another order.
            torch.testing.assert_close(a[i], b, rtol=1e-2 if autocast else 1e-4, atol=1e-2 if autocast else 1e-6)


def test_shapes_on_meta():
    """Autocast knows no such device and raises when it is asked for it."""
    with torch.device("meta"):
        model = MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=2))
    ids = torch.ones(2, 7, dtype=torch.int64, device="meta")
    cache = model.eval()(ids, attention_mask=ids, use_cache=True).cache_params
    assert model(ids[:, :1], cache_params=cache).logits.shape == (2, 1, 61)
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())


def test_packed_weights_on_meta():
    model, ids = made()
    assert model.eval().quantize("int8").to("meta")(ids.to("meta")).logits.shape == (2, 7, 61)
