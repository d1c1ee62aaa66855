"""One optimiser step, run eagerly or captured once as a CUDA graph and replayed."""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mambakit.decoding.cuda_graph import CapturedGraph
from mambakit.modules import StateCache
from mambakit.modules.interception import untouched
from mambakit.ops import linear_cross_entropy
from mambakit.ops._backends.memory import PLAIN_TYPES
from mambakit.training.distributed import ProcessMesh, full, shard_cu_seqlens
from mambakit.training.guard import UpdateGuard
from mambakit.training.state_tuning import initial_state_of

_IGNORE = -100


class Objective(nn.Module):
    """The loss of a causal language model as a module: DDP and FSDP hook a module's forward."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.initial = initial_state_of(model)

    def forward(self, tokens: Tensor, targets: Tensor, num_items: Tensor, **inputs: Any) -> Tensor:
        """Loss of tokens against targets, (b, l) int64 both, summed and divided by ``num_items``.

        ``inputs`` are further arguments of the backbone. Each row, or sequence of ``cu_seqlens``, starts from the
        model's learned initial state where it has one.
        """
        if self.initial is not None:
            packed = inputs.get("cu_seqlens")
            inputs["cache_params"] = self.initial.cache(len(tokens) if packed is None else len(packed) - 1)
        hidden = self.model.backbone(tokens, use_cache=False, **inputs).last_hidden_state.flatten(0, 1)
        head, targets = self.model.get_output_embeddings(), targets.flatten().contiguous()
        if untouched(head, nn.Linear) and head.bias is None and type(head.weight) in PLAIN_TYPES:
            return linear_cross_entropy(hidden, head.weight, targets, num_items=num_items)
        return (
            functional.cross_entropy(head(hidden).float(), targets, ignore_index=_IGNORE, reduction="sum") / num_items
        )


class TrainingStep:
    """Forward, backward, clip and update on one batch; returns the loss and the gradient's norm as device tensors.

    Args:
        model: a causal language model, its parameters float32.
        optimizer: a fused one, so that an update can be skipped without a device-to-host synchronisation.
        clip: largest norm of the gradient.
        autocast: "bfloat16" (on CUDA) or "float32": dtype of matrix products.
        respect_documents: keep state from passing between the documents of a row.
        accumulate: micro-batches of a batch, equal in size; the gradient is that of the whole batch.
        ignored_token: a token that is never a target.
        carry_rows: rows of a batch where every row starts from the final state of its predecessor; 0: from zeros.
        spike_factor: see `UpdateGuard`.
        processes: the mesh; one process when absent.
        objective: what `ProcessMesh.parallelize` made of the model's `Objective`, where there are several.
    """

    def __init__(
        self, model: Any, optimizer: torch.optim.Optimizer, clip: float, autocast: str, respect_documents: bool, *,
        accumulate: int = 1, ignored_token: int | None = None, carry_rows: int = 0, spike_factor: float = 0.0,
        processes: ProcessMesh | None = None, objective: nn.Module | None = None,
    ):  # fmt: skip
        self.model, self.optimizer, self.clip = model, optimizer, clip
        self.device = next(model.parameters()).device
        self.half = autocast == "bfloat16" and self.device.type == "cuda"
        self.respect_documents = respect_documents
        self.tunes_state = initial_state_of(model) is not None
        self.accumulate, self.ignored_token = accumulate, ignored_token
        self.guard = UpdateGuard(self.device, spike_factor)
        optimizer.found_inf = self.guard.skip  # type: ignore[attr-defined]  # the fused step's own way to skip
        self.processes = processes or ProcessMesh("none", self.device)
        self.objective = objective or Objective(model)
        self._buckets_built = self.processes.mode != "ddp"
        self._warming_up = False
        parts = accumulate if carry_rows else 0
        rows = carry_rows // self.processes.data_size
        self.carried: list[StateCache] = [model.backbone.new_cache(rows // parts) for _ in range(parts)]

    def autocast(self) -> contextlib.AbstractContextManager:
        # Without the cache of cast weights: it would keep a captured graph's tensors alive between replays.
        return torch.autocast("cuda", torch.bfloat16, cache_enabled=False) if self.half else contextlib.nullcontext()

    def targets(self, rows: Tensor, begins: Tensor) -> Tensor:
        """(b, l) int64: the target of each of a row's first l tokens, -100 for none."""
        targets = rows[:, 1:]
        if self.respect_documents and not self.tunes_state:  # whose documents begin with the end token before them
            targets = targets.masked_fill(begins[:, 1:], _IGNORE)
        if self.ignored_token is not None:
            targets = targets.masked_fill(targets == self.ignored_token, _IGNORE)
        return targets

    def loss(self, rows: Tensor, begins: Tensor) -> Tensor:
        """Mean next-token loss of rows (b, l + 1), () float32, each from a zero state; without a gradient.

        A document's first token is not predicted across its boundary where documents are respected.
        """
        return self.processes.mean(self._share(rows, begins, self._count(rows, begins), None).detach())

    def _count(self, rows: Tensor, begins: Tensor) -> Tensor:
        return (self.targets(rows, begins) != _IGNORE).sum().clamp(min=1)

    def _share(self, rows: Tensor, begins: Tensor, count: Tensor, cache: StateCache | None) -> Tensor:
        """This process's share of a batch's loss, scaled so that the mean over processes is the batch's.

        ``cache`` is the state before this process's rows, and is brought up to date.
        """
        mesh = self.processes
        targets = mesh.rows(self.targets(rows, begins), _IGNORE)
        following = mesh.rows(begins[:, 1:])  # whether the next token begins a document
        tokens, begins = mesh.rows(rows[:, :-1]), mesh.rows(begins[:, :-1])
        inputs: dict[str, Any] = {}
        if mesh.context_size > 1:
            if self.respect_documents:  # rows, too, are sequences of one packed row, cut without regard to them
                begins = begins.clone()
                begins[:, 0] = True
                tokens, targets = tokens.reshape(1, -1), targets.reshape(1, -1)
            part = mesh.sequence_shard(tokens.shape[1])
            tokens, targets = tokens[:, part], targets[:, part]
            if self.respect_documents:
                inputs["cu_seqlens"] = shard_cu_seqlens(begins.flatten().nonzero().squeeze(1), part)
        elif self.respect_documents and self.tunes_state:
            inputs["cu_seqlens"] = _from_end_tokens(following)
            tokens, targets = tokens.reshape(1, -1), targets.reshape(1, -1)
        elif self.respect_documents:
            inputs["position_ids"] = _positions(begins, cache is not None)
        if cache is not None:
            inputs["cache_params"] = cache
        with self.autocast():
            return self.objective(tokens, targets, count / mesh.world, **inputs)

    def run(self, rows: Tensor, begins: Tensor) -> tuple[Tensor, Tensor]:
        """One update from rows (b, l + 1) int64 and (b, l + 1) bool, true where a document begins."""
        self._build_buckets(rows, begins)
        count = self._count(rows, begins)
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for part, (tokens, starts) in enumerate(
            zip(rows.chunk(self.accumulate), begins.chunk(self.accumulate), strict=True)
        ):
            cache = self.carried[part].detach() if self.carried else None
            with self.processes.accumulating(self.objective, last=part == self.accumulate - 1):
                loss = self._share(tokens, starts, count, cache)
                loss.backward()
            total = total + loss.detach()
            if cache is not None:
                self._carry(part, cache)
        norm = full(nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]))
        self.guard.check(norm)
        # The fused optimiser divides by this as it reads the gradients: they are not clipped in a pass of its own.
        self.optimizer.grad_scale = (norm / self.clip).clamp(min=1.0)  # type: ignore[attr-defined]
        if self._warming_up:
            self.guard.skip.fill_(1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self.processes.mean(total), norm

    def warm_up(self, rows: Tensor, begins: Tensor) -> None:
        """A step that changes nothing: compiles the kernels for these shapes and allocates the optimiser's state."""
        guard = {name: value.clone() for name, value in self.guard.state_dict().items()}
        carried = [cache.clone() for cache in self.carried]
        self._warming_up = True
        self.run(rows, begins)
        self._warming_up = False
        self.guard.load_state_dict(guard)
        for part, cache in enumerate(carried):
            self._carry(part, cache)

    def _build_buckets(self, rows: Tensor, begins: Tensor) -> None:
        """One backward pass whose gradient is dropped: after its first one DDP rebuilds its buckets, which changes the
        order of its sums. Without this the first step of a resumed run would differ in the last bits."""
        if not self._buckets_built:
            rows, begins = rows.chunk(self.accumulate)[0], begins.chunk(self.accumulate)[0]
            self._share(rows, begins, self._count(rows, begins), None).backward()
            self.optimizer.zero_grad(set_to_none=True)
            self._buckets_built = True

    def _carry(self, part: int, cache: StateCache) -> None:
        """Keep the final states for the next batch: after the backward pass, and in place, as graphs need."""
        self.carried[part].load_(cache)

    def forget(self, rows: np.ndarray) -> None:
        """Let these rows (batch_size,) bool of the next batch start from a zero state: in place, as graphs need."""
        if not self.carried or not rows.any():
            return
        fresh = torch.from_numpy(rows).to(self.device, non_blocking=True)
        for cache, part in zip(self.carried, fresh.chunk(self.accumulate), strict=True):
            cache.reset(self.processes.rows(part))

    def state_dict(self) -> dict[str, Any]:
        """What an exact continuation needs besides parameters and optimiser."""
        rows = self.processes.gather_rows
        # Of each part the stacked tensors in the specification's order, then the tokens seen.
        carried = [(*(rows(t, 1) for t in c.tensors().values()), c.get_seq_length()) for c in self.carried]
        return {"guard": self.guard.state_dict(), "carried": carried}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.guard.load_state_dict(state["guard"])
        if not self.carried:
            return
        # (layers, rows, ...) of the whole batch: it may be computed in another number of parts now.
        *parts, seen = zip(*state["carried"], strict=True)
        whole = [torch.cat(tensors, 1).chunk(self.accumulate, 1) for tensors in parts]
        for i, cache in enumerate(self.carried):
            mine = [self.processes.rows(chunks[i].transpose(0, 1)).transpose(0, 1) for chunks in whole]
            cache.fill_(dict(zip(cache.tensors(), mine, strict=True)), seen[0])


class CapturedStep:
    """A `TrainingStep` as CUDA graphs over fixed input memory, one for each shape of batch.

    A shape's first call warms the step up, captures it and replays it. No step runs in any other way: a resumed run
    repeats the arithmetic of one that was never stopped.
    """

    _WARM_UPS = 3
    # DDP times its first ten steps with events, which may not be read during a capture.
    _WARM_UPS_OF_DDP = 11

    def __init__(self, step: TrainingStep):
        if step.respect_documents:
            raise ValueError(
                "respect_documents packs rows of changing shapes, which a CUDA graph cannot hold; set cuda_graph=false"
            )
        if not step.processes.capturable:
            raise ValueError(
                f"a step of {step.processes.world} process(es) with parallel={step.processes.mode} and "
                f"context_parallel={step.processes.context_size} cannot be a CUDA graph on {step.device}; set "
                "cuda_graph=false"
            )
        self.step = step
        self.graphs: dict[torch.Size, _Graph] = {}
        self.stream = step.processes.stream or torch.cuda.Stream()
        step.processes.before_closing.append(self.graphs.clear)

    def run(self, rows: Tensor, begins: Tensor) -> tuple[Tensor, Tensor]:
        graph = self.graphs.get(rows.shape)
        if graph is None:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                ddp = self.step.processes.mode == "ddp"
                for _ in range(self._WARM_UPS_OF_DDP if ddp else self._WARM_UPS):
                    self.step.warm_up(rows, begins)
            torch.cuda.current_stream().wait_stream(self.stream)
            graph = self.graphs[rows.shape] = _Graph(self.step, rows, begins, self.stream)
        return graph.replay(rows)


class _Graph:
    """One captured step. Capturing records the work without doing it."""

    def __init__(self, step: TrainingStep, rows: Tensor, begins: Tensor, stream: torch.cuda.Stream):
        self.rows, self.begins = rows.clone(), begins.clone()  # begins is read by no captured work
        # NCCL's watchdog looks at events meanwhile, from a thread of its own: that must not end the capture.
        mode: Literal["thread_local", "global"] = "thread_local" if step.processes.world > 1 else "global"
        self.graph = CapturedGraph(
            lambda: step.run(self.rows, self.begins), step.device, stream=stream, error_mode=mode
        )

    def replay(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        self.rows.copy_(rows)
        self.graph.replay()
        loss, norm = self.graph.result
        return loss.clone(), norm.clone()


def _from_end_tokens(following: Tensor) -> Tensor:
    """(s + 1,) int32: where sequences start in the row of all rows (b, l), one after another: at each row's start, and
    at the end token before each document, from which its first token is predicted."""
    starts = following.clone()
    starts[:, 0] = True
    at = starts.flatten().nonzero().squeeze(1)
    return torch.cat([at, at.new_tensor([following.numel()])]).to(torch.int32)


def _positions(begins: Tensor, continues: bool = False) -> Tensor:
    """Positions (b, l) that restart at 0 where a document begins.

    With ``continues`` a row that begins inside a document starts from a carried state: its first position is not 0.
    """
    index = torch.arange(begins.shape[1], dtype=torch.int64, device=begins.device).expand(begins.shape)
    start = torch.where(begins, index, -1 if continues else 0).cummax(1).values
    return index - start
