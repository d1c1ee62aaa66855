"""One sequence over 2 and 4 processes: loss and every gradient those of one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mambakit.ops import linear_cross_entropy
from mambakit.training.distributed import context_parallel, sequence_shard, shard_cu_seqlens
from tests.models.configurations import pair, worst
from tests.training.launch import launch

# Summed in another order: a few roundings of the dtype. float32 gradients of A_log and dt_proj sum over many tokens.
TOLERANCE = {"float64": 1e-11, "float32": 2e-4}


def example(name: str, dtype: str, length: int):
    torch.manual_seed(1)
    model = pair(name)[0].to(getattr(torch, dtype)).train()
    ids = torch.randint(1, 61, (2, length + 1))
    return model, ids[:, :-1], ids[:, 1:]


def share(model, ids, targets, count: int, **packed) -> torch.Tensor:
    hidden = model.backbone(ids, **packed).last_hidden_state.flatten(0, 1)
    return linear_cross_entropy(hidden, model.get_output_embeddings().weight, targets.flatten(), num_items=count)


def gradients(model) -> dict[str, np.ndarray]:
    return {name: p.grad.numpy() for name, p in model.named_parameters()}


def spread(name: str, dtype: str, length: int, starts: list[int] | None, checkpointing: bool):
    """This process's share of the loss, and the gradients summed over processes."""
    model, ids, targets = example(name, dtype, length)
    if checkpointing:
        model.gradient_checkpointing_enable()
    context_parallel(model, dist.group.WORLD)
    packed = {}
    if starts is not None:
        ids, targets = ids.reshape(1, -1), targets.reshape(1, -1)
    part = sequence_shard(ids.shape[1], dist.get_rank(), dist.get_world_size())
    if starts is not None:
        packed = {"cu_seqlens": shard_cu_seqlens(torch.tensor(starts), part)}
    loss = share(model, ids[:, part], targets[:, part], targets.numel(), **packed)
    loss.backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    total = loss.detach().clone()
    dist.all_reduce(total)
    model.eval()
    with torch.no_grad():  # evaluation too, where a model would otherwise make a cache
        again = share(model, ids[:, part], targets[:, part], targets.numel(), **packed)
    assert abs(again.item() - loss.item()) < 1e-6
    return total.item(), gradients(model) if dist.get_rank() == 0 else None


CASES = [
    pytest.param(2, "plain", "float64", 37, None, False, id="2"),
    pytest.param(4, "falcon_odd", "float64", 41, None, True, id="4, falcon, activations checkpointed"),
    pytest.param(4, "odd_everything", "float32", 130, None, False, id="4, float32, a window of 5"),
    # 74 tokens: boundaries at 37 (2 processes) or 19, 38, 56 (4). Sequences start or end there, span three, are empty.
    pytest.param(2, "plain", "float64", 37, [0, 5, 37, 73], False, id="2, packed, one starts at the boundary"),
    pytest.param(4, "use_bias", "float64", 37, [0, 3, 18], False, id="4, packed, one over four"),
    pytest.param(4, "plain", "float64", 37, [0, 19, 20, 36, 38, 38, 55], False, id="4, packed, short ones"),
]  # fmt: skip


@pytest.mark.parametrize("world, name, dtype, length, starts, checkpointing", CASES)
def test_the_loss_and_every_gradient_are_one_processes(world, name, dtype, length, starts, checkpointing):
    model, ids, targets = example(name, dtype, length)
    packed = {}
    if starts is not None:
        ids, targets = ids.reshape(1, -1), targets.reshape(1, -1)
        packed = {"cu_seqlens": torch.tensor([*starts, ids.numel()], dtype=torch.int32)}
    loss = share(model, ids, targets, targets.numel(), **packed)
    loss.backward()
    expected = gradients(model)
    results = launch(spread, world, name, dtype, length, starts, checkpointing)
    limit = TOLERANCE[dtype]
    assert all(abs(total - loss.item()) < limit for total, _ in results)
    for parameter, actual in results[0][1].items():
        assert np.abs(expected[parameter]).max() > 0
        error = worst(torch.from_numpy(actual), torch.from_numpy(expected[parameter]))
        assert error < limit, f"{parameter}: {error:.1e}"


def test_earlier_names_still_import():
    from mambakit.training import distributed

    for old, new in distributed._RENAMED.items():
        with pytest.warns(DeprecationWarning, match=f"{old} is now {new}"):
            assert getattr(distributed, old) is getattr(distributed, new)
    with pytest.raises(AttributeError, match="team"):
        _ = distributed.team
