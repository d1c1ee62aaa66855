"""Objects kept with a model: they last while its tensors and modes stay the same, and no longer than the model."""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
import weakref

import pytest
import torch
from torch import nn

from mambakit.decoding import cuda_graph, graph_step
from mambakit.decoding.bucket_graphs import BucketGraphs
from mambakit.decoding.cuda_graph import CapturedGraph, kept_with, placement_of, why_not_captured
from mambakit.ops._backends.captured_graph import between_captures
from tests.models.configurations import pair

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def model():
    return pair("plain")[0]


def replace_parameter(model):
    model.backbone.layers[1].mixer.D = nn.Parameter(model.backbone.layers[1].mixer.D.detach().clone())


def move_data(model):
    model.backbone.layers[0].norm.weight.data = model.backbone.layers[0].norm.weight.data.clone()


def replace_module(model):
    model.backbone.layers[0].mixer.out_proj = nn.Linear(64, 32, bias=False)


def add_buffer(model):
    model.backbone.layers[0].register_buffer("extra", torch.zeros(1))


def drop_a_layer(model):
    del model.backbone.layers[1]


CHANGES = [replace_parameter, move_data, replace_module, add_buffer, drop_a_layer, lambda model: model.train()]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_moves_is_noticed(model, change):
    made = []
    before = placement_of(model)
    for _ in range(3):
        assert kept_with(model, ("thing",), lambda: made.append(1) or len(made)) == 1
    assert placement_of(model) is before
    change(model)
    assert placement_of(model) is not before
    assert kept_with(model, ("thing",), lambda: made.append(1) or len(made)) == 2
    assert placement_of(model) is placement_of(model)


def test_values_that_change_in_place_are_not_a_move(model):
    before = placement_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    hook = model.backbone.register_forward_hook(lambda *_: None)
    hook.remove()
    assert placement_of(model) is before


def test_only_the_last_few_are_kept(model):
    made = []
    for key in [*range(cuda_graph._MOST_KEPT), 0, cuda_graph._MOST_KEPT, 0, 1]:
        kept_with(model, (key,), lambda key=key: made.append(key) or key)
    assert made == [*range(cuda_graph._MOST_KEPT), cuda_graph._MOST_KEPT, 1], "0 was used last, so 1 had gone"


def test_what_is_kept_goes_with_the_model():
    model = pair("plain")[0]  # nobody else's
    kept = weakref.ref(kept_with(model, ("prefill",), functools.partial(BucketGraphs, model)))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert kept() is None


@torch.no_grad()
def test_tensors_that_are_kept_are_not_of_an_inference_mode(model):
    with torch.inference_mode():
        kept = kept_with(model, ("states",), lambda: model.backbone.new_cache(1))
    assert not kept.ssm_states.is_inference()


def test_a_cpu_has_no_graphs(model):
    assert "on cpu" in why_not_captured(model)
    assert "on cpu" in graph_step.why_not_persistent(model, 1)
    assert "on cpu" in graph_step.why_not_verification(model, 1, 4)


@pytest.mark.cuda
@torch.no_grad()
def test_a_graph_runs_again_what_was_captured():
    x = torch.ones(3, device="cuda")
    first = CapturedGraph(lambda: x * 2, x.device, warm_ups=2)
    second = CapturedGraph(lambda: x + 1, x.device, shared=first)
    x.fill_(5)
    first.replay()
    assert first.result.tolist() == [10.0] * 3
    second.replay()
    assert second.result.tolist() == [6.0] * 3


@pytest.mark.cuda
def test_reasons_on_a_gpu():
    model = pair("plain")[0].cuda()
    assert why_not_captured(model) is None
    with torch.autocast("cuda", torch.bfloat16):
        assert why_not_captured(model) == "autocast is on"
    hook = model.backbone.layers[0].register_forward_hook(lambda *_: None)
    assert "hook" in why_not_captured(model)
    hook.remove()
    assert why_not_captured(model) is None
    model.backbone.layers[0].cpu()
    assert "not all tensors" in why_not_captured(model)


def test_no_graph_is_captured_while_a_thread_waits_for_the_device(monkeypatch):
    """A capture fails where another thread does what must not happen in it."""
    for name in ("device", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    captured, inside = [], threading.Event()

    def capture():
        CapturedGraph(lambda: captured.append(inside.is_set()), torch.device("cpu"))

    with between_captures():
        thread = threading.Thread(target=capture)
        thread.start()
        thread.join(0.1)
        assert not captured
        inside.set()
    thread.join(30)
    assert captured == [True]
