"""Context parallelism: one sequence is sharded over processes; the loss and every gradient stay exact.

A layer looks back in two places. The convolution needs the last k - 1 inputs of the previous shard, (b, k - 1, d). The
scan needs the state at the shard's start: every process reduces its shard to the pair (decay, state) of
`sharded_scan.py`, all pairs, (b, d, n) each, are gathered, and every process folds those before its own. No process
waits for another's scan: forward is one scan and one small all-gather, and backward the same in the other direction.
The messages do not grow with the length. On a GPU the first half of the scan computes the pair as well.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mambakit import ops
from mambakit.models.documents import Marks
from mambakit.models.mamba.modeling import MambaModel
from mambakit.models.outputs import CACHE_NAMES
from mambakit.modules import MambaMixer
from mambakit.ops.selective_scan.schema import CHECKPOINT_INTERVAL
from mambakit.training.distributed.sharded_scan import two_phase_scan


def context_parallel(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Make ``model`` read one sequence that is sharded over the processes of ``group``, in the order of their ranks.

    Afterwards all processes of the group call the model together, in the same order, each on its own shard:
    ``input_ids`` (b, l / processes), or the packed row (1, total / processes) with the ``cu_seqlens`` of
    `shard_cu_seqlens`. Shards may differ in length. Losses and gradients are each process's share: their sums over the
    group are those of one process. Shift labels before the sequence is cut: a shard's last token predicts the next
        shard's first.

    Raises (in the model's forward):
        ValueError: attention_mask, position_ids or a cache, or a shard shorter than the convolution's window.
    """
    for module in model.modules():
        if isinstance(module, MambaMixer):
            module.causal_conv1d = functools.partial(causal_conv1d, group=group)
            module.selective_scan = functools.partial(selective_scan, group=group)
        elif isinstance(module, MambaModel):
            module.register_forward_pre_hook(_refuse, with_kwargs=True)


def _refuse(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    for name in ("attention_mask", *CACHE_NAMES, *Marks._fields):
        if name != "cu_seqlens" and kwargs.get(name) is not None:
            raise ValueError(f"a context-parallel model takes no {name}; pack documents and give cu_seqlens instead")
    if kwargs.get("use_cache"):
        raise ValueError(
            "a context-parallel model keeps no cache: its state is sharded over processes; use_cache=False"
        )
    return args, {**kwargs, "use_cache": False}  # eval mode would make one


def sequence_shard(length: int, group_rank: int, group_size: int) -> slice:
    """The tokens of a sequence of ``length`` that a process of the group holds: as even as possible."""
    each, rest = divmod(length, group_size)
    begin = group_rank * each + min(group_rank, rest)
    return slice(begin, begin + each + (group_rank < rest))


def shard_cu_seqlens(starts: Tensor, part: slice) -> Tensor:
    """The cu_seqlens of one shard of a packed row.

    Args:
        starts: (s,) integer, ascending: where sequences start in the whole row.
        part: the shard, as of `sequence_shard`.

    Returns:
        (m + 1,) int32. By convention the first sequence continues that of the previous shard, and the last one
        continues in the next: where a sequence starts at the shard's first token, an empty one precedes it.
    """
    inside = starts[(starts >= part.start) & (starts < part.stop) & (starts > 0)] - part.start
    edges = inside.new_tensor([0, part.stop - part.start])
    return torch.cat([edges[:1], inside, edges[1:]]).to(torch.int32)


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = "silu", *,
    group: dist.ProcessGroup, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`mambakit.ops.causal_conv1d` of a sequence sharded over ``group``; ``x`` (b, l, d) is this process's shard.

    With ``cu_seqlens`` the first sequence continues that of the previous process. ``initial_state`` must be None: it is
    the last inputs of the previous process.
    """
    _no_state("causal_conv1d", initial_state)
    length, reach = x.shape[1], weight.shape[1] - 1
    if length < reach:
        raise ValueError(
            f"a process holds {length} tokens, fewer than the {reach} that the convolution looks back; use fewer "
            "processes "
            "for a sequence, or longer sequences"
        )
    tail = x[:, length - reach :]  # (b, k - 1, d)
    if cu_seqlens is not None:
        tail = (
            tail * (torch.arange(length - reach, length, dtype=torch.int64, device=x.device) >= cu_seqlens[-2])[:, None]
        )
    state = _FromPrevious.apply(tail, group).transpose(1, 2)  # (b, d, k - 1)
    return ops.causal_conv1d(
        x, weight, bias, activation, initial_state=_for_first(state, cu_seqlens), cu_seqlens=cu_seqlens
    )


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, *,
    group: dist.ProcessGroup, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`mambakit.ops.selective_scan` of a sequence that is sharded over ``group``; the inputs are this process's shard.

    With ``cu_seqlens`` the first sequence continues that of the previous process, and the last one continues in the
    next. ``initial_state`` must be None. The final state (of this shard) is a value: no gradient flows through it.
    """
    _no_state("selective_scan", initial_state)
    differentiable = (u, delta, A, B, C, D, z, delta_bias)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable)
    interval = CHECKPOINT_INTERVAL if needs_grad else 0
    return _Scan.apply(u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, interval, group)


