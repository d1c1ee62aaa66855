"""The states that a replica's texts leave."""

from __future__ import annotations

import threading
from array import array

import pytest
import torch

from mambakit.generation.prefix_snapshot import on_gpu
from mambakit.ops._backends.captured_graph import between_captures
from mambakit.serving.replicas.states import Left
from tests.models.configurations import pair

GPU = pytest.param(
    "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_state_is_copied_while_no_graph_is_captured(device):
    """The engine captures while another thread makes the file: a copy that waits for the device would break it."""
    model = pair("plain")[0].to(device).eval()
    cache = model.backbone.new_cache(1)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]], device=device), cache_params=cache)
    left, found = Left(None, array("q", [1, 2]), [cache], [3, 4]), []
    thread = threading.Thread(target=lambda: found.append(left.state(2, [])))
    with between_captures():
        thread.start()
        thread.join(0.2)
        assert not found
    thread.join(30)
    (state,) = found
    assert (state.seen, list(state.pending), list(state.tokens)) == (3, [4], [1, 2, 3, 4])
    assert not on_gpu(state.tensors)
    for name, tensor in cache.tensors().items():
        assert torch.equal(state.tensors[name], tensor.cpu())
        assert state.tensors[name].data_ptr() != tensor.data_ptr()