class _FromPrevious(torch.autograd.Function):
    """The previous process's tensor, zeros at the first; backward, the next process's gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        rank = dist.get_rank(group)
        gathered = _gather(x, group)
        return gathered[rank - 1] if rank else torch.zeros_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        after = dist.get_rank(ctx.group) + 1
        gathered = _gather(grad, ctx.group)
        return gathered[after] if after < gathered.shape[0] else torch.zeros_like(grad), None


class _Scan(torch.autograd.Function):
    """The scan of a shard. Its initial state, and the gradient of its final state, come from the other processes."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, interval, group):
        part = two_phase_scan(u, A)[0](u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, interval)
        decays, states = _gather(torch.stack([part.decay, part.state]), group).unbind(1)  # (processes, b, d, n) each
        entering = torch.zeros_like(part.state)
        for before in range(dist.get_rank(group)):
            entering = states[before] + decays[before] * entering
        initial = _for_first(entering, cu_seqlens)
        y, final, checkpoints = part.finish(initial)
        ctx.save_for_backward(
            u, delta, A, B, C, D, z, delta_bias, initial, cu_seqlens, checkpoints, decays
        )  # fmt: skip
        ctx.delta_softplus, ctx.interval, ctx.group = delta_softplus, interval, group
        ctx.mark_non_differentiable(final)
        return y, final

    @staticmethod
    def backward(ctx, dy: Tensor, _):
        u, delta, A, B, C, D, z, delta_bias, initial, cu_seqlens, checkpoints, decays = ctx.saved_tensors
        part = two_phase_scan(u, A)[1](
            dy, u, delta, A, B, C, D, z, delta_bias, ctx.delta_softplus, initial, cu_seqlens, checkpoints, ctx.interval
        )  # fmt: skip
        gradients = _gather(part.gradient, ctx.group)  # (processes, b, d, n)
        arriving = torch.zeros_like(part.gradient)
        for after in range(gradients.shape[0] - 1, dist.get_rank(ctx.group), -1):
            arriving = gradients[after] + decays[after] * arriving
        if cu_seqlens is not None:  # of the last sequence only
            arriving = torch.cat([torch.zeros_like(initial[:-1]), arriving])
        du, ddelta, dA, dB, dC, dD, dz, dbias, _ = part.finish(arriving)
        present = lambda x, grad: None if x is None else grad  # noqa: E731
        return du, ddelta, dA, dB, dC, present(D, dD), present(z, dz), present(delta_bias, dbias), *(None,) * 4


def _for_first(state: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """A state for every row; when packed, (1, ...) -> (s, ...): the first sequence's, and zeros."""
    if cu_seqlens is None:
        return state
    return torch.cat([state, state.new_zeros(cu_seqlens.shape[0] - 2, *state.shape[1:])])


def _gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(...) of every process -> (processes, ...)."""
    x = x.contiguous()
    gathered = x.new_empty(dist.get_world_size(group), *x.shape)
    dist.all_gather(list(gathered.unbind(0)), x, group=group)
    return gathered


def _no_state(op: str, initial_state: Tensor | None) -> None:
    if initial_state is not None:
        raise ValueError(
            f"{op} over processes takes no initial_state: it comes from the previous process; drop the cache"
        )
